# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The LlamaGen transformer: next-token prediction of classes or captions.

Shape letters: B batch, T condition slots, L tokens, N new slots, M slots that
they attend to, W width, H heads, D size of a head, P = D/2 rotated pairs,
F caption features, V codes.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal, TypeVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import config as config_lib
from dd_jax.kernels import attention as attention_lib
from dd_jax.model import Model, Params, platform
from dd_jax.models.layers import Dense, embed, pure, rows, stack

Array = jax.Array
Cache = Mapping[str, Array]
# Labels (B,) int32, or {'features': (B, T, F), 'mask': (B, T)}.
Condition = Array | Mapping[str, Array]

# Published sizes; `size` in a config stands for these fields.
SIZES: Mapping[str, Mapping[str, int]] = {
    'B': {'depth': 12, 'heads': 12, 'width': 768},
    'L': {'depth': 24, 'heads': 16, 'width': 1024},
    'XL': {'depth': 36, 'heads': 20, 'width': 1280},
    'XXL': {'depth': 48, 'heads': 24, 'width': 1536},
    'XXXL': {'depth': 48, 'heads': 40, 'width': 2560},
    '1B': {'depth': 22, 'heads': 32, 'width': 2048},
    '3B': {'depth': 24, 'heads': 32, 'width': 3200},
    '7B': {'depth': 32, 'heads': 32, 'width': 4096},
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and variants of a LlamaGen transformer.

  Attributes:
    num_classes: labels are 0..num_classes-1 and num_classes means no label; 0
      for a network that is conditioned on captions.
    depth: number of blocks.
    width: size of the residual stream.
    heads: attention heads; `width / heads` must be a multiple of 4.
    latent_size: side of the token grid.
    vocab_size: number of codes.
    code_dim: size of a code vector.
    caption_length: slots of a caption; without classes only.
    caption_dim: size of its features; without classes only.
    mlp_width: width of the feed-forward layers; None is 8/3 of `width`, rounded
      up to a multiple of 256.
    token_dropout: chance of dropping an input of the first block.
    dropout: chance of dropping an output of a branch.
    dtype: type of activations and of the key-value cache; parameters and
      logits are float32.
    remat: what a backward pass recomputes: nothing, blocks except for their
      matrix products, or whole blocks.
    unroll: blocks one after the other instead of a loop; None does so on CPU,
      but for single tokens.
    attention: what computes it where all slots are there at once; see
      `kernels.attention.attend`.
  """

  num_classes: int
  depth: int
  width: int
  heads: int
  latent_size: int = 16
  vocab_size: int = 16384
  code_dim: int = 8
  caption_length: int = 120
  caption_dim: int = 2048
  mlp_width: int | None = None
  token_dropout: float = 0.0
  dropout: float = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'dots', 'full'] = 'none'
  unroll: bool | None = None
  attention: attention_lib.Kind = 'auto'

  def __post_init__(self):
    counts = (
        self.depth, self.width, self.heads, self.latent_size, self.vocab_size,
        self.code_dim, self.caption_length, self.caption_dim,
        self.hidden,
    )
    if min(counts) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if self.num_classes < 0:
      raise ValueError(
          f'num_classes={self.num_classes} must not be negative; 0 is for '
          'captions'
      )
    if self.width % (4 * self.heads):
      raise ValueError(
          f'width={self.width} is not a multiple of 4 * heads='
          f'{4 * self.heads}: a quarter of each head rotates with the row'
      )
    for name in ('token_dropout', 'dropout'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be in [0, 1)')
    attention_lib.check(self.attention, self.dtype, self.width // self.heads)

  @property
  def offsets(self) -> tuple[int, ...]:
    """Tokens before each one, and the length of the sequence at the end."""
    return tuple(range(self.latent_size**2 + 1))

  @property
  def slots(self) -> int:
    """Slots of the condition, which stand before the tokens."""
    return 1 if self.num_classes else self.caption_length

  @property
  def hidden(self) -> int:
    """Width of the feed-forward layers."""
    rule = -(-(8 * self.width // 3) // 256) * 256
    return rule if self.mlp_width is None else self.mlp_width

  @property
  def init_std(self) -> float:
    """Standard deviation of initial weights."""
    return 0.02


C = TypeVar('C', bound=Config)


def make_config(cls: type[C], config: Mapping[str, Any], name: str) -> C:
  """A checked config; `size` stands for the fields of one of `SIZES`.

  Raises:
    ValueError: an unknown size, or an unknown or invalid field.
  """
  fields = dict(config)
  if (size := fields.pop('size', None)) is not None:
    if size not in SIZES:
      raise ValueError(f'{name}: size={size!r} must be one of {list(SIZES)}')
    fields = dict(SIZES[size]) | fields
  return config_lib.make(cls, fields, name)


def rotations(c: Config) -> np.ndarray:
  """Cosine and sine of every slot and rotated pair, (T + L, P, 2) float32.

  The first half of a head's pairs turns with the row of the token, the second
  with its column. Of condition slots both are 0, not a rotation at all: queries
  and keys are zero there, as in LlamaGen: autoregressive/models/gpt.py.
  """
  half = c.width // c.heads // 2
  # As in the original in float32, so that the angles are the same.
  power = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
  frequency = np.float32(1) / np.float32(10000) ** power
  angle = np.arange(c.latent_size, dtype=np.float32)[:, None] * frequency[None]
  shape = (c.latent_size, c.latent_size, len(frequency))
  grid = np.concatenate([
      np.broadcast_to(angle[:, None], shape),
      np.broadcast_to(angle[None], shape),
  ], axis=-1).reshape(-1, half)
  table = np.stack([np.cos(grid), np.sin(grid)], axis=-1)
  return np.concatenate([np.zeros((c.slots, half, 2), np.float32), table])


class Conditioner(nn.Module):
  """Class or caption in the residual stream, at the slots before the tokens."""

  config: Config

  @nn.compact
  def __call__(self, condition: Condition) -> tuple[Array, Array | None]:
    """Slots (B, T, W), and (B, T) where they hold a caption's tokens."""
    c = self.config
    check_condition(c, condition)
    if c.num_classes:
      classes = embed(c, c.num_classes + 1, 'classes').embedding
      return rows(classes, condition)[:, None], None
    # Sampling reads it by `null`, here it is only made.
    self.param(
        'null',
        nn.with_logical_partitioning(
            nn.initializers.normal(c.caption_dim**-0.5), (None, None)
        ),
        (c.caption_length, c.caption_dim),
    )
    missing = c.caption_length - condition['features'].shape[1]
    features_BxTxF = jnp.pad(
        condition['features'], ((0, 0), (missing, 0), (0, 0))
    )
    valid_BxT = jnp.pad(
        jnp.asarray(condition['mask'], bool), ((0, 0), (missing, 0))
    )
    h = dense(c, c.width, (None, 'mlp'), 'fc1')(features_BxTxF)
    h = jax.nn.gelu(h, approximate=True)
    return dense(c, c.width, ('mlp', 'embed'), 'fc2')(h), valid_BxT


class Attention(nn.Module):
  """Multi-head self-attention over new slots, or over those of a cache."""

  config: Config

  @nn.compact
  def __call__(
      self, x_BxNxW: Array, cache: Cache | None, layer: Array,
      start: Array | None, table_NxPx2: Array, mask: attention_lib.Mask | Array,
  ) -> tuple[Array, Cache | None]:
    c = self.config
    batch, n, _ = x_BxNxW.shape

    def project(name: str) -> Array:
      y = dense(c, c.width, ('embed', 'heads'), name)(x_BxNxW)
      return y.reshape(batch, n, c.heads, c.width // c.heads)

    q, k, v = project('q'), project('k'), project('v')
    q, k = _rotate(q, table_NxPx2), _rotate(k, table_NxPx2)
    if cache is not None:
      # Heads stand before slots, as the products of one query read them; the
      # other way round the whole cache would be turned for each token.
      at = (layer, 0, 0, 0 if start is None else start, 0)
      cache = cache | {
          name: jax.lax.dynamic_update_slice(
              cache[name], new.swapaxes(1, 2)[None], at
          )
          for name, new in (('k', k), ('v', v))
      }
    if start is not None:
      k, v = (
          jax.lax.dynamic_index_in_dim(
              cache[name], layer, keepdims=False
          ).swapaxes(1, 2)
          for name in ('k', 'v')
      )
    y = attention_lib.attend(q, k, v, mask, kind=c.attention)
    y = dense(c, c.width, ('heads', 'embed'), 'proj')(
        y.reshape(batch, n, c.width)
    )
    return y, cache


class Block(nn.Module):
  """Attention and a gated feed-forward branch, each normalised before."""

  config: Config

  @nn.compact
  def __call__(
      self, carry: tuple[Array, Cache | None], layer: Array,
      start: Array | None, table_NxPx2: Array, mask: attention_lib.Mask | Array,
      key: Array | None,
  ) -> tuple[tuple[Array, Cache | None], None]:
    c = self.config
    x, cache = carry

    def drop(y: Array, branch: int) -> Array:
      if key is None or not c.dropout:
        return y
      keys = jax.vmap(jax.random.fold_in, (0, None))(key, 2 * layer + branch)
      return dropout(keys, y, c.dropout)

    y, cache = Attention(c, name='attn')(
        RMSNorm(name='attn_norm')(x), cache, layer, start, table_NxPx2, mask
    )
    x += drop(y, 0)
    h = RMSNorm(name='mlp_norm')(x)
    gate = dense(c, c.hidden, ('embed', 'mlp'), 'gate')(h)
    up = dense(c, c.hidden, ('embed', 'mlp'), 'up')(h)
    down = dense(c, c.width, ('mlp', 'embed'), 'down')
    return (x + drop(down(jax.nn.silu(gate) * up), 1), cache), None


class RMSNorm(nn.Module):
  """Divides by the root mean square, in float32, and scales."""

  @nn.compact
  def __call__(self, x_BxNxW: Array) -> Array:
    scale = self.param(
        'scale', nn.with_logical_partitioning(nn.initializers.ones, ('embed',)),
        x_BxNxW.shape[-1:],
    )
    x = x_BxNxW.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x.astype(x_BxNxW.dtype) * scale.astype(x_BxNxW.dtype)[None, None]


class Transformer(nn.Module):
  """The condition and the tokens after it, or one token and a cache."""

  config: Config

  @nn.compact
  def __call__(
      self,
      condition: Condition | None,
      indices_BxN: Array,
      *,
      position: Array | None = None,
      cache: Cache | None = None,
      last: bool = False,
      key: Array | None = None,
  ) -> tuple[Array, Cache | None]:
    """Logits after each of the tokens, and the cache with their slots.

    Args:
      condition: None if the cache has it.
      indices_BxN: the first tokens or, with `position`, the one there.
      position: of the token.
      cache: see `build`.
      last: logits of the last slot only.
      key: (B,), draw what dropout drops; None keeps all.
    """
    c = self.config
    tokens = embed(c, c.vocab_size, 'token_embed').embedding
    x_BxNxW = rows(tokens, indices_BxN)
    table = jnp.asarray(rotations(c))
    if position is None:
      start = None
      prefix_BxTxW, valid_BxT = Conditioner(c, name='condition')(condition)
      x_BxNxW = jnp.concatenate([prefix_BxTxW, x_BxNxW], axis=1)
      n = x_BxNxW.shape[1]
      mask = attention_lib.causal(n, valid_BxT)
      table = table[:n]
      if cache is not None and valid_BxT is not None:
        cache = cache | {'valid': valid_BxT}
    else:
      start = c.slots + position
      seen_M = jnp.arange(cache['k'].shape[3]) <= start
      mask = seen_M[None, None, None]
      if 'valid' in cache:
        missing = len(seen_M) - c.slots
        valid_BxM = jnp.pad(
            cache['valid'], ((0, 0), (0, missing)), constant_values=True
        )
        mask = jnp.logical_and(mask, valid_BxM[:, None, None])
      table = jax.lax.dynamic_slice_in_dim(table, start, 1)
    x_BxNxW, cache = run_blocks(
        c, x_BxNxW, table, mask, start=start, cache=cache, key=key
    )
    if last or position is not None:
      x_BxNxW = x_BxNxW[:, -1:]
    else:
      x_BxNxW = x_BxNxW[:, c.slots - 1 :]
    return head(c, x_BxNxW), cache


def check_condition(c: Config, condition: Condition) -> None:
  """Raises where a condition is not of the kind or size that is expected.

  Raises:
    ValueError: labels for captions or the reverse, or a caption too long or
      with other features.
  """
  captions = isinstance(condition, Mapping)
  if captions == bool(c.num_classes):
    wanted = 'labels' if c.num_classes else 'captions, features and mask'
    raise ValueError(
        f'num_classes={c.num_classes}: the condition must be {wanted}'
    )
  if captions:
    shape, mask = condition['features'].shape, condition['mask'].shape
    if len(shape) != 3 or shape[2] != c.caption_dim or mask != shape[:2]:
      raise ValueError(
          f'features of shape {shape} and a mask of shape {mask}: expected '
          f'(B, T, {c.caption_dim}) and (B, T)'
      )
    if shape[1] > c.caption_length:
      raise ValueError(
          f'captions of {shape[1]} tokens: there are caption_length='
          f'{c.caption_length} slots; cut them'
      )


def dense(
    c: Config, features: int, axes: tuple[str | None, str | None], name: str
) -> Dense:
  """A linear map as LlamaGen has them."""
  return Dense(
      features, axes, False, nn.initializers.normal(c.init_std), dtype=c.dtype,
      name=name,
  )


def head(c: Config, x_BxNxW: Array) -> Array:
  """Logits (B, N, V), float32, from the residual stream."""
  return Dense(
      c.vocab_size, ('embed', 'vocab'), False, nn.initializers.zeros,
      name='output',
  )(RMSNorm(name='norm')(x_BxNxW))


def dropout(key_B: Array, x_BxNxW: Array, rate: float) -> Array:
  """Zeros in place of a share `rate` of the values; the others grow."""
  keep = jax.vmap(
      lambda k: jax.random.bernoulli(k, 1 - rate, x_BxNxW.shape[1:])
  )(key_B)
  return jnp.where(keep, x_BxNxW / (1 - rate), 0)


def run_blocks(
    c: Config,
    x_BxNxW: Array,
    table_NxPx2: Array,
    mask: attention_lib.Mask | Array,
    *,
    start: Array | None = None,
    cache: Cache | None = None,
    key: Array | None = None,
) -> tuple[Array, Cache | None]:
  """All blocks, with stacked parameters under `layers`.

  Args:
    c: sizes.
    x_BxNxW: slots from the first on or, with `start`, the one there.
    table_NxPx2: their rotations.
    mask: who sees whom; with a cache of more slots, (B or 1, 1, N, M).
    start: slot of the cache that attention over the cache begins to fill.
    cache: see `build`.
    key: (B,), draw what dropout drops; None keeps all.

  Returns:
    The slots after the last block, and the cache with theirs.
  """
  x_BxNxW = x_BxNxW.astype(c.dtype)
  if key is not None and c.token_dropout:
    # Blocks fold in numbers from 0 to 2 * depth - 1.
    keys = jax.vmap(jax.random.fold_in, (0, None))(key, 2 * c.depth)
    x_BxNxW = dropout(keys, x_BxNxW, c.token_dropout)
  unroll = c.unroll
  if unroll is None:
    # One token has no gradient: a loop is about as fast, and compiles sooner,
    # without copies of the weights.
    unroll = platform() == 'cpu' and start is None
  # The cache is carried, not scanned over: a token changes one slot of it, and
  # the rest is not copied.
  in_axes = (0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast)
  layers = stack(Block, c, in_axes, unroll)(c, name='layers')
  (x_BxNxW, cache), _ = layers(
      (x_BxNxW, cache), jnp.arange(c.depth), start, table_NxPx2, mask, key
  )
  return x_BxNxW, cache


def block_flops(c: Config, slots: int) -> int:
  """FLOPs of all blocks on one example, all slots attending to all."""
  dense = 2 * slots * c.width * (4 * c.width + 3 * c.hidden)
  return c.depth * (dense + 4 * slots**2 * c.width)


def condition_flops(c: Config) -> int:
  """FLOPs of bringing one condition into the residual stream."""
  if c.num_classes:
    return 0
  return 2 * c.caption_length * c.width * (c.caption_dim + c.width)


def example_condition(c: Config) -> Any:
  """Shapes and types of the condition of one example."""
  if c.num_classes:
    return jax.ShapeDtypeStruct((1,), jnp.int32)
  shape = (1, c.caption_length)
  return {
      'features': jax.ShapeDtypeStruct((*shape, c.caption_dim), jnp.float32),
      'mask': jax.ShapeDtypeStruct(shape, bool),
  }


def build(config: Mapping[str, Any]) -> Model:
  """Builds the LlamaGen transformer; a config may name a `size` of `SIZES`.

  Tokens are int32, rows of the grid first, L of them; one outside of
  [0, vocab_size) gives NaN. A condition is labels_B, int32 in [0, num_classes],
  num_classes meaning no label and others giving NaN; or, if num_classes is 0, a
  mapping of features_BxTxF and mask_BxT, of up to caption_length tokens of
  which the valid ones stand at the end. Every function takes `params` first:

  - forward(condition, indices_Bx(L-1), *, key=None) -> logits_BxLxV, teacher
    forced; dropout is on if there is a key per example
  - null(condition) -> that of no class or caption, for guidance and for
    training; where a caption is padded it is, too
  - init_cache(batch) -> cache of that many rows
  - prefill(cache, condition, indices_Bxm) -> (logits_BxV of token m, cache);
    m may be 0
  - step(cache, indices_B, position) -> (logits_BxV of the token after it,
    cache), given the token at `position`, which may be traced

  Batch and m are static. Logits are float32.

  Source: LlamaGen (arXiv 2406.06525), autoregressive/models/gpt.py.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = make_config(Config, config, 'llamagen')
  module = Transformer(c)
  length = c.offsets[-1]
  init, axes = pure(
      module, example_condition(c),
      jax.ShapeDtypeStruct((1, length - 1), jnp.int32),
  )

  def run(params: Params, *args, **kwargs) -> tuple[Array, Cache | None]:
    return module.apply({'params': params}, *args, **kwargs)

  def forward(
      params: Params, condition: Condition, indices_BxM: Array, *,
      key: Array | None = None,
  ) -> Array:
    if indices_BxM.shape[1] != length - 1:
      raise ValueError(
          f'{indices_BxM.shape[1]} tokens: expected all {length} but the last'
      )
    return run(params, condition, indices_BxM, key=key)[0]

  def null(params: Params, condition: Condition) -> Condition:
    check_condition(c, condition)
    if c.num_classes:
      return jnp.full_like(condition, c.num_classes)
    features = condition['features']
    rows_TxF = params['condition']['null'][-features.shape[1] :]
    return {
        'features': jnp.broadcast_to(rows_TxF[None], features.shape),
        'mask': condition['mask'],
    }

  def init_cache(params: Params, batch: int) -> Cache:
    del params
    # The last token is never an input.
    slots = c.slots + length - 1
    shape = (c.depth, batch, c.heads, slots, c.width // c.heads)
    cache = {name: jnp.zeros(shape, c.dtype) for name in ('k', 'v')}
    if not c.num_classes:
      cache['valid'] = jnp.zeros((batch, c.slots), bool)
    return cache

  def prefill(
      params: Params, cache: Cache, condition: Condition, indices_BxM: Array
  ) -> tuple[Array, Cache]:
    if indices_BxM.shape[1] >= length:
      raise ValueError(
          f'a prefix of {indices_BxM.shape[1]} tokens leaves nothing of '
          f'{length} to predict'
      )
    logits, cache = run(params, condition, indices_BxM, cache=cache, last=True)
    return logits[:, 0], cache

  def step(
      params: Params, cache: Cache, indices_B: Array, position: Array
  ) -> tuple[Array, Cache]:
    logits, cache = run(
        params, None, indices_B[:, None], position=position, cache=cache
    )
    return logits[:, 0], cache

  def flops() -> int:
    ends = 2 * length * c.width * c.vocab_size + condition_flops(c)
    return block_flops(c, c.slots + length - 1) + ends

  return Model(
      family='llamagen',
      config=c,
      init=init,
      fns={
          'forward': forward,
          'null': null,
          'init_cache': init_cache,
          'prefill': prefill,
          'step': step,
      },
      axes=axes,
      flops=flops,
  )


def _rotate(x_BxNxHxD: Array, table_NxPx2: Array) -> Array:
  """Turns neighbouring pairs of a head, in float32."""
  pairs = x_BxNxHxD.astype(jnp.float32).reshape(*x_BxNxHxD.shape[:-1], -1, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  cos, sin = (table_NxPx2[None, :, None, :, i] for i in range(2))
  out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.reshape(x_BxNxHxD.shape).astype(x_BxNxHxD.dtype)
