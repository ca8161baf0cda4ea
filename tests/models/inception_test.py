# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the Inception network: golden parity, pools, table, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.models.inception import convert, model
from tests.golden import golden_cases

SLIM = {'image_size': 75, 'slim': 16}


@functools.cache
def slim():
  """A narrow network with weights of ordinary size."""
  built = model.build(SLIM)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      values /= np.sqrt(np.prod(leaf.shape[:-1]) / 2)
    elif path[-1].key in ('var', 'scale'):
      values = 1 + 0.1 * np.abs(values)
    else:
      values *= 0.1
    return jnp.asarray(values, jnp.float32)

  return built, jax.tree_util.tree_map_with_path(draw, built.abstract())


def image(size, batch=2):
  rng = np.random.default_rng(size)
  return rng.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)


def test_golden():
  case = golden_cases.load('inception_fid')
  built = model.build({})
  params = table.convert(convert.TABLE, case.tensors(), built.abstract())
  x = case.uniform('image', 2, 3, 64, 64).transpose(0, 2, 3, 1)
  taps = jax.jit(built.fns['taps'])(params, x)
  assert [t.shape[-1] for t in taps.values()] == [64, 192, 768, 2048]
  maps = {k: taps[k].transpose(0, 3, 1, 2) for k in (192, 768)}
  for name, found in (
      ('block1', maps[192][:, ::16, ::8, ::8]),
      ('mixed6e', maps[768][:, ::32, ::4, ::4]),
      ('pool3', taps[2048]),
  ):
    expected = case.arrays[name]
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(),
        err_msg=name,
    )


def test_table_is_total_and_bijective():
  built, params = slim()
  tensors = table.invert(convert.TABLE, params)
  names = golden_cases.load('inception_fid').meta['params']
  assert set(tensors) == set(names)
  counters = {
      name.replace('running_var', 'num_batches_tracked'): np.zeros(())
      for name in tensors if name.endswith('running_var')
  }
  assert len(counters) == len(convert.IGNORE) == 94
  back = table.convert(
      convert.TABLE, tensors | counters, built.abstract(),
      ignore=convert.IGNORE,
  )
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_family_tells_the_size():
  _, params = slim()
  tensors = table.invert(convert.TABLE, params)
  assert convert.INCEPTION.fits(tensors)
  assert convert.INCEPTION.infer(tensors, {}) == {'slim': 16}


def test_functions_agree():
  built, params = slim()
  x = image(75)
  found = jax.jit(lambda p, x: {n: f(p, x) for n, f in built.fns.items()})(
      params, x
  )
  features, scores = found['features_and_scores']
  np.testing.assert_array_equal(features, found['features'])
  np.testing.assert_array_equal(features, found['taps'][2048])
  np.testing.assert_allclose(
      scores + params['logits']['bias'][None], found['forward'], atol=1e-5
  )
  assert np.std(features, axis=0).max() > 0


def test_images_are_resized_without_antialiasing():
  """One pixel in two of a fine image counts, as where PyTorch shrinks it."""
  built, params = slim()
  features = jax.jit(built.fns['features'])
  x = image(75)
  fine = np.repeat(np.repeat(x, 3, axis=1), 3, axis=2)
  noisy = fine + image(225) * 0.5
  noisy[:, 1::3, 1::3] = x  # the only pixels that are looked at
  np.testing.assert_allclose(
      features(params, noisy), features(params, x), rtol=1e-4, atol=1e-5
  )


def test_mean_leaves_the_border_out_of_its_count():
  ones = jnp.ones((1, 4, 5, 2))
  np.testing.assert_allclose(model._mean_same(ones), ones, rtol=1e-6)


def test_last_block_takes_maxima():
  """Its pooled branch grows with the largest pixel, not with the mean."""
  x = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2].set(9.0)
  pooled = model._max_same(x)
  np.testing.assert_array_equal(pooled[0, 1:4, 1:4, 0], 9.0)
  pools = [
      branch[0] for stage in model._STAGES for step in stage
      if getattr(step, 'name', '') in ('mixed_7b', 'mixed_7c')
      for branch in step.branches if callable(branch[0])
  ]
  assert pools == [model._mean_same, model._max_same]


def test_axes_name_every_dimension():
  built, _ = slim()
  ranks = jax.tree.map(lambda x: x.ndim, built.abstract())
  names = jax.tree.map(
      len, built.axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert names == ranks


def test_published_size():
  built = model.build({})
  sizes = jax.tree.leaves(jax.tree.map(lambda x: x.size, built.abstract()))
  # 94 convolutions with four vectors each, and the classifier.
  assert len(sizes) == 94 * 5 + 2
  assert sum(sizes) == 23_885_392
  assert 11.3e9 < built.flops() < 11.5e9  # 5.7 billion multiply-adds


@pytest.mark.parametrize('change, message', [
    ({'image_size': 64}, 'image_size is 64.*at least 75'),
    ({'slim': 3}, 'slim is 3'),
    ({'classes': 1000}, "unknown field 'classes'"),
])
def test_bad_fields_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    model.build(change)
