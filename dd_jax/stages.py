# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A run is a list of stages; this runs those that are not finished.

    <workdir>/<stage>/stage.json   what made the artefact beside it
    <workdir>/.redo                while a run with --redo is not finished
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import graphlib
import hashlib
import json
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from dd_jax import config as config_lib
from dd_jax import console, hooks, paths, registry, released, sharding

FORMAT_VERSION = 1
_PREFIX = 'stage:'
# While it is there, the stages that were to be made again have been removed.
_REDO = '.redo'


@dataclasses.dataclass(frozen=True)
class Stage:
  """One step of a run.

  Attributes:
    name: its folder under the workdir.
    kind: entry of `registry.TABLES['kinds']`.
    inputs: names of the stages whose artefacts it reads.
    config: what its kind takes, plain values, with the run's `seed`.
    rules: name of a sharding preset. Like the mesh, no part of what an artefact
      was made from.
  """

  name: str
  kind: str
  inputs: tuple[str, ...]
  config: Mapping[str, Any]
  rules: str


@dataclasses.dataclass(frozen=True)
class Context:
  """What a stage kind gets: `run(context) -> outputs` (JSON-able)."""

  name: str
  config: Mapping[str, Any]
  directory: epath.Path
  workdir: epath.Path
  seed: int
  mesh: Mesh
  rules: str

  def resolve(self, ref: str) -> epath.Path:
    """A path, or the artefact of 'stage:name' or 'stage:name/role'.

    Raises:
      FileNotFoundError: the stage is not complete, or the path is not there.
    """
    if not ref.startswith(_PREFIX):
      path = epath.Path(ref)
      if not path.exists():
        raise FileNotFoundError(f'stage {self.name!r}: {ref} does not exist')
      return path
    name, _, role = ref.removeprefix(_PREFIX).partition('/')
    record = read_record(self.workdir / name)
    if record is None or not record['complete']:
      raise FileNotFoundError(
          f'stage {self.name!r} needs {ref}, which is not complete in '
          f'{self.workdir}; run it first (--stage={name})'
      )
    outputs = record['outputs']
    exports = outputs.get('exports') or {'': outputs['artefact']}
    if not role and len(exports) > 1:
      raise ValueError(f'{ref} has several roles: {sorted(exports)}')
    role = role or next(iter(exports))
    if role not in exports:
      raise ValueError(f'{ref}: roles are {sorted(exports)}')
    path = self.workdir / name / exports[role]
    if not path.exists():
      raise FileNotFoundError(
          f'{path} is missing though stage {name!r} was complete; restore it '
          f'or run with --redo={name}'
      )
    return path


def _references(value: Any) -> Iterator[str]:
  """All 'stage:name' and 'stage:name/role' in a config."""
  if isinstance(value, Mapping):
    for v in value.values():
      yield from _references(v)
  elif isinstance(value, (list, tuple)):
    for v in value:
      yield from _references(v)
  elif isinstance(value, str) and value.startswith(_PREFIX):
    yield value


def check_fields(config: Mapping[str, Any]) -> None:
  """Raises where a run's config lacks one of its own fields.

  Raises:
    ValueError: names what is missing.
  """
  fields = ('name', 'seed', 'mesh', 'rules', 'stages')
  if missing := [name for name in fields if name not in config]:
    raise ValueError(
        f'the config lacks {", ".join(missing)}; a run needs '
        f'{", ".join(fields)}'
    )


def parse(config: Mapping[str, Any]) -> list[Stage]:
  """The stages of a run's config, each after those that it reads.

  Raises:
    ValueError: missing fields, unknown kind or rules, a seed out of range, a
      reference to no stage, or a circle.
  """
  check_fields(config)
  stages = {}
  for name, values in config['stages'].items():
    values = dict(values)
    kind = values.pop('kind', None)
    registry.find('kinds', kind)
    inputs = tuple(sorted({
        ref.removeprefix(_PREFIX).partition('/')[0]
        for ref in _references(values)
    }))
    for ref in inputs:
      if ref not in config['stages']:
        raise ValueError(
            f'stage {name!r} reads stage {ref!r}, which the config lacks; it '
            f'has {sorted(config["stages"])}'
        )
    seed = values.setdefault('seed', config['seed'])
    if type(seed) is not int or not 0 <= seed < 2**31:
      raise ValueError(
          f'stage {name!r}: seed={seed!r} must be an integer in [0, 2**31)'
      )
    rules = values.pop('rules', config['rules'])
    if rules not in sharding.RULES:
      raise ValueError(
          f'stage {name!r}: rules={rules!r}: expected one of '
          f'{list(sharding.RULES)}'
      )
    stages[name] = Stage(name, kind, inputs, values, rules)
  try:
    order = graphlib.TopologicalSorter(
        {s.name: s.inputs for s in stages.values()}
    ).static_order()
    return [stages[name] for name in order]
  except graphlib.CycleError as e:
    raise ValueError(f'stages read each other in a circle: {e.args[1]}') from e


def read_record(directory: epath.Path) -> dict[str, Any] | None:
  """The `stage.json` of a stage's folder, None where there is none.

  Raises:
    ValueError: a file that is not JSON or of a newer format.
  """
  file = directory / 'stage.json'
  if not file.exists():
    return None
  try:
    record = json.loads(file.read_text())
    version = record['format_version']
  except (ValueError, KeyError) as e:
    raise ValueError(
        f'{file} cannot be read ({e}); run with --redo={directory.name}'
    ) from e
  if version > FORMAT_VERSION:
    raise ValueError(f'{file}: format_version {version} is newer than this '
                     f'dd_jax reads ({FORMAT_VERSION}); update dd_jax')
  return record


def _write_record(directory: epath.Path, record: Mapping[str, Any]) -> None:
  """Process 0 writes; the others go on once it is there to be read."""
  if jax.process_index() == 0:
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / 'stage.json.tmp'
    temporary.write_text(json.dumps(record, indent=1))
    temporary.replace(directory / 'stage.json')
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'record of {directory.name}')


def _hash(value: Any) -> str:
  return hashlib.sha256(config_lib.canonical_json(value).encode()).hexdigest()


def _check_config(stage: Stage) -> None:
  """Raises where its kind knows a field otherwise, or does not know it.

  The last stage should not find its mistake after a day.
  """
  if stage.kind in registry.TABLES['configs']:
    fields = {k: v for k, v in stage.config.items() if k != 'seed'}
    config_lib.make(registry.get('configs', stage.kind), fields, stage.name)


def _check(stage: Stage, record: Mapping[str, Any],
           inputs: Mapping[str, str], directory: epath.Path) -> None:
  """Raises where an artefact was made by another config or other inputs."""
  redo = (f'run with --redo={stage.name} to make it (and what depends on it) '
          'again, or choose another --workdir')
  if changed := config_lib.differences(record['config'], stage.config):
    more = f' (and {len(changed) - 1} more)' if len(changed) > 1 else ''
    raise ValueError(
        f'{directory} was made by another config: {stage.name}.{changed[0]}'
        f'{more}; {redo}'
    )
  for name, digest in inputs.items():
    if record['inputs'].get(name) != digest:
      raise ValueError(
          f'{directory} was made from another {name!r} than the one in the '
          f'workdir now; {redo}'
      )


def _remove(names: Collection[str], workdir: epath.Path, made_by: str) -> None:
  """Removes the folders of stages that are to be made again."""
  if jax.process_index() == 0:
    _forget_redo(workdir)
    for name in names:
      if (workdir / name).exists():
        logging.info('redoing %s', name)
        (workdir / name).rmtree()
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _REDO).write_text(made_by)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('redo')


def _forget_redo(workdir: epath.Path) -> None:
  if jax.process_index() == 0 and (workdir / _REDO).exists():
    (workdir / _REDO).unlink()


def _dependents(stages: Sequence[Stage], names: set[str]) -> set[str]:
  out = set(names)
  for stage in stages:  # in order, so one pass is enough
    if out & set(stage.inputs):
      out.add(stage.name)
  return out


def run(
    config: Mapping[str, Any], workdir: epath.PathLike, *,
    only: str | None = None, redo: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
  """Runs the stages of a config that are not complete, in order.

  Args:
    config: `name`, `seed`, `mesh`, `rules` and `stages`, which may have rules
      of their own; a plain mapping.
    workdir: each stage has a folder of its name there.
    only: run this stage alone.
    redo: stages to make again; what depends on them is made again too. Until
      such a run has ended, the same one goes on with what has been made.

  Returns:
    The record of every stage that is complete.

  Raises:
    ValueError: bad config, or an artefact of another config.
    FileNotFoundError: files that are read from outside are not there.
    hooks.Preempted: a signal came; what was done is saved.
  """
  # Values as JSON gives them back, so that comparisons see no tuples.
  config = json.loads(json.dumps(config))
  workdir = paths.absolute(workdir)
  stages = parse(config)
  names = [s.name for s in stages]
  for name in [*redo, *([only] if only else [])]:
    if name not in names:
      raise ValueError(f'no stage {name!r}; this config has {names}')
  mesh = sharding.make_mesh(config['mesh'])
  if mesh.shape['context'] > 1:
    logging.warning(
        'mesh: nothing is split over context yet; its devices repeat the work '
        'of each other'
    )
  again = _dependents(stages, set(redo))
  # Whoever starts a stopped run again repeats its flags too: what is being made
  # again is removed once.
  made_by = _hash([s.config for s in stages if s.name in again])
  if again:
    marker = workdir / _REDO
    going_on = marker.exists() and marker.read_text() == made_by
    if jax.process_count() > 1:  # what host 0 sees: it is the one that removes
      going_on = bool(multihost_utils.broadcast_one_to_all(np.array(going_on)))
    if going_on:
      console.say('--redo: going on with what such a run has begun; to begin '
                  f'anew remove {marker}')
      again = set()
  # Nothing is touched before everything that is there has been checked.
  records: dict[str, dict[str, Any]] = {}

  def hashes_of(stage: Stage) -> dict[str, str]:
    """What is known of a stage's inputs."""
    return {n: records[n]['hash'] for n in stage.inputs
            if n in records and records[n]['complete']}

  for stage in stages:
    record = read_record(workdir / stage.name)
    if record is None or record['config'] != stage.config:
      _check_config(stage)
    if record is None or stage.name in again:
      continue
    _check(stage, record, hashes_of(stage), workdir / stage.name)
    records[stage.name] = record
  released.check([
      s for s in stages if only in (None, s.name)
      and not records.get(s.name, {'complete': False})['complete']
  ])
  if again:
    _remove(again, workdir, made_by)
  console.say(f'{"devices":<14} {sharding.describe(mesh)}')
  for stage in stages:
    if only and stage.name != only:
      continue
    done = records.get(stage.name)
    if done:  # an input may just have been made, and differ
      _check(stage, done, hashes_of(stage), workdir / stage.name)
    if done and done['complete']:
      console.say(f'{stage.name:<14} complete, skipped')
      continue
    hooks.raise_if_preempted(f'stopped by a signal before {stage.name}')
    context = Context(
        name=stage.name,
        config={k: v for k, v in stage.config.items() if k != 'seed'},
        directory=workdir / stage.name, workdir=workdir,
        seed=stage.config['seed'], mesh=mesh, rules=stage.rules,
    )
    for ref in sorted(set(_references(context.config))):
      context.resolve(ref)
    record = {
        'format_version': FORMAT_VERSION, 'name': stage.name,
        'kind': stage.kind, 'config': stage.config,
        'config_hash': _hash(stage.config),
        'inputs': {n: records[n]['hash'] for n in stage.inputs},
        'complete': False,
    }
    _write_record(context.directory, record)
    began = time.monotonic()
    with sharding.kernels_on(mesh):
      outputs = registry.get('kinds', stage.kind)(context)
    record |= {
        'outputs': outputs, 'hash': _hash([record['config_hash'], outputs]),
        'seconds': round(time.monotonic() - began, 1), 'complete': True,
    }
    _write_record(context.directory, record)
    records[stage.name] = record
  complete = {n: r for n, r in records.items() if r['complete']}
  if redo or len(complete) == len(stages):
    _forget_redo(workdir)
  return complete
