# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""One training step: the only place that takes a gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clu import metrics as clu_metrics
import jax
import jax.numpy as jnp
import optax

from dd_jax.method import Inputs, Method, Update
from dd_jax.model import Params
from dd_jax.state import TrainState


def _inputs(
    method: Method, state: TrainState, frozen: Mapping[str, Params],
    batch: Mapping[str, jax.Array],
) -> Inputs:
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  return Inputs(
      params={n: r.bind(state.params[n], frozen)
              for n, r in method.roles.items()},
      frozen=frozen,
      aux=state.aux,
      batch=batch,
      key=key,
      keys=jax.vmap(lambda i: jax.random.fold_in(key, i))(batch['index']),
      clocks={'step': state.step, **state.updates},
      shared={},
  )


def _split(inputs: Inputs, count: int) -> dict[str, Any]:
  """Examples as `count` micro-batches, interleaved so that shards stay put."""

  def split(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

  return jax.tree.map(split, {'batch': inputs.batch, 'keys': inputs.keys})


def _accumulate(
    fn: Callable[[Any], tuple[Any, Any]], parts: Any, count: int, unroll: bool,
) -> tuple[Any, Any]:
  """Mean of fn's first result and stack of its second over micro-batches.

  Loops keep memory at one micro-batch, but gradients of convolutions inside a
  loop are tens of times slower on CPU: hence `unroll`.
  """
  if count == 1 or unroll:
    results = [
        fn(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(count)
    ]
    means, stacks = zip(*results, strict=True)
    return (
        jax.tree.map(lambda *xs: sum(xs) / count, *means),
        jax.tree.map(lambda *xs: jnp.stack(xs), *stacks),
    )
  first = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], parts))[0]

  def body(total, part):
    mean, stack = fn(part)
    return jax.tree.map(jnp.add, total, mean), stack

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  total, stacks = jax.lax.scan(body, zeros, parts)
  return jax.tree.map(lambda x: x / count, total), stacks


def update_ema(
    average: Params, params: Params, decay: float, count: jax.Array
) -> Params:
  """Moves an average; the decay warms up as (1 + n) / (10 + n)."""
  rate = 1.0 - jnp.minimum(decay, (1.0 + count) / (10.0 + count))
  return optax.incremental_update(params, average, rate)


def train_step(
    method: Method, updates: tuple[Update, ...], micro_batches: int,
    unroll: bool, state: TrainState, frozen: Mapping[str, Params],
    batch: Mapping[str, jax.Array],
) -> tuple[TrainState, dict[str, clu_metrics.Average]]:
  """Applies the updates in order; later ones see what earlier ones moved.

  Gradients and metrics of the micro-batches are averaged: those of the whole
  batch, when losses are means over examples.

  Args:
    method: roles, `prepare` and `after`.
    updates: static; names this program.
    micro_batches: static; must divide the batch.
    unroll: static; micro-batches one after the other instead of in a loop.
    state: donated by the caller.
    frozen: parameters of the frozen networks.
    batch: arrays with a leading axis of examples.

  Returns:
    The next state, and metrics as `clu.metrics.Average` by name.
  """
  inputs = _inputs(method, state, frozen, batch)
  parts = _split(inputs, micro_batches)
  _, shared = _accumulate(
      lambda part: ((), method.prepare(inputs._replace(**part))),
      parts, micro_batches, unroll,
  )
  parts['shared'] = jax.lax.stop_gradient(shared)
  params, opt = dict(state.params), dict(state.opt)
  ema, counts = dict(state.ema), dict(state.updates)
  metrics, outputs = {}, {}
  for update in updates:
    role = method.roles[update.role]
    now = inputs._replace(
        params={n: r.bind(params[n], frozen) for n, r in method.roles.items()}
    )

    def loss(p, part, update=update, role=role, now=now):
      out = update.loss(
          role.bind(p, frozen), now._replace(**part), **dict(update.statics)
      )
      return out.loss, out

    def grad(part, update=update, loss=loss):
      (value, out), grads = jax.value_and_grad(loss, has_aux=True)(
          params[update.role], part
      )
      return (grads, {'loss': value, **out.metrics}), out.extras

    (grads, scalars), outputs[update.name] = _accumulate(
        grad, parts, micro_batches, unroll
    )
    moves, opt[update.role] = role.tx.update(
        grads, opt[update.role], params[update.role],
        clocks={'step': state.step, 'updates': counts[update.role]},
    )
    params[update.role] = optax.apply_updates(params[update.role], moves)
    counts[update.role] += 1
    if role.ema is not None:
      ema[update.role] = update_ema(
          ema[update.role], params[update.role], role.ema, counts[update.role]
      )
    scalars['grad_norm'] = optax.tree.norm(grads)
    metrics |= {f'{update.name}/{k}': v for k, v in scalars.items()}
  state = state.replace(
      step=state.step + 1, params=params, opt=opt, ema=ema, updates=counts
  )
  return method.after(state, outputs), _averages(metrics)


def eval_step(
    method: Method, updates: tuple[Update, ...], state: TrainState,
    frozen: Mapping[str, Params], batch: Mapping[str, jax.Array],
) -> dict[str, clu_metrics.Average]:
  """The same losses without a gradient, on moving averages where kept.

  Nothing is dropped: neither conditions nor parts of the networks.
  """
  state = state.replace(params=state.params | state.ema)
  part = _inputs(method, state, frozen, batch)._replace(training=False)
  part = part._replace(shared=method.prepare(part))
  metrics = {}
  for update in updates:
    out = update.loss(
        part.params[update.role], part, **dict(update.statics)
    )
    scalars = out.metrics | {'loss': out.loss}
    metrics |= {f'{update.name}/{k}': v for k, v in scalars.items()}
  return _averages(metrics)


def _averages(
    scalars: Mapping[str, jax.Array]
) -> dict[str, clu_metrics.Average]:
  return {
      k: clu_metrics.Average.from_model_output(v) for k, v in scalars.items()
  }
