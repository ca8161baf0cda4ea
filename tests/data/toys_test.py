# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the points of the plane."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import registry
from dd_jax.data import toys
from dd_jax.ops import mixture


def test_the_board():
  board = toys.checkerboard()
  assert board.means.shape == (8, 2) and board.std == 0.06
  assert np.abs(board.means).max() == 1
  gaps = np.linalg.norm(board.means[:, None] - board.means[None], axis=-1)
  np.testing.assert_allclose(
      gaps[gaps > 0].min(), np.sqrt(2) * 2 / 3, rtol=1e-6
  )
  np.testing.assert_allclose(board.sigma_data, 0.748, atol=1e-3)


def test_source():
  train = registry.get('sources', 'toy2d')(split='train')
  heldout = toys.toy2d('heldout', count=500)
  assert len(train) == 20_000 and len(heldout) == 500
  points, label = train.arrays['image'], train.arrays['label']
  assert points.dtype == np.float32 and label.dtype == np.int32
  assert not {*map(tuple, heldout.arrays['image'])} & {*map(tuple, points)}
  np.testing.assert_array_equal(
      toys.toy2d('train').arrays['image'], points
  )
  board = toys.checkerboard()
  for i, mean in enumerate(board.means):
    own = points[label == i]
    assert abs(len(own) - 2500) < 250
    np.testing.assert_allclose(own.mean(0), mean, atol=0.01)
    np.testing.assert_allclose(np.cov(own.T), np.eye(2) * 0.0036, atol=4e-4)
  with pytest.raises(ValueError, match='split'):
    toys.toy2d('test')


@pytest.mark.parametrize('sigma', [0.0, 0.1, 3.0])
def test_densities_agree_with_those_of_jax(sigma):
  board = toys.checkerboard()
  x = np.random.default_rng(0).uniform(-1.2, 1.2, (30, 2))
  levels = jnp.full((30,), sigma)
  weights = jnp.full((8,), -np.log(8))

  def log_density(x):
    return mixture.log_density(
        x, levels, board.means.astype(np.float32), weights, board.std
    )

  x32 = x.astype(np.float32)
  value, score = jax.jit(lambda x: (
      log_density(x), jax.grad(lambda x: log_density(x).sum())(x)
  ))(x32)
  np.testing.assert_allclose(
      board.log_density(x, sigma), value, rtol=1e-4, atol=1e-3
  )
  np.testing.assert_allclose(
      board.score(x, sigma), score, rtol=1e-3, atol=1e-3 * np.abs(score).max()
  )
  np.testing.assert_allclose(
      board.denoise(x, sigma), x + sigma**2 * board.score(x, sigma)
  )
