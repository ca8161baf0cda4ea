# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables: total, invertible renaming and reshaping of checkpoints.

A table is a sequence of `Row`s. `convert` turns the flat names of a foreign
checkpoint into our nested dict and `invert` turns them back, with nothing left
over and nothing missing on either side.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, Protocol

import numpy as np

Arrays = tuple[np.ndarray, ...]


class ConversionError(ValueError):
  """Everything that is wrong with a conversion, in one message."""

  def __init__(self, problems: Sequence[str]):
    self.problems = tuple(problems)
    lines = '\n'.join(f'  {p}' for p in self.problems)
    super().__init__(f'{len(self.problems)} problem(s) in conversion:\n{lines}')


class Transform(Protocol):
  """An invertible map from the source arrays of a row to its target arrays."""

  def forward(self, arrays: Arrays) -> Arrays:
    ...

  def inverse(self, arrays: Arrays) -> Arrays:
    ...


@dataclasses.dataclass(frozen=True)
class Identity:
  """Leaves arrays as they are."""

  def forward(self, arrays: Arrays) -> Arrays:
    return arrays

  def inverse(self, arrays: Arrays) -> Arrays:
    return arrays


@dataclasses.dataclass(frozen=True)
class Permute:
  """Permutes the axes of every array: axis i of the target is `order[i]`."""

  order: tuple[int, ...]

  def forward(self, arrays: Arrays) -> Arrays:
    return tuple(x.transpose(self.order) for x in arrays)

  def inverse(self, arrays: Arrays) -> Arrays:
    return tuple(x.transpose(np.argsort(self.order)) for x in arrays)


TRANSPOSE = Permute((1, 0))  # linear: (out, in) <-> (in, out)
CONV = Permute((2, 3, 1, 0))  # convolution: OIHW <-> HWIO


@dataclasses.dataclass(frozen=True)
class Reshape:
  """Reshapes every array between two shapes; each may hold one -1."""

  source: tuple[int, ...]
  target: tuple[int, ...]

  def forward(self, arrays: Arrays) -> Arrays:
    return tuple(_reshape(x, self.source, self.target) for x in arrays)

  def inverse(self, arrays: Arrays) -> Arrays:
    return tuple(_reshape(x, self.target, self.source) for x in arrays)


@dataclasses.dataclass(frozen=True)
class Split:
  """Cuts one array into `parts` equal ones along `axis`."""

  parts: int
  axis: int = 0

  def forward(self, arrays: Arrays) -> Arrays:
    (x,) = arrays
    return tuple(np.split(x, self.parts, self.axis))

  def inverse(self, arrays: Arrays) -> Arrays:
    return (np.concatenate(arrays, self.axis),)


@dataclasses.dataclass(frozen=True)
class Join:
  """Joins `parts` equal arrays into one along `axis`."""

  parts: int
  axis: int = 0

  def forward(self, arrays: Arrays) -> Arrays:
    return Split(self.parts, self.axis).inverse(arrays)

  def inverse(self, arrays: Arrays) -> Arrays:
    return Split(self.parts, self.axis).forward(arrays)


@dataclasses.dataclass(frozen=True, init=False)
class Chain:
  """Applies transforms in order."""

  steps: tuple[Transform, ...]

  def __init__(self, *steps: Transform):
    object.__setattr__(self, 'steps', steps)

  def forward(self, arrays: Arrays) -> Arrays:
    for step in self.steps:
      arrays = step.forward(arrays)
    return arrays

  def inverse(self, arrays: Arrays) -> Arrays:
    for step in reversed(self.steps):
      arrays = step.inverse(arrays)
    return arrays


@dataclasses.dataclass(frozen=True)
class Row:
  """One kind of weight on both sides.

  Names are templates in which `{i}` stands for a number. A number that both
  sides name is carried over; one that only `src` names is the index of a
  stacked layer, the leading axis of the target. With several templates on one
  side, `fwd` takes or gives as many arrays, in that order.

  Attributes:
    src: template(s) of the checkpoint's names.
    dst: template(s) of '/'-joined paths in our parameters.
    fwd: transform of one layer's arrays.
    optional: whether `invert` accepts parameters without this row.
  """

  src: str | tuple[str, ...]
  dst: str | tuple[str, ...]
  fwd: Transform = Identity()
  optional: bool = False

  def __post_init__(self):
    for side in ('src', 'dst'):
      if isinstance(templates := getattr(self, side), str):
        object.__setattr__(self, side, (templates,))
      if len({_fields(t) for t in getattr(self, side)}) != 1:
        raise ValueError(f'{side} must name the same numbers: {self}')
    src, dst = _fields(self.src[0]), _fields(self.dst[0])
    if not dst <= src or len(src - dst) > 1:
      raise ValueError(f'dst must name all numbers of src but one: {self}')

  @property
  def stacked(self) -> str | None:
    """Name of the number that becomes the leading axis."""
    return next(iter(_fields(self.src[0]) - _fields(self.dst[0])), None)


Table = Sequence[Row]


def convert(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    target: Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
  """Turns a checkpoint's tensors into our parameters.

  Args:
    table: rows; each tensor must match exactly one row or `ignore` template.
    tensors: arrays by the checkpoint's names; their types are kept.
    target: nested dict whose leaves have the `shape` that is expected, such as
      `Model.abstract()` returns.
    ignore: templates of names that hold no weights, such as buffers.

  Returns:
    Nested dict of arrays with the structure of `target`.

  Raises:
    ConversionError: lists every tensor that not exactly one template matches,
      every target that not exactly one row fills, every missing layer and every
      wrong shape.
  """
  sources = [(f'row {t!r}', t) for row in table for t in row.src]
  ignored = [(f'ignored {t!r}', t) for t in ignore]
  problems = _unclaimed('tensor', tensors, sources + ignored)
  shapes = {path: tuple(leaf.shape) for path, leaf in _flatten(target)}
  filled: dict[str, np.ndarray | None] = {}
  for row in table:
    for numbers, layers in _layers(row, tensors, problems).items():
      paths = [_fill(t, dict(numbers)) for t in row.dst]
      for path in paths:
        if path in filled:
          problems.append(f'target {path!r} is filled twice')
        filled.setdefault(path, None)
      try:
        outputs = [
            _exactly(
                row.fwd.forward(tuple(np.asarray(tensors[n]) for n in names)),
                len(paths),
            )
            for names in layers
        ]
        stack = np.stack if row.stacked else lambda parts: parts[0]
        values = [stack(parts) for parts in zip(*outputs, strict=True)]
      except (ValueError, IndexError) as e:
        problems.append(f'tensor {layers[0][0]!r} does not fit its row: {e}')
        continue
      for path, value in zip(paths, values, strict=True):
        filled[path] = np.asarray(value, order='C')
        if path not in shapes:
          problems.append(
              f'target {path!r} of tensor {layers[0][0]!r} does not exist'
          )
        elif value.shape != shapes[path]:
          problems.append(
              f'target {path!r} has shape {shapes[path]}, but tensor '
              f'{layers[0][0]!r} gives {value.shape}'
          )
  problems.extend(
      f'target {path!r} is not filled: {_wanted(table, path)}'
      for path in shapes if path not in filled
  )
  if problems:
    raise ConversionError(problems)
  return _nest(target, filled)


def invert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Turns our parameters back into a checkpoint's tensors.

  Args:
    table: the rows that `convert` was given.
    params: nested dict of arrays; each leaf must match exactly one row.

  Returns:
    Contiguous arrays by the checkpoint's names, without what was ignored.

  Raises:
    ConversionError: lists every leaf that not exactly one row matches, every
      row that matches none unless it is optional, every name that is made twice
      and every wrong shape.
  """
  leaves = {path: np.asarray(leaf) for path, leaf in _flatten(params)}
  problems = _unclaimed(
      'parameter', leaves, [(f'row {t!r}', t) for r in table for t in r.dst]
  )
  tensors: dict[str, np.ndarray] = {}
  for row in table:
    known_problems = len(problems)
    groups = _groups(row.dst, leaves, problems)
    if not (groups or row.optional or len(problems) > known_problems):
      problems.append(f'no parameter matches row {row.dst[0]!r}')
    for numbers, paths in groups.items():
      inputs = [leaves[path] for path in paths]
      try:
        layers = _unstack(inputs) if row.stacked else [tuple(inputs)]
        outputs = [
            _exactly(row.fwd.inverse(layer), len(row.src)) for layer in layers
        ]
      except (ValueError, IndexError) as e:
        problems.append(f'parameter {paths[0]!r} does not fit its row: {e}')
        continue
      for i, arrays in enumerate(outputs):
        known = dict(numbers) | ({row.stacked: i} if row.stacked else {})
        for template, array in zip(row.src, arrays, strict=True):
          name = _fill(template, known)
          if name in tensors:
            problems.append(f'tensor {name!r} is made twice')
          tensors[name] = np.asarray(array, order='C')
  if problems:
    raise ConversionError(problems)
  return tensors


# Numbers of a name, such as (('block', 0), ('level', 3)).
_Numbers = tuple[tuple[str, int], ...]


def _unclaimed(
    kind: str, names: Iterable[str], claims: Sequence[tuple[str, str]]
) -> list[str]:
  """Problems of names that not exactly one of (label, template) matches."""
  problems = []
  for name in names:
    owners = [label for label, t in claims if _pattern(t).fullmatch(name)]
    if not owners:
      problems.append(f'{kind} {name!r} matches no row')
    elif len(owners) > 1:
      problems.append(f'{kind} {name!r} matches {" and ".join(owners)}')
  return problems


def _groups(
    templates: Sequence[str], names: Iterable[str], problems: list[str]
) -> dict[_Numbers, tuple[str, ...]]:
  """Names that belong together, one per template, by their numbers."""
  found: dict[_Numbers, dict[str, str]] = collections.defaultdict(dict)
  for name in names:
    for template in templates:
      if match := _pattern(template).fullmatch(name):
        numbers = sorted((k, int(v)) for k, v in match.groupdict().items())
        found[tuple(numbers)][template] = name
  groups = {}
  for numbers, members in found.items():
    missing = [_fill(t, dict(numbers)) for t in templates if t not in members]
    if missing:
      present = next(iter(members.values()))
      problems.append(f'{missing} must stand beside {present!r}')
    else:
      groups[numbers] = tuple(members[t] for t in templates)
  return groups


def _layers(
    row: Row, names: Iterable[str], problems: list[str]
) -> dict[_Numbers, list[tuple[str, ...]]]:
  """A row's groups in the order of their layers, by the other numbers."""
  found: dict[_Numbers, dict[int, tuple[str, ...]]] = (
      collections.defaultdict(dict)
  )
  for numbers, group in _groups(row.src, names, problems).items():
    others = dict(numbers)
    layer = others.pop(row.stacked, 0)
    found[tuple(others.items())][layer] = group
  for layers in found.values():
    missing = sorted(set(range(max(layers))) - set(layers))
    if missing:
      problems.append(f'row {row.src[0]!r} lacks layers {missing}')
  return {k: [v[i] for i in sorted(v)] for k, v in found.items()}


def _wanted(table: Table, path: str) -> str:
  """What would have filled a target."""
  for row in table:
    for template in row.dst:
      if match := _pattern(template).fullmatch(path):
        names = [_fill(t, match.groupdict()) for t in row.src]
        return f'there is no tensor {" or ".join(map(repr, names))}'
  return 'no row makes it'


def _fields(template: str) -> frozenset[str]:
  return frozenset(_FIELD.findall(template))


def _fill(template: str, numbers: Mapping[str, Any]) -> str:
  """Puts numbers into a template; fields without one stay."""
  return _FIELD.sub(lambda m: str(numbers.get(m[1], m[0])), template)


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
  pattern, seen = '', set()
  for i, part in enumerate(_FIELD.split(template)):  # literal, field, ...
    if i % 2 == 0:
      pattern += re.escape(part)
    elif part in seen:
      pattern += f'(?P={part})'
    else:  # without leading zeros, so that numbers and names are one to one
      pattern += f'(?P<{part}>0|[1-9][0-9]*)'
      seen.add(part)
  return re.compile(pattern)


_FIELD = re.compile(r'\{(\w+)\}')


def _unstack(arrays: Sequence[np.ndarray]) -> list[Arrays]:
  if not all(x.ndim for x in arrays):
    raise ValueError('there is no axis of layers')
  return list(zip(*arrays, strict=True))


def _exactly(arrays: Arrays, count: int) -> Arrays:
  if len(arrays) != count:
    raise ValueError(f'{len(arrays)} arrays for {count} names')
  return arrays


def _reshape(
    x: np.ndarray, shape: tuple[int, ...], new: tuple[int, ...]
) -> np.ndarray:
  if x.ndim != len(shape) or any(
      s not in (-1, n) for s, n in zip(shape, x.shape, strict=True)
  ):
    raise ValueError(f'shape {x.shape} is not {shape}')
  return x.reshape(new)


def _flatten(
    tree: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{prefix}{key}/')
    else:
      yield f'{prefix}{key}', value


def _nest(
    tree: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = ''
) -> dict[str, Any]:
  """The structure of `tree` with the values of `leaves`."""
  return {
      key: _nest(value, leaves, f'{prefix}{key}/')
      if isinstance(value, Mapping)
      else leaves[f'{prefix}{key}']
      for key, value in tree.items()
  }
