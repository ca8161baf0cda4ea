# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Does a run fit, and how long will it take? Asked before there is a chip.

    python -m dd_jax.tools.plan --config=configs/dd_var.py:d16 \\
        --topology=v5e:4x4

Compiles every program of the run's stages for that slice with libtpu's
compiler, which needs no TPU (pip install 'dd_jax[tpu]'), and prints bytes,
FLOPs, collectives and an estimate of the time. The compiler stops where these
are known, seconds after it began, unless `--full` lets it finish. Ends with 1
when a program does not fit. `--topology=cpu:8` compiles for CPU devices of this
machine instead. docs/tpu_plans.md has the plans of the released recipes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import json
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath
import jax

from dd_jax import config as config_lib
from dd_jax import console, fit, plan, roofline, sharding
from dd_jax import stages as stages_lib

_COLUMNS = (
    'program', 'runs', 'arguments', 'temporaries', 'total', 'fits',
    'model FLOPs', 'collectives a run', 'step', 'in collectives', 'bound by',
    'MFU', 'compile',
)


def run(
    config: Mapping[str, Any], topology: str, *, mesh: str | None = None,
    stages: Sequence[str] = (), hbm_gb: float | None = None,
    out: str | None = None, markdown: str | None = None,
    search: str | None = None, full: bool = False,
    memo: str | None = None,
) -> int:
  """Plans a run; arguments are those of the command line.

  Returns:
    The exit code: 0 when all fits, 1 when something does not, 2 for errors.
  """
  config = json.loads(json.dumps(config))
  try:
    if mesh:
      config['mesh'] = sharding.parse_mesh(mesh)
    target = plan.make_target(topology, hbm_gb)
    compile_ = functools.partial(
        fit.compile_program, target=target, memo=fit.Memo(memo), full=full
    )
    if search:
      return 0 if _search(config, target, search, compile_, out) else 1
    return 0 if _table(
        config, target, stages, compile_, out, markdown
    ) else 1
  except (ValueError, OSError, ImportError, RuntimeError) as e:
    console.fail(str(e))
    return 2


def _table(
    config: Mapping[str, Any], target: plan.Target, stages: Sequence[str],
    compile_: fit.Compile, out: str | None, markdown: str | None,
) -> bool:
  programs = plan.programs(config, target, only=stages)
  rows = []
  with console.Progress('compile', len(programs)) as bar:
    for program in programs:
      bar.update(len(rows), f'{program.stage}: {program.name}')
      rows.append(compile_(program))
    bar.update(len(rows))
  title = f'{config["name"]} on {_place(config, target)}'
  lines = [_line(row) for row in rows]
  console.table(title, _COLUMNS, lines)
  failed = [row for row in rows if row['fits'] is False]
  notes = [f'does not fit: {fit.advice(row)}' for row in failed]
  for row in failed:
    for allocation in row.get('largest_temporaries', ()):
      notes.append(f'  {allocation}')
  looped = [r for r in rows if r.get('loops_counted_once')]
  notes += [
      f'{r["stage"]}, {r["program"]}: {r["loops_counted_once"]} loop(s) of '
      'unknown length count once' for r in looped
  ]
  for note in notes:
    console.say(note)
  assumptions = list(roofline.ASSUMPTIONS)
  if any('reserve' in row['consumers'] for row in rows):
    assumptions.append(fit.ASSUMPTION)
  for text in assumptions:
    console.say(f'assumed: {text}')
  if out:
    epath.Path(out).write_text(json.dumps({
        'config': config['name'], 'mesh': config['mesh'],
        'rules': {s.name: s.rules for s in stages_lib.parse(config)},
        'topology': target.name,
        'chips': len(target.devices), 'hbm_bytes': target.hbm_bytes,
        'assumptions': assumptions, 'versions': fit.versions(),
        'programs': rows,
    }, indent=1) + '\n')
  if markdown:
    file = epath.Path(markdown)
    text = file.read_text() + '\n' if file.exists() else ''
    file.write_text(text + _section(title, lines, notes))
  return not failed


def _search(
    config: Mapping[str, Any], target: plan.Target, stage: str,
    compile_: fit.Compile, out: str | None,
) -> bool:
  tried = []

  def report(row: Mapping[str, Any]) -> None:
    tried.append(row)
    console.say(_tried(row))

  best = fit.search(config, target, stage, report, compile_)
  if best is None:
    console.say(f'nothing fits on {target.name}; more chips, remat or another '
                'dtype may help')
  else:
    console.say(f'best: {_tried(best)}')
  if out:
    epath.Path(out).write_text(json.dumps(
        {'topology': target.name, 'stage': stage, 'best': best,
         'tried': tried, 'versions': fit.versions()}, indent=1,
    ) + '\n')
  return best is not None


def _place(config: Mapping[str, Any], target: plan.Target) -> str:
  shape = sharding.make_mesh(config['mesh'], target.devices).shape
  mesh = ','.join(f'{k}:{v}' for k, v in shape.items() if v != 1)
  size = '' if target.hbm_bytes is None else (
      f', {target.hbm_bytes / roofline.GIGA:g} GB a chip'
  )
  others = ', '.join(
      f'{s.name} {s.rules}' for s in stages_lib.parse(config)
      if s.rules != config['rules']
  )
  return (f'{target.name} ({len(target.devices)} chips{size}), mesh '
          f'{mesh or "1"}, rules {config["rules"]}'
          + f' ({others})' * bool(others))


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
  guess = row.get('estimate')
  collectives = ', '.join(
      f'{kind} {_bytes(v["bytes"])}'
      for kind, v in sorted(row.get('collectives', {}).items())
      if v['bytes'] >= 1e6
  )
  return (
      f'{row["stage"]}: {row["program"]}',
      '-' if row['calls'] is None else f'{row["calls"]:,}',
      _bytes(row['argument_bytes']), _bytes(row['temporary_bytes']),
      _bytes(row['total_bytes']),
      {True: 'yes', False: 'NO', None: '-'}[row['fits']],
      _flops(row['model_flops']), collectives or '-',
      _milliseconds(guess['seconds']) if guess else '-',
      _milliseconds(guess['collectives']) if guess else '-',
      guess['bound'] if guess else '-',
      f'{guess["mfu"]:.0%}' if guess and guess['mfu'] else '-',
      f'{row["trace_seconds"] + row["compile_seconds"]:.0f} s',
  )


def _tried(row: Mapping[str, Any]) -> str:
  text = (f'mesh {",".join(f"{k}:{v}" for k, v in row["mesh"].items())} rules '
          f'{row["rules"]} micro_batches {row["micro_batches"]}: ')
  if 'why' in row:
    return text + row['why']
  text += f'{"fits" if row["fits"] else "too large"}, '
  text += _bytes(row['total_bytes'])
  if row['fits'] and row['seconds']:
    text += f', {row["seconds"] * 1e3:.4g} ms a step'
  return text


def _section(
    title: str, lines: Sequence[Sequence[str]], notes: Sequence[str]
) -> str:
  versions = ', '.join(f'{k} {v}' for k, v in fit.versions().items())
  table = [_COLUMNS, ['---'] * len(_COLUMNS), *lines]
  return '\n'.join([
      f'## {title}', '', f'Compiled with {versions}.', '',
      *(f'| {" | ".join(cells)} |' for cells in table), '',
      *(f'- {note.strip()}' for note in notes), *([''] if notes else []),
  ])


def _bytes(size: float | None) -> str:
  if size is None:
    return '?'
  giga = size / roofline.GIGA
  return f'{giga:.2f} GB' if giga >= 0.1 else f'{giga * 1e3:.1f} MB'


def _milliseconds(seconds: float) -> str:
  return f'{seconds * 1e3:.3g} ms'


def _flops(count: float | None) -> str:
  if count is None:
    return '?'
  return f'{count / 1e12:.3g} T' if count >= 1e11 else f'{count / 1e9:.3g} G'


def cli() -> None:
  # What is planned for is elsewhere: nothing here but the CPU is wanted.
  jax.config.update('jax_platforms', 'cpu')
  config = config_lib.define_flag()
  topology = flags.DEFINE_string(
      'topology', None, f'Slice: chips ({", ".join(roofline.CHIPS)}, cpu) and '
      'sides, as in v5e:4x4.',
  )
  mesh = flags.DEFINE_string(
      'mesh', None, "Instead of the config's, as in data:2,fsdp:8."
  )
  stages = flags.DEFINE_list('stage', [], 'These stages alone.')
  hbm_gb = flags.DEFINE_float(
      'hbm_gb', None, "Memory of a chip in 10^9 bytes instead of the data "
      "sheet's.", lower_bound=0.0,
  )
  out = flags.DEFINE_string('out', None, 'JSON file for all figures.')
  markdown = flags.DEFINE_string(
      'markdown', None, 'Markdown file that a section is added to.'
  )
  search = flags.DEFINE_string(
      'search', None, "Try meshes and micro-batches for this stage of kind "
      "'train', and print the best that fits.",
  )
  full = flags.DEFINE_bool(
      'full', False, 'Let the compiler finish, in minutes a program instead of '
      'seconds: the size of instructions is known then, too.',
  )
  memo = flags.DEFINE_string(
      'memo', None, 'Folder for what the compiler said of each program, so '
      'that it is not asked again.',
  )
  flags.mark_flags_as_required(['config', 'topology'])

  def main(argv: Sequence[str]) -> None:
    if argv[1:]:
      raise app.UsageError(f'unknown arguments {argv[1:]}')
    logging.set_verbosity(logging.WARNING)
    try:
      values = config.value.to_dict()
    except OSError as e:  # the file is not there
      console.fail(str(e))
      sys.exit(2)
    sys.exit(run(
        values, topology.value, mesh=mesh.value,
        stages=stages.value, hbm_gb=hbm_gb.value, out=out.value,
        markdown=markdown.value, search=search.value, full=full.value,
        memo=memo.value,
    ))

  app.run(main, flags_parser=console.parse_flags)


if __name__ == '__main__':
  cli()
