# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of grids of noise levels and of samplers of few steps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.flow import process
from dd_jax.ops import mixture

LEVELS = (999, 749, 499, 249)


def test_levels_are_those_of_the_papers():
  grid = process.ve(0.5)
  np.testing.assert_allclose(
      grid.sigma[[0, 20, 100, 250, 500, 750, 900, 980, 999]],
      [0.0020, 0.00323, 0.01675, 0.1703, 2.5265, 17.617, 45.556, 72.054, 80],
      rtol=2e-3,
  )
  np.testing.assert_array_equal(grid.told, grid.sigma)
  np.testing.assert_allclose(
      grid.weight, 1 / grid.sigma.astype(np.float64) ** 2 + 4, rtol=1e-5
  )
  assert grid.weight.dtype == np.float32
  grid = process.vp()
  np.testing.assert_allclose(
      grid.alpha[[0, 20, 249, 499, 980, 999]] ** 2,
      [0.99915, 0.98131, 0.67543, 0.27767, 0.0058438, 0.0046601], rtol=1e-4,
  )
  np.testing.assert_allclose(grid.alpha**2 + grid.sigma**2, 1, rtol=1e-5)
  assert grid.told[249] == 249 and grid.start[999] == 1


def exact(x, sigma):
  means = jnp.asarray([[-1.0, 0.5], [0.7, -0.2], [0.3, 1.0]])
  return mixture.posterior_mean(x, sigma, means, jnp.log(jnp.ones(3) / 3), 0.2)


def test_both_grids_give_the_same_data_of_the_same_state():
  # The noise that an exact network of VP states predicts, of a mixture.
  grid = process.vp()

  def network(params, x, time, condition):
    del params, condition
    alpha = jnp.asarray(grid.alpha)[time.astype(jnp.int32)][:, None]
    sigma = jnp.asarray(grid.sigma)[time.astype(jnp.int32)][:, None]
    x0 = exact(x / alpha, (sigma / alpha)[:, 0])
    return (x - alpha * x0) / sigma

  place = jnp.asarray([0, 100, 399, 749])
  rng = np.random.default_rng(0)
  x0, noise = rng.normal(size=(2, 4, 2)).astype(np.float32)
  x = grid.diffuse(x0, noise, place)
  alpha, sigma = grid.alpha[place], grid.sigma[place]
  want = exact(x / alpha[:, None], sigma / alpha)
  found = grid.denoise(network, {}, x, place, None)
  np.testing.assert_allclose(found, want, atol=1e-5)
  # The weight makes errors of x0 those of the noise.
  made = network({}, x, grid.level(place), None)
  np.testing.assert_allclose(
      grid.error(found, x0, place), np.square(made - noise).mean(-1),
      rtol=1e-3,
  )


@pytest.mark.parametrize('grid', [process.ve(0.5), process.vp()])
def test_a_later_step_sees_the_one_before(grid):
  shape = (3, 2)
  noises = jnp.asarray(
      np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32
  )

  def tagged(x, place):
    return jnp.broadcast_to(place[:, None] / 100.0, x.shape)

  def fresh(k):
    return noises[k]

  run = jax.jit(
      lambda k: grid.input_of_step(tagged, LEVELS, k, noises[0], fresh)
  )
  # Noise alone, not what is left of data at that level.
  np.testing.assert_array_equal(run(0), grid.start[999] * noises[0])
  for k in (1, 2, 3):
    want = (
        grid.alpha[LEVELS[k]] * LEVELS[k - 1] / 100
        + grid.sigma[LEVELS[k]] * noises[k]
    )
    np.testing.assert_allclose(run(k), want, rtol=1e-5)
  seen = []

  def last(x, place):
    seen.append((x, place))
    return tagged(x, place)

  found = grid.sample(last, LEVELS, noises[0], fresh)
  np.testing.assert_allclose(found, np.full(shape, 2.49), rtol=1e-6)
  np.testing.assert_allclose(seen[-1][0], run(3), rtol=1e-5)


def test_guidance_is_one_call_of_both_conditions():
  calls = []

  def network(params, x, level, condition):
    calls.append((x.shape, condition))
    return params * x + condition[:, None].astype(jnp.float32)

  x, level = jnp.ones((2, 3)), jnp.ones(2)
  labels = jnp.asarray([1, 2])
  assert process.guided(network, 1, 10) is network
  found = process.guided(network, 3, 10)(0.5, x, level, labels)
  ((shape, condition),) = calls
  assert shape == (4, 3)
  np.testing.assert_array_equal(condition, [10, 10, 1, 2])
  np.testing.assert_allclose(found[:, 0], [10.5 - 27, 10.5 - 24])
  captions = {'features': jnp.ones((2, 3, 4)), 'mask': jnp.ones((2, 3), bool)}
  assert not process.nothing(captions, 0)['features'].any()
