# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What denoisers share: their condition and what stands around the network."""

from __future__ import annotations

from collections.abc import Callable
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax.models import layers
from dd_jax.ops.preconditioning import scalings

Array = jax.Array


def precondition(
    network: Callable[[Array, Array], Array],
    x: Array, sigma_B: Array, sigma_data: float,
) -> Array:
  """A denoiser of x = x0 + sigma * epsilon; float32.

  Args:
    network: `(inputs, noise_B) -> outputs`, both of x's shape.
    x: (B, ...) noisy data.
    sigma_B: noise levels > 0.
    sigma_data: standard deviation of the data.

  Source: EDM (arXiv 2206.00364), eq. 7.
  """
  x = x.astype(jnp.float32)
  s = scalings(sigma_B, sigma_data)
  wide = (-1,) + (1,) * (x.ndim - 1)
  y = network(s.inner.reshape(wide) * x, s.noise).astype(jnp.float32)
  return s.skip.reshape(wide) * x + s.out.reshape(wide) * y


def uniform(fan_in: int) -> layers.Init:
  """Uniform in +-fan_in^-0.5: kernels and biases of untrained denoisers.

  Drawn flat, for what XLA compiles then takes a third of the time.
  """
  bound = fan_in**-0.5

  def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    size = (math.prod(shape),)
    values = jax.random.uniform(key, size, dtype, -bound, bound)
    return values.reshape(shape)

  return init


def dense(
    fan_in: int, features: int, axes: tuple[str | None, str | None], name: str,
    precision: jax.lax.Precision | None = None,
) -> layers.Dense:
  """An affine map in float32 with the initial values of denoisers."""
  init = uniform(fan_in)
  return layers.Dense(
      features, axes, kernel_init=init, bias_init=init, precision=precision,
      name=name,
  )


class Condition(nn.Module):
  """Embeds noise level and class: `noise_B, labels_B -> e_BxE`, float32.

  Attributes:
    frequencies: half of them cosines, half sines.
    features: E.
    num_classes: the label of this number stands for no class. With 0 of them
      labels are not looked at.
  """

  frequencies: int
  features: int
  num_classes: int

  @nn.compact
  def __call__(self, noise_B: Array, labels_B: Array) -> Array:
    half = self.frequencies // 2
    rate_F = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BxF = noise_B.astype(jnp.float32)[:, None] * rate_F[None]
    wave_BxF = jnp.concatenate([jnp.cos(angle_BxF), jnp.sin(angle_BxF)], -1)
    # Neighbouring levels would be one in a platform's fast products.
    exact = jax.lax.Precision.HIGHEST
    e_BxE = nn.silu(dense(
        2 * half, self.features, ('time', 'mlp'), 'noise_0', exact
    )(wave_BxF))
    e_BxE = dense(
        self.features, self.features, ('mlp', 'embed'), 'noise_1', exact
    )(e_BxE)
    if self.num_classes:
      table_KxE = self.param(
          'embedding',
          nn.with_logical_partitioning(
              nn.initializers.normal(1.0), ('vocab', 'embed')
          ),
          (self.num_classes, self.features),
      )
      known_B = labels_B != self.num_classes
      e_BxE += jnp.where(
          known_B[:, None], layers.rows(table_KxE, labels_B), 0.0
      )
    return nn.silu(e_BxE)
