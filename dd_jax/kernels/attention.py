# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention by the reference, a TPU kernel or a GPU kernel, as one function.

Shape letters: B batch, N queries, M keys, H heads, D size of a head, T slots at
the front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import contextvars
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dd_jax.model import platform

Array = jax.Array
Kind = Literal['auto', 'reference', 'splash', 'cudnn']

# What runs where; on another platform the reference does. 'auto' is the
# reference everywhere: no kernel here has been timed on hardware.
_PLATFORMS = {'splash': 'tpu', 'cudnn': 'gpu'}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['valid_BxT'], meta_fields=['levels', 'alone'],
)
@dataclasses.dataclass(frozen=True)
class Mask:
  """Who sees whom among N slots, without the N x N array.

  A slot sees those of lower levels and, unless `alone`, of its own; and itself.

  Attributes:
    levels: of each slot.
    alone: whether slots of a level do not see each other.
    valid_BxT: False where one of the first T slots, T <= N, holds nothing: it
      sees, and is seen by, itself only.
  """

  levels: tuple[int, ...]
  alone: bool = False
  valid_BxT: Array | None = None

  def static(self) -> np.ndarray:
    """What is the same for all examples, (N, N) bool."""
    levels = np.asarray(self.levels)
    if not self.alone:
      return levels[:, None] >= levels[None]
    return (levels[:, None] > levels[None]) | np.eye(len(levels), dtype=bool)

  def array(self) -> Array:
    """(B or 1, 1, N, N) bool."""
    seen_NxN = jnp.asarray(self.static())
    if self.valid_BxT is None:
      return seen_NxN[None, None]
    valid_BxN = self.valid_BxN()
    both = jnp.logical_and(valid_BxN[:, :, None], valid_BxN[:, None])
    seen = jnp.logical_and(seen_NxN[None], both)
    alone = jnp.eye(len(self.levels), dtype=bool)[None]
    return jnp.logical_or(seen, alone)[:, None]

  def valid_BxN(self) -> Array:
    """`valid_BxT` of all slots; there must be one."""
    rest = len(self.levels) - self.valid_BxT.shape[1]
    return jnp.pad(
        jnp.asarray(self.valid_BxT, bool), ((0, 0), (0, rest)),
        constant_values=True,
    )

  def padded(self, multiple: int) -> Mask:
    """With slots at the end, that no others see, up to a multiple."""
    top = max(self.levels) + 1
    rest = -len(self.levels) % multiple
    return dataclasses.replace(
        self, levels=self.levels + tuple(range(top, top + rest))
    )


def causal(n: int, valid_BxT: Array | None = None) -> Mask:
  """Slots see themselves and those before them."""
  return Mask(tuple(range(n)), valid_BxT=valid_BxT)


def check(kind: Kind, dtype: str, head_dim: int) -> None:
  """Raises where a kernel cannot do what a config asks for.

  Args:
    kind: the config's field `attention`.
    dtype: the config's field `dtype`.
    head_dim: D.

  Raises:
    ValueError: naming the field and what to do.
  """
  if kind != 'cudnn':
    return
  if dtype != 'bfloat16':
    raise ValueError(
        f"attention='cudnn' needs dtype='bfloat16', not {dtype!r}; or set "
        "attention='reference'"
    )
  if head_dim % 8 or head_dim > 128:  # more only from Hopper on
    raise ValueError(
        "attention='cudnn' needs heads whose size is a multiple of 8 and at "
        f"most 128, not width / heads = {head_dim}; or set "
        "attention='reference'"
    )


@dataclasses.dataclass(frozen=True)
class Split:
  """Where `on_mesh` splits kernels."""

  mesh: Mesh
  batch: tuple[str, ...]
  heads: str


_SPLIT: contextvars.ContextVar[Split | None] = contextvars.ContextVar(
    'split', default=None
)


def split() -> Split | None:
  """That of the innermost `on_mesh`."""
  return _SPLIT.get()


@contextlib.contextmanager
def on_mesh(mesh: Mesh, batch: Sequence[str], heads: str) -> Iterator[None]:
  """Splits the kernels of programs that are traced within over a mesh.

  XLA partitions all but them by itself. A program that was traced before is not
  traced again.

  Args:
    mesh: of the devices that the programs run on.
    batch: mesh axes that examples are split over, as many as divide them.
    heads: mesh axis that heads are split over, if it divides them.
  """
  token = _SPLIT.set(Split(mesh, tuple(batch), heads))
  try:
    yield
  finally:
    _SPLIT.reset(token)


def attend(
    q_BxNxHxD: Array,
    k_BxMxHxD: Array,
    v_BxMxHxD: Array,
    mask: Mask | Array | None,
    *,
    scale: float | None = None,
    kind: Kind = 'auto',
) -> Array:
  """Attention, (B, N, H, D) in the type of the queries.

  Args:
    q_BxNxHxD: queries.
    k_BxMxHxD: keys.
    v_BxMxHxD: values.
    mask: who sees whom; as an array, (B or 1, 1, N, M) bool. Kernels need a
      description; with an array or None, as for few queries and a cache, the
      reference runs.
    scale: factor on the logits; None is D^-0.5.
    kind: 'splash' is for TPU and 'cudnn' for GPU; on other platforms the
      reference runs, so that what was trained on one is read by all. 'auto' is
      the reference.
  """
  fn = reference
  if isinstance(mask, Mask) and _PLATFORMS.get(kind) == platform():
    fn = cudnn if kind == 'cudnn' else _splash
  return fn(q_BxNxHxD, k_BxMxHxD, v_BxMxHxD, mask, scale=scale)


def reference(
    q_BxNxHxD: Array, k_BxMxHxD: Array, v_BxMxHxD: Array,
    mask: Mask | Array | None, *, scale: float | None = None,
) -> Array:
  """As `attend`, in plain operations."""
  mask = mask.array() if isinstance(mask, Mask) else mask
  return jax.nn.dot_product_attention(
      q_BxNxHxD, k_BxMxHxD, v_BxMxHxD, mask=mask, scale=scale
  )


def cudnn(
    q_BxNxHxD: Array, k_BxNxHxD: Array, v_BxNxHxD: Array, mask: Mask, *,
    scale: float | None = None,
) -> Array:
  """As `attend`, by cuDNN's fused kernel: bfloat16 or float16.

  Only causal masks are skipped over; others are added to the logits.
  """
  n = q_BxNxHxD.shape[1]
  if mask.valid_BxT is None and mask == causal(n):
    return jax.nn.dot_product_attention(
        q_BxNxHxD, k_BxNxHxD, v_BxNxHxD, scale=scale, is_causal=True,
        implementation='cudnn',
    )
  # With a mask gradients exist for even lengths only.
  mask = mask.padded(2)
  q, k, v = (pad(x, len(mask.levels)) for x in (
      q_BxNxHxD, k_BxNxHxD, v_BxNxHxD
  ))
  return jax.nn.dot_product_attention(
      q, k, v, mask=mask.array(), scale=scale, implementation='cudnn'
  )[:, :n]


def _splash(*args: Any, **kwargs: Any) -> Array:
  # Pallas takes half a second to import, in every program.
  from dd_jax.kernels import splash

  return splash.attend(*args, **kwargs)


def pad(x_BxNxHxD: Array, slots: int) -> Array:
  """With zeros in slots at the end, (B, slots, H, D)."""
  missing = slots - x_BxNxHxD.shape[1]
  return jnp.pad(x_BxNxHxD, ((0, 0), (0, missing), (0, 0), (0, 0)))
