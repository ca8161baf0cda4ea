# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""How an algorithm plugs into the loop: roles, updates and pure losses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from dd_jax.adapter import Adapter
from dd_jax.model import Model, Params, condition_of


@dataclasses.dataclass(frozen=True, eq=False)
class Role:
  """One trainable network.

  Attributes:
    model: the network.
    tx: its optimizer; see `optim.make_optimizer`.
    init: `(key, source) -> params`, where source is the parameter tree that the
      config's `init` names, or None.
    ema: decay of the moving average, None for none.
    adapter: when set, the role trains a low-rank tree over a frozen network.
  """

  model: Model
  tx: optax.GradientTransformationExtraArgs
  init: Callable[[jax.Array, Params | None], Params]
  ema: float | None = None
  adapter: Adapter | None = None

  def bind(self, params: Params, frozen: Mapping[str, Params]) -> Params:
    """The tree that `model.fns` take: adapters are laid over their base."""
    if self.adapter is None:
      return params
    return self.adapter.bind(frozen[self.adapter.base], params)


class Inputs(NamedTuple):
  """Everything that a loss may read. Teachers are arguments, not closures.

  Attributes:
    params: bound parameters of all roles, as updated so far in this step.
    frozen: parameters of the frozen networks.
    aux: state that no gradient moves.
    batch: device arrays; `index` is each example's place in the global order.
    key: randomness of this step, the same for all examples.
    keys: one key per example, independent of mesh, hosts and micro-batches.
    clocks: `step` and each role's own count of updates, int32 scalars.
    shared: what `Method.prepare` returned, with gradients stopped.
    training: whether a role is to be moved; what is dropped in training is not
      where losses are only looked at.
  """

  params: Mapping[str, Params]
  frozen: Mapping[str, Params]
  aux: Any
  batch: Mapping[str, jax.Array]
  key: jax.Array
  keys: jax.Array
  clocks: Mapping[str, jax.Array]
  shared: Mapping[str, Any]
  training: bool = True

  @property
  def condition(self) -> Any:
    """What the networks of a teacher's family take besides tokens."""
    return condition_of(self.batch)


class Output(NamedTuple):
  """What a loss returns: scalar loss, scalar metrics, arrays for `after`."""

  loss: jax.Array
  metrics: Mapping[str, jax.Array] = {}
  extras: Mapping[str, jax.Array] = {}


@dataclasses.dataclass(frozen=True)
class Update:
  """One gradient step of one role; a tuple of these names a compiled program.

  Attributes:
    name: prefix of its metrics.
    role: the role that moves.
    loss: `(role params, inputs, **statics) -> Output`; a bound method or a
      module-level function, so that it hashes the same at every step.
    statics: hashable keyword arguments; other statics compile another program.
  """

  name: str
  role: str
  loss: Callable[..., Output]
  statics: tuple[tuple[str, Hashable], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """An algorithm as data and pure functions; subclasses fill in `updates`.

  Attributes:
    config: the method's frozen config dataclass.
    roles: trainable networks by name.
    frozen: networks that only serve, by name.
  """

  config: Any
  roles: Mapping[str, Role]
  frozen: Mapping[str, Model]

  def __post_init__(self) -> None:
    """Raises ValueError where config and networks do not go together."""

  def check_parts(
      self, roles: Sequence[str], frozen: Sequence[str] = ()
  ) -> None:
    """Raises ValueError where one of these networks is not there."""
    for kind, names, found in (
        ('role', roles, self.roles), ('frozen network', frozen, self.frozen)
    ):
      for name in names:
        if name not in found:
          raise ValueError(
              f'{type(self).__name__} needs a {kind} {name!r}; there are '
              f'{sorted(found)}'
          )

  def updates(self, step: int) -> tuple[Update, ...]:
    """The updates of a step, in order; a function of the step alone."""
    raise TypeError(f'{type(self).__name__} defines no updates')

  def init_aux(self) -> Any:
    """Initial value of the state that no gradient moves."""
    return {}

  def prepare(self, inputs: Inputs) -> Mapping[str, Any]:
    """Forward work that several updates share; no gradient flows through."""
    del inputs
    return {}

  def after(self, state: Any, outputs: Mapping[str, Mapping[str, Any]]) -> Any:
    """Moves what gradients do not: usage counts, running statistics.

    Args:
      state: the `TrainState` after this step's updates.
      outputs: the losses' extras by update name, with a leading axis of
        micro-batches.
    """
    del outputs
    return state

  def collect(
      self, params: Mapping[str, Params], batch: Mapping[str, np.ndarray],
      step: int,
  ) -> Mapping[str, np.ndarray]:
    """Work on the host before a step, such as rollouts with outside rewards.

    Must be a function of its arguments; draw from `host_rng(seed, step)`.
    """
    del params, step
    return batch

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    """Analytic FLOPs of one micro-batch of `batch_size` examples.

    Counts a forward and a backward (twice a forward) of each updated role;
    methods that run more networks add them.
    """
    return batch_size * sum(
        3 * self.roles[u.role].model.flops() for u in updates
    )


def host_rng(seed: int, step: int) -> np.random.Generator:
  """Randomness for choices on the host, the same on every host."""
  return np.random.default_rng((seed, step))
