# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The VQ tokenizer of LlamaGen: images to grids of codes and back.

Shape letters: B batch, H, W image sides, h side of the token grid, C code size,
V codes, L = h * h tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import autoencoder, layers
from dd_jax.ops import vq

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the tokenizer (LlamaGen: tokenizer/tokenizer_image/vq_model.py).

  The defaults are those of VQ-16.

  Attributes:
    image_size: side of the square image, pixels.
    image_channels: 3, or 1 for grayscale.
    ch: channels at full resolution.
    ch_mult: channel factor of each level; each level but the last halves the
      resolution.
    res_blocks: residual blocks per level of the encoder; the decoder has one
      more.
    attention: self-attention after every block of the lowest level and between
      the two middle blocks.
    z_channels: channels between the encoder or decoder and the code.
    code_dim: size of a code.
    vocab_size: number of codes.
    beta: weight of the encoder's term in the commitment loss.
    dtype: type of encoder and decoder activations; quantization is float32.
    remat: 'full' recomputes every block in the backward pass.
  """

  image_size: int
  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  z_channels: int = 256
  code_dim: int = 8
  vocab_size: int = 16384
  image_channels: int = 3
  res_blocks: int = 2
  attention: bool = True
  beta: float = 0.25
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'full'] = 'none'

  def __post_init__(self):
    counts = (
        self.image_size, self.image_channels, self.ch, *self.ch_mult,
        self.res_blocks, self.z_channels, self.code_dim, self.vocab_size,
    )
    if min(counts) < 1 or not self.ch_mult:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    stride = 2 ** (len(self.ch_mult) - 1)
    if self.image_size % stride:
      raise ValueError(
          f'image_size={self.image_size} is not a multiple of '
          f'2**(len(ch_mult) - 1) = {stride}'
      )

  @property
  def latent_size(self) -> int:
    """Side of the token grid."""
    return self.image_size // 2 ** (len(self.ch_mult) - 1)


def build(config: Mapping[str, Any]) -> Model:
  """Builds the tokenizer; every function of `Model.fns` takes `params` first.

  - encode(image_BxHxWxC) -> latent_BxhxhxC, not normalised
  - to_indices(image_BxHxWxC) -> indices_BxL
  - forward(image_BxHxWxC) -> training outputs, see `Tokenizer.forward`
  - codebook() -> codes_VxC
  - codes(indices_BxL) -> codes_BxLxC; NaN for an index outside of [0, V)
  - accumulate(codes_BxLxC) -> map_BxhxhxC, the codes at their places
  - decode(map_BxhxhxC) -> image_BxHxWxC, not clamped

  Codes have length 1, whatever the length of the stored vectors. Images are in
  [-1, 1], NHWC. Indices are int32, rows of the grid first. Everything returned
  is float32.

  Raises:
    ValueError: on unknown, missing or inconsistent fields.
  """
  cfg = config_lib.make(Config, config, 'llamagen_vq')
  image = jax.ShapeDtypeStruct(
      (1, cfg.image_size, cfg.image_size, cfg.image_channels), jnp.float32
  )
  return layers.counted('llamagen_vq', Tokenizer(cfg), [image], (
      'forward', 'encode', 'to_indices', 'codebook', 'codes', 'accumulate',
      'decode',
  ))


class Tokenizer(nn.Module):
  """Encoder, quantizer on the unit sphere, decoder."""

  config: Config

  def setup(self):
    cfg = self.config
    # Which code is nearest must not depend on the platform's fast products.
    conv = functools.partial(
        layers.Conv2d, size=1, precision=jax.lax.Precision.HIGHEST
    )
    self.encoder = autoencoder.Encoder(cfg, name='encoder')
    self.decoder = autoencoder.Decoder(cfg, name='decoder')
    self.quant_conv = conv(cfg.code_dim, name='quant_conv')
    self.post_quant_conv = conv(cfg.z_channels, name='post_quant_conv')
    self.embedding = self.param(
        'embedding',
        nn.with_logical_partitioning(_on_sphere, (None, 'code')),
        (cfg.vocab_size, cfg.code_dim),
    )

  def encode(self, image_BxHxWxC: Array) -> Array:
    return self.quant_conv(self.encoder(image_BxHxWxC))

  def decode(self, map_BxhxhxC: Array) -> Array:
    return self.decoder(self.post_quant_conv(map_BxhxhxC))

  def codebook(self) -> Array:
    return layers.unit(self.embedding)

  def codes(self, indices_BxL: Array) -> Array:
    return layers.rows(self.codebook(), indices_BxL)

  def to_indices(self, image_BxHxWxC: Array) -> Array:
    return self._nearest(layers.unit(self.encode(image_BxHxWxC)))

  def accumulate(self, codes_BxLxC: Array) -> Array:
    size = self.config.latent_size
    return codes_BxLxC.reshape(-1, size, size, self.config.code_dim)

  def forward(self, image_BxHxWxC: Array) -> dict[str, Array]:
    """What training needs (LlamaGen: VectorQuantizer.forward).

    Returns:
      reconstruction: (B, H, W, C), its gradient passed straight through to the
        encoder.
      commitment: scalar, beta * |sg(q) - z|^2 + |q - sg(z)|^2 with z the
        latent and q its code, both of length 1. The second term trains the
        codes. The release's entropy term has weight 0 and is left out.
      indices: (B, L) int32.
      counts: (1, V) int32, how often each code was used.
      latent: (B, h, h, C) of length 1, gradient stopped.
      targets: the same as [(B, L, C)], where to move unused codes to.
    """
    cfg = self.config
    latent_BxhxhxC = layers.unit(self.encode(image_BxHxWxC))
    fixed_BxhxhxC = jax.lax.stop_gradient(latent_BxhxhxC)
    indices_BxL = self._nearest(fixed_BxhxhxC)
    codes_BxhxhxC = self.accumulate(self.codes(indices_BxL))
    to_latent = jax.lax.stop_gradient(codes_BxhxhxC) - latent_BxhxhxC
    to_codes = codes_BxhxhxC - fixed_BxhxhxC
    return {
        'reconstruction': self.decode(
            vq.straight_through(latent_BxhxhxC, codes_BxhxhxC)
        ),
        'commitment': (
            cfg.beta * jnp.square(to_latent).mean()
            + jnp.square(to_codes).mean()
        ),
        'indices': indices_BxL,
        'counts': vq.count_codes(indices_BxL.reshape(-1), cfg.vocab_size)[None],
        'latent': fixed_BxhxhxC,
        'targets': [fixed_BxhxhxC.reshape(*indices_BxL.shape, -1)],
    }

  def _nearest(self, latent_BxhxhxC: Array) -> Array:
    """Index of the nearest code of each place, (B, L) int32."""
    flat_NxC = latent_BxhxhxC.reshape(-1, self.config.code_dim)
    index_N = vq.nearest_code(flat_NxC, self.codebook())
    return index_N.reshape(latent_BxhxhxC.shape[0], -1)


def _on_sphere(key: Array, shape: tuple[int, ...]) -> Array:
  """As in the original: uniform in a cube, then scaled to length 1."""
  return layers.unit(jax.random.uniform(key, shape, minval=-1, maxval=1))
