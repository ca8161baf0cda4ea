# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run will need: its programs, compiled for chips that are not here.

The programs are those that the stages run, traced for shapes. Nothing of a
network's size is made, and nothing that earlier stages would have written is
read.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import importlib.util
import itertools
import math
import os
import re
import time
from typing import Any

from etils import epath
import jax
from jax.experimental import topologies
import numpy as np

from dd_jax import (
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
  hlo,
  judging,
  registry,
  released,
  roofline,
  sharding,
  stages,
  train,
)
from dd_jax import config as config_lib
from dd_jax.data import pairs
from dd_jax.model import Model, for_platform
from dd_jax.models import layers

_MICRO_BATCHES = (1, 2, 4, 8, 16)
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


def parse_mesh(text: str) -> dict[str, int]:
  """{'data': 2, 'fsdp': 8} of 'data:2,fsdp:8'; see `sharding.make_mesh`.

  Raises:
    ValueError: another form.
  """
  sizes: dict[str, int] = {}
  for part in text.split(','):
    if not (m := re.fullmatch(r'(\w+):(-?\d+)', part.strip())):
      raise ValueError(
          f'mesh {text!r}: expected axis:size, as in data:2,fsdp:8'
      )
    if m[1] in sizes:
      raise ValueError(f'mesh {text!r}: {m[1]} twice')
    sizes[m[1]] = int(m[2])
  return sizes


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
  with for_platform(target.devices[0].platform):
    for stage in parsed:
      if only and not _matters(stage.name, only, parsed):
        continue
      blueprint = Blueprint(
          stage.name, {k: v for k, v in stage.config.items() if k != 'seed'},
          stage.config['seed'], mesh, config['rules'],
          lambda ref, name=stage.name: _resolve(ref, name, done),
      )
      planner = registry.get('planners', stage.kind)
      done[stage.name] = planner(blueprint)
  return [
      p for name, planned in done.items() if not only or name in only
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
      held, batch, method.flops(updates, config.batch_size), count, knobs,
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
  sharding.check_batch(config.batch_size, b.mesh)
  models, params = build.load_frozen(
      {n: getattr(config, n) for n in ('teacher', 'student', 'vae')},
      b.resolve, b.mesh, b.rules,
  )
  panel = evaluate.make_panel(
      config, models, params, b.resolve(config.pairs).provenance, b.seed, b.mesh
  )
  return _plan_panel(b, config, panel, models['teacher'].config, params)


def plan_evaluate_denoiser(b: Blueprint) -> Planned:
  """A batch of each row of the report that a network samples."""
  config = config_lib.make(
      evaluate_denoiser.EvaluateDenoiserConfig, b.config, b.name
  )
  sharding.check_batch(config.batch_size, b.mesh)
  models, params = build.load_frozen(
      {n: getattr(config, n) for n in ('teacher', 'student')}, b.resolve,
      b.mesh, b.rules,
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
  rows = _rows(b.mesh, config.batch_size, {
      'id': ((), np.uint32), **_describe_conditions(network),
  })
  return Planned([Program(
      b.name, row.name, lambda row=row: row.sample.trace(rows), params, rows,
      None, -(-config.samples // config.batch_size), ('batch_size', 'mesh'),
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
      evaluate_fid.networks(config, (judge,) if judge else ()), b.resolve,
      b.mesh, b.rules,
  )
  model, size = models['student'], config.batch_size
  evaluate_fid.check(config, model, b.name, b.mesh)
  rows = _rows(b.mesh, size, {
      'id': ((), np.uint32), **_describe_conditions(model.config),
  })
  program = evaluate_fid.make_program(
      config, model, models.get('vae'), b.seed, b.mesh
  )
  calls = -(-config.samples // size)
  knobs = ('batch_size', "the network's dtype", 'mesh')
  out = [Program(
      b.name, 'samples',
      lambda: program.trace(params['student'], params.get('vae'), rows),
      params, rows, None, calls, knobs,
  )]
  if judge == 'inception':
    side = evaluate_fid.image_size(models)
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


def compile_program(
    program: Program, target: Target,
    seen: dict[str, Any] | None = None,
) -> dict[str, Any]:
  """Compiles a program and says what it takes.

  Args:
    program: of a stage.
    target: where it will run.
    seen: compiled programs by their text, so that no two are compiled twice.

  Returns:
    JSON-able figures; bytes are of one chip, FLOPs of all. `fits` is None
    where the size of the memory is not known. `consumers` are the parts of
    `total_bytes`, largest first.
  """
  chips = len(target.devices)
  began = time.monotonic()
  with for_platform(target.devices[0].platform):
    traced = program.trace()
    lowered = traced.lower()
  row: dict[str, Any] = {
      'stage': program.stage, 'program': program.name, 'calls': program.calls,
      'knobs': list(program.knobs),
      'traced_flops': _count(traced),
      'trace_seconds': time.monotonic() - began,
  }
  flops = program.model_flops
  row['model_flops'] = row['traced_flops'] if flops is None else flops
  held = {name: _chip_bytes(tree) for name, tree in program.held.items()}
  given = _chip_bytes(program.inputs)
  began = time.monotonic()
  text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
  seen = {} if seen is None else seen
  try:
    if text not in seen:
      seen[text] = lowered.compile()
    compiled = seen[text]
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    return row | _refused(str(e), held, given, began)
  row['compile_seconds'] = time.monotonic() - began
  memory = compiled.memory_analysis()
  # What the program does not read stays in memory all the same.
  arguments = max(
      memory.argument_size_in_bytes, sum(held.values()) + given
  )
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  code = memory.generated_code_size_in_bytes
  consumers = {
      **held, 'inputs': given, 'temporaries': memory.temp_size_in_bytes,
      'results': results, 'code': code,
      'padding': arguments - sum(held.values()) - given,
  }
  row |= {
      'argument_bytes': arguments,
      'temporary_bytes': memory.temp_size_in_bytes,
      'total_bytes': arguments + results + code + memory.temp_size_in_bytes,
      'consumers': _sorted(consumers),
  }
  size = target.hbm_bytes
  row['fits'] = None if size is None else row['total_bytes'] <= size
  traffic = hlo.parse(compiled.as_text())
  row['collectives'] = {k: dict(v) for k, v in traffic.collectives.items()}
  row['hbm_traffic_bytes'] = traffic.hbm_bytes
  row['loops_counted_once'] = traffic.unknown_loops
  if target.chip is not None and row['traced_flops'] is not None:
    time_ = roofline.estimate(
        target.chip, flops=_count(traced, passes=True) / chips,
        hbm_bytes=traffic.hbm_bytes, sent_bytes=traffic.sent_bytes,
    )
    row['estimate'] = dataclasses.asdict(time_) | {
        'seconds': time_.seconds, 'bound': time_.bound,
        'mfu': roofline.utilisation(
            target.chip, row['model_flops'], time_.seconds, chips
        ) if time_.seconds else None,
    }
  return row


def _refused(
    message: str, held: Mapping[str, int], given: int, began: float
) -> dict[str, Any]:
  """Figures of a program that the compiler finds too large."""
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40, '': 1}
  used = re.search(r'Used ([\d.]+)([KMGT]?) of', message)
  total = float(used[1]) * units[used[2]] if used else None
  known = sum(held.values()) + given
  consumers = {**held, 'inputs': given}
  if total is not None:
    # The compiler does not count what the program does not read.
    total = max(total, known)
    consumers['temporaries'] = total - known
  return {
      'compile_seconds': time.monotonic() - began, 'fits': False,
      'total_bytes': total, 'argument_bytes': known,
      'temporary_bytes': consumers.get('temporaries'),
      'consumers': _sorted(consumers),
      'largest_temporaries': _allocations(message),
  }


def _allocations(message: str) -> list[str]:
  """The compiler's own list of what is large, as size, shape and place."""
  found = re.findall(
      r'Size: (\S+)(?:.*?)(?:Operator: op_name="([^"]*)")?[^=]*?'
      r'Shape: (\S+)', message, re.DOTALL,
  )
  return [' '.join(filter(None, (s, shape.split('{')[0], op)))
          for s, op, shape in found[:3]]


def _count(traced: Any, passes: bool = False) -> int | None:
  try:
    return layers.count_jaxpr(traced.jaxpr.jaxpr, passes)
  except ValueError:  # a loop of unknown length
    return None


def _chip_bytes(tree: Any) -> int:
  """Bytes of a sharded tree on one chip."""
  def one(x: Any) -> int:
    shape = x.sharding.shard_shape(x.shape)
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(one, jax.tree.leaves(tree)))


def _sorted(consumers: Mapping[str, float]) -> dict[str, float]:
  return dict(sorted(
      ((k, v) for k, v in consumers.items() if v > 0), key=lambda kv: -kv[1]
  ))


def advice(row: Mapping[str, Any]) -> str:
  """What is large in a program that does not fit, and what may help."""
  largest = list(row['consumers'].items())[:3]
  text = ', '.join(f'{name} {_gb(size)}' for name, size in largest)
  knobs = list(row['knobs'])
  if largest and largest[0][0] != 'temporaries':
    # Weights and moments: spread them before anything else.
    knobs.sort(key=lambda k: not k.startswith(('mesh', 'roles.*.optimizer')))
  return (f'{row["stage"]}, {row["program"]}: largest are {text}; may help: '
          f'{", ".join(knobs[:4])}')


def _gb(size: float) -> str:
  return f'{size / roofline.GIGA:.2f} GB'


def candidates(
    chips: int, rules: str
) -> Iterator[tuple[dict[str, int], str]]:
  """Meshes to try, and the preset of rules: least communication first."""
  yield {'data': chips}, 'dp'
  for fsdp in range(2, chips + 1):
    if chips % fsdp == 0:
      yield {'data': chips // fsdp, 'fsdp': fsdp}, (
          rules if rules != 'dp' else 'fsdp'
      )
  if rules == 'fsdp_tp':
    for tensor, fsdp in itertools.product((2, 4, 8), range(1, chips + 1)):
      if chips % (tensor * fsdp) == 0:
        yield {
            'data': chips // tensor // fsdp, 'fsdp': fsdp, 'tensor': tensor,
        }, rules


def search(
    config: Mapping[str, Any], target: Target, stage: str,
    report: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any] | None:
  """Tries meshes and micro-batches for a stage of kind 'train'.

  With each mesh the fewest micro-batches that fit are taken: more of them only
  cost time.

  Args:
    config: of the run.
    target: its `hbm_bytes` is the limit.
    stage: name of the stage.
    report: called with every try.

  Returns:
    The try with the shortest estimated step that fits: `mesh`, `rules`,
    `micro_batches`, `seconds` a step (None without an estimate), `total_bytes`;
    or None.

  Raises:
    ValueError: no such stage of kind 'train'.
  """
  if config['stages'].get(stage, {}).get('kind') != 'train':
    raise ValueError(f"--search needs a stage of kind 'train', not {stage!r}")
  best = None
  for mesh, rules in candidates(len(target.devices), config['rules']):
    for micro in _MICRO_BATCHES:
      tried = {'mesh': mesh, 'rules': rules, 'micro_batches': micro}
      values = dict(config['stages'][stage], micro_batches=micro)
      now = {
          **config, 'mesh': mesh, 'rules': rules,
          'stages': {**config['stages'], stage: values},
      }
      try:
        rows = [
            compile_program(p, target) if _may_fit(p, target) else _hopeless(p)
            for p in programs(now, target, only=[stage])
            if p.model_flops is not None  # neither losses nor samples
        ]
      except ValueError as e:  # the mesh does not divide something
        report(tried | {'fits': False, 'why': str(e)})
        break
      totals = [r['total_bytes'] for r in rows if r['total_bytes']]
      tried |= {
          'fits': all(r['fits'] for r in rows),
          'total_bytes': max(totals, default=None),
          'seconds': _mean_seconds(rows),
      }
      report(tried)
      if tried['fits']:
        if best is None or (tried['seconds'] or 0) < (best['seconds'] or 0):
          best = tried
        break
      if not all(_may_fit(p, target)
                 for p in programs(now, target, only=[stage])):
        break  # micro-batches do not make weights smaller
  return best


def _may_fit(program: Program, target: Target) -> bool:
  held = sum(map(_chip_bytes, program.held.values()))
  return target.hbm_bytes is None or held <= target.hbm_bytes


def _hopeless(program: Program) -> dict[str, Any]:
  held = sum(map(_chip_bytes, program.held.values()))
  return {'fits': False, 'total_bytes': held, 'calls': program.calls}


def _mean_seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
  """Estimated time of a step, of programs in turn as often as they run."""
  rows = [r for r in rows if r.get('model_flops')]
  if not rows or not all('estimate' in r for r in rows):
    return None
  calls = sum(r['calls'] for r in rows)
  return sum(r['calls'] * r['estimate']['seconds'] for r in rows) / calls
