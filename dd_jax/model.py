# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the library calls a model: pure functions over a plain dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax

Params = Mapping[str, Any]  # nested dict of arrays, never a Flax object
Axes = Mapping[str, Any]  # same structure, leaves: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network as data and pure functions; built by `dd_jax.models`.

  Attributes:
    family: name in `registry.MODELS` that rebuilds this model from `config`.
    config: frozen, JSON-able dataclass.
    init: `key -> params`.
    fns: pure functions `(params, *inputs, **static) -> outputs` by name;
      `forward` is always there.
    axes: logical axis names of every parameter; allocates nothing.
    flops: analytic FLOPs (2 per multiply-add) of one `forward` of one example.
  """

  family: str
  config: Any
  init: Callable[[jax.Array], Params]
  fns: Mapping[str, Callable[..., Any]]
  axes: Callable[[], Axes]
  flops: Callable[[], int]

  @property
  def apply(self) -> Callable[..., Any]:
    return self.fns['forward']

  def abstract(self) -> Params:
    """Shapes and dtypes of the parameters, with nothing allocated."""
    return jax.eval_shape(self.init, jax.random.key(0))
