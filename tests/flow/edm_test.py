# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of Gaussian diffusion: grids, conversions, and the flow of Heun."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.flow import edm
from dd_jax.ops import mixture
from dd_jax.ops.preconditioning import scalings


def test_grid_has_the_published_levels():
  grid = edm.karras_sigmas(1000)
  assert grid.dtype == np.float32 and (np.diff(grid) > 0).all()
  for index, value in {
      0: 0.0020, 20: 0.00323, 100: 0.01675, 250: 0.1703, 500: 2.5265,
      750: 17.617, 900: 45.556, 980: 72.054, 999: 80.0,
  }.items():
    np.testing.assert_allclose(grid[index], value, rtol=2e-3, err_msg=index)
  steps = edm.sampling_sigmas(6, sigma_max=10.0)
  assert len(steps) == 7 and steps[-1] == 0 and (np.diff(steps) < 0).all()
  np.testing.assert_allclose(steps[[0, 5]], [10, 0.002], rtol=1e-6)
  for bad in (dict(count=1), dict(count=5, sigma_min=0.0),
              dict(count=5, sigma_min=90.0)):
    with pytest.raises(ValueError, match='sigma_min'):
      edm.karras_sigmas(**bad)


def test_vp_has_the_published_levels():
  bars = edm.alpha_bars()
  for index, value in {
      0: 0.99915, 20: 0.98131, 249: 0.67543, 399: 0.42609, 499: 0.27767,
      749: 0.056623, 980: 0.0058438, 999: 0.0046601,
  }.items():
    np.testing.assert_allclose(bars[index], value, rtol=2e-5, err_msg=index)


def test_levels_and_indices_are_inverse():
  for grid in (
      edm.karras_sigmas(1000), edm.ve_sigma(*edm.vp_levels(edm.alpha_bars()))
  ):
    index = jnp.array([0.0, 0.25, 17.0, 500.5, 999.0])
    sigma = edm.sigma_of_index(index, grid)
    np.testing.assert_allclose(sigma[2], grid[17], rtol=1e-5)
    np.testing.assert_allclose(
        edm.index_of_sigma(sigma, grid), index, rtol=1e-4, atol=2e-3
    )
    ends = edm.index_of_sigma(jnp.array([1e-6, 1e6]), grid)
    np.testing.assert_array_equal(ends, [0, 999])
  alpha, sigma = edm.vp_levels(edm.alpha_bars()[[0, 300, 999]])
  again = edm.vp_of_ve(edm.ve_sigma(alpha, sigma))
  np.testing.assert_allclose(again, (alpha, sigma), rtol=1e-5)


LEVELS = {
    'VE': (1.0, np.array([0.01, 0.7, 80], np.float32)),
    'VP': edm.vp_levels(edm.alpha_bars()[[0, 300, 999]]),
    'flow': (0.25, 0.75),
}


@pytest.mark.parametrize('kind', LEVELS)
def test_conversions_are_inverse(kind):
  levels = LEVELS[kind]
  rng = np.random.default_rng(0)
  x0, epsilon = jnp.asarray(rng.normal(size=(2, 3, 4, 4, 2)), jnp.float32)
  x = edm.diffuse(x0, epsilon, *levels)
  alpha, sigma = (np.reshape(v, (-1, 1, 1, 1)) for v in levels)

  def close(a, b, scale=1.0):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.max(scale))

  # Small noise beside the data, and small data beside the noise, lose digits.
  close(edm.x0_of_epsilon(x, epsilon, *levels), x0, 1 + sigma / alpha)
  close(edm.epsilon_of_x0(x, x0, *levels), epsilon, 1 + alpha / sigma)
  v = alpha * epsilon - sigma * x0
  close(edm.x0_of_v(x, v, *levels), x0)
  close(edm.v_of_x0(x, x0, *levels), v, 1 + alpha / sigma)
  score = edm.score_of_x0(x, x0, *levels)
  close(score, -epsilon / sigma, 1 / np.square(sigma) * (1 + alpha))
  close(edm.x0_of_score(x, score, *levels), x0, 1 + sigma / alpha)


MEANS = np.array([[1.0, -0.5], [-1.0, 0.25], [0.0, 2.0]], np.float32)
LOG_WEIGHTS = np.log(np.array([0.5, 0.2, 0.3], np.float32))


def denoise(x, sigma):
  return mixture.posterior_mean(x, sigma, MEANS, LOG_WEIGHTS, 0.3)


@pytest.mark.parametrize('sigma', [0.05, 0.6, 5.0])
def test_score_of_a_mixture(sigma):
  x = np.random.default_rng(1).normal(size=(20, 2)).astype(np.float32)
  levels = jnp.full((20,), sigma)

  def total(x):
    return mixture.log_density(x, levels, MEANS, LOG_WEIGHTS, 0.3).sum()

  score, expected = jax.jit(lambda x: (
      edm.score_of_x0(x, denoise(x, levels), 1.0, levels), jax.grad(total)(x),
  ))(x)
  np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-3)


def test_vp_and_ve_agree_on_a_mixture():
  """x0 from VP's noise prediction is EDM's denoiser of x / alpha."""
  alpha, sigma = edm.vp_levels(edm.alpha_bars()[[100, 500, 900]])
  x = np.random.default_rng(2).normal(size=(3, 2)).astype(np.float32)

  def log_density(x):  # of the VP state itself
    parts = [
        LOG_WEIGHTS[k] - 0.5 * jnp.square(
            x - alpha[:, None] * MEANS[k][None]
        ).sum(-1, keepdims=True) / (sigma**2 + (0.3 * alpha) ** 2)[:, None]
        for k in range(3)
    ]
    return jax.nn.logsumexp(jnp.concatenate(parts, -1), -1).sum()

  epsilon = -sigma[:, None] * jax.jit(jax.grad(log_density))(x)
  np.testing.assert_allclose(
      edm.x0_of_epsilon(x, epsilon, alpha, sigma),
      denoise(x / alpha[:, None], edm.ve_sigma(alpha, sigma)), atol=1e-5,
  )


def test_heun_follows_the_flow_of_a_gaussian_to_second_order():
  std = 0.7

  def denoise(x, sigma):
    return x * (std**2 / (std**2 + sigma**2))[:, None]

  x = np.random.default_rng(3).normal(size=(4, 3)).astype(np.float32)

  def error(steps, last):
    sigmas = np.geomspace(5, last, steps + 1)
    exact = x * np.sqrt((std**2 + last**2) / (std**2 + 5**2))
    return np.abs(edm.heun(denoise, x, sigmas) - exact).max()

  errors = [error(n, 0.5) for n in (4, 8, 16)]
  assert errors[0] / errors[1] > 3 and errors[1] / errors[2] > 3
  assert errors[2] < 1e-2
  # Down to zero, by EDM's levels.
  exact = x * std / np.sqrt(std**2 + 80**2)
  coarse, fine = (
      np.abs(edm.heun(denoise, x, edm.sampling_sigmas(n)) / exact - 1).max()
      for n in (40, 80)
  )
  assert fine < 4e-3 and coarse / fine > 3


def test_heun_calls_twice_per_step_but_the_last():
  calls = []

  def denoise(x, sigma):
    jax.debug.callback(lambda s: calls.append(float(s[0])), sigma)
    return jnp.zeros_like(x)

  x = jnp.ones((2, 3))
  found = edm.heun(denoise, x, edm.sampling_sigmas(5))
  jax.effects_barrier()
  assert len(calls) == 9
  np.testing.assert_allclose(found, 0, atol=1e-6)


def test_loss_weight_is_that_of_the_network_output():
  sigma = jnp.geomspace(0.002, 80, 7)
  for sigma_data in (0.5, 0.748):
    np.testing.assert_allclose(
        edm.loss_weight(sigma, sigma_data),
        1 / scalings(sigma, sigma_data).out ** 2, rtol=1e-5,
    )
