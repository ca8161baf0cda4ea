# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables: total, invertible renaming and reshaping of checkpoints.

A table is a sequence of `Row`s. `convert` turns the flat names of a foreign
checkpoint into our nested dict and `invert` turns them back, with nothing left
over and nothing missing on either side.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any, Protocol

import numpy as np

from dd_jax.convert import lazy
from dd_jax.convert.lazy import LazyArray

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
    tensors: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> dict[str, Any]:
  """Turns a checkpoint's tensors into our parameters, in memory.

  Takes the arguments of `plan` and raises what it raises.

  Returns:
    Nested dict of arrays with the structure of `target`.
  """
  leaves = plan(table, tensors, target, ignore=ignore)
  return nest(target, {k: np.asarray(v) for k, v in leaves.items()})


def plan(
    table: Table,
    tensors: Mapping[str, Any],
    target: Mapping[str, Any],
    *,
    ignore: Iterable[str] = (),
) -> dict[str, LazyArray]:
  """How a checkpoint's tensors become our parameters, from shapes alone.

  Args:
    table: rows; each tensor must match exactly one row or `ignore` template.
    tensors: arrays or lazy arrays by the checkpoint's names; their types are
      kept.
    target: nested dict whose leaves have the `shape` that is expected, such as
      `Model.abstract()` returns.
    ignore: templates of names that hold no weights, such as buffers.

  Returns:
    By '/'-joined path in the order of `target`, arrays that read their tensors
    when they are asked for.

  Raises:
    ConversionError: lists every tensor that not exactly one template matches,
      every target that not exactly one row fills, every missing layer, every
      wrong shape and every leaf of several types.
  """
  sources = [(f'row {t!r}', t) for row in table for t in row.src]
  ignored = [(f'ignored {t!r}', t) for t in ignore]
  problems = _unclaimed('tensor', tensors, sources + ignored)
  shapes = {path: tuple(leaf.shape) for path, leaf in flatten(target)}
  filled: dict[str, LazyArray | None] = {}
  for row in table:
    for numbers, layers in _layers(row, tensors, problems).items():
      paths = [_fill(t, dict(numbers)) for t in row.dst]
      for path in paths:
        if path in filled:
          problems.append(f'target {path!r} is filled twice')
        filled.setdefault(path, None)
      first = layers[0][0]
      try:
        made = _planned(row, layers, tensors)
      except (ValueError, IndexError) as e:
        problems.append(f'tensor {first!r} does not fit its row: {e}')
        continue
      for path, leaf in zip(paths, made, strict=True):
        filled[path] = leaf
        if path not in shapes:
          problems.append(
              f'target {path!r} of tensor {first!r} does not exist'
          )
        elif leaf.shape != shapes[path]:
          problems.append(
              f'target {path!r} has shape {shapes[path]}, but tensor '
              f'{first!r} gives {leaf.shape}'
          )
  problems.extend(
      f'target {path!r} is not filled: {_wanted(table, path)}'
      for path in shapes if path not in filled
  )
  if problems:
    raise ConversionError(problems)
  return {path: filled[path] for path in shapes}


def invert(table: Table, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Turns our parameters back into a checkpoint's tensors, in memory.

  Takes the arguments of `plan_inverse` and raises what it raises.

  Returns:
    Contiguous arrays by the checkpoint's names, without what was ignored.
  """
  tensors = {}
  for group in plan_inverse(table, params):
    tensors |= group.make()
  return tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Tensors of a checkpoint that are made from the same parameters.

  Attributes:
    shapes: of every tensor, by name.
    dtype: of all of them.
    make: reads the parameters and gives contiguous arrays by name.
  """

  shapes: Mapping[str, tuple[int, ...]]
  dtype: np.dtype
  make: Callable[[], dict[str, np.ndarray]]


def plan_inverse(table: Table, params: Mapping[str, Any]) -> list[Group]:
  """How our parameters become a checkpoint's tensors, from shapes alone.

  Args:
    table: the rows that `plan` was given.
    params: nested dict of arrays or lazy arrays; each leaf must match exactly
      one row.

  Returns:
    Groups that together make every tensor.

  Raises:
    ConversionError: lists every leaf that not exactly one row matches, every
      row that matches none unless it is optional, every name that is made twice
      and every wrong shape.
  """
  leaves = dict(flatten(params))
  problems = _unclaimed(
      'parameter', leaves, [(f'row {t!r}', t) for r in table for t in r.dst]
  )
  made: list[Group] = []
  seen: set[str] = set()
  for row in table:
    known_problems = len(problems)
    groups = _groups(row.dst, leaves, problems)
    if not (groups or row.optional or len(problems) > known_problems):
      problems.append(f'no parameter matches row {row.dst[0]!r}')
    for numbers, paths in groups.items():
      inputs = [leaves[path] for path in paths]
      try:
        blanks = [lazy.blank(tuple(x.shape)) for x in inputs]
        shapes = {
            k: v.shape for k, v in _inverse(row, numbers, blanks).items()
        }
        dtype = _one_type(inputs)
      except (ValueError, IndexError) as e:
        problems.append(f'parameter {paths[0]!r} does not fit its row: {e}')
        continue
      problems.extend(
          f'tensor {name!r} is made twice' for name in shapes if name in seen
      )
      seen.update(shapes)

      def make(row=row, numbers=numbers, inputs=inputs):
        arrays = _inverse(row, numbers, [np.asarray(x) for x in inputs])
        return {k: np.asarray(v, order='C') for k, v in arrays.items()}

      made.append(Group(shapes, dtype, make))
  if problems:
    raise ConversionError(problems)
  return made


def _planned(
    row: Row, layers: Sequence[tuple[str, ...]], tensors: Mapping[str, Any]
) -> list[LazyArray]:
  """The targets of one group of layers."""
  shapes = [
      [x.shape for x in _exactly(
          row.fwd.forward(
              tuple(lazy.blank(tuple(tensors[n].shape)) for n in names)
          ), len(row.dst),
      )]
      for names in layers
  ]
  dtype = _one_type([tensors[n] for names in layers for n in names])
  made = []
  for k, parts in enumerate(zip(*shapes, strict=True)):
    if len(set(parts)) > 1:
      raise ValueError(f'its layers have shapes {sorted(set(parts))}')
    shape = (len(parts), *parts[0]) if row.stacked else parts[0]

    def make(k=k, shape=shape):
      value = np.empty((len(layers), *shape[bool(row.stacked):]), dtype)
      for i, names in enumerate(layers):
        arrays = tuple(np.asarray(tensors[n]) for n in names)
        value[i] = row.fwd.forward(arrays)[k]
      return value.reshape(shape)

    names = tuple(n for names in layers for n in names)
    made.append(LazyArray(shape, dtype, make, names))
  return made


def _inverse(
    row: Row, numbers: _Numbers, inputs: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
  """The tensors of one group of parameters."""
  layers = _unstack(inputs) if row.stacked else [tuple(inputs)]
  tensors = {}
  for i, layer in enumerate(layers):
    known = dict(numbers) | ({row.stacked: i} if row.stacked else {})
    arrays = _exactly(row.fwd.inverse(layer), len(row.src))
    for template, array in zip(row.src, arrays, strict=True):
      tensors[_fill(template, known)] = array
  return tensors


def _one_type(arrays: Sequence[Any]) -> np.dtype:
  """The type of all; to stack several would change values for good."""
  types = {np.dtype(x.dtype) for x in arrays}
  if len(types) > 1:
    raise ValueError(f'types {sorted(map(str, types))} in one parameter')
  return types.pop()


def matches(templates: Iterable[str], name: str) -> bool:
  """Whether a name is one of those that the templates stand for."""
  return any(_pattern(t).fullmatch(name) for t in templates)


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
    # A name can hold any number: nothing is counted up to it.
    missing = [i for i in range(len(layers)) if i not in layers]
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


def flatten(
    tree: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """'/'-joined paths and leaves of nested dicts."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f'{prefix}{key}/')
    else:
      yield f'{prefix}{key}', value


def nest(
    tree: Mapping[str, Any], leaves: Mapping[str, Any], prefix: str = ''
) -> dict[str, Any]:
  """The structure of `tree` with the values of `leaves`."""
  return {
      key: nest(value, leaves, f'{prefix}{key}/')
      if isinstance(value, Mapping)
      else leaves[f'{prefix}{key}']
      for key, value in tree.items()
  }
