# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The text encoder of T5 v1.1 and flan-t5 (arXiv 1910.10683, 2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from types import MappingProxyType
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import config as config_lib
from dd_jax.model import Model, Params
from dd_jax.models.layers import Dense, count_flops, pure

Array = jax.Array

_EPSILON = 1e-6  # beside the mean square
_LENGTH = 120  # tokens that FLOPs are stated for: captions of LlamaGen


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of the encoder.

  Attributes:
    vocab_size: rows of the embedding, padding and unused ones included.
    width: size of the residual stream and of the features.
    depth: number of blocks.
    heads: attention heads.
    head_dim: size of a head; their total need not be `width`.
    mlp_dim: size of the gated feed-forward layer.
    buckets: classes of relative positions, half of them for each side.
    max_distance: distance from which on all positions share a class.
    dtype: type of matrix products; the residual stream, the norms and the
      features are float32.
  """

  vocab_size: int
  width: int
  depth: int
  heads: int
  head_dim: int
  mlp_dim: int
  buckets: int = 32
  max_distance: int = 128
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    sizes = (
        self.vocab_size, self.width, self.depth, self.heads, self.head_dim,
        self.mlp_dim,
    )
    if min(sizes) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if self.buckets < 4 or self.buckets % 4:
      raise ValueError(f'buckets={self.buckets} must be a multiple of 4')
    if self.max_distance <= self.buckets // 4:
      raise ValueError(
          f'max_distance={self.max_distance} must be over a quarter of '
          f'buckets={self.buckets}'
      )


def _size(
    width: int, depth: int, heads: int, mlp_dim: int
) -> Mapping[str, int]:
  return MappingProxyType(dict(
      vocab_size=32128, width=width, depth=depth, heads=heads, head_dim=64,
      mlp_dim=mlp_dim,
  ))


# Published sizes of flan-t5 and T5 v1.1.
SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType({
    'small': _size(512, 8, 6, 1024),
    'base': _size(768, 12, 12, 2048),
    'large': _size(1024, 24, 16, 2816),
    'xl': _size(2048, 24, 32, 5120),
    'xxl': _size(4096, 24, 64, 10240),
})


class RMSNorm(nn.Module):
  """Divides by the root mean square, then scales; float32."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param(
        'scale', nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
        (x.shape[-1],),
    )
    x = x.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _EPSILON)
    return x * jnp.broadcast_to(scale, x.shape)


class Block(nn.Module):
  """Self-attention and a gated feed-forward layer, each normalised before."""

  config: Config

  @nn.compact
  def __call__(
      self, x_BxTxW: Array, bias_1xHxTxT: Array, mask_Bx1x1xT: Array
  ) -> tuple[Array, None]:
    c = self.config
    batch, length, _ = x_BxTxW.shape
    inner = c.heads * c.head_dim

    def dense(
        name: str, features: int, axes: tuple[str, str], std: float, x: Array
    ) -> Array:
      return Dense(
          features, axes, False, nn.initializers.normal(std), dtype=c.dtype,
          name=name,
      )(x)

    y = RMSNorm(name='attn_norm')(x_BxTxW)
    std = c.width**-0.5
    q, k, v = (
        dense(name, inner, ('embed', 'heads'), s, y).reshape(
            batch, length, c.heads, c.head_dim
        )
        for name, s in (('q', std * c.head_dim**-0.5), ('k', std), ('v', std))
    )
    # T5 does not divide logits by the root of the head's size.
    y = jax.nn.dot_product_attention(
        q, k, v, bias=bias_1xHxTxT.astype(c.dtype), mask=mask_Bx1x1xT,
        scale=1.0,
    ).reshape(batch, length, inner)
    x = x_BxTxW + dense('o', c.width, ('heads', 'embed'), inner**-0.5, y)
    y = RMSNorm(name='mlp_norm')(x)
    gate = dense('gate', c.mlp_dim, ('embed', 'mlp'), std, y)
    up = dense('up', c.mlp_dim, ('embed', 'mlp'), std, y)
    y = dense(
        'down', c.width, ('mlp', 'embed'), c.mlp_dim**-0.5,
        jax.nn.gelu(gate, approximate=True) * up,
    )
    return x + y, None


class Encoder(nn.Module):
  """Tokens and their mask to features."""

  config: Config

  @nn.compact
  def __call__(self, tokens_BxT: Array, mask_BxT: Array) -> Array:
    c = self.config
    x_BxTxW = nn.Embed(
        c.vocab_size, c.width, name='embed',
        embedding_init=nn.with_logical_partitioning(
            nn.initializers.normal(1.0), ('vocab', 'embed')
        ),
    )(tokens_BxT).astype(jnp.float32)
    classes_TxT = buckets(tokens_BxT.shape[1], c.buckets, c.max_distance)
    bias_TxTxH = nn.Embed(
        c.buckets, c.heads, name='relative_bias',
        embedding_init=nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), (None, 'heads')
        ),
    )(jnp.asarray(classes_TxT))
    blocks = nn.scan(
        Block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=nn.broadcast,
        length=c.depth,
        metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c, name='layers')
    x_BxTxW, _ = blocks(
        x_BxTxW, bias_TxTxH.transpose(2, 0, 1)[None], mask_BxT[:, None, None]
    )
    x_BxTxW = RMSNorm(name='norm')(x_BxTxW)
    return jnp.where(mask_BxT[:, :, None], x_BxTxW, 0.0)


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
  """Classes (T, T) int32 of the relative positions of keys (columns).

  Half of the classes are for keys behind the query. Of each half, small
  distances have a class each and larger ones share classes by their logarithm.
  """
  half = count // 2
  exact = half // 2
  gap_TxT = np.arange(length)[None] - np.arange(length)[:, None]
  distance_TxT = np.abs(gap_TxT)
  # float32 as in the original, where rounding may decide at a border.
  ratio_TxT = np.maximum(distance_TxT, 1).astype(np.float32) / exact
  logs_TxT = np.log(ratio_TxT) / np.float32(np.log(max_distance / exact))
  far_TxT = exact + (logs_TxT * (half - exact)).astype(np.int32)
  class_TxT = np.where(
      distance_TxT < exact, distance_TxT, np.minimum(far_TxT, half - 1)
  )
  return (class_TxT + half * (gap_TxT > 0)).astype(np.int32)


def build(config: Mapping[str, Any]) -> Model:
  """Builds the encoder; `SIZES` has the fields of published ones.

  Its functions are `encode(params, tokens_BxT, mask_BxT) -> features_BxTxW`,
  float32, and `forward`, the same. Tokens are int32 in [0, vocab_size), the
  mask is True where a token counts; the others are seen by nobody and their
  features are zero. FLOPs are those of 120 tokens.

  Source: T5 (google-research/text-to-text-transfer-transformer) as Hugging
  Face lays it out.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = config_lib.make(Config, config, 't5')
  module = Encoder(c)
  inputs = (
      jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32),
      jax.ShapeDtypeStruct((1, _LENGTH), jnp.bool),
  )
  init, axes = pure(module, *inputs)

  def encode(params: Params, tokens_BxT: Array, mask_BxT: Array) -> Array:
    return module.apply({'params': params}, tokens_BxT, mask_BxT)

  def flops() -> int:
    abstract = jax.eval_shape(init, jax.random.key(0))
    return count_flops(encode, abstract, *inputs)

  return Model(
      't5', c, init, {'forward': encode, 'encode': encode}, axes, flops
  )
