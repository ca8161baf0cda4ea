# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The convolutional encoder and decoder of image tokenizers (VQGAN's).

Their config is that of a tokenizer, of which `ch`, `ch_mult`, `res_blocks`,
`attention`, `z_channels`, `image_channels`, `dtype` and `remat` are read.
"""

from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax.models import layers

Array = jax.Array


class Encoder(nn.Module):
  """Image to latent map."""

  config: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    conv = functools.partial(layers.Conv2d, dtype=jnp.dtype(cfg.dtype))
    x = conv(cfg.ch, name='conv_in')(x)
    for level, multiple in enumerate(cfg.ch_mult):
      lowest = level == len(cfg.ch_mult) - 1
      x = Level(
          cfg, cfg.ch * multiple, cfg.res_blocks, cfg.attention and lowest,
          name=f'level_{level}',
      )(x)
      if not lowest:
        x = conv(
            x.shape[-1], stride=2, padding=(0, 1), name=f'downsample_{level}'
        )(x)
    x = Middle(cfg, name='middle')(x)
    x = nn.silu(layers.GroupNorm(name='norm_out')(x))
    return conv(cfg.z_channels, name='conv_out')(x).astype(jnp.float32)


class Decoder(nn.Module):
  """Latent map to image."""

  config: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    cfg = self.config
    conv = functools.partial(layers.Conv2d, dtype=jnp.dtype(cfg.dtype))
    x = conv(cfg.ch * cfg.ch_mult[-1], name='conv_in')(x)
    x = Middle(cfg, name='middle')(x)
    for level, multiple in reversed(list(enumerate(cfg.ch_mult))):
      lowest = level == len(cfg.ch_mult) - 1
      x = Level(
          cfg, cfg.ch * multiple, cfg.res_blocks + 1, cfg.attention and lowest,
          name=f'level_{level}',
      )(x)
      if level:
        x = conv(x.shape[-1], name=f'upsample_{level}')(_double(x))
    x = nn.silu(layers.GroupNorm(name='norm_out')(x))
    return conv(cfg.image_channels, name='conv_out')(x).astype(jnp.float32)


class Level(nn.Module):
  """The blocks of one resolution."""

  config: Any
  features: int
  blocks: int
  attention: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    res_block, attention = _blocks(self.config)
    for i in range(self.blocks):
      x = res_block(self.features, name=f'block_{i}')(x)
      if self.attention:
        x = attention(name=f'attention_{i}')(x)
    return x


class Middle(nn.Module):
  """The blocks between the lowest level and the latent."""

  config: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    res_block, attention = _blocks(self.config)
    x = res_block(x.shape[-1], name='block_0')(x)
    if self.config.attention:
      x = attention(name='attention_0')(x)
    return res_block(x.shape[-1], name='block_1')(x)


class ResBlock(nn.Module):
  """Two normalised convolutions around a shortcut."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    conv = functools.partial(layers.Conv2d, self.features, dtype=self.dtype)
    h = nn.silu(layers.GroupNorm(name='norm_0')(x_BxHxWxC))
    h = conv(name='conv_0')(h)
    h = nn.silu(layers.GroupNorm(name='norm_1')(h))
    h = conv(name='conv_1')(h)
    if x_BxHxWxC.shape[-1] != self.features:
      x_BxHxWxC = conv(size=1, name='shortcut')(x_BxHxWxC)
    return x_BxHxWxC + h


class Attention(nn.Module):
  """Single-head self-attention over all positions of a map."""

  dtype: Any

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    batch, height, width, channels = x_BxHxWxC.shape
    conv = functools.partial(layers.Conv2d, size=1, dtype=self.dtype)
    h = layers.GroupNorm(name='norm')(x_BxHxWxC)
    h = conv(3 * channels, name='qkv')(h)
    q_BxNxC, k_BxNxC, v_BxNxC = jnp.split(
        h.reshape(batch, height * width, 3 * channels), 3, axis=-1
    )
    logits_BxNxM = jnp.einsum(
        'bnc,bmc->bnm', q_BxNxC, k_BxNxC, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(logits_BxNxM * channels**-0.5).astype(self.dtype)
    h = jnp.einsum('bnm,bmc->bnc', weights, v_BxNxC).reshape(x_BxHxWxC.shape)
    return x_BxHxWxC + conv(channels, name='out')(h)


def _blocks(cfg: Any) -> tuple[Any, Any]:
  """Constructors of residual and attention blocks, rematerialised or not."""
  wrap = nn.remat if cfg.remat == 'full' else lambda cls: cls
  dtype = jnp.dtype(cfg.dtype)
  return (
      functools.partial(wrap(ResBlock), dtype=dtype),
      functools.partial(wrap(Attention), dtype=dtype),
  )


def _double(x_BxHxWxC: Array) -> Array:
  """Nearest-neighbour upsampling by two."""
  batch, height, width, channels = x_BxHxWxC.shape
  return jnp.broadcast_to(
      x_BxHxWxC[:, :, None, :, None, :],
      (batch, height, 2, width, 2, channels),
  ).reshape(batch, 2 * height, 2 * width, channels)
