# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the library calls a model: pure functions over a plain dict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import contextvars
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Params = Mapping[str, Any]  # nested dict of arrays, never a Flax object
Axes = Mapping[str, Any]  # same structure, leaves: tuple[str | None, ...]

_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    'platform', default=None
)


def platform() -> str:
  """What programs are traced for: 'cpu', 'gpu' or 'tpu'.

  That of this process, except within `for_platform`.
  """
  return _PLATFORM.get() or jax.default_backend()


@contextlib.contextmanager
def for_platform(name: str) -> Iterator[None]:
  """Traces programs as they will be on another machine."""
  token = _PLATFORM.set(name)
  try:
    yield
  finally:
    _PLATFORM.reset(token)


_ROWS: contextvars.ContextVar[tuple[Mesh, tuple[str, ...]] | None] = (
    contextvars.ContextVar('rows', default=None)
)


@contextlib.contextmanager
def rows_on(mesh: Mesh, axes: tuple[str, ...]) -> Iterator[None]:
  """Traces programs whose examples are split over these axes of a mesh."""
  token = _ROWS.set((mesh, axes))
  try:
    yield
  finally:
    _ROWS.reset(token)


def keep_rows(x: jax.Array) -> jax.Array:
  """Activations (B, N, ...), each example where `rows_on` has it.

  Where weights are split over the axes of the examples, the compiler may as
  well split features, and then every device computes, and holds, all examples.
  """
  mesh, axes = _ROWS.get() or (None, ())
  parts = math.prod(mesh.shape[a] for a in axes)
  # Not vectors of an example: told where those are, XLA's partitioner has given
  # the gradient of one class to another (jax 0.10.2, CPU, a mesh of 2x2x2).
  if parts == 1 or x.ndim < 3 or x.shape[0] % parts:
    return x
  rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(
      x, NamedSharding(mesh, PartitionSpec(axes, *rest))
  )


def condition_of(batch: Mapping[str, Any]) -> Any:
  """What a batch asks networks for: its captions, or else its labels.

  Captions are a dict of `features` (B, T, F) and `mask` (B, T).
  """
  if 'features' in batch:
    return {name: batch[name] for name in ('features', 'mask')}
  return batch['label']


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A network as data and pure functions; built by `dd_jax.models`.

  Attributes:
    family: name in `registry.TABLES['models']` that rebuilds this model from
      `config`.
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
    return jax.tree.map(lambda x: x, self._shapes)  # the caller's own dicts

  @functools.cached_property
  def _shapes(self) -> Params:
    return jax.eval_shape(self.init, jax.random.key(0))  # seconds for a UNet


def check_tokenizer(net: Model, vae: Model) -> None:
  """Raises where a vae is not of the kind that a network predicts codes of.

  Raises:
    ValueError: it has another number of codes, or codes of another size.
  """
  codebook = jax.eval_shape(vae.fns['codebook'], vae.abstract())
  check_codes(net, vae, codebook.shape)


def check_codes(net: Model, vae: Model, found: tuple[int, ...]) -> None:
  """As `check_tokenizer`, of a codebook whose shape is known."""
  wanted = net.config.vocab_size, net.config.code_dim
  if found != wanted:
    raise ValueError(
        f'{net.family!r} predicts {wanted[0]} codes of size {wanted[1]}, but '
        f'this {vae.family!r} has {found[0]} of size {found[1]}: it is not its '
        'tokenizer'
    )
