# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What is this checkpoint?

    python -m dd_jax.tools.inspect PATH

PATH is an export of ours, or a weight file of another program. Runs nothing and
reads names, shapes and, of values, what `conversion.plan` compares.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import pathlib
import re
import sys
from typing import Any

from absl import app, flags, logging

from dd_jax import checkpoint, console, conversion, registry
from dd_jax.convert import lazy, readers

_INERT = flags.DEFINE_list(
    'inert', [], 'Names in a pickle to read past without importing them.'
)

_MOST_ROWS = 60


def inspect(path: pathlib.Path, inert: Sequence[str] = ()) -> None:
  """Prints what a path holds.

  Raises:
    ValueError, OSError: nothing that is known, or broken.
  """
  if not path.is_dir():
    _inspect_file(path, inert)
  elif (path / 'model.json').exists():
    _inspect_export(path)
  else:
    exports = sorted(p.parent for p in path.glob('**/model.json'))
    if not exports:
      checkpoint.describe(path)  # says what is missing
    console.say(f'{path}: a folder with these exports:')
    for export in exports:
      meta = checkpoint.describe(export)
      console.say(f'  {export}  {meta["family"]}  {meta["parameters"]:,}')


def _inspect_export(path: pathlib.Path) -> None:
  meta = checkpoint.describe(path)
  source = dict(meta['source'])
  rows = [
      ('family', meta['family']), ('parameters', f'{meta["parameters"]:,}'),
      ('leaves', len(meta['sha256'])), ('hash', meta['hash']),
      *((k, _brief(v)) for k, v in source.items()),
  ]
  console.table(f'{path}: an export of dd_jax', ('field', 'value'), rows)
  console.table(
      'config', ('field', 'value'),
      [(k, _brief(v)) for k, v in meta['config'].items()],
  )
  names = [
      name for name, family in conversion.families().items()
      if family.model == meta['family']
  ]
  if names:
    console.say(
        f'to its original format: python -m dd_jax.tools.convert --reverse '
        f'--input={path} --output={path.name}.safetensors'
    )


def _inspect_file(path: pathlib.Path, inert: Sequence[str]) -> None:
  contents = readers.read(path, inert)
  console.say(f'{path}: {contents.format}, {path.stat().st_size:,} bytes')
  console.say(f'keys: {readers.outline(contents.tree)}')
  holds = False
  for wrapper in readers.WRAPPERS:
    try:
      weights = readers.select(path, contents.tree, wrapper)
    except readers.ReadError:
      continue
    where = '/'.join(wrapper) or 'the top'
    prefix = f', names without {weights.prefix!r}' if weights.prefix else ''
    if holds:
      console.say(f'{len(weights.tensors)} more tensors at {where}{prefix}')
      continue
    holds = True
    _show_tensors(f'{len(weights.tensors)} tensors at {where}{prefix}', weights)
    family = conversion.guess(weights.tensors)
    if family is None:
      console.say(
          'no family of the converter has these names; known: '
          f'{", ".join(registry.TABLES["families"])}'
      )
      continue
    console.say(f'family: {family}')
    extra = ''
    try:
      conversion.plan(family, [path], inert=inert)
    except ValueError as e:
      console.say(f'not as it is: {e}')
      extra = ' [--config=field=value]'
    console.say(
        f'convert: python -m dd_jax.tools.convert --family={family} '
        f'--input={path} --output={path.stem}{extra}'
    )
  if not holds:
    raise ValueError(
        f'{path}: no tensors at '
        f'{", ".join("/".join(w) or "the top" for w in readers.WRAPPERS)}'
    )


def _show_tensors(title: str, weights: readers.Weights) -> None:
  """One row for all names that differ in numbers alone."""
  groups: dict[str, list[lazy.LazyArray]] = {}
  for name, tensor in weights.tensors.items():
    groups.setdefault(re.sub(r'\b\d+\b', '{i}', name), []).append(tensor)
  rows = []
  for name, tensors in groups.items():
    shapes = {t.shape for t in tensors}
    rows.append((
        name, len(tensors),
        conversion.by(tensors[0].shape) if len(shapes) == 1 else 'several',
        '/'.join(sorted({t.dtype.name for t in tensors})),
    ))
  if len(rows) > _MOST_ROWS:
    more = f'and {len(rows) - _MOST_ROWS} more'
    rows = [*rows[:_MOST_ROWS], (more, '', '', '')]
  console.table(title, ('name', 'count', 'shape', 'type'), rows)
  total = sum(t.size for t in weights.tensors.values())
  console.say(f'{total:,} values')


def _brief(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def main(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError('give one path')
  logging.set_verbosity(logging.WARNING)
  try:
    inspect(pathlib.Path(argv[1]), _INERT.value)
  except (ValueError, OSError) as e:
    console.fail(str(e))
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
