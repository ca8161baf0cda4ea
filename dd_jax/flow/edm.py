# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Gaussian diffusion: noise levels, what networks predict, and its flow.

A state is x = alpha * x0 + sigma * epsilon with standard normal epsilon.
Variance exploding (VE, that of EDM) has alpha = 1; variance preserving (VP,
that of DDPM) has alpha^2 + sigma^2 = 1. Functions of a state take alpha and
sigma as scalars or as one value per example, (B,).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Level = jax.Array | np.ndarray | float


def karras_sigmas(
    count: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0,
    rho: float = 7.0,
) -> np.ndarray:
  """Noise levels evenly spaced in sigma^(1/rho), ascending.

  `karras_sigmas(1000)` is the grid that DMD2 draws levels from: index 0 has the
  smallest (DMD2, ImageNet-64).

  Returns:
    (count,) float32 from `sigma_min` to `sigma_max`.

  Raises:
    ValueError: fewer than two levels, or bounds that are not 0 < min < max.

  Source: EDM (arXiv 2206.00364), eq. 5.
  """
  if count < 2 or not 0 < sigma_min < sigma_max:
    raise ValueError(
        f'count={count}, sigma_min={sigma_min}, sigma_max={sigma_max}: there '
        'must be at least 2 levels and 0 < sigma_min < sigma_max'
    )
  ends = np.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), count)
  return (ends**rho).astype(np.float32)


def sampling_sigmas(steps: int, **bounds: float) -> np.ndarray:
  """Levels that a sampler visits: `karras_sigmas` descending, then 0.

  Returns:
    (steps + 1,) float32.
  """
  return np.append(karras_sigmas(steps, **bounds)[::-1], np.float32(0))


def alpha_bars(
    count: int = 1000, *, start: float = 0.00085, end: float = 0.012
) -> np.ndarray:
  """alpha^2 of a VP diffusion whose sqrt(beta) is linear, descending.

  Index t is the time; `alpha, sigma = vp_levels(alpha_bars()[t])`. The defaults
  are those of Stable Diffusion.

  Returns:
    (count,) float32.
  """
  betas = np.linspace(start**0.5, end**0.5, count) ** 2
  return np.cumprod(1 - betas).astype(np.float32)


def vp_levels(alpha_bar: Level) -> tuple[jax.Array, jax.Array]:
  """alpha and sigma of a VP state from alpha^2."""
  alpha_bar = jnp.asarray(alpha_bar, jnp.float32)
  return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def ve_sigma(alpha: Level, sigma: Level) -> jax.Array:
  """The level of the VE state x / alpha."""
  return jnp.asarray(sigma, jnp.float32) / alpha


def vp_of_ve(sigma: Level) -> tuple[jax.Array, jax.Array]:
  """alpha and sigma of the VP state alpha * x, from the VE level of x."""
  alpha = jax.lax.rsqrt(1 + jnp.square(jnp.asarray(sigma, jnp.float32)))
  return alpha, alpha * sigma


def index_of_sigma(sigma: Level, grid: Level) -> jax.Array:
  """The place of levels in a grid, linear in log sigma between entries.

  Args:
    sigma: VE levels > 0; those beyond the grid get its ends.
    grid: (N,) ascending VE levels, such as `karras_sigmas(1000)` or
      `ve_sigma(*vp_levels(alpha_bars()))`.

  Returns:
    float32 in [0, N - 1].
  """
  grid = jnp.asarray(grid, jnp.float32)
  place = jnp.arange(grid.size, dtype=jnp.float32)
  return jnp.interp(jnp.log(sigma), jnp.log(grid), place)


def sigma_of_index(index: Level, grid: Level) -> jax.Array:
  """Inverse of `index_of_sigma` within the grid."""
  grid = jnp.asarray(grid, jnp.float32)
  place = jnp.arange(grid.size, dtype=jnp.float32)
  return jnp.exp(jnp.interp(index, place, jnp.log(grid)))


def diffuse(
    x0: jax.Array, epsilon: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """alpha * x0 + sigma * epsilon; arrays have a leading axis of examples."""
  return _over(alpha, x0) * x0 + _over(sigma, x0) * epsilon


def x0_of_epsilon(
    x: jax.Array, epsilon: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """What is left when predicted noise is taken away; alpha > 0."""
  return (x - _over(sigma, x) * epsilon) / _over(alpha, x)


def epsilon_of_x0(
    x: jax.Array, x0: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """The noise that leads from x0 to x; sigma > 0."""
  return (x - _over(alpha, x) * x0) / _over(sigma, x)


def x0_of_v(
    x: jax.Array, v: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """x0 of v = alpha * epsilon - sigma * x0."""
  a, s = _over(alpha, x), _over(sigma, x)
  return (a * x - s * v) / (a * a + s * s)


def v_of_x0(
    x: jax.Array, x0: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """v = alpha * epsilon - sigma * x0; sigma > 0."""
  a, s = _over(alpha, x), _over(sigma, x)
  return (a * x - (a * a + s * s) * x0) / s


def score_of_x0(
    x: jax.Array, x0: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """Gradient of log p(x) from the posterior mean of x0; sigma > 0."""
  return (_over(alpha, x) * x0 - x) / jnp.square(_over(sigma, x))


def x0_of_score(
    x: jax.Array, score: jax.Array, alpha: Level, sigma: Level
) -> jax.Array:
  """The posterior mean of x0 (Tweedie's formula); alpha > 0."""
  return (x + jnp.square(_over(sigma, x)) * score) / _over(alpha, x)


def loss_weight(sigma: Level, sigma_data: float) -> Level:
  """1/sigma^2 + 1/sigma_data^2: an untrained denoiser's loss is about 1.

  Of NumPy's arrays it is one of those.

  Source: EDM (arXiv 2206.00364), table 1; it is 1 / out^2 of the scalings.
  """
  return 1 / (sigma * sigma) + sigma_data**-2


def heun(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    sigmas: np.ndarray,
) -> jax.Array:
  """Follows the VE probability flow by Heun's method; two calls per step.

  Args:
    denoise: `(x, sigma_B) -> x0`, the posterior mean.
    x: (B, ...) states at `sigmas[0]`: that level times standard normal noise
      where it is the largest one.
    sigmas: (N + 1,) descending levels; all but the last > 0. The step to a last
      level of 0 is Euler's, one call.

  Returns:
    (B, ...) float32 states at the last level.

  Source: EDM (arXiv 2206.00364), algorithm 1.
  """

  def slope(x, sigma):
    return (x - denoise(x, jnp.full(x.shape[:1], sigma))) / sigma

  def step(x, pair):
    now, after = pair
    d = slope(x, now)
    end = x + (after - now) * d
    return x + (after - now) * 0.5 * (d + slope(end, after)), None

  sigmas = np.asarray(sigmas, np.float32)
  steps = len(sigmas) - 1 - (sigmas[-1] == 0)
  x, _ = jax.lax.scan(
      step, x.astype(jnp.float32), (sigmas[:steps], sigmas[1 : steps + 1])
  )
  return x if sigmas[-1] else x - sigmas[-2] * slope(x, sigmas[-2])


def _over(level: Level, x: jax.Array) -> jax.Array:
  """A level as float32 that multiplies (B, ...) arrays."""
  level = jnp.asarray(level, jnp.float32)
  return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))
