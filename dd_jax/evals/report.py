# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The report of a run: report.json, report.md and pictures beside them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
import io
import json
import math
from typing import Any

from etils import epath
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dd_jax.evals import judge

ROW_FIELDS = ('name', 'steps', 'seed', *judge.SCORES, 'seconds_per_image')
TEACHER = 'teacher'  # name of the row that the others are compared with
MIXED = 'mixed_pixels'  # must score worse than real images do
RESAMPLED = 'fd_resampled'  # of an environment: see `judge.resampled_fd`
ONE_CALL = 'teacher_1'  # a denoiser without training as a student
RATIOS = ('student_1', 'student_2', 'onestep_pooled', 'onestep_class')

_COLUMNS = (
    'name', 'steps', 'seed', 'FD train', 'FD held-out', 'FD pixel',
    'precision', 'recall', 'accuracy', 'cov. trace', 'NN distance',
    'ms/image', 'speed-up', 'FD/teacher',
)
_TYPES = {'name': str, 'steps': int, 'seed': int}  # the others are numbers
_MARGIN = 6  # pixels around and between the parts of a grid
_CELL = 48  # an image of a grid is at least so wide

Report = dict[str, Any]


def make(
    rows: Sequence[Mapping[str, Any]],
    floor: Mapping[str, float],
    environment: Mapping[str, Any],
) -> Report:
  """Puts a report together.

  Args:
    rows: one mapping with `ROW_FIELDS` per sampler and seed; each seed needs
      its `teacher`.
    floor: what `judge.floor` returned.
    environment: what the figures depend on: machine, versions, settings.

  Returns:
    {'rows', 'floor', 'ratios', 'environment'}. Ratios are `fd_train` over the
    teacher's of the same seed, the median over seeds, of `RATIOS`, None without
    such a row; where a denoiser is judged, of every row but the teacher's.

  Raises:
    ValueError: see `validate`.
  """
  report = {
      'rows': [dict(row) for row in rows],
      'floor': dict(floor),
      'ratios': dict.fromkeys(_compared(rows)),
      'environment': dict(environment),
  }
  validate(report)
  for name in report['ratios']:
    ratios = [
        _over_teacher(report, row) for row in rows if row['name'] == name
    ]
    if ratios:
      report['ratios'][name] = float(np.median(ratios))
  return report


def merge_seeds(reports: Sequence[Report]) -> Report:
  """One report with the rows of several, which must differ in seed.

  Ratios are medians over seeds, the floor is the median of the floors, and the
  environment is that of the first report.

  Raises:
    ValueError: if there is no report, or see `validate`.
  """
  if not reports:
    raise ValueError('no reports to merge')
  floor = {
      name: float(np.median([r['floor'][name] for r in reports]))
      for name in judge.SCORES
  }
  rows = [row for r in reports for row in r['rows']]
  return make(rows, floor, reports[0]['environment'])


def validate(report: Mapping[str, Any]) -> None:
  """Checks names, types and that every number is finite.

  Raises:
    ValueError: lists everything that is wrong.
  """
  fields = {'rows', 'floor', 'ratios', 'environment'}
  problems = _wrong_names('report', report, fields)
  rows = report.get('rows', ())
  for i, row in enumerate(rows):
    where = f'rows[{i}]'
    problems += _wrong_names(where, row, ROW_FIELDS)
    for name in _TYPES.keys() & row.keys():
      if type(row[name]) is not _TYPES[name]:
        problems.append(f'{where}.{name} is {row[name]!r}, not a '
                        f'{_TYPES[name].__name__}')
    problems += _not_numbers(where, {
        k: v for k, v in row.items() if k not in _TYPES
    })
  floor, ratios = report.get('floor', {}), report.get('ratios', {})
  problems += _wrong_names('floor', floor, judge.SCORES)
  problems += _not_numbers('floor', floor)
  problems += _wrong_names('ratios', ratios, _compared(rows))
  problems += _not_numbers('ratios', {
      k: v for k, v in ratios.items() if v is not None
  })
  keys = collections.Counter((r.get('name'), r.get('seed')) for r in rows)
  problems += [
      f'{n} rows {name!r} with seed {seed}'
      for (name, seed), n in keys.items() if n > 1
  ]
  problems += [
      f'no row {TEACHER!r} with seed {seed}'
      for seed in dict.fromkeys(seed for _, seed in keys)
      if (TEACHER, seed) not in keys
  ]
  if not rows:
    problems.append('no rows')
  if problems:
    raise ValueError('invalid report: ' + '; '.join(problems))


def warnings(report: Report) -> list[str]:
  """What a reader must know before the figures: weak teacher, unfit judge."""
  floor, out = report['floor'], []
  if not judge.is_fit(floor):
    out.append(
        f'The judge is not fit to judge: {floor["accuracy"]:.1%} held-out '
        f'accuracy, below {judge.MIN_ACCURACY:.0%}.'
    )
  for row in report['rows']:
    if row['name'] == MIXED and row['fd_train'] < floor['fd_train']:
      out.append(
          'The judge is not fit to judge: it takes pixels mixed from several '
          f'images (FD {row["fd_train"]:.2f}) for better images than real '
          f'ones that it has not seen ({floor["fd_train"]:.2f}).'
      )
    if row['name'] == TEACHER and judge.is_weak(row, floor):
      out.append(
          f'The teacher of seed {row["seed"]} is weak (FD '
          f'{row["fd_train"] / floor["fd_train"]:.2f} times the floor, at most '
          f'{judge.WEAK_FLOOR_RATIO}; accuracy {row["accuracy"]:.1%}, at '
          f'least {judge.MIN_ACCURACY:.0%}): ratios to it say little.'
      )
  return out


def table(report: Report) -> tuple[list[str], list[list[Any]]]:
  """Columns and rows for a person, medians over seeds after each sampler.

  The first row is the floor. Speed-up and FD/teacher compare with the teacher
  of the same seed.
  """
  floor = report['floor']
  out = [['held-out', '', '', *(floor[s] for s in judge.SCORES), '', '', '']]
  for name in dict.fromkeys(row['name'] for row in report['rows']):
    rows = [row for row in report['rows'] if row['name'] == name]
    lines = [_line(report, row) for row in rows]
    out += lines
    if len(lines) > 1:
      figures = np.median([line[3:] for line in lines], axis=0)
      out.append([name, rows[0]['steps'], 'median', *figures.tolist()])
  return list(_COLUMNS), out


def markdown(report: Report, pictures: Iterable[str] = ()) -> str:
  """The report as Markdown that shows `pictures`, file names beside it."""
  seeds = {row['seed'] for row in report['rows']}
  environment = report['environment'].items()
  ratios = report['ratios'].items()
  parts = [
      '# Report',
      *(f'> **{text}**' for text in warnings(report)),
      '## Quality and speed',
      _markdown_table(*table(report)),
      'FD is the Fréchet distance of the judge\'s features, lower is better; '
      'the row held-out is what real images score, mixed_pixels what pixels '
      'score that were drawn one by one from real images of the class. '
      'FD falls with the number of images, and fewer are held out than a row '
      f'has samples: {RESAMPLED} below is what as many train images score '
      'against the others. '
      'Speed-up and FD/teacher compare with the teacher of the same seed.',
      f'## FD over the teacher\'s, {_count(len(seeds), "seed")}',
      _markdown_table(
          ('sampler', 'ratio'),
          [(k, 'not run' if v is None else v) for k, v in ratios],
      ),
      *(f'![{name}]({name})' for name in pictures),
      '## Environment',
      _markdown_table(('', ''), list(environment)),
  ]
  return '\n\n'.join(parts) + '\n'


def write(
    directory: epath.PathLike,
    report: Report,
    pictures: Mapping[str, Image.Image],
) -> None:
  """Writes pictures, report.md and, last, report.json, each atomically.

  Args:
    directory: made if it does not exist.
    report: from `make` or `merge_seeds`.
    pictures: PNG file name to image, in the order of the report.

  Raises:
    ValueError: see `validate`; nothing is written then.
  """
  validate(report)
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  for name, picture in pictures.items():
    buffer = io.BytesIO()
    picture.save(buffer, format='PNG')
    _replace(directory / name, buffer.getvalue())
  _replace(directory / 'report.md', markdown(report, pictures).encode())
  text = json.dumps(report, indent=2, allow_nan=False) + '\n'
  _replace(directory / 'report.json', text.encode())


def read(directory: epath.PathLike) -> Report:
  """The report.json of a directory.

  Raises:
    ValueError: if it is not a report; see `validate`.
  """
  report = json.loads((epath.Path(directory) / 'report.json').read_text())
  validate(report)
  return report


def grid(rows: Mapping[str, np.ndarray]) -> Image.Image:
  """Images in labelled rows; whole pixels are enlarged, never smoothed.

  Args:
    rows: label to (N, H, W, C) images in [-1, 1], C 1 or 3. For images of the
      same noise, column by column, give the same order in every row.
  """
  font = ImageFont.load_default()
  left = 3 * _MARGIN + math.ceil(max(map(font.getlength, rows)))
  strips = [_strip(images) for images in rows.values()]
  width = left + max(s.width for s in strips)
  height = _MARGIN + sum(s.height + _MARGIN for s in strips)
  out = Image.new('RGB', (width, height), 'white')
  draw, y = ImageDraw.Draw(out), _MARGIN
  for label, strip in zip(rows, strips, strict=True):
    middle = (_MARGIN, y + strip.height // 2)
    draw.text(middle, label, fill='black', font=font, anchor='lm')
    out.paste(strip, (left, y))
    y += strip.height + _MARGIN
  return out


def curves(logs: Mapping[str, epath.PathLike]) -> Image.Image:
  """One plot per log of every metric named like a loss, against the step.

  Args:
    logs: title to file of JSON lines, {'step': 10, 'student/loss': 1.5, ...}.

  Raises:
    ValueError: if a log holds no loss.
  """
  from matplotlib.figure import Figure  # an extra; needs no display this way

  figure = Figure(figsize=(5 * len(logs), 3.5), layout='constrained')
  axes = figure.subplots(1, len(logs), squeeze=False)[0]
  for ax, (title, file) in zip(axes, logs.items(), strict=True):
    losses = _losses(epath.Path(file))
    if not losses:
      raise ValueError(f'{file} holds no metric with "loss" in its name')
    for name, points in losses.items():
      ax.plot(*zip(*sorted(points.items()), strict=True), label=name)
    if all(v > 0 for points in losses.values() for v in points.values()):
      ax.set_yscale('log')
    ax.set(title=title, xlabel='step')
    ax.legend(fontsize='small')
    ax.grid(alpha=0.3)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=100)
  return Image.open(buffer)


def _compared(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
  """Names of the rows that have a ratio."""
  names = dict.fromkeys(row.get('name') for row in rows)
  if ONE_CALL not in names:
    return RATIOS
  return tuple(name for name in names if name != TEACHER)


def _teacher(report: Report, seed: int) -> dict[str, Any]:
  return next(
      row for row in report['rows']
      if row['name'] == TEACHER and row['seed'] == seed
  )


def _over_teacher(report: Report, row: Mapping[str, Any]) -> float:
  return row['fd_train'] / _teacher(report, row['seed'])['fd_train']


def _line(report: Report, row: Mapping[str, Any]) -> list[Any]:
  teacher = _teacher(report, row['seed'])
  return [
      *(row[field] for field in ROW_FIELDS[:-1]),
      1e3 * row['seconds_per_image'],
      teacher['seconds_per_image'] / row['seconds_per_image'],
      _over_teacher(report, row),
  ]


def _wrong_names(
    where: str, values: Mapping[str, Any], wanted: Iterable[str]
) -> list[str]:
  wanted = set(wanted)
  return [
      f'{where} lacks {name!r}' for name in sorted(wanted - values.keys())
  ] + [
      f'{where} has unknown {name!r}' for name in sorted(values.keys() - wanted)
  ]


def _not_numbers(where: str, values: Mapping[str, Any]) -> list[str]:
  return [
      f'{where}.{name} is {value!r}, not a finite number'
      for name, value in values.items()
      if isinstance(value, bool)
      or not isinstance(value, int | float)
      or not math.isfinite(value)
  ]


def _count(n: int, noun: str) -> str:
  return f'{n} {noun}' if n == 1 else f'{n} {noun}s, median'


def _markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> str:
  lines = [columns, ['---'] + ['---:'] * (len(columns) - 1)] + [
      [f'{x:.4g}' if isinstance(x, float) else str(x) for x in row]
      for row in rows
  ]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _strip(images: np.ndarray) -> Image.Image:
  """Images side by side, at a whole-number scale."""
  images = np.clip((np.asarray(images) + 1) * 127.5 + 0.5, 0, 255)
  n, height, width, channels = images.shape
  if channels == 1:
    images = np.repeat(images, 3, axis=-1)
  scale = max(1, -(-_CELL // width))
  big = images.astype(np.uint8).repeat(scale, axis=1).repeat(scale, axis=2)
  out = Image.new(
      'RGB', (n * (width * scale + _MARGIN), height * scale), 'white'
  )
  for i, image in enumerate(big):
    out.paste(Image.fromarray(image), (i * (width * scale + _MARGIN), 0))
  return out


def _losses(file: epath.Path) -> dict[str, dict[int, float]]:
  """Metric name to {step: value}; a step logged twice keeps the later."""
  out: dict[str, dict[int, float]] = {}
  for line in file.read_text().splitlines():
    record = json.loads(line)
    for name, value in record.items():
      if 'loss' in name:
        out.setdefault(name, {})[record['step']] = value
  return out


def _replace(file: epath.Path, data: bytes) -> None:
  temporary = file.with_name(f'{file.name}.tmp')
  temporary.write_bytes(data)
  temporary.replace(file)
