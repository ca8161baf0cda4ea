# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""CLIP: images and captions in one space (arXiv 2103.00020)."""

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

_EPSILON = 1e-5  # beside the variance


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of both towers.

  Attributes:
    image_size: side of the images.
    patch_size: side of a patch; must divide `image_size`.
    image_width: residual stream of the image tower.
    image_depth: its blocks.
    image_heads: its attention heads; must divide `image_width`.
    image_mlp_dim: its feed-forward layers.
    vocab_size: tokens; the largest ends a caption.
    context_length: most tokens of a caption, its ends included.
    text_width: residual stream of the text tower.
    text_depth: its blocks.
    text_heads: its attention heads; must divide `text_width`.
    text_mlp_dim: its feed-forward layers.
    projection_dim: size of the common space.
    activation: of both towers; 'gelu' in networks of OpenCLIP.
    dtype: type of matrix products; the rest is float32.
  """

  image_size: int
  patch_size: int
  image_width: int
  image_depth: int
  image_heads: int
  image_mlp_dim: int
  vocab_size: int
  context_length: int
  text_width: int
  text_depth: int
  text_heads: int
  text_mlp_dim: int
  projection_dim: int
  activation: Literal['quick_gelu', 'gelu'] = 'quick_gelu'
  dtype: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    values = dataclasses.asdict(self)
    if min(v for v in values.values() if not isinstance(v, str)) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    for whole, part in (
        ('image_size', 'patch_size'), ('image_width', 'image_heads'),
        ('text_width', 'text_heads'),
    ):
      if values[whole] % values[part]:
        raise ValueError(
            f'{whole}={values[whole]} is not a multiple of '
            f'{part}={values[part]}'
        )

  @property
  def patches(self) -> int:
    """Patches of an image."""
    return (self.image_size // self.patch_size) ** 2


def _size(
    patch_size: int, image: tuple[int, int, int], text: tuple[int, int],
    projection_dim: int,
) -> Mapping[str, int]:
  """Fields of a published size, from width, depth and heads of the towers."""
  width, depth, heads = image
  text_width, text_heads = text
  return MappingProxyType(dict(
      image_size=224, patch_size=patch_size, image_width=width,
      image_depth=depth, image_heads=heads, image_mlp_dim=4 * width,
      vocab_size=49408, context_length=77, text_width=text_width,
      text_depth=12, text_heads=text_heads, text_mlp_dim=4 * text_width,
      projection_dim=projection_dim,
  ))


# Sizes that OpenAI published.
SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType({
    'b32': _size(32, (768, 12, 12), (512, 8), 512),
    'b16': _size(16, (768, 12, 12), (512, 8), 512),
    'l14': _size(14, (1024, 24, 16), (768, 12), 768),
})


class LayerNorm(nn.Module):
  """Centres and divides by the deviation, then scales and shifts; float32."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale, bias = (
        self.param(name, nn.with_logical_partitioning(init, ('embed',)),
                   (x.shape[-1],))
        for name, init in (
            ('scale', nn.initializers.ones), ('bias', nn.initializers.zeros)
        )
    )
    x = x.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + _EPSILON)
    return (
        x * jnp.broadcast_to(scale, x.shape)
        + jnp.broadcast_to(bias, x.shape)
    )


class Block(nn.Module):
  """Self-attention and a feed-forward layer, each normalised before."""

  heads: int
  mlp_dim: int
  causal: bool
  activation: str
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxW: Array) -> tuple[Array, None]:
    batch, length, width = x_BxTxW.shape
    std = width**-0.5

    def dense(
        name: str, features: int, axes: tuple[str, str], x: Array
    ) -> Array:
      return Dense(
          features, axes, True, nn.initializers.normal(std), dtype=self.dtype,
          name=name,
      )(x)

    y = LayerNorm(name='attn_norm')(x_BxTxW)
    q, k, v = (
        dense(name, width, ('embed', 'heads'), y).reshape(
            batch, length, self.heads, width // self.heads
        )
        for name in 'qkv'
    )
    y = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
    x = x_BxTxW + dense(
        'proj', width, ('heads', 'embed'), y.reshape(x_BxTxW.shape)
    )
    y = dense(
        'fc1', self.mlp_dim, ('embed', 'mlp'), LayerNorm(name='mlp_norm')(x)
    )
    if self.activation == 'quick_gelu':
      y *= jax.nn.sigmoid(1.702 * y)
    else:
      y = jax.nn.gelu(y, approximate=False)
    return x + dense('fc2', width, ('mlp', 'embed'), y), None


def _blocks(depth: int, *args: Any) -> nn.Module:
  """Blocks with stacked parameters under `layers`."""
  return nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=depth,
      metadata_params={nn.PARTITION_NAME: 'layers'},
  )(*args, name='layers')


class ImageTower(nn.Module):
  """A vision transformer; the class slot is the image's vector."""

  config: Config

  @nn.compact
  def __call__(self, image_BxHxWx3: Array) -> Array:
    c = self.config
    if image_BxHxWx3.shape[1:] != (c.image_size, c.image_size, 3):
      raise ValueError(
          f'images are {image_BxHxWx3.shape[1:]}, not '
          f'{(c.image_size, c.image_size, 3)}'
      )
    batch, side, patch = len(image_BxHxWx3), c.image_size // c.patch_size, (
        c.patch_size
    )
    x = image_BxHxWx3.reshape(batch, side, patch, side, patch, 3)
    x_BxNxP = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, c.patches, -1)
    x_BxNxW = Dense(
        c.image_width, ('conv_in', 'embed'), False, dtype=c.dtype,
        name='patch_embed',
    )(x_BxNxP).astype(jnp.float32)
    normal = nn.initializers.normal(c.image_width**-0.5)
    class_W = self.param(
        'class_embed', nn.with_logical_partitioning(normal, ('embed',)),
        (c.image_width,),
    )
    first_Bx1xW = jnp.broadcast_to(class_W, (batch, 1, c.image_width))
    x_BxTxW = jnp.concatenate([first_Bx1xW, x_BxNxW], axis=1)
    x_BxTxW += _positions(c.patches + 1, c.image_width)
    x_BxTxW = LayerNorm(name='pre_norm')(x_BxTxW)
    x_BxTxW, _ = _blocks(
        c.image_depth, c.image_heads, c.image_mlp_dim, False, c.activation,
        c.dtype,
    )(x_BxTxW)
    x_BxW = LayerNorm(name='norm')(x_BxTxW[:, 0])
    return _project(c)(x_BxW).astype(jnp.float32)


class TextTower(nn.Module):
  """A causal transformer; the first end token is the caption's vector."""

  config: Config

  @nn.compact
  def __call__(self, tokens_BxT: Array) -> Array:
    c = self.config
    length = tokens_BxT.shape[1]
    if length > c.context_length:
      raise ValueError(
          f'{length} tokens are more than context_length={c.context_length}'
      )
    x_BxTxW = nn.Embed(
        c.vocab_size, c.text_width, name='embed',
        embedding_init=nn.with_logical_partitioning(
            nn.initializers.normal(0.02), ('vocab', 'embed')
        ),
    )(tokens_BxT).astype(jnp.float32)
    x_BxTxW += _positions(c.context_length, c.text_width)[:, :length]
    x_BxTxW, _ = _blocks(
        c.text_depth, c.text_heads, c.text_mlp_dim, True, c.activation,
        c.dtype,
    )(x_BxTxW)
    # The end of a caption has the largest number; padding may repeat it.
    end_B = tokens_BxT.argmax(-1)
    x_BxW = jnp.take_along_axis(x_BxTxW, end_B[:, None, None], axis=1)[:, 0]
    return _project(c)(LayerNorm(name='norm')(x_BxW)).astype(jnp.float32)


class Clip(nn.Module):
  """Both towers and the factor on their cosines."""

  config: Config

  def setup(self):
    self.image = ImageTower(self.config, name='image')
    self.text = TextTower(self.config, name='text')
    self.log_scale = self.param(
        'log_scale',
        nn.with_logical_partitioning(
            nn.initializers.constant(np.log(1 / 0.07)), ()
        ), (),
    )

  def encode_image(self, image_BxHxWx3: Array) -> Array:
    return self.image(image_BxHxWx3)

  def encode_text(self, tokens_BxT: Array) -> Array:
    return self.text(tokens_BxT)

  def __call__(self, image_BxHxWx3: Array, tokens_CxT: Array) -> Array:
    image_BxP = _unit(self.image(image_BxHxWx3))
    text_CxP = _unit(self.text(tokens_CxT))
    return jnp.exp(self.log_scale) * jnp.einsum(
        'bp,cp->bc', image_BxP, text_CxP
    )


def build(config: Mapping[str, Any]) -> Model:
  """Builds CLIP; `SIZES` has the fields of published ones.

  Images are NHWC RGB of the network's size, normalised (see
  `evals.clip_score.preprocess`). Tokens are int32; behind the first token with
  the largest number, which ends the caption, there may be anything. Every
  function takes `params` first, results are float32:

  - encode_image(image_BxHxWx3) -> (B, P), not of unit length
  - encode_text(tokens_BxT) -> (B, P), not of unit length
  - similarity(image_BxHxWx3, tokens_BxT) -> cosine (B,) of each pair
  - forward(image_BxHxWx3, tokens_CxT) -> logits (B, C), scaled cosines of all
    pairs; FLOPs are those of one pair

  Source: openai/CLIP as Hugging Face lays it out.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = config_lib.make(Config, config, 'clip')
  module = Clip(c)
  inputs = (
      jax.ShapeDtypeStruct((1, c.image_size, c.image_size, 3), jnp.float32),
      jax.ShapeDtypeStruct((1, c.context_length), jnp.int32),
  )
  init, axes = pure(module, *inputs)

  def forward(params: Params, image: Array, tokens: Array) -> Array:
    return module.apply({'params': params}, image, tokens)

  def encode_image(params: Params, image: Array) -> Array:
    return module.apply({'params': params}, image, method='encode_image')

  def encode_text(params: Params, tokens: Array) -> Array:
    return module.apply({'params': params}, tokens, method='encode_text')

  def similarity(params: Params, image: Array, tokens: Array) -> Array:
    image_BxP = _unit(encode_image(params, image))
    return (image_BxP * _unit(encode_text(params, tokens))).sum(-1)

  def flops() -> int:
    abstract = jax.eval_shape(init, jax.random.key(0))
    return count_flops(forward, abstract, *inputs)

  return Model('clip', c, init, {
      'forward': forward, 'encode_image': encode_image,
      'encode_text': encode_text, 'similarity': similarity,
  }, axes, flops)


def _positions(length: int, width: int) -> Array:
  """A learned vector for each position, (1, T, W)."""
  return nn.Embed(
      length, width, name='pos_embed',
      embedding_init=nn.with_logical_partitioning(
          nn.initializers.normal(0.01), (None, 'embed')
      ),
  ).embedding[None]


def _project(c: Config) -> Dense:
  return Dense(
      c.projection_dim, ('embed', None), False, dtype=c.dtype, name='proj'
  )


def _unit(x_BxP: Array) -> Array:
  return x_BxP / jnp.linalg.norm(x_BxP, axis=-1, keepdims=True)
