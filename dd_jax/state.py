# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The state of a run: a pytree of plain dicts, keyed by role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp

from dd_jax.method import Method
from dd_jax.model import Params


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: int32 scalar, steps done.
    params: trainable parameters by role (adapter trees for adapter roles).
    opt: optimizer state by role.
    ema: moving averages of the roles that ask for one.
    updates: int32 scalar by role, its own count of updates.
    aux: state that no gradient moves.
    key: raw uint32 key data; steps fold their number into it.
  """

  step: jax.Array
  params: dict[str, Params]
  opt: dict[str, Any]
  ema: dict[str, Params]
  updates: dict[str, jax.Array]
  aux: Any
  key: jax.Array


def init_state(
    method: Method, key: jax.Array, sources: Mapping[str, Params | None],
) -> TrainState:
  """A fresh state; pure, so that `jit(out_shardings=...)` shards it at birth.

  Args:
    method: names the roles.
    key: typed key of the run.
    sources: per role the tree handed to its `init`, or None.
  """
  params = {
      name: role.init(jax.random.fold_in(key, i), sources.get(name))
      for i, (name, role) in enumerate(sorted(method.roles.items()))
  }
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt={n: r.tx.init(params[n]) for n, r in method.roles.items()},
      ema={
          n: jax.tree.map(jnp.array, params[n])
          for n, r in method.roles.items() if r.ema is not None
      },
      updates={n: jnp.zeros((), jnp.int32) for n in method.roles},
      aux=method.init_aux(),
      key=jax.random.key_data(key),
  )
