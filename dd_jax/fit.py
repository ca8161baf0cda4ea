# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a planned program fits: it is compiled for chips that are not here.

What is planned is `dd_jax.plan`'s; here is how it is compiled and judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import re
import time
from typing import Any

from etils import epath
import jax

from dd_jax import aot, hlo, plan, roofline
from dd_jax.model import for_platform
from dd_jax.models import layers

_MICRO_BATCHES = (1, 2, 4, 8, 16)
# Finished programs of convolutions report up to 15% more for temporaries than
# their graphs were given. Instructions, 100 MB of them, must fit too.
_RESERVE = 0.2
ASSUMPTION = (
    'room: as the compiler places values, and a fifth of the temporaries in '
    'reserve for what it settles later; instructions count with --full only'
)

Compile = Callable[[plan.Program], dict[str, Any]]


def versions() -> dict[str, str]:
  """Of what compiles."""
  found = {'jax': jax.__version__}
  try:
    found['libtpu'] = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    pass
  return found


class Memo:
  """What is known of programs that were compiled before.

  With a folder, what a run of the planner found serves those after it, also
  after one that was killed.
  """

  def __init__(self, folder: str | None = None):
    self._folder = folder and epath.Path(folder)
    self._figures: dict[str, dict[str, Any]] = {}
    if self._folder:
      self._folder.mkdir(parents=True, exist_ok=True)

  def get(self, key: str) -> dict[str, Any] | None:
    if self._folder and key not in self._figures:
      file = self._folder / f'{key}.json'
      if file.exists():
        self._figures[key] = json.loads(file.read_text())
    return self._figures.get(key)

  def put(self, key: str, figures: dict[str, Any]) -> None:
    self._figures[key] = figures
    if self._folder:
      part = self._folder / f'{key}.part'
      part.write_text(json.dumps(figures))
      part.rename(self._folder / f'{key}.json')


def compile_program(
    program: plan.Program, target: plan.Target, memo: Memo | None = None,
    full: bool = False,
) -> dict[str, Any]:
  """Compiles a program and says what it takes.

  Args:
    program: of a stage.
    target: where it will run.
    memo: so that no program is compiled twice.
    full: whether the compiler for TPUs is to finish, see `dd_jax.aot`; without
      it, a fifth of the temporaries is held in reserve.

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
  held = {name: chip_bytes(tree) for name, tree in program.held.items()}
  given = chip_bytes(program.inputs)
  known = sum(held.values()) + given
  found = _figures(lowered, target, memo or Memo(), full)
  row['compile_seconds'] = found['seconds']
  if 'used_bytes' in found:
    # The compiler does not count what the program does not read.
    total = found['used_bytes'] and max(found['used_bytes'], known)
    spare = None if total is None else total - known
    return row | {
        'fits': False, 'total_bytes': total, 'argument_bytes': known,
        'temporary_bytes': spare,
        'consumers': _sorted(
            {**held, 'inputs': given, 'temporaries': spare or 0}
        ),
        'largest_temporaries': found['largest'],
    }
  # What the program does not read stays in memory all the same.
  arguments = max(found['argument_bytes'], known)
  results, temporaries = found['result_bytes'], found['temporary_bytes']
  code, reserve = found['code_bytes'], 0
  if code is None:
    code, reserve = 0, round(_RESERVE * temporaries)
  consumers = {
      **held, 'inputs': given, 'temporaries': temporaries,
      'results': results, 'code': code, 'padding': arguments - known,
      'reserve': reserve,
  }
  row |= {
      'argument_bytes': arguments,
      'temporary_bytes': temporaries,
      'total_bytes': arguments + results + temporaries + code + reserve,
      'consumers': _sorted(consumers),
      'collectives': found['collectives'],
      'hbm_traffic_bytes': found['hbm_traffic_bytes'],
      'loops_counted_once': found['unknown_loops'],
  }
  size = target.hbm_bytes
  row['fits'] = None if size is None else row['total_bytes'] <= size
  if target.chip is not None and row['traced_flops'] is not None:
    time_ = roofline.estimate(
        target.chip, flops=_count(traced, passes=True) / chips,
        hbm_bytes=found['hbm_traffic_bytes'], sent_bytes=found['sent_bytes'],
    )
    row['estimate'] = dataclasses.asdict(time_) | {
        'seconds': time_.seconds, 'bound': time_.bound,
        'mfu': roofline.utilisation(
            target.chip, row['model_flops'], time_.seconds, chips
        ) if time_.seconds else None,
    }
  return row


def _figures(
    lowered: Any, target: plan.Target, memo: Memo, full: bool
) -> dict[str, Any]:
  """What the compiler says of a program, or what it said before."""
  full = full or target.devices[0].platform != 'tpu'
  parts = (lowered.as_text(), target.name, full, sorted(versions().items()))
  key = hashlib.sha256(repr(parts).encode()).hexdigest()
  if (found := memo.get(key)) is not None:
    return found
  began = time.monotonic()
  try:
    text, found = _finish(lowered) if full else _place(lowered)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    found = _refused(str(e))
  else:
    traffic = hlo.parse(text)
    found |= {
        'collectives': {k: dict(v) for k, v in traffic.collectives.items()},
        'sent_bytes': traffic.sent_bytes,
        'hbm_traffic_bytes': traffic.hbm_bytes,
        'unknown_loops': traffic.unknown_loops,
    }
  found['seconds'] = time.monotonic() - began
  memo.put(key, found)
  return found


def _finish(lowered: Any) -> tuple[str, dict[str, Any]]:
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  return compiled.as_text(), {
      'argument_bytes': memory.argument_size_in_bytes,
      'result_bytes':
          memory.output_size_in_bytes - memory.alias_size_in_bytes,
      'temporary_bytes': memory.temp_size_in_bytes,
      'code_bytes': memory.generated_code_size_in_bytes,
  }


def _place(lowered: Any) -> tuple[str, dict[str, Any]]:
  text, sizes = aot.place(lowered)
  return text, {
      'argument_bytes': sizes['arguments'], 'result_bytes': sizes['results'],
      'temporary_bytes': sizes['temporaries'], 'code_bytes': None,
  }


def _refused(message: str) -> dict[str, Any]:
  """Figures of a program that the compiler finds too large."""
  units = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40, '': 1}
  used = re.search(r'Used ([\d.]+)([KMGT]?) of', message)
  return {
      'used_bytes': float(used[1]) * units[used[2]] if used else None,
      'largest': _allocations(message),
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


def chip_bytes(tree: Any) -> int:
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
    config: Mapping[str, Any], target: plan.Target, stage: str,
    report: Callable[[Mapping[str, Any]], None], compile_: Compile,
) -> dict[str, Any] | None:
  """Tries meshes and micro-batches for a stage of kind 'train'.

  With each mesh the fewest micro-batches that fit are taken: more of them only
  cost time.

  Args:
    config: of the run.
    target: its `hbm_bytes` is the limit.
    stage: name of the stage.
    report: called with every try.
    compile_: says what a program takes; see `compile_program`.

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
  own = config['stages'][stage].get('rules', config['rules'])
  for mesh, rules in candidates(len(target.devices), own):
    for micro in _MICRO_BATCHES:
      tried = {'mesh': mesh, 'rules': rules, 'micro_batches': micro}
      values = dict(
          config['stages'][stage], micro_batches=micro, rules=rules
      )
      now = {
          **config, 'mesh': mesh, 'rules': rules,
          'stages': {**config['stages'], stage: values},
      }
      try:
        rows = [
            compile_(p) if _may_fit(p, target) else _hopeless(p)
            for p in plan.programs(now, target, only=[stage])
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
                 for p in plan.programs(now, target, only=[stage])):
        break  # micro-batches do not make weights smaller
  return best


def _may_fit(program: plan.Program, target: plan.Target) -> bool:
  held = sum(map(chip_bytes, program.held.values()))
  return target.hbm_bytes is None or held <= target.hbm_bytes


def _hopeless(program: plan.Program) -> dict[str, Any]:
  held = sum(map(chip_bytes, program.held.values()))
  return {'fits': False, 'total_bytes': held, 'calls': program.calls}


def _mean_seconds(rows: Sequence[Mapping[str, Any]]) -> float | None:
  """Estimated time of a step, of programs in turn as often as they run."""
  rows = [r for r in rows if r.get('model_flops')]
  if not rows or not all('estimate' in r for r in rows):
    return None
  calls = sum(r['calls'] for r in rows)
  return sum(r['calls'] * r['estimate']['seconds'] for r in rows) / calls
