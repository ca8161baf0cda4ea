# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The one training loop, for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.sharding import Mesh

from dd_jax import build, checkpoint, console, flops, hooks, metrics, sharding
from dd_jax import config as config_lib
from dd_jax.data import pipeline
from dd_jax.method import Method, Update
from dd_jax.model import Params
from dd_jax.stages import Context
from dd_jax.state import TrainState, init_state
from dd_jax.step import eval_step, train_step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A stage of kind 'train'.

  Attributes:
    method: `name` in the registry and the fields of its config.
    roles: trainable networks; see `build.RoleConfig`.
    data: `source` in the registry and its arguments.
    batch_size: examples a step, over all hosts.
    steps: steps in all.
    frozen: networks that only serve; see `build.FrozenConfig`.
    heldout: as `data`; its losses are reported every `eval_every` steps.
    micro_batches: gradients are accumulated over this many slices of a batch.
    log_every: steps between two records of metrics.
    eval_every: steps between two evaluations, 0 for none.
    eval_batches: batches of an evaluation.
    save_every: steps between two checkpoints.
    keep: checkpoints that are kept.
    profile_first: step at which the profiler starts.
    profile_steps: steps that it records, 0 for none.
  """

  method: Mapping[str, Any]
  roles: Mapping[str, Any]
  data: Mapping[str, Any]
  batch_size: int
  steps: int
  frozen: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  heldout: Mapping[str, Any] | None = None
  micro_batches: int = 1
  log_every: int = 50
  eval_every: int = 0
  eval_batches: int = 4
  save_every: int = 1000
  keep: int = 2
  profile_first: int = 10
  profile_steps: int = 0

  def __post_init__(self) -> None:
    for name in ('log_every', 'save_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} must be at least 1')
    build.check_entries(self.method, self.roles, self.frozen)


class Programs:
  """Compiled train steps, one per tuple of updates, ahead of time.

  A compiled program refuses other shapes instead of compiling again.
  """

  def __init__(self, method: Method, micro_batches: int, mesh: Mesh):
    self._method, self._micro_batches = method, micro_batches
    self._unroll = mesh.devices.flat[0].platform == 'cpu'
    self._mesh = mesh
    self.compiled: dict[Any, Any] = {}

  def trace(self, updates: Any, state: Any, frozen: Any, batch: Any) -> Any:
    """The program of a tuple of updates, traced for the given shapes."""
    step = functools.partial(
        train_step, self._method, updates, self._micro_batches, self._unroll
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step, donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(self._mesh)),
    ).trace(state, frozen, batch)

  def prepare(self, updates: Any, state: Any, frozen: Any, batch: Any) -> None:
    """Compiles what `__call__` would run, where that was not done before."""
    if updates not in self.compiled:
      began = time.monotonic()
      self.compiled[updates] = self.trace(
          updates, state, frozen, batch
      ).lower().compile()
      logging.info(
          'compiled %s in %.1f s', [u.name for u in updates],
          time.monotonic() - began,
      )

  def __call__(self, updates: Any, state: Any, frozen: Any, batch: Any) -> Any:
    self.prepare(updates, state, frozen, batch)
    return self.compiled[updates](state, frozen, batch)


def fresh_state(
    method: Method, seed: int, sources: Mapping[str, Params | None],
    mesh: Mesh, rules: str,
) -> tuple[TrainState, Callable[..., TrainState]]:
  """An abstract state with shardings, and the function that makes it."""
  make = functools.partial(init_state, method, jax.random.key(seed))
  abstract = jax.eval_shape(make, sources)
  shardings = sharding.shard_state(
      method, abstract, mesh, sharding.RULES[rules]
  )
  abstract = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      abstract, shardings,
  )
  return abstract, jax.jit(make, out_shardings=shardings)


def make_evaluation(method: Method, updates: Any) -> Any:
  """A jitted `(state, frozen, batch)` -> metrics of the losses."""
  return jax.jit(functools.partial(eval_step, method, updates))


def evaluate_losses(
    method: Method, state: TrainState, frozen: Mapping[str, Params],
    source: Any, config: TrainConfig, mesh: Mesh, programs: dict[Any, Any],
) -> dict[str, float]:
  """Losses of the current updates on the first held-out batches."""
  step = int(state.step)
  updates = method.updates(step)
  if updates not in programs:
    programs[updates] = make_evaluation(method, updates)
  part, parts = sharding.batch_share(mesh)
  iterator = pipeline.make_iterator(
      source, batch_size=config.batch_size, seed=0, shuffle=False,
      process_index=part, process_count=parts,
  )
  history = []
  for _ in range(config.eval_batches):
    batch = method.collect(state.params, next(iterator), step)
    batch = sharding.place_batch(batch, mesh)
    history.append(programs[updates](state, frozen, batch))
  return {f'heldout/{k}': v for k, v in metrics.reduce(history).items()}


def train(
    method: Method, config: TrainConfig, sources: Mapping[str, Params | None],
    frozen: Mapping[str, Params], directory: epath.Path, *, name: str,
    seed: int, mesh: Mesh, rules: str, resolve: build.Resolve,
    clock: metrics.Clock,
) -> TrainState:
  """Trains to the last step, from the latest checkpoint if there is one.

  Args:
    method: what to train.
    config: how long and on what.
    sources: per role the tree its `init` takes.
    frozen: parameters of the frozen networks, on the mesh.
    directory: `checkpoints/`, `metrics.jsonl` and `tensorboard/` go there.
    name: shown beside the progress bar.
    seed: of initial parameters, data order and all randomness of steps.
    mesh: see `sharding.make_mesh`.
    rules: name of a sharding preset.
    resolve: turns 'stage:name' in data paths into folders.
    clock: started when the stage did.

  Returns:
    The state after the last step.

  Raises:
    hooks.NotFinite: a metric is NaN or infinite.
    hooks.Preempted: SIGTERM came; the state is saved.
    ValueError: a batch that the mesh does not divide, bad data.
  """
  sharding.check_batch(config.batch_size, mesh, config.micro_batches)
  source = build.build_source(config.data, resolve)
  heldout = config.heldout and build.build_source(config.heldout, resolve)
  part, parts = sharding.batch_share(mesh)
  stream = dict(
      source=source, batch_size=config.batch_size, seed=seed,
      process_index=part, process_count=parts,
  )
  iterator = pipeline.make_iterator(**stream)
  abstract, fresh = fresh_state(method, seed, sources, mesh, rules)
  saver = checkpoint.Checkpointer(
      directory / 'checkpoints', save_every=config.save_every,
      keep=config.keep,
  )
  # 1. this run's own checkpoint, 2. the roles' `init`, 3. from scratch.
  if saver.latest_step is None:
    state = fresh(sources)
  else:
    state = saver.restore(abstract, iterator)
  start = int(state.step)
  # Nothing is saved at step 0: its records come again.
  writer = metrics.make_writer(directory, resume_at=start or -1)
  programs = Programs(method, config.micro_batches, mesh)
  evaluations: dict[Any, Any] = {}
  guard = hooks.NanGuard(
      directory, seed, pipeline.make_batches(**stream).__getitem__, method
  )
  throttle = hooks.Throttle()
  profile = hooks.Profile(
      directory / 'profile', config.profile_first, config.profile_steps
  )
  history, flops_done = [], 0

  @functools.cache  # some networks are traced to be counted
  def work(updates: tuple[Update, ...]) -> int:
    examples = config.batch_size // config.micro_batches
    return config.micro_batches * method.flops(updates, examples)

  def report(step: int) -> str:
    """Writes what has been gathered since the last report."""
    nonlocal flops_done
    if not history:
      return ''
    steps = jax.device_get(history)
    guard.check(step - len(steps), steps, saver.latest_step)
    values, spent = metrics.reduce(steps), clock.take()
    seconds = sum(spent.values())
    speed = {
        'time/steps_per_second': len(history) / seconds,
        'time/examples_per_second':
            len(history) * config.batch_size / seconds,
        'time/data_wait': spent['time/data_seconds'] / seconds,
    }
    used = flops.utilisation(flops_done, seconds, mesh.devices.flatten())
    if used is not None:
      speed['time/mfu'] = used
    writer.write_scalars(
        step, values | speed | spent | metrics.peak_memory()
    )
    history.clear()
    flops_done = 0
    losses = [f'{k} {v:.4g}' for k, v in values.items() if k.endswith('/loss')]
    return '  '.join(losses)

  clock.turn('step')
  try:
    with console.Progress(name, config.steps, start) as bar:
      for step in range(start, config.steps):
        # The order is law: evaluate, save, and only then advance the data, so
        # that a resumed run sees the batch that comes next and no other. It
        # has been evaluated where it was saved.
        if heldout and config.eval_every and step % config.eval_every == 0 and (
            step > start or not start):
          with clock.spend('eval'):
            writer.write_scalars(step, evaluate_losses(
                method, state, frozen, heldout, config, mesh, evaluations
            ))
        preempted = hooks.preempted()
        if step > start and (preempted or saver.should_save(step)):
          report(step)
          writer.flush()  # a run that goes on from here has nothing of before
          with clock.spend('save'):
            saver.save(state, iterator, {'stage': name}, force=preempted)
        if preempted:
          saver.wait()
          raise hooks.Preempted(
              f'{name}: stopped by a signal, saved at step {step}; run the '
              'same command again to go on'
          )
        with clock.spend('data'):
          batch = method.collect(state.params, next(iterator), step)
          batch = sharding.place_batch(batch, mesh)
        updates = method.updates(step)
        with clock.spend('compile'):
          programs.prepare(updates, state, frozen, batch)
        profile.before(step)
        state, outputs = programs(updates, state, frozen, batch)
        profile.after(step + 1, outputs)
        throttle.add(outputs)
        # One step behind: step n is on its way while n-1 is read.
        note = ''
        if step % config.log_every == 0:
          note = report(step)
        history.append(outputs)
        flops_done += work(updates)
        bar.update(step + 1, note)
      report(config.steps)
    if heldout and config.eval_every and start < config.steps:
      with clock.spend('eval'):
        writer.write_scalars(config.steps, evaluate_losses(
            method, state, frozen, heldout, config, mesh, evaluations
        ))
    writer.flush()
    with clock.spend('save'):
      if saver.latest_step != config.steps:
        saver.save(state, iterator, {'stage': name}, force=True)
      saver.wait()
    writer.write_scalars(config.steps, clock.take())
  finally:
    profile.close()
    writer.close()
    saver.close()
  return state


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'train' and exports its roles.

  Returns:
    `exports`, folder by role, and `hashes` by role.
  """
  clock = metrics.Clock()
  config = config_lib.make(TrainConfig, context.config, context.name)
  networks = {
      name: checkpoint.describe(context.resolve(path))['hash']
      for name, entry in config.frozen.items()
      if (path := entry if isinstance(entry, str) else entry.get('path'))
  }
  build.check_pairs(config.data, networks, context.resolve)
  method, sources, frozen = build.build_method(
      config.method, config.roles, config.frozen, config.steps,
      context.resolve, context.mesh, context.rules,
  )
  state = train(
      method, config, sources, frozen, context.directory, name=context.name,
      seed=context.seed, mesh=context.mesh, rules=context.rules,
      resolve=context.resolve, clock=clock,
  )
  described = {
      'stage': context.name, 'step': config.steps, 'seed': context.seed,
      'method': dict(config.method),
      # Who samples from the export needs to know its tokenizer.
      'frozen': networks,
  }
  exports, hashes = {}, {}
  for name, role in method.roles.items():
    params = state.ema.get(name, state.params[name])
    if role.adapter is not None:
      params = role.adapter.merge(frozen[role.adapter.base], params)
    exports[name] = f'export/{name}-{config.steps}'
    hashes[name] = checkpoint.export(
        context.directory / exports[name], role.model, params, described
    )
  return {'exports': exports, 'hashes': hashes}
