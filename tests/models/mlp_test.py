# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the MLP denoiser and of the exact one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dd_jax.data import toys
from dd_jax.models.mlp import exact, model
from tests import released_files


@pytest.mark.parametrize('shape, classes', [((2,), 0), ((8, 8, 1), 10)])
def test_functions(shape, classes):
  net = model.build({
      'shape': shape, 'num_classes': classes, 'width': 16, 'blocks': 3
  })
  params = released_files.random(net, 0)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(4, *shape)).astype(np.float32)
  sigma = np.array([0.001, 0.5, 3, 50], np.float32)
  labels = np.array([0, 1, 2, classes], np.int32)
  found = jax.jit(net.apply)(params, x, sigma, labels)
  assert found.shape == x.shape and found.dtype == np.float32
  # Almost no noise: the data are what is seen.
  np.testing.assert_allclose(found[0], x[0], atol=0.1)
  features = jax.jit(net.fns['features'])(params, x, sigma, labels)
  assert features.shape == (4, 16)
  other = jax.jit(net.apply)(params, x, sigma, labels[::-1].copy())
  assert (np.abs(other - found).max() > 1e-4) == bool(classes)
  assert net.flops() > 0
  assert jax.tree.structure(
      jax.tree.map(lambda a: 0, net.axes(), is_leaf=lambda a: type(a) is tuple)
  ) == jax.tree.structure(net.abstract())


def test_features_lead_to_the_output():
  """Half of the blocks: a change of the other half leaves them alone."""
  net = model.build({'width': 8, 'blocks': 4})
  params = released_files.random(net, 0)
  x, sigma = np.ones((2, 2), np.float32), np.ones(2, np.float32)
  labels = np.zeros(2, np.int32)

  def features(params):
    return net.fns['features'](params, x, sigma, labels)

  grads = jax.jit(jax.grad(lambda p: features(p).sum()))(params)
  moved = {
      k for k, v in grads.items()
      if any(np.abs(g).max() > 0 for g in jax.tree.leaves(v))
  }
  assert moved == {'condition', 'in', 'block_0', 'block_1'}


def test_errors():
  for fields in ({'width': 1}, {'blocks': 1}, {'shape': [0]},
                 {'num_classes': -1}, {'sigma_data': 0.0}):
    with pytest.raises(ValueError, match=next(iter(fields)).split('_')[0]):
      model.build(fields)


def test_exact_denoiser():
  board = toys.checkerboard()
  net = exact.build({'means': board.means.tolist(), 'std': board.std})
  params = net.init(jax.random.key(0))
  x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
  for sigma in (0.05, 1.0):
    found = jax.jit(net.apply)(
        params, x, np.full(5, sigma, np.float32), np.zeros(5, np.int32)
    )
    np.testing.assert_allclose(found, board.denoise(x, sigma), atol=1e-4)
  with pytest.raises(ValueError, match='means'):
    exact.build({'means': [[1.0], [1.0, 2.0]], 'std': 1.0})
  with pytest.raises(ValueError, match='std'):
    exact.build({'means': [[1.0]], 'std': 0.0})
