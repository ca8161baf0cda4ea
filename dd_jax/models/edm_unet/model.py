# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The ADM UNet under EDM's preconditioning: noisy images to clean ones.

Shape letters: B batch, H, W image sides, h sides of the lowest level, C
channels, E size of the condition, N positions, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import denoiser, layers

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the UNet; the defaults are those of EDM for ImageNet-64.

  Attributes:
    image_size: side of the square image, pixels.
    num_classes: labels, of which this number stands for no class; 0 for a
      network without classes.
    image_channels: 3, or 1 for grayscale.
    ch: channels at full resolution.
    ch_mult: channel factor of each level; each level but the last halves the
      resolution.
    res_blocks: blocks per level of the encoder; the decoder has one more.
    attention: sides of the maps whose blocks attend. The first block of the
      decoder always does.
    head_dim: channels of an attention head.
    embed_mult: size of the condition as a factor of `ch`.
    dropout: probability within blocks, where `forward` is given keys.
    sigma_data: standard deviation of the data.
    dtype: type of the network's activations; the condition, normalisations,
      softmax and preconditioning are float32.
    remat: 'full' recomputes every block in the backward pass.

  Source: ADM (arXiv 2105.05233), EDM (arXiv 2206.00364).
  """

  image_size: int
  num_classes: int
  image_channels: int = 3
  ch: int = 192
  ch_mult: tuple[int, ...] = (1, 2, 3, 4)
  res_blocks: int = 3
  attention: tuple[int, ...] = (32, 16, 8)
  head_dim: int = 64
  embed_mult: int = 4
  dropout: float = 0.0
  sigma_data: float = 0.5
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'full'] = 'none'

  def __post_init__(self):
    counts = (
        self.image_size, self.image_channels, self.ch, *self.ch_mult,
        self.res_blocks, self.head_dim, self.embed_mult,
    )
    if min(counts) < 1 or not self.ch_mult or self.num_classes < 0:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if self.ch % 4:
      raise ValueError(f'ch={self.ch} must be a multiple of 4')
    if self.image_size % 2 ** (len(self.ch_mult) - 1):
      raise ValueError(
          f'image_size={self.image_size} cannot be halved '
          f'len(ch_mult) - 1 = {len(self.ch_mult) - 1} times'
      )
    if unknown := set(self.attention) - set(self.sides):
      raise ValueError(
          f'attention={self.attention}: no level has side {sorted(unknown)}; '
          f'there are {self.sides}'
      )
    for level, channels in enumerate(self.channels):
      attends = self.attends(level) or level == len(self.ch_mult) - 1
      if attends and channels % self.head_dim:
        raise ValueError(
            f'{channels} channels at side {self.sides[level]} are not a '
            f'multiple of head_dim={self.head_dim}'
        )
    if not 0 <= self.dropout < 1 or self.sigma_data <= 0:
      raise ValueError(
          f'dropout={self.dropout} must be in [0, 1) and '
          f'sigma_data={self.sigma_data} positive'
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Of an example."""
    return (self.image_size, self.image_size, self.image_channels)

  @property
  def sides(self) -> tuple[int, ...]:
    """Side of the maps of every level."""
    return tuple(self.image_size >> i for i in range(len(self.ch_mult)))

  @property
  def channels(self) -> tuple[int, ...]:
    """Channels of every level."""
    return tuple(self.ch * multiple for multiple in self.ch_mult)

  def attends(self, level: int) -> bool:
    return self.sides[level] in self.attention


def build(config: Mapping[str, Any]) -> Model:
  """Builds the denoiser; every function of `Model.fns` takes `params` first.

  - forward(x_BxHxWxC, sigma_B, labels_B, *, key=None) -> denoised_BxHxWxC;
    dropout is on if there is a key per example
  - features(x_BxHxWxC, sigma_B, labels_B) -> features_BxhxhxC, what leaves the
    encoder's last block

  x is image + sigma * noise, with images NHWC in [-1, 1] and sigma > 0. Labels
  are int32 in [0, num_classes]; the last stands for no class, and others give
  NaN. What is returned is float32.

  Raises:
    ValueError: on unknown, missing or inconsistent fields.
  """
  cfg = config_lib.make(Config, config, 'edm_unet')
  side = cfg.image_size
  inputs = (
      jax.ShapeDtypeStruct((1, side, side, cfg.image_channels), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  return layers.counted(
      'edm_unet', EdmUnet(cfg), inputs, ('forward', 'features')
  )


class EdmUnet(nn.Module):
  """Condition, encoder and decoder under preconditioning."""

  config: Config

  def setup(self):
    cfg = self.config
    self.condition = denoiser.Condition(
        cfg.ch, cfg.ch * cfg.embed_mult, cfg.num_classes, name='condition'
    )
    self.encoder = Encoder(cfg, name='encoder')
    self.decoder = Decoder(cfg, name='decoder')

  def forward(
      self, x_BxHxWxC: Array, sigma_B: Array, labels_B: Array, *,
      key: Array | None = None,
  ) -> Array:
    keys = (None, None)
    if key is not None:
      keys = jnp.unstack(jax.vmap(jax.random.split)(key), axis=1)

    def network(x_BxHxWxC, noise_B):
      e_BxE = self.condition(noise_B, labels_B)
      maps = self.encoder(x_BxHxWxC, e_BxE, keys[0])
      return self.decoder(maps, e_BxE, keys[1])

    return denoiser.precondition(
        network, x_BxHxWxC, sigma_B, self.config.sigma_data
    )

  def features(
      self, x_BxHxWxC: Array, sigma_B: Array, labels_B: Array
  ) -> Array:
    s = denoiser.scalings(sigma_B, self.config.sigma_data)
    x_BxHxWxC = s.inner[:, None, None, None] * x_BxHxWxC.astype(jnp.float32)
    e_BxE = self.condition(s.noise, labels_B)
    return self.encoder(x_BxHxWxC, e_BxE, None)[-1].astype(jnp.float32)


class Encoder(nn.Module):
  """Image to the maps after its first convolution and after every block."""

  config: Config

  @nn.compact
  def __call__(
      self, x_BxHxWxC: Array, e_BxE: Array, key_B: Array | None
  ) -> list[Array]:
    cfg = self.config
    block = _Blocks(cfg, e_BxE, key_B)
    x = conv(x_BxHxWxC, cfg.ch, jnp.dtype(cfg.dtype), 'conv_in')
    maps = [x]
    for level, channels in enumerate(cfg.channels):
      if level:
        x = block(x, x.shape[-1], f'down_{level}', resample='down')
        maps.append(x)
      for i in range(cfg.res_blocks):
        x = block(x, channels, f'level_{level}_{i}', cfg.attends(level))
        maps.append(x)
    return maps


class Decoder(nn.Module):
  """Maps of the encoder to an image."""

  config: Config

  @nn.compact
  def __call__(
      self, maps: Sequence[Array], e_BxE: Array, key_B: Array | None
  ) -> Array:
    cfg = self.config
    block = _Blocks(cfg, e_BxE, key_B)
    maps = list(maps)
    x = maps[-1]
    x = block(x, x.shape[-1], 'middle_0', True)
    x = block(x, x.shape[-1], 'middle_1')
    for level, channels in reversed(list(enumerate(cfg.channels))):
      if level < len(cfg.channels) - 1:
        x = block(x, x.shape[-1], f'up_{level}', resample='up')
      for i in range(cfg.res_blocks + 1):
        x = jnp.concatenate([x, maps.pop()], axis=-1)
        x = block(x, channels, f'level_{level}_{i}', cfg.attends(level))
    x = nn.silu(group_norm(x, 'norm_out'))
    return conv(
        x, cfg.image_channels, jnp.dtype(cfg.dtype), 'conv_out', zero=True
    )


class Block(nn.Module):
  """Two conditioned convolutions around a shortcut, then attention or none."""

  features: int
  head_dim: int | None
  resample: Literal['none', 'down', 'up']
  dropout: float
  dtype: Any

  @nn.compact
  def __call__(
      self, x_BxHxWxC: Array, e_BxE: Array, key_B: Array | None
  ) -> Array:
    resample = {'none': lambda x: x, 'down': _halve, 'up': _double}[
        self.resample
    ]
    h = nn.silu(group_norm(x_BxHxWxC, 'norm_0'))
    h = conv(resample(h), self.features, self.dtype, 'conv_0')
    scale, shift = jnp.split(denoiser.dense(
        e_BxE.shape[-1], 2 * self.features, ('embed', 'conv_out'), 'affine'
    )(e_BxE)[:, None, None].astype(self.dtype), 2, axis=-1)
    h = nn.silu(group_norm(h, 'norm_1') * (1 + scale) + shift)
    if key_B is not None and self.dropout:
      kept = jax.vmap(
          lambda key: jax.random.bernoulli(key, 1 - self.dropout, h.shape[1:])
      )(key_B)
      h = jnp.where(kept, h / (1 - self.dropout), 0)
    h = conv(h, self.features, self.dtype, 'conv_1', zero=True)
    x = resample(x_BxHxWxC)
    if x.shape[-1] != self.features:
      x = conv(x, self.features, self.dtype, 'shortcut', size=1)
    x += h
    if self.head_dim is not None:
      x += Attention(self.head_dim, self.dtype, name='attention')(x)
    return x


class Attention(nn.Module):
  """Self-attention over all positions of a map, without the shortcut.

  The channels of queries, keys and values follow each other; those of a head
  stand together within.
  """

  head_dim: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    batch, height, width, channels = x_BxHxWxC.shape
    init = denoiser.uniform(channels)
    h = group_norm(x_BxHxWxC, 'norm').reshape(batch, height * width, channels)
    h = layers.Dense(
        3 * channels, ('embed', 'heads'), kernel_init=init, bias_init=init,
        dtype=self.dtype, name='qkv',
    )(h)
    q, k, v = (
        x.reshape(batch, height * width, -1, self.head_dim)
        for x in jnp.split(h, 3, axis=-1)
    )
    logits = jnp.einsum(
        'bnhd,bmhd->bhnm', q, k * self.head_dim**-0.5,
        preferred_element_type=jnp.float32,
    )
    weights = jax.nn.softmax(logits).astype(self.dtype)
    h = jnp.einsum('bhnm,bmhd->bnhd', weights, v).reshape(x_BxHxWxC.shape)
    return layers.Dense(
        channels, ('heads', 'embed'), kernel_init=nn.initializers.zeros,
        dtype=self.dtype, name='out',
    )(h)


class _Blocks:
  """Calls blocks one after the other, each with keys of its own."""

  def __init__(self, config: Config, e_BxE: Array, key_B: Array | None):
    self._config, self._e_BxE, self._key_B = config, e_BxE, key_B
    self._cls = nn.remat(Block) if config.remat == 'full' else Block
    self._count = 0

  def __call__(
      self, x: Array, features: int, name: str, attends: bool = False,
      resample: Literal['none', 'down', 'up'] = 'none',
  ) -> Array:
    cfg, key_B = self._config, self._key_B
    if key_B is not None:
      fold = functools.partial(jax.random.fold_in, data=self._count)
      key_B = jax.vmap(fold)(key_B)
    self._count += 1
    return self._cls(
        features, cfg.head_dim if attends else None, resample, cfg.dropout,
        jnp.dtype(cfg.dtype), name=name,
    )(x, self._e_BxE, key_B)


def conv(
    x: Array, features: int, dtype: Any, name: str, size: int = 3,
    zero: bool = False,
) -> Array:
  """A convolution with a UNet's initial values, or with zeros."""
  init = denoiser.uniform(size * size * x.shape[-1])
  if zero:
    init = nn.initializers.zeros
  return layers.Conv2d(
      features, size, dtype=dtype, kernel_init=init, bias_init=init, name=name
  )(x)


def group_norm(x: Array, name: str) -> Array:
  """At most 32 groups, of no fewer than four channels."""
  groups = min(32, x.shape[-1] // 4)
  return layers.GroupNorm(groups, 1e-5, name=name)(x)


def _halve(x: Array) -> Array:
  """Mean of two by two pixels."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  return x.mean((2, 4))


def _double(x: Array) -> Array:
  """Nearest-neighbour upsampling by two."""
  return x.repeat(2, axis=1).repeat(2, axis=2)
