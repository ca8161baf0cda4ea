# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A small residual MLP under EDM's preconditioning, for toy data."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import denoiser, layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the MLP.

  Attributes:
    shape: of an example; it is flattened.
    num_classes: labels, of which this number stands for no class; 0 for a
      network that does not look at labels.
    width: of the residual stream.
    blocks: number of them, at least 2.
    sigma_data: standard deviation of the data.
  """

  shape: tuple[int, ...] = (2,)
  num_classes: int = 0
  width: int = 128
  blocks: int = 4
  sigma_data: float = 0.5

  def __post_init__(self):
    if min(*self.shape, self.width // 2, self.blocks // 2) < 1:
      raise ValueError(
          f'sizes must be at least 1, width and blocks at least 2: {self}'
      )
    if self.num_classes < 0 or self.sigma_data <= 0:
      raise ValueError(
          f'num_classes={self.num_classes} must not be negative and '
          f'sigma_data={self.sigma_data} must be positive'
      )


def build(config: Mapping[str, Any]) -> Model:
  """Builds the denoiser; every function of `Model.fns` takes `params` first.

  - forward(x, sigma_B, labels_B, *, key=None) -> denoised; it draws nothing,
    and takes a key as all denoisers do
  - features(x, sigma_B, labels_B) -> features_BxW, after half of the blocks

  x is (B, *shape), data + sigma * noise with sigma > 0. Labels are int32 in
  [0, num_classes]; the last stands for no class. All float32.

  Raises:
    ValueError: on unknown or invalid fields.
  """
  cfg = config_lib.make(Config, config, 'mlp')
  inputs = (
      jax.ShapeDtypeStruct((1, *cfg.shape), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  return layers.counted('mlp', Mlp(cfg), inputs, ('forward', 'features'))


class Mlp(nn.Module):
  """Two halves of residual blocks under preconditioning."""

  config: Config

  def setup(self):
    cfg = self.config
    self.condition = denoiser.Condition(
        cfg.width // 2 * 2, cfg.width, cfg.num_classes, name='condition'
    )
    self.inner = denoiser.dense(
        math.prod(cfg.shape), cfg.width, (None, 'embed'), 'in'
    )
    self.blocks = [
        Block(cfg.width, name=f'block_{i}') for i in range(cfg.blocks)
    ]
    self.outer = layers.Dense(
        math.prod(cfg.shape), ('embed', None),
        kernel_init=nn.initializers.zeros, name='out',
    )

  def forward(
      self, x: Array, sigma_B: Array, labels_B: Array, *,
      key: Array | None = None,
  ) -> Array:
    del key

    def network(x, noise_B):
      e_BxW = self.condition(noise_B, labels_B)
      h_BxW = self._half(x, e_BxW)
      for block in self.blocks[self.config.blocks // 2 :]:
        h_BxW = block(h_BxW, e_BxW)
      return self.outer(nn.silu(h_BxW)).reshape(x.shape)

    return denoiser.precondition(network, x, sigma_B, self.config.sigma_data)

  def features(self, x: Array, sigma_B: Array, labels_B: Array) -> Array:
    s = denoiser.scalings(sigma_B, self.config.sigma_data)
    wide = (-1,) + (1,) * (x.ndim - 1)
    return self._half(
        s.inner.reshape(wide) * x, self.condition(s.noise, labels_B)
    )

  def _half(self, x: Array, e_BxW: Array) -> Array:
    h_BxW = self.inner(x.reshape(x.shape[0], -1))
    for block in self.blocks[: self.config.blocks // 2]:
      h_BxW = block(h_BxW, e_BxW)
    return h_BxW


class Block(nn.Module):
  """A hidden layer, scaled and shifted by the condition, around a shortcut."""

  width: int

  @nn.compact
  def __call__(self, x_BxW: Array, e_BxW: Array) -> Array:
    def dense(size: int, axes: tuple[str, str], name: str) -> layers.Dense:
      return denoiser.dense(self.width, size, axes, name)

    scale, shift = jnp.split(
        dense(2 * self.width, ('embed', 'mlp'), 'affine')(e_BxW), 2, axis=-1
    )
    h = dense(self.width, ('embed', 'mlp'), 'dense_0')(nn.silu(x_BxW))
    h = nn.silu(h * (1 + scale) + shift)
    return x_BxW + dense(self.width, ('mlp', 'embed'), 'dense_1')(h)
