# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The scalings around a network that make it a denoiser."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scalings(NamedTuple):
  """D(x) = skip * x + out * F(inner * x, noise); float32, shape of sigma."""

  skip: jax.Array
  out: jax.Array
  inner: jax.Array
  noise: jax.Array


def scalings(sigma: jax.Array, sigma_data: float) -> Scalings:
  """Scalings that give F inputs and targets of variance one.

  Args:
    sigma: noise levels > 0 of x = x0 + sigma * epsilon, any shape.
    sigma_data: standard deviation of the data.

  Source: EDM (arXiv 2206.00364), table 1.
  """
  sigma = jnp.asarray(sigma, jnp.float32)
  total = jnp.square(sigma) + sigma_data**2
  return Scalings(
      skip=sigma_data**2 / total,
      out=sigma * sigma_data * jax.lax.rsqrt(total),
      inner=jax.lax.rsqrt(total),
      noise=jnp.log(sigma) / 4,
  )
