# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Starts the processes of a benchmark, compares their outputs, sums up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import numpy as np

from dd_jax import __version__, console, sharding
from dd_jax.tools.bench import workloads

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch')
_LOAD_ABOVE_CORES = 0.5
_LOG_LINES = 15
# Losses after the first: a first step of Adam divides by gradients that may be
# rounding alone, so that single weights move differently.
_CURVE_TOLERANCE = 1e-3


class Failure(Exception):
  """A process failed, or the sides do not agree."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the flags of the tool say.

  Attributes:
    model: entry of `workloads.SIZES`.
    batches: examples of a call.
    frameworks: sides that run.
    rows: entries of `workloads.rows(model)`; empty for all.
    variants: ways to run them.
    rounds: processes for each row, batch size and variant.
    seconds: time for the calls of a process.
    warm_ups: calls before those.
    threads: cores for each process.
    seed: of weights and inputs.
    meshes: that ours runs on, as in 'data:2,fsdp:4'; empty for one device.
  """

  model: str
  batches: tuple[int, ...]
  frameworks: tuple[str, ...]
  rows: tuple[str, ...]
  variants: tuple[str, ...]
  rounds: int
  seconds: float
  warm_ups: int
  threads: int
  seed: int
  meshes: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    _one_of('model', [self.model], workloads.SIZES)
    _one_of('frameworks', self.frameworks, workloads.FRAMEWORKS)
    known = workloads.rows(self.model)
    object.__setattr__(self, 'rows', self.rows or tuple(known))
    _one_of('rows', self.rows, known)
    _one_of('variants', self.variants, workloads.VARIANTS)
    for name, value in (
        ('batch', min(self.batches, default=0)), ('rounds', self.rounds),
        ('warm_ups', self.warm_ups),
    ):
      if value < 1:
        raise ValueError(f'--{name}: at least 1, not {value}')
    cores = len(os.sched_getaffinity(0))
    if not 1 <= self.threads <= cores:
      raise ValueError(f'--threads={self.threads}: from 1 to {cores} here')
    if self.meshes and self.frameworks != ('jax',):
      raise ValueError('--mesh: for ours alone, with --frameworks=jax')
    for mesh in self.meshes:
      parts = devices(mesh, ('data', 'fsdp'))
      for batch in self.batches:
        if parts < 1 or batch % parts:
          raise ValueError(f'--batch={batch} does not divide over {mesh}')
    if not list(order(self)):
      raise ValueError('--rows, --frameworks, --variants: nothing to run')
    if 'torch' in self.frameworks and not importlib.util.find_spec('torch'):
      raise ValueError(
          "--frameworks: torch is not installed; pip install -e '.[parity]', "
          'or --frameworks=jax'
      )


@dataclasses.dataclass(frozen=True)
class Entry:
  """A line of the table."""

  row: str
  batch: int
  framework: str
  variant: str
  mesh: str = ''

  def __str__(self) -> str:
    return f'{self.row}, batch {self.batch}, {_side(dataclasses.asdict(self))}'


def run(
    settings: Settings, folder: pathlib.Path, out: pathlib.Path
) -> list[dict[str, Any]]:
  """Measures, writes lines of JSON as they come, and shows the table.

  Args:
    settings: of the tool.
    folder: where weights, logs and compiled programs go.
    out: file of the figures; replaced.

  Returns:
    The records of kind 'summary', one for each line of the table.

  Raises:
    Failure: a process failed or the sides do not agree; the figures of the
      comparison are in the message, and in `out`.
  """
  folder.mkdir(parents=True, exist_ok=True)
  cores = os.cpu_count() or 1
  limit = cores + _LOAD_ABOVE_CORES
  with out.open('w') as file:

    def record(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
      line = {'record': kind, **values}
      file.write(json.dumps(line) + '\n')
      file.flush()
      return line

    made = _job(settings, folder, None, None)
    record('machine', {
        **machine(), 'load_limit': limit, 'settings': dataclasses.asdict(
            settings
        ), **made,
    })
    rounds: dict[Entry, list[dict[str, Any]]] = {}
    parity: dict[tuple[str, int], Parity] = {}
    for entry, number in order(settings):
      key = entry.row, entry.batch
      outputs = folder / 'outputs.npz' if number == 0 else None
      result = _job(settings, folder, entry, outputs)
      rejected = result['load'] > limit
      rounds.setdefault(entry, []).append(record('round', {
          **dataclasses.asdict(entry), 'round': number, **result,
          'rejected': rejected,
      }))
      if key not in parity:
        parity[key] = Parity(workloads.SIZES[settings.model].tolerance)
      agreement = parity[key].add(entry, outputs, result['values'])
      if agreement is not None:
        record('parity', {**dataclasses.asdict(entry), **agreement})
        if not agreement['agrees']:
          raise Failure(
              f'{entry} does not agree with {agreement["reference"]}: '
              f'{agreement["differences"]}, allowed {agreement["allowed"]}'
          )
      p50 = float(np.median(result['calls']))
      console.say(
          f'round {number + 1} of {settings.rounds}: {entry}: {p50:.4g} s, '
          f'load {result["load"]:.1f}' + ', rejected' * rejected
      )
    flops = made['flops']
    summaries = [
        record('summary', summary(
            entry, results, flops[entry.row], made.get('tokens')
        ))
        for entry, results in rounds.items()
    ]
    for ratio in ratios(summaries):
      record('ratio', ratio)
  show(settings, summaries, limit)
  return summaries


def order(settings: Settings) -> Iterator[tuple[Entry, int]]:
  """Processes in turn: every second round runs the other way round."""
  known = workloads.rows(settings.model)
  entries = [
      Entry(row, batch, framework, variant, mesh)
      for batch in settings.batches for row in settings.rows
      for mesh in settings.meshes or ('',)
      for framework in settings.frameworks
      for variant in known[row].variants.get(framework, ())
      if variant in settings.variants
  ]
  for number in range(settings.rounds):
    for entry in entries[:: -1 if number % 2 else 1]:
      yield entry, number


def devices(mesh: str, axes: Sequence[str] | None = None) -> int:
  """Devices of a mesh, along these axes or all."""
  sizes = sharding.parse_mesh(mesh or 'data:1')
  return math.prod(n for a, n in sizes.items() if axes is None or a in axes)


class Parity:
  """Compares the outputs of one row and batch size with the first ones."""

  def __init__(self, tolerance: float):
    self._tolerance = tolerance
    self._reference: tuple[Entry, dict[str, np.ndarray]] | None = None
    self._curve: list[float] = []

  def add(
      self, entry: Entry, outputs: pathlib.Path | None,
      values: Sequence[float],
  ) -> dict[str, Any] | None:
    """What differs, as a record; None for the first outputs and for none."""
    if outputs is None:
      return None
    with np.load(outputs) as file:
      arrays = dict(file)
    outputs.unlink()
    if self._reference is None:
      self._reference = entry, arrays
      self._curve = list(values)
      return None
    first, reference = self._reference
    differences, allowed = {}, {}
    for name, wanted in reference.items():
      if wanted.dtype.kind in 'iu':
        differences[name] = int((wanted != arrays[name]).sum())
        allowed[name] = 0
      else:
        scale = max(1.0, float(np.abs(wanted).max()))
        gap = float(np.abs(wanted - arrays[name]).max()) / scale
        differences[name], allowed[name] = gap, self._tolerance
    both = list(zip(self._curve, values, strict=False))
    if both:
      gaps = [abs(a - b) / max(1.0, abs(a)) for a, b in both]
      name = f'values of {len(both)} calls'
      differences[name], allowed[name] = max(gaps), _CURVE_TOLERANCE
    return {
        'reference': str(first), 'differences': differences,
        'allowed': allowed, 'agrees': all(
            differences[k] <= allowed[k] for k in differences  # NaN is not
        ),
    }


def summary(
    entry: Entry, results: Sequence[Mapping[str, Any]], flops: int,
    tokens: int | None = None,
) -> dict[str, Any]:
  """Figures of all rounds; of the rejected ones if there are no others."""
  good = [r for r in results if not r['rejected']]
  used = good or results
  calls = np.concatenate([r['calls'] for r in used])
  p50, p95 = np.percentile(calls, (50, 95)).tolist()
  # The first round finds no compiled program.
  cold = results[0]
  return {
      **dataclasses.asdict(entry), 'p50': p50, 'p95': p95,
      'cpu': float(np.median(np.concatenate([r['cpu'] for r in used]))),
      'calls': len(calls), 'gflops': flops * entry.batch / p50 / 1e9,
      'tokens_per_second': tokens and tokens * entry.batch / p50,
      'cold_start': cold['seconds']['cold_start'],
      'import': cold['seconds']['import'], 'load': cold['seconds']['load'],
      'trace': cold['costs'].get('trace'), 'compile': cold['costs']['compile'],
      'peak_rss': max(r['peak_rss'] for r in used),
      'arguments': cold['costs'].get('arguments'),
      'temporaries': cold['costs'].get('temporaries'),
      'rounds': len(results), 'accepted': len(good),
  }


def ratios(summaries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Best of torch over best of ours, and shares of one row in another.

  Of several meshes each is compared with itself.

  Under load they say how each side's threads wait for each other, not how fast
  they are: `accepted` is False where either has no round that counts.
  """
  best: dict[tuple[str, int, str, str], Mapping[str, Any]] = {}
  for s in sorted(summaries, key=lambda s: -s['p50']):
    best[s['row'], s['batch'], s['framework'], s.get('mesh', '')] = s
  found = []
  for (row, batch, framework, mesh), s in best.items():
    whole = workloads.SHARES.get(row)
    compared = {
        f'share of {whole}': (s, best.get((whole, batch, framework, mesh))),
    }
    if framework == 'jax':
      compared['torch / jax'] = best.get((row, batch, 'torch', mesh)), s
    found += [
        {
            'row': row, 'batch': batch, 'mesh': mesh, 'is': name,
            'ratio': a['p50'] / b['p50'], 'of': [a['variant'], b['variant']],
            'accepted': bool(a['accepted'] and b['accepted']),
        }
        for name, (a, b) in compared.items() if a and b
    ]
  return sorted(found, key=lambda r: (r['batch'], r['row']))


def show(
    settings: Settings, summaries: Sequence[Mapping[str, Any]], limit: float
) -> None:
  """The tables."""
  console.table(
      f'{settings.model}, float32, {settings.threads} threads',
      ('row', 'batch', 'side', 'p50 s', 'p95 s', 'cpu s', 'calls', 'GFLOP/s',
       'tokens/s', 'cold start s', 'compile s', 'peak GB', 'rounds'),
      [
          (s['row'], s['batch'], _side(s), s['p50'], s['p95'], s['cpu'],
           s['calls'], f'{s["gflops"]:.1f}', s['tokens_per_second'] or '-',
           s['cold_start'],
           (s['trace'] or 0.0) + s['compile'], s['peak_rss'] / 1e9,
           f'{s["accepted"]} of {s["rounds"]}')
          for s in summaries
      ],
  )
  if settings.meshes:
    console.table(
        'The same work on meshes; bytes of one device',
        ('row', 'batch', 'side', 'devices', 'step s', 'tokens/s',
         'arguments MB', 'temporaries MB'),
        [
            (s['row'], s['batch'], _side(s), devices(s['mesh']), s['p50'],
             s['tokens_per_second'] or '-', s['arguments'] / 1e6,
             s['temporaries'] / 1e6)
            for s in summaries
        ],
    )
  compared = ratios(summaries)
  if compared:
    console.table(
        'p50 compared, the fastest variant of each side',
        ('row', 'batch', 'figure', 'of', 'value'),
        [
            (r['row'], r['batch'], r['is'], ' / '.join(r['of']),
             r['ratio'] if r['accepted'] else 'no result')
            for r in compared
        ],
    )
  total = sum(s['rounds'] for s in summaries)
  rejected = total - sum(s['accepted'] for s in summaries)
  console.say(
      f'{rejected} of {total} rounds were rejected: load average above '
      f'{limit:g}'
  )
  if any(not s['accepted'] for s in summaries):
    console.say(
        'rows with 0 accepted rounds show rejected ones: they are no results, '
        'and are not compared'
    )


def _side(line: Mapping[str, Any]) -> str:
  """Of an entry or a summary: framework, variant and mesh, if there is one."""
  parts = line['framework'], line['variant'], line.get('mesh')
  return ' '.join(filter(None, parts))


def machine() -> dict[str, Any]:
  """Where and on what this runs."""
  here = pathlib.Path(__file__).parent
  versions = {'python': platform.python_version(), 'dd_jax': __version__}
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  cpu = [
      line.partition(':')[2].strip()
      for line in _text('/proc/cpuinfo').splitlines()
      if line.startswith('model name')
  ]
  return {
      'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
      'cpu': cpu[0] if cpu else platform.processor(),
      'cores': os.cpu_count(), 'load': os.getloadavg(),
      'system': platform.platform(), 'versions': versions,
      'revision': _git(here, 'rev-parse', 'HEAD'),
      'changed': bool(_git(here, 'status', '--porcelain')),
      'xla_flags': os.environ.get('XLA_FLAGS', ''),
  }


def _text(path: str) -> str:
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''


def _git(folder: pathlib.Path, *args: str) -> str | None:
  try:
    return subprocess.run(
        ['git', '-C', str(folder), *args], capture_output=True, text=True,
        check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


def _job(
    settings: Settings, folder: pathlib.Path, entry: Entry | None,
    outputs: pathlib.Path | None,
) -> dict[str, Any]:
  """Runs a process to its end: of an entry, or what writes the inputs."""
  if entry is None:
    row, framework, name = None, None, 'inputs'
    batch, variant = max(settings.batches), ''
  else:
    row, framework = entry.row, entry.framework
    batch, variant = entry.batch, entry.variant
    name = f'{row}-{batch}-{framework}-{variant}'
    if entry.mesh:
      name += '-' + entry.mesh.replace(':', '').replace(',', '-')
  job, result = folder / 'job.json', folder / 'result.json'
  result.unlink(missing_ok=True)
  cache = folder / 'cache' / name
  cache.mkdir(parents=True, exist_ok=True)
  log = folder / f'{name}.log'
  threads = str(settings.threads)
  mesh = entry.mesh if entry else ''
  flag = f'--xla_force_host_platform_device_count={devices(mesh)}'
  environment = os.environ | {
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip(),
      'JAX_PLATFORMS': 'cpu', 'OMP_NUM_THREADS': threads,
      'MKL_NUM_THREADS': threads,
  }
  job.write_text(json.dumps({
      'row': row, 'framework': framework, 'folder': str(folder),
      'cache': str(cache), 'rows': settings.rows,
      'sides': settings.frameworks, 'outputs': outputs and str(outputs),
      'warm_ups': settings.warm_ups, 'seconds': settings.seconds,
      'case': {
          'model': settings.model, 'batch': batch, 'variant': variant,
          'threads': settings.threads, 'seed': settings.seed, 'mesh': mesh,
      },
      'started': time.time(),
  }))
  with log.open('a') as stream:
    code = subprocess.run(
        [sys.executable, '-m', 'dd_jax.tools.bench.worker', job, result],
        env=environment, stdout=stream, stderr=stream, check=False,
    ).returncode
  if code:
    lines = log.read_text(errors='replace').splitlines()
    last = '\n'.join(lines[-_LOG_LINES:])
    raise Failure(f'{entry or name} ended with {code}:\n{last}')
  return json.loads(result.read_text())


def _one_of(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
  if not given:
    raise ValueError(f'--{flag}: give at least one of {", ".join(known)}')
  for name in given:
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      hint = f'did you mean {close[0]!r}?' if close else (
          f'one of {", ".join(known)}'
      )
      raise ValueError(f'--{flag}: no {name!r}; {hint}')
