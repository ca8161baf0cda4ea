# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The multi-scale VQ-VAE of VAR: images to token pyramids and back.

Shape letters: B batch, H, W image sides, h side of the latent map, Z code size,
V codes, K scales, n tokens of a scale, L tokens of all scales.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from fractions import Fraction
import functools
import itertools
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Model
from dd_jax.models import autoencoder, layers
from dd_jax.ops import resize, vq

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the VQ-VAE (VAR: models/vqvae.py, models/quant.py).

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
    z_channels: size of a code.
    vocab_size: number of codes, shared by all scales.
    patch_nums: side of the token map of every scale, ending with the latent's;
      a side that comes again quantizes what the first time left.
    phi_count: convolutions shared by the scales.
    phi_ratio: share of the convolution in phi(h) = (1-r) h + r conv(h).
    beta: weight of the encoder's term in the commitment loss.
    dtype: type of encoder and decoder activations; quantization is float32.
    remat: 'full' recomputes every block in the backward pass.
  """

  image_size: int
  ch: int
  ch_mult: tuple[int, ...]
  z_channels: int
  vocab_size: int
  patch_nums: tuple[int, ...]
  image_channels: int = 3
  res_blocks: int = 2
  attention: bool = True
  phi_count: int = 4
  phi_ratio: float = 0.5
  beta: float = 0.25
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'full'] = 'none'

  def __post_init__(self):
    counts = (
        self.image_size, self.image_channels, self.ch, *self.ch_mult,
        self.res_blocks, self.z_channels, self.vocab_size, *self.patch_nums,
        self.phi_count,
    )
    if min(counts) < 1 or not self.ch_mult or not self.patch_nums:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if any(a > b for a, b in itertools.pairwise(self.patch_nums)):
      raise ValueError(f'patch_nums must not decrease: {self.patch_nums}')
    stride = 2 ** (len(self.ch_mult) - 1)
    if self.patch_nums[-1] * stride != self.image_size:
      raise ValueError(
          f'patch_nums ends with {self.patch_nums[-1]}, but image_size '
          f'{self.image_size} / 2**(len(ch_mult) - 1) = '
          f'{self.image_size / stride:g}: make them equal'
      )

  @property
  def latent_size(self) -> int:
    return self.patch_nums[-1]

  @property
  def offsets(self) -> tuple[int, ...]:
    """Where each scale's tokens start; the last entry is L."""
    return tuple(
        sum(n * n for n in self.patch_nums[:k])
        for k in range(len(self.patch_nums) + 1)
    )


def build(config: Mapping[str, Any]) -> Model:
  """Builds the VQ-VAE; every function of `Model.fns` takes `params` first.

  - encode(image_BxHxWxC) -> latent_BxhxhxZ
  - to_indices(image_BxHxWxC) -> indices_BxL
  - latent_to_indices(latent_BxhxhxZ) -> indices_BxL
  - forward(image_BxHxWxC, scales_B=None) -> training outputs, see
    `VQVAE.forward`
  - codebook() -> codes_VxZ
  - codes(indices_BxL) -> codes_BxLxZ
  - accumulate(codes_BxLxZ) -> f_hat_BxhxhxZ
  - var_input(codes_BxLxZ) -> maps_Bx(L-1)xZ, one token fewer with one scale
  - advance(f_hat_BxhxhxZ, codes_BxnxZ, scale) -> (f_hat, next_BxmxZ or None)
  - decode(f_hat_BxhxhxZ) -> image_BxHxWxC, not clamped

  Images are in [-1, 1], NHWC. Indices are int32, scales concatenated from
  coarse to fine, rows of a scale first. Everything returned is float32.

  Raises:
    ValueError: on unknown, missing or inconsistent fields.
  """
  cfg = config_lib.make(Config, config, 'vqvae')
  image = jax.ShapeDtypeStruct(
      (1, cfg.image_size, cfg.image_size, cfg.image_channels), jnp.float32
  )
  return layers.counted('vqvae', VQVAE(cfg), [image], (
      'forward', 'encode', 'to_indices', 'latent_to_indices', 'codebook',
      'codes', 'accumulate', 'var_input', 'advance', 'decode',
  ))


def phi_table(scales: int, count: int) -> tuple[int, ...]:
  """Which of `count` phi convolutions each scale uses.

  The tick nearest to the scale's position in [0, 1] among `count` evenly spaced
  ones, whose margin to either end is 1/3 of 1/count for four and 1/2 for other
  counts (VAR: models/quant.py, PhiPartiallyShared). Exact arithmetic: with ten
  scales two ties occur, and rounding takes the upper tick in the original.
  """
  margin = Fraction(1, (3 if count == 4 else 2) * count)
  step = (1 - 2 * margin) / max(count - 1, 1)
  ticks = [margin + i * step for i in range(count)]
  position = [Fraction(k, max(scales - 1, 1)) for k in range(scales)]
  return tuple(
      min(range(count), key=lambda i: (abs(ticks[i] - p), -i))
      for p in position
  )


class VQVAE(nn.Module):
  """Encoder, residual quantizer over scales, decoder."""

  config: Config

  def setup(self):
    cfg = self.config
    # Which code is nearest must not depend on the platform's fast products.
    conv = functools.partial(
        layers.Conv2d, cfg.z_channels, precision=jax.lax.Precision.HIGHEST
    )
    self.encoder = autoencoder.Encoder(cfg, name='encoder')
    self.decoder = autoencoder.Decoder(cfg, name='decoder')
    self.quant_conv = conv(name='quant_conv')
    self.post_quant_conv = conv(name='post_quant_conv')
    self.phis = [conv(name=f'phi_{i}') for i in range(cfg.phi_count)]
    self.embedding = self.param(
        'embedding',
        nn.with_logical_partitioning(_around_zero, (None, 'code')),
        (cfg.vocab_size, cfg.z_channels),
    )

  def encode(self, image_BxHxWxC: Array) -> Array:
    return self.quant_conv(self.encoder(image_BxHxWxC))

  def decode(self, f_hat_BxhxhxZ: Array) -> Array:
    return self.decoder(self.post_quant_conv(f_hat_BxhxhxZ))

  def codebook(self) -> Array:
    # Parameters may be of half precision.
    return jnp.asarray(self.embedding, jnp.float32)

  def codes(self, indices_BxL: Array) -> Array:
    return self.codebook()[indices_BxL]

  def to_indices(self, image_BxHxWxC: Array) -> Array:
    return self.latent_to_indices(self.encode(image_BxHxWxC))

  def latent_to_indices(self, latent_BxhxhxZ: Array) -> Array:
    return jnp.concatenate(self._quantize(latent_BxhxhxZ)[0], axis=1)

  def forward(
      self, image_BxHxWxC: Array, scales_B: Array | None = None
  ) -> dict[str, Array]:
    """What training needs (VAR: models/quant.py, VectorQuantizer2.forward).

    Args:
      image_BxHxWxC: in [-1, 1].
      scales_B: int32 in [1, K], how many scales, from the coarsest on, each
        image is decoded from; None for all.

    Returns:
      reconstruction: (B, H, W, C), its gradient passed straight through to the
        encoder.
      commitment: scalar; mean over scales of beta * |sg(f_k) - f|^2 +
        |f_k - sg(f)|^2 with f the latent and f_k its approximation by the
        scales up to k. The second term trains the codes and phi.
      indices: (B, L) int32.
      counts: (K, V) int32, how often each scale used each code.
      latent: (B, h, h, Z), gradient stopped.
      targets: (B, n, Z) for each scale, gradient stopped: what its tokens stand
        for, and where to move unused codes to.
    """
    cfg = self.config
    latent_BxhxhxZ = self.encode(image_BxHxWxC)
    fixed_BxhxhxZ = jax.lax.stop_gradient(latent_BxhxhxZ)
    if self.is_initializing():  # checkpoints hold phis that no scale uses too
      for phi in self.phis:
        phi(latent_BxhxhxZ)
    indices, targets, partial_sums = self._quantize(latent_BxhxhxZ)
    decoded_BxhxhxZ = partial_sums[-1]
    if scales_B is not None:
      rows_B = jnp.arange(len(scales_B))
      decoded_BxhxhxZ = jnp.stack(partial_sums)[scales_B - 1, rows_B]
    commitment = 0.0
    for f_hat_BxhxhxZ in partial_sums:
      to_latent = jax.lax.stop_gradient(f_hat_BxhxhxZ) - latent_BxhxhxZ
      to_codes = f_hat_BxhxhxZ - fixed_BxhxhxZ
      commitment += cfg.beta * jnp.square(to_latent).mean()
      commitment += jnp.square(to_codes).mean()
    return {
        'reconstruction': self.decode(
            vq.straight_through(latent_BxhxhxZ, decoded_BxhxhxZ)
        ),
        'commitment': commitment / len(cfg.patch_nums),
        'indices': jnp.concatenate(indices, axis=1),
        'counts': jnp.stack(
            [vq.count_codes(i.reshape(-1), cfg.vocab_size) for i in indices]
        ),
        'latent': fixed_BxhxhxZ,
        'targets': targets,
    }

  def accumulate(self, codes_BxLxZ: Array) -> Array:
    f_hat = self._zeros(codes_BxLxZ)
    for scale in range(len(self.config.patch_nums)):
      f_hat, _ = self.advance(f_hat, self._of(codes_BxLxZ, scale), scale)
    return f_hat

  def var_input(self, codes_BxLxZ: Array) -> Array:
    f_hat, maps = self._zeros(codes_BxLxZ), [codes_BxLxZ[:, :0]]
    for scale in range(len(self.config.patch_nums) - 1):
      f_hat, following = self.advance(
          f_hat, self._of(codes_BxLxZ, scale), scale
      )
      maps.append(following)
    return jnp.concatenate(maps, axis=1)

  def advance(
      self, f_hat_BxhxhxZ: Array, codes_BxnxZ: Array, scale: int
  ) -> tuple[Array, Array | None]:
    sizes = self.config.patch_nums
    f_hat_BxhxhxZ += self._upsample(codes_BxnxZ, scale)
    if scale == len(sizes) - 1:
      return f_hat_BxhxhxZ, None
    following = resize.area(f_hat_BxhxhxZ, sizes[scale + 1])
    return f_hat_BxhxhxZ, _flatten(following)

  def _quantize(
      self, latent_BxhxhxZ: Array
  ) -> tuple[list[Array], list[Array], list[Array]]:
    """Indices and targets of every scale, and the sums of those up to it."""
    residual = jax.lax.stop_gradient(latent_BxhxhxZ)
    f_hat = self._zeros(latent_BxhxhxZ)
    indices, targets, partial_sums = [], [], []
    for scale, size in enumerate(self.config.patch_nums):
      z_BxnxZ = _flatten(resize.area(residual, size))
      index_Bxn = vq.nearest_code(
          z_BxnxZ.reshape(-1, z_BxnxZ.shape[-1]), self.codebook()
      ).reshape(z_BxnxZ.shape[:2])
      update = self._upsample(self.codes(index_Bxn), scale)
      f_hat += update
      residual -= jax.lax.stop_gradient(update)
      indices.append(index_Bxn)
      targets.append(z_BxnxZ)
      partial_sums.append(f_hat)
    return indices, targets, partial_sums

  def _upsample(self, codes_BxnxZ: Array, scale: int) -> Array:
    """phi_k of one scale's codes, spread over the latent map."""
    cfg = self.config
    size = cfg.patch_nums[scale]
    phi = self.phis[phi_table(len(cfg.patch_nums), cfg.phi_count)[scale]]
    codes_BxsxsxZ = codes_BxnxZ.reshape(-1, size, size, cfg.z_channels)
    h_BxhxhxZ = resize.bicubic(codes_BxsxsxZ, cfg.latent_size)
    return (1 - cfg.phi_ratio) * h_BxhxhxZ + cfg.phi_ratio * phi(h_BxhxhxZ)

  def _of(self, codes_BxLxZ: Array, scale: int) -> Array:
    start, stop = self.config.offsets[scale : scale + 2]
    return codes_BxLxZ[:, start:stop]

  def _zeros(self, like: Array) -> Array:
    size = self.config.latent_size
    return jnp.zeros((like.shape[0], size, size, like.shape[-1]), jnp.float32)


def _around_zero(key: Array, shape: tuple[int, ...]) -> Array:
  """Uniform within 1/V: codes that start close together all get used.

  Of codes as large as the latents the one nearest to zero takes nearly all.
  """
  limit = 1 / shape[0]
  return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


def _flatten(x_BxsxsxZ: Array) -> Array:
  return x_BxsxsxZ.reshape(x_BxsxsxZ.shape[0], -1, x_BxsxsxZ.shape[-1])
