# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The small classifier that judges samples of the embedded data sets."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import layers

# Fixed, not configured: figures of different runs are comparable only if they
# were judged by the same network.
_STEM = 32
_WIDTH = 64
_SIDE = 4  # of the last map
FEATURES = 64


@dataclasses.dataclass(frozen=True)
class Config:
  """What the judge looks at; its architecture is fixed.

  Attributes:
    image_size: side of the square image: 8, 16 or 32 pixels.
    image_channels: 1 or 3.
    num_classes: number of labels, at least 2.
  """

  image_size: int
  image_channels: int
  num_classes: int

  def __post_init__(self):
    if self.image_size not in (8, 16, 32):
      raise ValueError(
          f'image_size is {self.image_size}; the judge takes 8, 16 or 32: '
          'resize the images'
      )
    if self.image_channels not in (1, 3):
      raise ValueError(
          f'image_channels is {self.image_channels}; use 1 (gray) or 3 (RGB)'
      )
    if self.num_classes < 2:
      raise ValueError(
          f'num_classes is {self.num_classes}; a classifier needs at least 2'
      )


class Judge(nn.Module):
  """Convolutions down to a 4x4 map, 64 features, one linear classifier."""

  config: Config

  def setup(self):
    stages = (self.config.image_size // _SIDE).bit_length() - 1
    self.stem = layers.Conv2d(_STEM, name='stem')
    self.stages = [
        layers.Conv2d(_WIDTH, stride=2, name=f'stage_{i}')
        for i in range(stages)
    ]
    self.neck = layers.Dense(FEATURES, axes=('embed', 'mlp'), name='neck')
    self.head = layers.Dense(
        self.config.num_classes, axes=('mlp', None), name='head'
    )

  def features(self, image_BxHxWxC: jax.Array) -> jax.Array:
    x = nn.gelu(self.stem(image_BxHxWxC))
    for stage in self.stages:
      x = nn.gelu(stage(x))
    return nn.gelu(self.neck(x.reshape(x.shape[0], -1)))

  def forward(self, image_BxHxWxC: jax.Array) -> jax.Array:
    return self.head(self.features(image_BxHxWxC))


def build(config: Mapping[str, Any]) -> Model:
  """The judge; images are NHWC in [-1, 1].

  Its functions are `forward(params, image_BxHxWxC) -> logits_BxK` and
  `features(params, image_BxHxWxC) -> (B, 64)`, the activations before the
  last layer; both float32.

  Raises:
    ValueError: on unknown, missing or unsupported fields.
  """
  cfg = config_lib.make(Config, config, 'judge')
  side = cfg.image_size
  image = jax.ShapeDtypeStruct(
      (1, side, side, cfg.image_channels), jnp.float32
  )
  return layers.counted('judge', Judge(cfg), [image], ('forward', 'features'))
