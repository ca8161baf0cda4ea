# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the tokenizers' training; its steps are tested by mesh."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build
from dd_jax.method import Role
from dd_jax.methods.vqvae import Config, TrainVQVAE

VQVAE = dict(
    name='vqvae', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, vocab_size=16, patch_nums=[1, 2, 4],
)
LLAMAGEN = dict(
    name='llamagen_vq', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, code_dim=4, vocab_size=16,
)


def method(model=VQVAE, **fields):
  tokenizer = build.build_model(model)
  role = Role(tokenizer, None, lambda key, _: tokenizer.init(key))
  return TrainVQVAE(Config(**fields), {'tokenizer': role}, {})


@functools.cache
def seen(share, patch_nums=(1, 2, 4)):
  """What a step says of pixels, and pixels by the number of scales."""
  made = method(VQVAE | {'patch_nums': patch_nums}, scale_dropout=share)
  model = made.roles['tokenizer'].model
  params = model.init(jax.random.key(0))
  # Codes as large as the latents, so that every scale is seen in the images.
  params['embedding'] = 0.5 * jax.random.normal(
      jax.random.key(1), params['embedding'].shape
  )
  image = jax.random.uniform(
      jax.random.key(2), (64, 8, 8, 1), minval=-1, maxval=1
  )
  inputs = SimpleNamespace(
      batch={'image': image}, keys=jax.random.split(jax.random.key(3), 64),
      frozen={}, aux=made.init_aux(),
  )
  metrics = jax.jit(lambda p: made.loss(p, inputs).metrics)(params)
  codes = model.fns['codes'](params, model.fns['to_indices'](params, image))
  position = jnp.arange(codes.shape[1])[:, None]
  pixels = []
  for stop in model.config.offsets[1:]:
    kept = jnp.where(position < stop, codes, 0)
    decoded = model.fns['decode'](params, model.fns['accumulate'](params, kept))
    pixels.append(np.square(decoded - image).mean())
  return float(metrics['pixels']), pixels


def test_all_scales_are_decoded_without_dropout():
  found, by_scales = seen(0.0)
  np.testing.assert_allclose(found, by_scales[-1], rtol=1e-4)


def test_a_dropped_scale_is_not_decoded():
  found, by_scales = seen(1.0, (1, 4))
  np.testing.assert_allclose(found, by_scales[0], rtol=1e-4)
  assert abs(by_scales[0] - by_scales[1]) > 1e-2 * by_scales[1]


def test_images_end_at_any_scale():
  draw = jax.vmap(method(scale_dropout=0.6)._draw_scales)
  scales = draw(jax.random.split(jax.random.key(0), 20_000))
  share = np.bincount(scales, minlength=5)[1:] / len(scales)
  np.testing.assert_allclose(share, [0.3, 0.3, 0.4, 0], atol=0.015)


@pytest.mark.parametrize('model, share, message', [
    (VQVAE, 1.5, r'scale_dropout=1.5: expected a share in \[0, 1\]'),
    (VQVAE, -0.1, 'scale_dropout=-0.1'),
    (LLAMAGEN, 0.1, 'this llamagen_vq has no scales to leave out'),
    (VQVAE | {'patch_nums': [4]}, 0.1, 'this vqvae has no scales'),
])
def test_settings_that_do_not_fit(model, share, message):
  with pytest.raises(ValueError, match=message):
    method(model, scale_dropout=share)
