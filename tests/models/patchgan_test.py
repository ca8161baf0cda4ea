# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the discriminator of patches."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dd_jax import build
from tests import released_files

TINY = dict(
    name='patchgan', image_size=14, image_channels=1, ch=2, halvings=2
)


def convolve(x, layer, stride):
  """Windows of 4x4 pixels of a map with a frame of zeros."""
  x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  windows = np.lib.stride_tricks.sliding_window_view(x, (4, 4), axis=(1, 2))
  return np.einsum(
      'bhwcij,ijcd->bhwd', windows[:, ::stride, ::stride], layer['kernel']
  ) + layer['bias']


def normalize(x, layer):
  """Every channel of every example: there are fewer than 32 of them."""
  x = x - x.mean(axis=(1, 2), keepdims=True)
  x /= np.sqrt(np.square(x).mean(axis=(1, 2), keepdims=True) + 1e-6)
  return x * layer['scale'] + layer['bias']


def leak(x):
  return np.where(x < 0, 0.2 * x, x)


def test_logits_are_what_the_definition_says():
  model = build.build_model(TINY)
  params = released_files.random(model, 0)
  image = np.random.default_rng(1).normal(size=(3, 14, 14, 1))
  x = leak(convolve(image, params['conv_0'], 2))
  x = leak(normalize(convolve(x, params['conv_1'], 2), params['norm_1']))
  x = leak(normalize(convolve(x, params['conv_2'], 1), params['norm_2']))
  want = convolve(x, params['out'], 1).reshape(3, -1)
  assert want.shape == (3, 1)
  got = jax.jit(model.apply)(params, image.astype(np.float32))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_sizes_of_llamagen():
  model = build.build_model(dict(name='patchgan', image_size=256))
  shapes = model.abstract()
  assert [shapes[f'conv_{i}']['kernel'].shape for i in range(4)] == [
      (4, 4, 3, 64), (4, 4, 64, 128), (4, 4, 128, 256), (4, 4, 256, 512)
  ]
  # The original's, and a bias before each of its normalisations.
  sizes = [x.size for x in jax.tree.leaves(shapes)]
  assert sum(sizes) == 2_765_633 + 128 + 256 + 512
  image = jax.ShapeDtypeStruct((2, 256, 256, 3), np.float32)
  assert jax.eval_shape(model.apply, shapes, image).shape == (2, 30 * 30)


@pytest.mark.parametrize('fields, message', [
    (dict(image_size=8), 'halvings=3 leave 1 of image_size=8 pixels'),
    (dict(halvings=0), 'must be at least 1'),
    (dict(width=3), 'width'),
])
def test_settings_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    build.build_model(dict(TINY, **({'halvings': 3} | fields)))
