# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run will need: its programs, for chips that are not here.

The programs are those that the stages run, traced for shapes. Nothing of a
network's size is made, and nothing that earlier stages would have written is
read. `dd_jax.fit` compiles them.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
import contextvars
import dataclasses
import functools
import importlib.util
import math
import os
import re
from typing import Any

from etils import epath
import jax
from jax.experimental import topologies
import numpy as np

from dd_jax import (
  aot,
  build,
  captions,
  checkpoint,
  conversion,
  evaluate,
  evaluate_clip,
  evaluate_denoiser,
  evaluate_fid,
  evaluate_toy,
  generate,
  judging,
  registry,
  released,
  roofline,
  scoring,
  sharding,
  stages,
  train,
)
from dd_jax import config as config_lib
from dd_jax.data import pairs
from dd_jax.model import Model, for_platform

# Networks that judge images, and the configs of the stages that have them.
_JUDGES = {
    'inception': evaluate_fid.FidConfig, 'clip': evaluate_clip.ClipScoreConfig,
}
_INCEPTION_INPUTS = (3,)  # channels of 8-bit images


@dataclasses.dataclass(frozen=True)
class Target:
  """Where programs will run.

  Attributes:
    name: such as 'v5e:4x4'; 'cpu:8' are devices of this machine.
    devices: of the slice.
    chip: what one of them does; None where that is not known.
    hbm_bytes: what one of them holds; None where that is not known.
  """

  name: str
  devices: Sequence[Any]
  chip: roofline.Chip | None
  hbm_bytes: float | None


@dataclasses.dataclass(frozen=True)
class Program:
  """A program of a stage.

  Attributes:
    stage: name of the stage.
    name: within the stage.
    trace: gives what `jax.jit(...).trace(...)` gives.
    held: trees in memory while it runs, by what they are.
    inputs: tree of what it is given besides.
    model_flops: analytic FLOPs of one run on all chips; None where they are
      those of the traced program.
    calls: how often the stage runs it, None where only data tell.
    knobs: fields of the config that make it smaller.
  """

  stage: str
  name: str
  trace: Callable[[], Any]
  held: Mapping[str, Any]
  inputs: Any
  model_flops: int | None
  calls: int | None
  knobs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """A stage that has not run; what a planner of `registry` gets.

  Attributes:
    name: of the stage.
    config: what its kind takes.
    seed: of the stage.
    mesh: of the target's devices.
    rules: name of a sharding preset.
    resolve: a path or 'stage:name' to a `Model`, or to what is known of data
      that are not there yet; see `Planned.data`.
  """

  name: str
  config: Mapping[str, Any]
  seed: int
  mesh: Any
  rules: str
  resolve: Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Planned:
  """What is known of a stage before it runs.

  Attributes:
    programs: in the order in which they run.
    exports: networks by role.
    data: of pairs their manifest; of captions, shape and type of each field
      that they add to records.
  """

  programs: Sequence[Program] = ()
  exports: Mapping[str, Model] = dataclasses.field(default_factory=dict)
  data: Any = None


def parse_topology(text: str) -> tuple[str, tuple[int, ...]]:
  """('v5e', (4, 4)) of 'v5e:4x4'.

  Raises:
    ValueError: another form, or chips that are not known.
  """
  kind, _, sides = text.partition(':')
  known = [*roofline.CHIPS, 'cpu']
  if kind not in known:
    raise ValueError(f'topology {text!r}: chips are {known}, as in v5e:4x4')
  if not re.fullmatch(r'\d+(x\d+)*', sides):
    raise ValueError(f'topology {text!r}: sides are missing, as in v5e:4x4')
  shape = tuple(map(int, sides.split('x')))
  if math.prod(shape) < 1:
    raise ValueError(f'topology {text!r}: no chips')
  return kind, shape


def make_target(topology: str, hbm_gb: float | None = None) -> Target:
  """The chips of a slice, without the slice; needs libtpu (extra `tpu`).

  Args:
    topology: such as 'v5e:4x4', or 'cpu:8' for devices of this machine.
    hbm_gb: memory of a chip in 10^9 bytes, instead of the data sheet's.

  Raises:
    ValueError: no such topology.
    ImportError: libtpu is not installed.
  """
  kind, shape = parse_topology(topology)
  chip = roofline.CHIPS.get(kind)
  size = hbm_gb * roofline.GIGA if hbm_gb else chip and chip.hbm_bytes
  if kind == 'cpu':
    devices = jax.devices('cpu')
    if len(devices) < math.prod(shape):
      raise ValueError(f'{topology}: there are {len(devices)} CPU devices')
    return Target(topology, devices[:math.prod(shape)], chip, size)
  # libtpu looks for chips unless it is told where it is.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # No chip is used, so that others may plan at the same time.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  for name, value in aot.ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
        f'programs for {topology} are compiled by libtpu: pip install '
        "'dd_jax[tpu]'"
    )
  try:
    slice_ = topologies.get_topology_desc(
        platform='tpu', topology_name=topology
    )
  except Exception as e:  # whatever libtpu raises
    raise ValueError(f'topology {topology!r}: {e}') from e
  return Target(topology, slice_.devices, chip, size)


def programs(
    config: Mapping[str, Any], target: Target, *,
    only: Sequence[str] = (),
) -> list[Program]:
  """Every program that a run's config makes, in order; compiles nothing.

  Args:
    config: of a run, see `stages.run`.
    target: its devices make the mesh.
    only: names of stages; empty for all.

  Raises:
    ValueError: a config that a run would refuse too, or sizes that neither the
      config nor files tell.
  """
  parsed = stages.parse(config)
  if unknown := set(only) - {s.name for s in parsed}:
    raise ValueError(f'no stage {sorted(unknown)}; this config has '
                     f'{[s.name for s in parsed]}')
  mesh = sharding.make_mesh(config['mesh'], target.devices)
  done: dict[str, Planned] = {}
  with for_platform(target.devices[0].platform), sharding.kernels_on(mesh):
    # Programs are traced later, as they would be in here.
    inside = contextvars.copy_context()
    for stage in parsed:
      if only and not _matters(stage.name, only, parsed):
        continue
      blueprint = Blueprint(
          stage.name, {k: v for k, v in stage.config.items() if k != 'seed'},
          stage.config['seed'], mesh, stage.rules,
          lambda ref, name=stage.name: _resolve(ref, name, done),
      )
      planner = registry.get('planners', stage.kind)
      done[stage.name] = planner(blueprint)
  return [
      dataclasses.replace(p, trace=functools.partial(inside.run, p.trace))
      for name, planned in done.items() if not only or name in only
      for p in planned.programs
  ]


def _matters(
    name: str, only: Sequence[str], parsed: Sequence[stages.Stage]
) -> bool:
  """Whether a stage is asked for, or read by one that is."""
  return name in only or any(
      name in s.inputs and _matters(s.name, only, parsed) for s in parsed
  )


def _resolve(ref: str, reader: str, done: Mapping[str, Planned]) -> Any:
  if not ref.startswith('stage:'):
    path = epath.Path(ref)
    if (path / 'manifest.json').exists():
      return pairs.read_manifest(path)
    meta = checkpoint.describe(path)
    return registry.get('models', meta['family'])(meta['config'])
  name, _, role = ref.removeprefix('stage:').partition('/')
  planned = done[name]
  if planned.data is not None:
    return planned.data
  if not role and len(planned.exports) != 1:
    raise ValueError(f'stage {reader!r}: {ref} has the roles '
                     f'{sorted(planned.exports)}; name one')
  role = role or next(iter(planned.exports))
  if role not in planned.exports:
    raise ValueError(f'stage {reader!r}: {ref}: roles are '
                     f'{sorted(planned.exports)}')
  return planned.exports[role]


def plan_convert(b: Blueprint) -> Planned:
  """The network of released files, by what is known of them or in them."""
  config = released.convert_config(b.config, b.name)
  family = registry.get('families', config.family)
  if all(epath.Path(p).exists() for p in config.paths):
    model = conversion.plan(
        config.family, config.paths, given=config.config, wrapper=config.keys
    ).model
  else:
    fields = released.known_fields(config)
    if fields is None:
      raise ValueError(
          f'stage {b.name!r}: neither {", ".join(config.paths)} nor the config '
          "tells the network's sizes; put the files there, or the fields of "
          f'the {family.model!r} config under stages.{b.name}.config'
      )
    model = registry.get('models', family.model)(fields)
  return Planned(exports={model.family: model})


def plan_train(b: Blueprint) -> Planned:
  """Fresh state, a step for each tuple of updates, held-out losses."""
  config = config_lib.make(train.TrainConfig, b.config, b.name)
  sharding.check_batch(config.batch_size, b.mesh, config.micro_batches)
  method, sources, frozen = build.build_method(
      config.method, config.roles, config.frozen, config.steps, b.resolve,
      b.mesh, b.rules,
  )
  whole = sharding.replicated(b.mesh)
  sources = jax.tree.map(lambda x: x.update(sharding=whole), sources)
  state, fresh = train.fresh_state(method, b.seed, sources, b.mesh, b.rules)
  batch = _rows(b.mesh, config.batch_size, {
      **_describe_records(config.data, b.resolve), 'index': ((), np.uint32),
  })
  compiled = train.Programs(method, config.micro_batches, b.mesh)
  networks = {f'frozen {n}': tree for n, tree in frozen.items()}
  held = dict(networks)
  for name in method.roles:
    held[f'{name} weights'] = state.params[name]
    held[f'{name} optimizer'] = state.opt[name]
    if name in state.ema:
      held[f'{name} average'] = state.ema[name]
  knobs = (
      'micro_batches', 'batch_size', 'roles.*.model.remat',
      'roles.*.model.dtype', 'mesh.fsdp with rules=fsdp',
      'roles.*.optimizer.moment_dtype',
  )
  out = [Program(
      b.name, 'initial state', lambda: fresh.trace(sources),
      networks, sources, 0, 1, ('mesh.fsdp with rules=fsdp',),
  )]
  steps = collections.Counter(map(method.updates, range(config.steps)))
  out += [Program(
      b.name, f'step {_title(updates)}',
      lambda updates=updates: compiled.trace(updates, state, frozen, batch),
      held, batch, config.micro_batches * method.flops(
          updates, config.batch_size // config.micro_batches
      ), count, knobs,
  ) for updates, count in steps.items()]
  if config.heldout and config.eval_every:
    evaluations = collections.Counter(
        method.updates(step)
        for step in (*range(0, config.steps, config.eval_every), config.steps)
    )
    out += [Program(
        b.name, f'losses {_title(updates)}',
        lambda updates=updates: train.make_evaluation(method, updates).trace(
            state, frozen, batch
        ),
        held, batch, None, count * config.eval_batches, ('batch_size',),
    ) for updates, count in evaluations.items()]
  return Planned(
      out, {name: role.model for name, role in method.roles.items()}
  )


def plan_generate(b: Blueprint) -> Planned:
  """A batch of pairs."""
  config = config_lib.make(generate.GenerateConfig, b.config, b.name)
  sharding.check_batch(config.batch_size, b.mesh)
  models, params = build.load_frozen(
      {'teacher': config.teacher, 'vae': config.vae}, b.resolve, b.mesh,
      b.rules,
  )
  teacher = models['teacher'].config
  manifest = pairs.Manifest(
      pairs=config.pairs, shard_size=config.shard_size,
      length=teacher.offsets[-1], vocab_size=teacher.vocab_size,
      # Of captions only the stage that reads them knows how many there are.
      num_classes=teacher.num_classes or 1,
      provenance=dataclasses.asdict(config),
  )
  rows = _rows(b.mesh, config.batch_size, {
      'seed': ((), np.uint32), 'id': ((), np.uint32),
      **_describe_conditions(teacher),
  })
  program = generate.make_program(
      config, models['teacher'], models['vae'], b.mesh
  )
  return Planned([Program(
      b.name, 'pairs',
      lambda: program.trace(params['teacher'], params['vae'], rows),
      params, rows, None, sum(
          -(-len(manifest.shard_ids(s)) // config.batch_size)
          for s in range(manifest.num_shards)
      ), ('batch_size', 'chunk', "the teacher's dtype", 'mesh'),
  )], data=manifest)


def plan_evaluate(b: Blueprint) -> Planned:
  """A batch of each row of the report that a network samples."""
  config = config_lib.make(evaluate.EvaluateConfig, b.config, b.name)
  models, params = build.load_frozen(
      {n: getattr(config, n) for n in ('teacher', 'student', 'vae')},
      b.resolve, b.mesh, judging.RULES,
  )
  manifest = b.resolve(config.pairs)
  params['cumulative'] = _describe_counts(manifest, b.mesh)
  panel = evaluate.make_panel(
      config, models, params, manifest.provenance, b.seed, b.mesh
  )
  return _plan_panel(b, config, panel, models['teacher'].config, params)


def plan_evaluate_denoiser(b: Blueprint) -> Planned:
  """A batch of each row of the report that a network samples."""
  config = config_lib.make(
      evaluate_denoiser.EvaluateDenoiserConfig, b.config, b.name
  )
  models, params = build.load_frozen(
      {n: getattr(config, n) for n in ('teacher', 'student')}, b.resolve,
      b.mesh, judging.RULES,
  )
  panel = evaluate_denoiser.make_panel(config, models, params, b.seed, b.mesh)
  return _plan_panel(b, config, panel, models['teacher'].config, params)


def plan_evaluate_toy(b: Blueprint) -> Planned:
  """Nothing: its programs are small, and run on one device."""
  config_lib.make(evaluate_toy.EvaluateToyConfig, b.config, b.name)
  return Planned()


def _plan_panel(
    b: Blueprint, config: judging.JudgedConfig, panel: judging.Panel,
    network: Any, params: Mapping[str, Any],
) -> Planned:
  size = sharding.fit_batch(config.batch_size, b.mesh)
  rows = _rows(b.mesh, size, {
      'id': ((), np.uint32), **_describe_conditions(network),
  })
  return Planned([Program(
      b.name, row.name, lambda row=row: row.sample.trace(rows), params, rows,
      None, -(-config.samples // size), ('batch_size', 'mesh'),
  ) for row in panel.rows])


def plan_captions(b: Blueprint) -> Planned:
  """A batch of captions through the text encoder."""
  config = config_lib.make(captions.CaptionsConfig, b.config, b.name)
  sharding.check_batch(config.batch_size, b.mesh)
  entry = config.encoder
  if isinstance(entry, Mapping) and 'model' in entry:
    model = build.build_model(entry['model'])
    where = sharding.replicated(b.mesh)
    params = jax.tree.map(lambda x: x.update(sharding=where), model.abstract())
  else:
    models, trees = build.load_frozen(
        {'encoder': entry}, b.resolve, b.mesh, b.rules
    )
    model, params = models['encoder'], trees['encoder']
  length = config.caption_length
  rows = _rows(b.mesh, config.batch_size, {
      'tokens': ((length,), np.int32), 'mask': ((length,), np.bool_),
  })
  program = jax.jit(
      model.fns['encode'], out_shardings=sharding.replicated(b.mesh)
  )
  return Planned([Program(
      b.name, 'features',
      lambda: program.trace(params, rows['tokens'], rows['mask']),
      {'encoder': params}, rows, None, None,
      ('batch_size', "the encoder's dtype", 'mesh'),
  )], data={
      'features': ((length, model.config.width), np.float32),
      'mask': ((length,), np.bool_),
  })


def plan_fid(b: Blueprint) -> Planned:
  """A batch of images, and of features where the stage judges them."""
  judge = next((n for n in _JUDGES if n in b.config), None)
  config = config_lib.make(
      _JUDGES.get(judge, evaluate_fid.AdmConfig), b.config, b.name
  )
  models, params = build.load_frozen(
      scoring.networks(config, (judge,) if judge else ()), b.resolve,
      b.mesh, b.rules,
  )
  model, size = models['student'], config.batch_size
  scoring.check(config, model, b.name, b.mesh, models.get('teacher'))
  if config.pairs is not None:
    params['cumulative'] = _describe_counts(b.resolve(config.pairs), b.mesh)
  rows = _rows(b.mesh, size, {
      'id': ((), np.uint32), **_describe_conditions(model.config),
  })
  program = scoring.make_program(config, models, b.seed, b.mesh)
  trees = scoring.sampled(params)
  calls = -(-config.samples // size)
  knobs = ('batch_size', "the network's dtype", 'mesh')
  out = [Program(
      b.name, 'samples',
      lambda: program.trace(trees, rows), params, rows, None, calls, knobs,
  )]
  if judge == 'inception':
    side = scoring.image_size(models)
    seen = _rows(b.mesh, size, {
        'image': ((side, side, *_INCEPTION_INPUTS), np.uint8),
    })['image']
    look = evaluate_fid.make_inception(models[judge], b.mesh)
  elif judge == 'clip':
    clip = models[judge].config
    seen = _rows(b.mesh, size, {
        'image': ((clip.image_size, clip.image_size, 3), np.float32),
        'tokens': ((clip.context_length,), np.int32),
    })
    look = evaluate_clip.make_similarity(models[judge], b.mesh)
  if judge:
    out.append(Program(
        b.name, 'features', lambda: look.trace(params[judge], seen),
        params, seen, None, calls, knobs,
    ))
  return Planned(out)


def _describe_counts(
    manifest: pairs.Manifest, mesh: Any
) -> jax.ShapeDtypeStruct:
  """How often each place of pairs has each code or one before it."""
  return jax.ShapeDtypeStruct(
      (manifest.length, manifest.vocab_size), np.int32,
      sharding=sharding.replicated(mesh),
  )


def _rows(
    mesh: Any, size: int, fields: Mapping[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
  """A batch on the mesh."""
  where = sharding.batch_sharding(mesh)
  return {
      name: jax.ShapeDtypeStruct((size, *shape), dtype, sharding=where)
      for name, (shape, dtype) in fields.items()
  }


def _describe_conditions(
    config: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and type of what a network of classes or captions is asked for."""
  if config.num_classes:
    return {'label': ((), np.int32)}
  length, width = config.caption_length, config.caption_dim
  return {
      'label': ((), np.int32), 'features': ((length, width), np.float32),
      'mask': ((length,), np.bool_),
  }


def _describe_records(
    values: Mapping[str, Any], resolve: Callable[[str], Any]
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and type of each field of a source's records."""
  fields = dict(values)
  if (ref := fields.pop('captions', None)) is not None:
    found = resolve(ref)
    if not isinstance(found, Mapping):
      raise ValueError(f'data.captions={ref} must be a stage of this config')
    return _describe_records(fields, resolve) | found
  name = fields.pop('source')
  if name == 'pairs':
    return pairs.describe_records(resolve(fields['path']))
  if name in registry.TABLES['records']:
    return registry.get('records', name)(**fields)
  # What has no entry there ships with its package.
  record = build.build_source(values, resolve)[0]
  return {k: (np.shape(v), np.asarray(v).dtype) for k, v in record.items()}


def _title(updates: Any) -> str:
  return '+'.join(
      ' '.join([u.name, *(f'{k}={v}' for k, v in u.statics)]) for u in updates
  )
