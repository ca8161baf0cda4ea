# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""LPIPS: a learned perceptual distance on VGG16 (arXiv 1801.03924)."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model, Params
from dd_jax.models import layers

Array = jax.Array

# Convolutions of each level; a tap follows the last of them, a pool the tap.
_DEPTHS = (2, 2, 3, 3, 3)
_WIDTHS = (64, 128, 256, 512, 512)
_MIN_SIZE = 1 << (len(_DEPTHS) - 1)
_EPSILON = 1e-10  # beside the length of a feature vector

# From [-1, 1] to what the trunk was trained on: channel means and deviations of
# ImageNet (0.485, 0.456, 0.406; 0.229, 0.224, 0.225), as LPIPS rounds them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True)
class Config:
  """How it runs, and its width.

  Attributes:
    remat: 'full' recomputes each level in the backward pass.
    dtype: type of the trunk's activations; distances are float32.
    slim: what every width is divided by, 1, 2, 4, 8, 16, 32 or 64: a small
      network for tests of programs that need one.
  """

  remat: Literal['none', 'full'] = 'none'
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  slim: int = 1

  def __post_init__(self):
    if self.slim not in (1, 2, 4, 8, 16, 32, 64):
      raise ValueError(
          f'slim is {self.slim}; use 1, 2, 4, 8, 16, 32 or 64'
      )


class Level(nn.Module):
  """A pool, unless it is the first level, and convolutions with ReLU."""

  index: int
  config: Config

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    cfg, x = self.config, x_BxHxWxC
    if self.index:
      x = _halve(x)
    for i in range(_DEPTHS[self.index]):
      x = nn.relu(layers.Conv2d(
          _WIDTHS[self.index] // cfg.slim, dtype=jnp.dtype(cfg.dtype),
          name=f'conv_{i}',
      )(x))
    return x


class Trunk(nn.Module):
  """The convolutions of VGG16 (arXiv 1409.1556), with a tap at each level."""

  config: Config

  @nn.compact
  def __call__(self, image_BxHxWxC: Array) -> list[Array]:
    _, height, width, channels = image_BxHxWxC.shape
    if channels not in (1, 3):
      raise ValueError(f'images have {channels} channels; use 1 or 3')
    if min(height, width) < _MIN_SIZE:
      raise ValueError(
          f'images are {height} x {width}; use {_MIN_SIZE} x {_MIN_SIZE} or '
          'larger'
      )
    shift, scale = (
        jnp.asarray(v, jnp.float32)[None, None, None] for v in (_SHIFT, _SCALE)
    )
    x = jnp.broadcast_to(image_BxHxWxC, (*image_BxHxWxC.shape[:3], 3))
    x, taps = (x - shift) / scale, []
    level = nn.remat(Level) if self.config.remat == 'full' else Level
    for i in range(len(_DEPTHS)):
      x = level(i, self.config, name=f'level_{i}')(x)
      taps.append(x)
    return taps


class Lpips(nn.Module):
  """Weighted squared differences of unit features, summed over levels."""

  config: Config

  def setup(self):
    self.trunk = Trunk(self.config, name='trunk')
    self.heads = [
        self.param(
            f'head_{i}',
            nn.with_logical_partitioning(
                nn.initializers.constant(1 / width), ('conv_in',)
            ),
            (width // self.config.slim,),
        ) for i, width in enumerate(_WIDTHS)
    ]

  def __call__(self, a_BxHxWxC: Array, b_BxHxWxC: Array) -> Array:
    total_B = 0.0
    for head_C, a, b in zip(
        self.heads, self.trunk(a_BxHxWxC), self.trunk(b_BxHxWxC), strict=True
    ):
      gap_BxHxWxC = jnp.square(_unit(a) - _unit(b))
      total_B += (gap_BxHxWxC * head_C[None, None, None]).sum(-1).mean((1, 2))
    return total_B


def build(config: Mapping[str, Any]) -> Model:
  """LPIPS on VGG16; images are NHWC in [-1, 1], gray or RGB, 16x16 at least.

  Its functions are `distance(params, a, b) -> (B,)`, float32, and `forward`,
  the same. FLOPs are those of a pair of 64x64 images and grow with the area.

  Raises:
    ValueError: on unknown or unsupported fields.
  """
  return _build('lpips', Lpips, config, inputs=2, name='distance')


def build_vgg(config: Mapping[str, Any]) -> Model:
  """VGG16 alone; its parameters are `trunk` of the other model.

  Its functions are `features(params, image)`, the five maps, last of each
  resolution, and `forward`, the same. Images and FLOPs as for `build`, which
  takes the same fields.

  Raises:
    ValueError: on unknown or unsupported fields.
  """
  return _build('vgg', Trunk, config, inputs=1, name='features')


def _build(
    family: str, cls: type[nn.Module], config: Mapping[str, Any], inputs: int,
    name: str,
) -> Model:
  cfg = config_lib.make(Config, config, family)
  module = cls(cfg)
  images = [jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)] * inputs
  init, axes = layers.pure(module, *images)
  forward = functools.partial(_call, module)

  def flops() -> int:
    abstract = jax.eval_shape(init, jax.random.key(0))
    return layers.count_flops(forward, abstract, *images)

  return Model(
      family, cfg, init, {'forward': forward, name: forward}, axes, flops
  )


def _call(module: nn.Module, params: Params, *images: Array) -> Any:
  return module.apply({'params': params}, *images)


def _halve(x_BxHxWxC: Array) -> Array:
  """Maxima of 2x2 pixels; an odd last row or column is dropped."""
  return jax.lax.reduce_window(
      x_BxHxWxC, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID'
  )


def _unit(x_BxHxWxC: Array) -> Array:
  """Feature vectors over their length, float32; a zero vector stays zero.

  A pixel may have no active feature. Its length has no derivative there, which
  would make every gradient NaN.
  """
  x = x_BxHxWxC.astype(jnp.float32)
  squared = jnp.square(x).sum(-1, keepdims=True)
  alive = squared > 0
  length = jnp.sqrt(jnp.where(alive, squared, 1))
  return jnp.where(alive, x / (length + _EPSILON), 0)
