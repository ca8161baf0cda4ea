# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: a small trainable tree over a frozen network."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.model import Params


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Which kernels of a frozen network get a low-rank correction.

  An adapted `kernel` of shape (..., in, out) has `kernel_a` (..., in, rank)
  and `kernel_b` (..., rank, out) beside it, and `models.layers.Dense` adds
  `(x @ a) @ b`: no second copy of the base is ever made in training. Kernels of
  convolutions stay as they are. Source: LoRA, arXiv 2106.09685, section 4.

  Attributes:
    base: name of the frozen network.
    rank: rank of the correction.
    targets: regex searched in the '/'-joined path of a kernel.
  """

  base: str
  rank: int
  targets: str = '.*'

  def init(self, key: jax.Array, base: Params) -> Params:
    """Adapters for a base tree: a is normal / sqrt(in), b is zero.

    Raises:
      ValueError: when no kernel of a Dense layer matches `targets`.
    """
    found = []

    def visit(tree: Params, path: tuple[str, ...]) -> dict[str, Any]:
      out = {}
      for name, leaf in sorted(tree.items()):
        here = (*path, name)
        if isinstance(leaf, dict):
          if sub := visit(leaf, here):
            out[name] = sub
        elif name == 'kernel' and leaf.ndim < 4 and re.search(
            self.targets, '/'.join(here)
        ):  # of a Dense layer or a stack of them; convolutions have four axes
          *lead, n_in, n_out = leaf.shape
          a = jax.random.normal(
              jax.random.fold_in(key, len(found)), (*lead, n_in, self.rank)
          )
          out['kernel_a'] = a / jnp.sqrt(n_in)
          out['kernel_b'] = jnp.zeros((*lead, self.rank, n_out))
          found.append(here)
      return out

    tree = visit(base, ())
    if not found:
      raise ValueError(
          f'adapter.targets={self.targets!r} matches no kernel of a Dense '
          f'layer of {self.base!r}; print the paths with parameter_overview'
      )
    return tree

  def bind(self, base: Params, adapter: Params) -> Params:
    """Base and adapter leaves side by side; no arithmetic, no copy."""
    return {
        name: self.bind(leaf, adapter[name])
        if isinstance(leaf, dict) and name in adapter else leaf
        for name, leaf in base.items()
    } | {k: v for k, v in adapter.items() if not isinstance(v, dict)}

  def merge(self, base: Params, adapter: Params) -> Params:
    """A plain tree of the base's shape with the corrections added; export."""
    out = {}
    for name, leaf in base.items():
      if isinstance(leaf, dict):
        out[name] = self.merge(leaf, adapter.get(name, {}))
      elif name == 'kernel' and 'kernel_a' in adapter:
        delta = adapter['kernel_a'] @ adapter['kernel_b']
        out[name] = (leaf + delta).astype(leaf.dtype)
      else:
        out[name] = leaf
    return out
