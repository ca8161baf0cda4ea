# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The VAR transformer: class-conditional next-scale prediction."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import config as config_lib
from dd_jax.kernels import attention as attention_lib
from dd_jax.model import Model, Params, platform
from dd_jax.models.layers import Dense, embed, modulate, pure, rows, stack, unit

Array = jax.Array
Cache = Mapping[str, Array]

_MOST_UNROLLED = 8  # blocks


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and variants of a VAR transformer.

  Attributes:
    num_classes: labels are 0..num_classes-1; num_classes means no label.
    depth: number of blocks.
    width: size of the residual stream.
    heads: attention heads; must divide `width`.
    patch_nums: side of the token grid of each scale, coarsest first; a side
      may come again.
    vocab_size: number of codes.
    code_dim: size of a code vector.
    shared_aln: one modulation layer for all blocks, plus an offset per block.
    attn_l2_norm: attention by cosine similarity with a learned temperature.
    mlp_ratio: width of the feed-forward layer over `width`.
    gamma_init: factor on the initial residual gates.
    drop_path: chance of skipping the last block's branches; grows linearly
      from 0 at the first block.
    dtype: type of activations and of the key-value cache; parameters and
      logits are float32.
    remat: what a backward pass recomputes: nothing, blocks except for their
      matrix products, or whole blocks.
    unroll: blocks one after the other instead of a loop; None does so on CPU
      where they are few.
    attention: what computes it where all slots are there at once; see
      `kernels.attention.attend`.
  """

  num_classes: int
  depth: int
  width: int
  heads: int
  patch_nums: tuple[int, ...]
  vocab_size: int
  code_dim: int
  shared_aln: bool = False
  attn_l2_norm: bool = True
  mlp_ratio: int = 4
  gamma_init: float = 1e-5
  drop_path: float = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['none', 'dots', 'full'] = 'none'
  unroll: bool | None = None
  attention: attention_lib.Kind = 'auto'

  def __post_init__(self):
    counts = (
        self.num_classes, self.depth, self.width, self.heads, self.vocab_size,
        self.code_dim, self.mlp_ratio,
    )
    if min(counts) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if self.width % self.heads:
      raise ValueError(
          f'width={self.width} is not a multiple of heads={self.heads}'
      )
    sizes = self.patch_nums
    if sizes[:1] != (1,) or list(sizes) != sorted(sizes):
      raise ValueError(
          f'patch_nums={sizes} must start with 1 and not decrease'
      )
    if not 0 <= self.drop_path < 1:
      raise ValueError(f'drop_path={self.drop_path} must be in [0, 1)')
    attention_lib.check(self.attention, self.dtype, self.width // self.heads)

  @property
  def offsets(self) -> tuple[int, ...]:
    """Tokens before each scale, and the length of the sequence at the end."""
    return (0, *np.cumsum(np.square(self.patch_nums)).tolist())

  @property
  def levels(self) -> np.ndarray:
    """Scale of each token, (L,)."""
    return np.repeat(np.arange(len(self.patch_nums)), np.diff(self.offsets))

  @property
  def init_std(self) -> float:
    """Standard deviation of initial weights."""
    # VAR truncates at +-2 in absolute terms, which never binds.
    return (3 * self.width) ** -0.5


class Attention(nn.Module):
  """Multi-head self-attention over new slots and, if given, a cache."""

  config: Config
  start: int

  @nn.compact
  def __call__(
      self, x_BxNxW: Array, cache: Cache | None, mask: attention_lib.Mask | None
  ) -> tuple[Array, Cache | None]:
    c = self.config
    batch, n, _ = x_BxNxW.shape

    def project(name: str, use_bias: bool) -> Array:
      y = Dense(
          c.width, ('embed', 'heads'), use_bias,
          nn.initializers.normal(c.init_std), dtype=c.dtype, name=name,
      )(x_BxNxW)
      return y.reshape(batch, n, c.heads, c.width // c.heads)

    q, k, v = project('q', True), project('k', False), project('v', True)
    if c.attn_l2_norm:
      log_scale_H = self.param(
          'log_scale',
          nn.with_logical_partitioning(
              nn.initializers.constant(np.log(4.0)), (None,)
          ),
          (c.heads,),
      )
      scale_H = jnp.exp(jnp.minimum(log_scale_H, np.log(100.0)))
      q = (unit(q) * scale_H[None, None, :, None]).astype(c.dtype)
      k = unit(k).astype(c.dtype)
      scale = 1.0
    else:
      scale = 0.25 * (c.width // c.heads) ** -0.5  # VAR: models/basic_var.py
    if cache is not None:
      stop = self.start + n
      cache = {
          name: cache[name].at[:, self.start : stop].set(new)
          for name, new in (('k', k), ('v', v))
      }
      k, v = cache['k'][:, :stop], cache['v'][:, :stop]
    y = attention_lib.attend(q, k, v, mask, scale=scale, kind=c.attention)
    std = c.init_std / np.sqrt(2 * c.depth)
    y = Dense(
        c.width, ('heads', 'embed'), True, nn.initializers.normal(std),
        dtype=c.dtype, name='proj',
    )(y.reshape(batch, n, c.width))
    return y, cache


class Block(nn.Module):
  """Attention and feed-forward branches, modulated and gated by the class."""

  config: Config
  start: int

  @nn.compact
  def __call__(
      self,
      x_BxNxW: Array,
      cache: Cache | None,
      keep_Bx2: Array | None,
      cond: Array,
      mask: attention_lib.Mask | None,
      extra: Any,
  ) -> tuple[Array, Cache | None]:
    c = self.config
    if c.shared_aln:
      std_6x1 = _ada_gains(c)[:, None] * c.width**-0.5
      offset_6xW = self.param(
          'ada_offset',
          nn.with_logical_partitioning(
              lambda key, shape: std_6x1 * jax.random.normal(key, shape),
              (None, 'embed'),
          ),
          (6, c.width),
      )
      ada = cond + offset_6xW[None]
    else:
      ada = modulation(c, cond, _ada_gains(c), 'ada')
    gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.split(ada, 6, axis=1)
    if keep_Bx2 is not None:
      gamma1 *= keep_Bx2[:, :1, None]
      gamma2 *= keep_Bx2[:, 1:, None]
    y, cache = Attention(c, self.start, name='attn')(
        modulate(x_BxNxW, scale1, shift1), cache, mask
    )
    x = x_BxNxW + (gamma1 * y).astype(c.dtype)
    x = self.between(x, extra)
    y = Dense(
        c.mlp_ratio * c.width, ('embed', 'mlp'), True,
        nn.initializers.normal(c.init_std), dtype=c.dtype, name='fc1',
    )(modulate(x, scale2, shift2))
    std = c.init_std / np.sqrt(2 * c.depth)
    y = Dense(
        c.width, ('mlp', 'embed'), True, nn.initializers.normal(std),
        dtype=c.dtype, name='fc2',
    )(jax.nn.gelu(y, approximate=True))
    return x + (gamma2 * y).astype(c.dtype), cache

  def between(self, x_BxNxW: Array, extra: Any) -> Array:
    """What happens to the residual stream between the two branches."""
    del extra
    return x_BxNxW


class Head(nn.Module):
  """Modulated normalisation and logits, both float32."""

  config: Config

  @nn.compact
  def __call__(self, x_BxNxW: Array, cond_BxW: Array) -> Array:
    c = self.config
    ada = modulation(c, cond_BxW, np.full(2, 0.5), 'ada', jnp.float32)
    return Dense(
        c.vocab_size, ('embed', 'vocab'), True,
        nn.initializers.normal(0.02 * c.init_std), name='logits',
    )(modulate(x_BxNxW, *jnp.split(ada, 2, axis=1)))


class Transformer(nn.Module):
  """Slots `start` to `start + n` of the sequence, full or with a cache."""

  config: Config

  @nn.compact
  def __call__(
      self,
      labels_B: Array,
      maps_BxMxC: Array | None,
      *,
      start: int = 0,
      mask: attention_lib.Mask | None = None,
      cache: Cache | None = None,
      key: Array | None = None,
  ) -> tuple[Array, Cache | None]:
    c = self.config
    cond_BxW = class_embed(c, labels_B)
    parts = [] if start else [start_slot(c, cond_BxW)]
    if maps_BxMxC is not None:
      parts.append(word_embed(c, maps_BxMxC).astype(jnp.float32))
    x_BxNxW = jnp.concatenate(parts, axis=1)
    slots = slice(start, start + x_BxNxW.shape[1])
    level_embed = embed(c, len(c.patch_nums), 'level_embed')
    pos_embed = embed(c, c.offsets[-1], 'pos_embed')
    x_BxNxW += level_embed(c.levels[slots])[None]
    x_BxNxW += pos_embed.embedding[slots][None]
    x_BxNxW, cache = run_blocks(
        c, x_BxNxW, cond_BxW, start=start, mask=mask, cache=cache, key=key
    )
    return Head(c, name='head')(x_BxNxW, cond_BxW), cache


def class_embed(c: Config, labels_B: Array) -> Array:
  """Classes in the residual stream, (B, W); NaN for one that is not there."""
  return rows(
      embed(c, c.num_classes + 1, 'class_embed').embedding, labels_B
  )


def word_embed(c: Config, codes_BxNxC: Array) -> Array:
  """Code vectors, or maps made of them, in the residual stream: (B, N, W)."""
  return Dense(
      c.width, ('code', 'embed'), True, nn.initializers.normal(c.init_std),
      dtype=c.dtype, name='word_embed',
  )(codes_BxNxC)


def start_slot(c: Config, cond_BxW: Array) -> Array:
  """The slot that stands before all tokens, (B, 1, W)."""
  return (cond_BxW + embed(c, 1, 'pos_start').embedding)[:, None]


def modulation(
    c: Config, cond_BxW: Array, gains: np.ndarray, name: str,
    dtype: Any = None,
) -> Array:
  """Modulation vectors of the class, (B, len(gains), W).

  Args:
    c: sizes.
    cond_BxW: class embedding.
    gains: factor on the initial weights of each vector.
    name: of the layer.
    dtype: of the product; default the config's.
  """
  std = jnp.asarray(c.init_std * np.repeat(gains, c.width), jnp.float32)
  y = Dense(
      len(gains) * c.width, ('embed', 'mlp'), True,
      lambda key, shape: std[None] * jax.random.normal(key, shape),
      dtype=dtype or c.dtype, name=name,
  )(jax.nn.silu(cond_BxW))
  return y.reshape(-1, len(gains), c.width)


def run_blocks(
    c: Config,
    x_BxNxW: Array,
    cond_BxW: Array,
    *,
    start: int = 0,
    mask: attention_lib.Mask | None = None,
    cache: Cache | None = None,
    key: Array | None = None,
    block: type[Block] = Block,
    extra: Any = None,
) -> tuple[Array, Cache | None]:
  """All blocks, with stacked parameters under `layers`.

  Args:
    c: sizes.
    x_BxNxW: slots `start` to `start + N`.
    cond_BxW: class embedding.
    start: slots that the cache already holds.
    mask: who sees whom; None for everybody.
    cache: see `init_cache`.
    key: (B,), draw the branches that drop-path skips; None keeps all.
    block: Block or a subclass of it.
    extra: arrays that every block's `between` is given.

  Returns:
    The slots after the last block, and the cache with theirs.
  """
  cond = cond_BxW
  if c.shared_aln:
    cond = modulation(c, cond_BxW, np.ones(6), 'shared_ada')
  unroll = c.unroll
  if unroll is None:
    # Many blocks take minutes to compile one by one, in every step of a
    # rollout, and their gradients lie side by side in memory.
    unroll = platform() == 'cpu' and c.depth <= _MOST_UNROLLED
  in_axes = (0, 0, nn.broadcast, nn.broadcast, nn.broadcast)
  layers = stack(block, c, in_axes, unroll)(c, start, name='layers')
  keep = None
  if key is not None and c.drop_path:
    rate_D = np.linspace(0, c.drop_path, c.depth)
    chance_Dx2 = jnp.asarray(np.stack([1 - rate_D] * 2, axis=1), jnp.float32)
    keep = jax.vmap(
        lambda k: jax.random.bernoulli(k, chance_Dx2) / chance_Dx2, out_axes=1
    )(key)
  x_BxNxW = x_BxNxW.astype(c.dtype)
  return layers(x_BxNxW, cache, keep, cond, mask, extra)


def block_flops(c: Config, slots: int) -> int:
  """FLOPs of all blocks on one example, all slots attending to all."""
  dense = 2 * slots * c.width**2 * (4 + 2 * c.mlp_ratio)
  attention = 4 * slots**2 * c.width
  modulations = 12 * c.width**2 * (1 if c.shared_aln else c.depth)
  return c.depth * (dense + attention) + modulations


def build(config: Mapping[str, Any]) -> Model:
  """Builds the VAR transformer.

  Tokens stand scale by scale, row by row; L of them. Labels are int32 in
  [0, num_classes], num_classes meaning no label; others give NaN. `maps` are
  what `vqvae.var_input` and `vqvae.advance` give: the image so far at the place
  of each token, for the scales from the second on. Every function takes
  `params` first:

  - forward(labels_B, maps_Bx(L-1)xC, *, key=None) -> logits_BxLxV; drop-path is
    on if there is a key per example
  - null(labels_B) -> those of no class
  - init_cache(batch) -> cache of that many rows
  - step(cache, labels_B, maps_BxnxC, scale) -> (logits_BxnxV, cache) of one
    scale; maps is None for scale 0
  - prefill(cache, labels_B, maps_Bx(m-1)xC, stop_scale, mask='causal') ->
    (logits_BxmxV, cache) of all scales before stop_scale at once. 'causal'
    gives what steps would; with 'full' coarse scales see finer ones too, as in
    the sampling code that came with DD1

  Batch, scales and mask are static. Logits are float32.

  Source: VAR (arXiv 2404.02905), models/var.py and models/basic_var.py.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = config_lib.make(Config, config, 'var')
  module = Transformer(c)
  length = c.offsets[-1]
  init, axes = pure(
      module,
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((1, length - 1, c.code_dim), jnp.float32),
  )
  levels = tuple(c.levels.tolist())

  def run(params: Params, *args, **kwargs) -> tuple[Array, Cache | None]:
    return module.apply({'params': params}, *args, **kwargs)

  def forward(
      params: Params, labels_B: Array, maps_BxMxC: Array, *,
      key: Array | None = None,
  ) -> Array:
    seen = attention_lib.Mask(levels)
    return run(params, labels_B, maps_BxMxC, mask=seen, key=key)[0]

  def null(params: Params, labels_B: Array) -> Array:
    del params
    return jnp.full_like(labels_B, c.num_classes)

  def init_cache(params: Params, batch: int) -> Cache:
    del params
    shape = (c.depth, batch, length, c.heads, c.width // c.heads)
    return {name: jnp.zeros(shape, c.dtype) for name in ('k', 'v')}

  def step(
      params: Params, cache: Cache, labels_B: Array,
      maps_BxNxC: Array | None, scale: int,
  ) -> tuple[Array, Cache]:
    return run(
        params, labels_B, maps_BxNxC, start=c.offsets[scale], cache=cache
    )

  def prefill(
      params: Params, cache: Cache, labels_B: Array,
      maps_BxMxC: Array | None, stop_scale: int,
      mask: Literal['causal', 'full'] = 'causal',
  ) -> tuple[Array, Cache]:
    if mask not in ('causal', 'full'):
      raise ValueError(f"mask={mask!r} must be 'causal' or 'full'")
    stop = c.offsets[stop_scale]
    seen = attention_lib.Mask(levels[:stop]) if mask == 'causal' else None
    return run(params, labels_B, maps_BxMxC, cache=cache, mask=seen)

  def flops() -> int:
    ends = 2 * c.width * (
        (length - 1) * c.code_dim + length * c.vocab_size + 2 * c.width
    )
    return block_flops(c, length) + ends

  return Model(
      family='var',
      config=c,
      init=init,
      fns={
          'forward': forward,
          'null': null,
          'init_cache': init_cache,
          'step': step,
          'prefill': prefill,
      },
      axes=axes,
      flops=flops,
  )


def _ada_gains(c: Config) -> np.ndarray:
  """Initial factors of (gate, gate, scale, scale, shift, shift)."""
  return np.repeat([c.gamma_init, 0.5, 0.5], 2)
