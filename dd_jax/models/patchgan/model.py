# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A discriminator of overlapping patches, for the training of tokenizers."""

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

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the discriminator; LlamaGen's are 64 channels and 3 halvings.

  Attributes:
    image_size: side of the square image, pixels.
    image_channels: 3, or 1 for grayscale.
    ch: channels after the first halving; every other one doubles them, up to
      eight times as many.
    halvings: how often the side is halved before patches are judged: more of
      them make larger patches.
  """

  image_size: int
  image_channels: int = 3
  ch: int = 64
  halvings: int = 3

  def __post_init__(self):
    if min(self.image_channels, self.ch, self.halvings) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if self.image_size >> self.halvings < 3:
      raise ValueError(
          f'halvings={self.halvings} leave '
          f'{self.image_size >> self.halvings} of image_size='
          f'{self.image_size} pixels; at least 3 are needed'
      )


def build(config: Mapping[str, Any]) -> Model:
  """Builds the discriminator: `forward(params, image_BxHxWxC) -> logits_BxP`.

  Images are NHWC in [-1, 1]; a logit of each of P overlapping patches says how
  much it looks like that of a real image, float32. Groups of channels of an
  example are normalised where the original normalises channels of the batch:
  examples do not see each other, on any mesh.

  Raises:
    ValueError: on unknown, missing or invalid fields.

  Source: pix2pix (arXiv 1611.07004), section 6.1.2; LlamaGen,
  tokenizer/tokenizer_image/discriminator_patchgan.py.
  """
  cfg = config_lib.make(Config, config, 'patchgan')
  side = cfg.image_size
  image = jax.ShapeDtypeStruct(
      (1, side, side, cfg.image_channels), jnp.float32
  )
  return layers.counted('patchgan', PatchGAN(cfg), [image], ['forward'])


class PatchGAN(nn.Module):
  """Convolutions of 4x4 pixels: by twos, by one, and to a logit."""

  config: Config

  @nn.compact
  def forward(self, image_BxHxWxC: Array) -> Array:
    c, x = self.config, image_BxHxWxC.astype(jnp.float32)
    for i in range(c.halvings + 1):
      stride = 2 if i < c.halvings else 1
      x = self._conv(c.ch * min(2**i, 8), stride, f'conv_{i}')(x)
      if i:  # not of what is nearest to the pixels
        x = layers.GroupNorm(name=f'norm_{i}')(x)
      x = nn.leaky_relu(x, 0.2)
    return self._conv(1, 1, 'out')(x).reshape(x.shape[0], -1)

  def _conv(self, features: int, stride: int, name: str) -> nn.Module:
    return layers.Conv2d(
        features, 4, stride, (1, 1), name=name,
        kernel_init=nn.initializers.normal(0.02),
    )
