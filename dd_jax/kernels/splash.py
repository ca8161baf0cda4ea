# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention of many slots by a TPU kernel.

Shape letters: B batch, N slots, H heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import math

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel,
  splash_attention_mask,
)
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from dd_jax.kernels import attention

Array = jax.Array

_LANES = 128  # blocks are made of so many slots
_LARGEST_BLOCK = 512  # slots


def attend(
    q_BxNxHxD: Array, k_BxNxHxD: Array, v_BxNxHxD: Array,
    mask: attention.Mask, *, scale: float | None = None,
    interpret: bool = False,
) -> Array:
  """As `attention.attend`, by JAX's splash kernel.

  Blocks that nobody sees are skipped, and nothing of size N x N is kept. Within
  `attention.on_mesh` examples and heads are split over the mesh.

  Args:
    q_BxNxHxD: queries.
    k_BxNxHxD: keys.
    v_BxNxHxD: values.
    mask: who sees whom.
    scale: factor on the logits; None is D^-0.5.
    interpret: runs on any platform, slowly.
  """
  batch, n, heads, head_dim = q_BxNxHxD.shape
  # The kernel has no scale of its own.
  scale = head_dim**-0.5 if scale is None else scale
  if scale != 1:
    q_BxNxHxD = (q_BxNxHxD.astype(jnp.float32) * scale).astype(q_BxNxHxD.dtype)
  mask = mask.padded(_LANES)
  slots = len(mask.levels)
  inputs = [
      attention.pad(x, slots).swapaxes(1, 2)
      for x in (q_BxNxHxD, k_BxNxHxD, v_BxNxHxD)
  ]
  if mask.valid_BxT is not None:
    # Slots see those of their own segment.
    inputs.append(jnp.where(mask.valid_BxN(), 0, 1 + jnp.arange(slots)[None]))
  run, split = _run, attention.split()
  if split is not None and split.mesh.size > 1:
    by_batch = _dividing(split.mesh, split.batch, batch)
    by_heads = _dividing(split.mesh, (split.heads,), heads)
    heads //= split.mesh.shape[split.heads] if by_heads else 1
    spec = PartitionSpec(by_batch, by_heads)
    specs = [PartitionSpec(), spec, spec, spec, PartitionSpec(by_batch)]
    run = jax.shard_map(
        _run, mesh=split.mesh, in_specs=tuple(specs[: 1 + len(inputs)]),
        out_specs=spec,
        check_vma=False,  # kernels do not say what varies over which axis
    )
  kernel = _kernel(mask.levels, mask.alone, heads, interpret)
  return run(kernel, *inputs).swapaxes(1, 2)[:, :n]


def _run(
    kernel: splash_attention_kernel.SplashAttentionKernel, *inputs: Array
) -> Array:
  """The kernel on each example: q, k, v (B, H, N, D) and segments (B, N)."""

  def one(q_HxNxD, k_HxNxD, v_HxNxD, segments_N=None):
    ids = None
    if segments_N is not None:
      ids = splash_attention_kernel.SegmentIds(segments_N, segments_N)
    return kernel(q_HxNxD, k_HxNxD, v_HxNxD, segment_ids=ids)

  return jax.vmap(one)(*inputs)


def _kernel(
    levels: tuple[int, ...], alone: bool, heads: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
  """The kernel of a mask over a multiple of `_LANES` slots."""
  slots = len(levels)
  block = max(
      size for size in range(_LANES, _LARGEST_BLOCK + 1, _LANES)
      if slots % size == 0
  )
  sizes = {
      f.name: block
      for f in dataclasses.fields(splash_attention_kernel.BlockSizes)
      if f.name.startswith('block_')
  }
  return splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([_mask(levels, alone)] * heads),
      block_sizes=splash_attention_kernel.BlockSizes(**sizes),
      head_shards=1, q_seq_shards=1, interpret=interpret,
  )


@functools.lru_cache(maxsize=32)
def _mask(levels: tuple[int, ...], alone: bool) -> splash_attention_mask.Mask:
  """The mask, the same object every time: programs are told apart by it."""
  slots = len(levels)
  if levels == tuple(range(slots)) and not alone:
    return splash_attention_mask.CausalMask((slots, slots))
  return splash_attention_mask.NumpyMask(attention.Mask(levels, alone).static())


def _dividing(
    mesh: Mesh, names: Sequence[str], size: int
) -> tuple[str, ...] | None:
  """As many axes, from the first, as divide a size."""
  out: tuple[str, ...] = ()
  for name in names:
    if size % math.prod(mesh.shape[a] for a in (*out, name)):
      break
    out += (name,)
  return out or None
