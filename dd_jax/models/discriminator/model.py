# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A small head that tells real from made by features of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import denoiser, layers

Array = jax.Array

# Float32 in earnest, whatever a platform's fast products are.
_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Config:
  """What the head looks at; the defaults are DMD2's for ImageNet-64.

  Attributes:
    size: side of the map of features, a power of two; 0 for vectors.
    channels: of a feature.
  """

  size: int = 8
  channels: int = 768

  def __post_init__(self):
    if self.size < 0 or self.size & (self.size - 1):
      raise ValueError(f'size={self.size} must be 0 or a power of two')
    if self.channels < 1:
      raise ValueError(f'channels={self.channels} must be at least 1')


def build(config: Mapping[str, Any]) -> Model:
  """Builds the head: `forward(params, features) -> logits_B`, float32.

  Features are (B, size, size, channels), or (B, channels) where size is 0. A
  map is halved by convolutions until its side is at most 4, then seen whole by
  one, each followed by a normalisation; a vector passes one hidden layer.

  Raises:
    ValueError: on unknown or invalid fields.

  Source: DMD2 (arXiv 2405.14867), section 4.3.
  """
  cfg = config_lib.make(Config, config, 'discriminator')
  module = MapHead(cfg) if cfg.size else VectorHead(cfg)
  shape = (1, *(cfg.size,) * 2, cfg.channels) if cfg.size else (1, cfg.channels)
  features = jax.ShapeDtypeStruct(shape, jnp.float32)
  return layers.counted('discriminator', module, [features], ['forward'])


class MapHead(nn.Module):
  """Convolutions down to one position, and an affine map to a logit."""

  config: Config

  @nn.compact
  def forward(self, x_BxHxWxC: Array) -> Array:
    channels = self.config.channels
    # Narrow groups of the last map, of one position, would leave signs alone.
    groups = min(32, max(1, channels // 24))
    x, i, last = x_BxHxWxC.astype(jnp.float32), 0, False
    while not last:
      side = x.shape[1]
      last = side <= 4
      size = side if last else 4
      init = denoiser.uniform(size * size * channels)
      x = layers.Conv2d(
          channels, size, side if last else 2, (0, 0) if last else (1, 1),
          precision=_EXACT, kernel_init=init, bias_init=init,
          name=f'conv_{i}',
      )(x)
      x = nn.silu(layers.GroupNorm(groups, 1e-5, name=f'norm_{i}')(x))
      i += 1
    return denoiser.dense(
        channels, 1, ('embed', None), 'out', _EXACT
    )(x)[:, 0, 0, 0]


class VectorHead(nn.Module):
  """One hidden layer, and an affine map to a logit."""

  config: Config

  @nn.compact
  def forward(self, x_BxC: Array) -> Array:
    channels = self.config.channels
    x_BxC = x_BxC.astype(jnp.float32)
    x = denoiser.dense(
        channels, channels, ('embed', 'mlp'), 'hidden', _EXACT
    )(x_BxC)
    # One group: a layer normalisation.
    x = layers.GroupNorm(1, 1e-5, name='norm')(x[:, None, None])
    return denoiser.dense(channels, 1, ('mlp', None), 'out', _EXACT)(
        nn.silu(x)
    )[:, 0, 0, 0]
