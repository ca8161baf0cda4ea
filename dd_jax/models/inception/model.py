# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""InceptionV3 as the Fréchet Inception distance uses it (PyTorch-FID).

It differs from the classifier of the paper (arXiv 1512.00567) as the TensorFlow
graph of 2015 does: average pools leave the border out of their count, the pool
of the last block takes maxima, and there are 1,008 classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model, Params
from dd_jax.models import layers
from dd_jax.ops import resize

Array = jax.Array

CLASSES = 1008
FEATURES = 2048
TAPS = (64, 192, 768, 2048)  # channels, by which PyTorch-FID names them
_EPSILON = 1e-3  # of the batch norms
_MIN_SIZE = 75  # below it the last maps would be empty


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes; figures are comparable only with those of the defaults.

  Attributes:
    image_size: side that images are resized to, at least 75.
    slim: what every width is divided by, 1, 2, 4, 8 or 16: a small network
      for tests of programs that need one.
  """

  image_size: int = 299
  slim: int = 1

  def __post_init__(self):
    if self.image_size < _MIN_SIZE:
      raise ValueError(
          f'image_size is {self.image_size}; use 299, at least {_MIN_SIZE}'
      )
    if self.slim not in (1, 2, 4, 8, 16):
      raise ValueError(f'slim is {self.slim}; use 1, 2, 4, 8 or 16')


@dataclasses.dataclass(frozen=True)
class _Conv:
  """A convolution, batch norm and ReLU.

  `same` keeps the size of the map at stride 1; otherwise there is no padding.
  """

  name: str
  features: int
  size: tuple[int, int] = (1, 1)
  stride: int = 1
  same: bool = True


@dataclasses.dataclass(frozen=True)
class _Fork:
  """Chains of steps on the same input, whose outputs are concatenated.

  With a name it is a module of its own.
  """

  name: str
  branches: tuple[tuple[_Step, ...], ...]


# A pool without parameters is a function of maps.
_Step = _Conv | _Fork | Callable[[Array], Array]


def _window(
    x_BxHxWxC: Array, start: float, reduce: Any, stride: int, same: bool
) -> Array:
  edge = (1, 1) if same else (0, 0)
  return jax.lax.reduce_window(
      x_BxHxWxC, start, reduce, (1, 3, 3, 1), (1, stride, stride, 1),
      ((0, 0), edge, edge, (0, 0)),
  )


def _max_down(x_BxHxWxC: Array) -> Array:
  return _window(x_BxHxWxC, -jnp.inf, jax.lax.max, stride=2, same=False)


def _max_same(x_BxHxWxC: Array) -> Array:
  return _window(x_BxHxWxC, -jnp.inf, jax.lax.max, stride=1, same=True)


def _mean_same(x_BxHxWxC: Array) -> Array:
  """Mean of the pixels that lie inside, so fewer than nine at the border."""
  add = functools.partial(
      _window, start=0.0, reduce=jax.lax.add, stride=1, same=True
  )
  count_1xHxWx1 = add(jnp.ones((1, *x_BxHxWxC.shape[1:3], 1), jnp.float32))
  return add(x_BxHxWxC) / count_1xHxWx1


def _block_a(name: str, pool_features: int) -> _Fork:
  return _Fork(name, (
      (_Conv('branch1x1', 64),),
      (_Conv('branch5x5_1', 48), _Conv('branch5x5_2', 64, (5, 5))),
      (_Conv('branch3x3dbl_1', 64), _Conv('branch3x3dbl_2', 96, (3, 3)),
       _Conv('branch3x3dbl_3', 96, (3, 3))),
      (_mean_same, _Conv('branch_pool', pool_features)),
  ))


def _block_b(name: str) -> _Fork:
  return _Fork(name, (
      (_Conv('branch3x3', 384, (3, 3), 2, same=False),),
      (_Conv('branch3x3dbl_1', 64), _Conv('branch3x3dbl_2', 96, (3, 3)),
       _Conv('branch3x3dbl_3', 96, (3, 3), 2, same=False)),
      (_max_down,),
  ))


def _block_c(name: str, width: int) -> _Fork:
  return _Fork(name, (
      (_Conv('branch1x1', 192),),
      (_Conv('branch7x7_1', width), _Conv('branch7x7_2', width, (1, 7)),
       _Conv('branch7x7_3', 192, (7, 1))),
      (_Conv('branch7x7dbl_1', width), _Conv('branch7x7dbl_2', width, (7, 1)),
       _Conv('branch7x7dbl_3', width, (1, 7)),
       _Conv('branch7x7dbl_4', width, (7, 1)),
       _Conv('branch7x7dbl_5', 192, (1, 7))),
      (_mean_same, _Conv('branch_pool', 192)),
  ))


def _block_d(name: str) -> _Fork:
  return _Fork(name, (
      (_Conv('branch3x3_1', 192),
       _Conv('branch3x3_2', 320, (3, 3), 2, same=False)),
      (_Conv('branch7x7x3_1', 192), _Conv('branch7x7x3_2', 192, (1, 7)),
       _Conv('branch7x7x3_3', 192, (7, 1)),
       _Conv('branch7x7x3_4', 192, (3, 3), 2, same=False)),
      (_max_down,),
  ))


def _block_e(name: str, pool: Callable[[Array], Array]) -> _Fork:

  def cross(name: str) -> _Fork:
    return _Fork('', (
        (_Conv(f'{name}a', 384, (1, 3)),), (_Conv(f'{name}b', 384, (3, 1)),),
    ))

  return _Fork(name, (
      (_Conv('branch1x1', 320),),
      (_Conv('branch3x3_1', 384), cross('branch3x3_2')),
      (_Conv('branch3x3dbl_1', 448), _Conv('branch3x3dbl_2', 384, (3, 3)),
       cross('branch3x3dbl_3')),
      (pool, _Conv('branch_pool', 192)),
  ))


# Each stage ends at a tap.
_STAGES: tuple[tuple[_Step, ...], ...] = (
    (
        _Conv('conv_1a', 32, (3, 3), 2, same=False),
        _Conv('conv_2a', 32, (3, 3), same=False),
        _Conv('conv_2b', 64, (3, 3)),
        _max_down,
    ),
    (
        _Conv('conv_3b', 80),
        _Conv('conv_4a', 192, (3, 3), same=False),
        _max_down,
    ),
    (
        _block_a('mixed_5b', 32),
        _block_a('mixed_5c', 64),
        _block_a('mixed_5d', 64),
        _block_b('mixed_6a'),
        _block_c('mixed_6b', 128),
        _block_c('mixed_6c', 160),
        _block_c('mixed_6d', 160),
        _block_c('mixed_6e', 192),
    ),
    (
        _block_d('mixed_7a'),
        _block_e('mixed_7b', _mean_same),
        _block_e('mixed_7c', _max_same),
    ),
)


class ConvNorm(nn.Module):
  """Convolution, batch norm with fixed statistics, ReLU; float32."""

  plan: _Conv
  slim: int

  @nn.compact
  def __call__(self, x_BxHxWxI: Array) -> Array:
    plan = self.plan
    features = plan.features // self.slim

    def vector(name: str, init: Any) -> Array:
      init = nn.with_logical_partitioning(init, ('conv_out',))
      return self.param(name, init, (features,))

    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(
            _he_normal, ('kernel', 'kernel', 'conv_in', 'conv_out')
        ),
        (*plan.size, x_BxHxWxI.shape[-1], features),
    )
    scale, bias = vector('scale', ones), vector('bias', zeros)
    mean, var = vector('mean', zeros), vector('var', ones)
    gain = scale * jax.lax.rsqrt(var + _EPSILON)
    y_BxHxWxO = jax.lax.conv_general_dilated(
        x_BxHxWxI,
        kernel * gain[None, None, None],
        window_strides=(plan.stride, plan.stride),
        padding=[
            ((n - 1) // 2,) * 2 if plan.same else (0, 0) for n in plan.size
        ],
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return nn.relu(y_BxHxWxO + (bias - mean * gain)[None, None, None])


class Block(nn.Module):
  """A fork of which the convolutions are submodules."""

  plan: _Fork
  slim: int

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    return _fork(self.plan, x_BxHxWxC, self.slim)


class Inception(nn.Module):
  """Four stages, mean over space, one linear classifier."""

  config: Config

  @nn.compact
  def __call__(self, image_BxHxWxC: Array) -> tuple[dict[int, Array], Array]:
    x = resize.bilinear(
        image_BxHxWxC.astype(jnp.float32), self.config.image_size
    )
    taps = {}
    for tap, stage in zip(TAPS, _STAGES, strict=True):
      for step in stage:
        x = _run(step, x, self.config.slim)
      taps[tap] = x
    taps[FEATURES] = x.mean((1, 2))
    head = layers.Dense(CLASSES, axes=('embed', 'vocab'), name='logits')
    return taps, head(taps[FEATURES])


def build(config: Mapping[str, Any]) -> Model:
  """The network of PyTorch-FID; images are NHWC RGB in [-1, 1], float32.

  Square images of any size are resized inside, bilinearly and without
  antialiasing, whatever they are. Its functions:

    forward(params, image) -> logits (B, 1008);
    features(params, image) -> (B, 2048), the mean of the last map;
    taps(params, image) -> {64: (B, h, w, 64), 192: ..., 768: ...,
      2048: (B, 2048)}, maps after the first and the second max pool and before
      the last stage, and the features;
    features_and_scores(params, image) -> features and the logits without
      their bias, which the Inception Score is defined on.

  Raises:
    ValueError: on unknown or unsupported fields.
  """
  cfg = config_lib.make(Config, config, 'inception')
  module = Inception(cfg)
  image = jax.ShapeDtypeStruct(
      (1, cfg.image_size, cfg.image_size, 3), jnp.float32
  )
  init, axes = layers.pure(module, image)

  def run(params: Params, image: Array) -> tuple[dict[int, Array], Array]:
    # Figures of different machines are compared: no TF32, no bfloat16 passes.
    with jax.default_matmul_precision('float32'):
      return module.apply({'params': params}, image)

  def forward(params: Params, image: Array) -> Array:
    return run(params, image)[1]

  def taps(params: Params, image: Array) -> dict[int, Array]:
    return run(params, image)[0]

  def features(params: Params, image: Array) -> Array:
    return taps(params, image)[FEATURES]

  def features_and_scores(
      params: Params, image: Array
  ) -> tuple[Array, Array]:
    x = features(params, image)
    scores = jnp.matmul(
        x, params['logits']['kernel'], precision=jax.lax.Precision.HIGHEST
    )
    return x, scores

  fns = {
      'forward': forward, 'features': features, 'taps': taps,
      'features_and_scores': features_and_scores,
  }

  def flops() -> int:
    abstract = jax.eval_shape(init, jax.random.key(0))
    return layers.count_flops(forward, abstract, image)

  return Model('inception', cfg, init, fns, axes, flops)


def _run(step: _Step, x: Array, slim: int) -> Array:
  if isinstance(step, _Conv):
    return ConvNorm(step, slim, name=step.name)(x)
  if isinstance(step, _Fork):
    if step.name:
      return Block(step, slim, name=step.name)(x)
    return _fork(step, x, slim)
  return step(x)


def _fork(plan: _Fork, x: Array, slim: int) -> Array:
  outputs = []
  for branch in plan.branches:
    y = x
    for step in branch:
      y = _run(step, y, slim)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=-1)


def _he_normal(key: Array, shape: tuple[int, ...]) -> Array:
  """Drawn as a matrix, of which the random bits compile faster."""
  matrix = (math.prod(shape[:-1]), shape[-1])
  return nn.initializers.he_normal()(key, matrix).reshape(shape)
