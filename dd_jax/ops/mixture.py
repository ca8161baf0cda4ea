# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Exact densities and denoisers of mixtures of round Gaussians."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def log_density(
    x: jax.Array, sigma: jax.Array, means: jax.Array, log_weights: jax.Array,
    std: float,
) -> jax.Array:
  """Log-density of a mixture that noise was added to.

  Args:
    x: (B, D) points.
    sigma: (B,) standard deviations of the noise, 0 for none.
    means: (K, D).
    log_weights: (K,), normalised.
    std: of every Gaussian.

  Returns:
    (B,) nats.
  """
  variance = std**2 + jnp.square(sigma)
  size = 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi * variance)
  joint = _joint(x, variance, means, log_weights)
  return jax.nn.logsumexp(joint, axis=-1) - size


def posterior_mean(
    x: jax.Array, sigma: jax.Array, means: jax.Array, log_weights: jax.Array,
    std: float,
) -> jax.Array:
  """The best denoiser, (B, D); arguments as of `log_density`, sigma > 0."""
  variance = std**2 + jnp.square(sigma)
  weights = jax.nn.softmax(_joint(x, variance, means, log_weights))
  mean = jnp.matmul(weights, means, precision=jax.lax.Precision.HIGHEST)
  # Of one Gaussian: what its own spread leaves of the way back to x.
  share = (std**2 / variance)[:, None]
  return share * x + (1 - share) * mean


def _joint(
    x: jax.Array, variance: jax.Array, means: jax.Array, log_weights: jax.Array
) -> jax.Array:
  """(B, K) log of weight times density, without the density's constant."""
  squares = jnp.square(x[:, None] - means[None]).sum(-1)
  return log_weights[None] - 0.5 * squares / variance[:, None]
