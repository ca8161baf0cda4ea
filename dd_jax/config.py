# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""From plain mappings to checked, frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_flags

T = TypeVar('T')


def define_flag() -> flags.FlagHolder:
  """The flag --config, a file whose fields --config.<field> replaces.

  What a mapping within the config lacks may be added, since the fields that
  have defaults stand in no file; `make` refuses those that nobody knows. Of the
  config itself only what stands in the file can be set.
  """
  holder = config_flags.DEFINE_config_file(
      'config', None, 'Config file, with its argument after a colon.',
      lock_config=False, accept_new_attributes=True,
  )

  def check(_: Any) -> bool:
    flag = flags.FLAGS['config']
    added = [
        name for name in config_flags.get_override_values(flag)
        if '.' not in name
    ]
    if added:
      known = flag.parser.parse(config_flags.get_config_filename(flag))
      for name in added:
        if name not in known:
          raise flags.ValidationError(
              f'the config has no field {name!r}; it has {sorted(known)}'
          )
    return True

  flags.register_validator(holder, check)
  return holder


def make(cls: type[T], values: Mapping[str, Any], where: str) -> T:
  """An instance of a config dataclass, with names and types checked.

  Lists become tuples and integers given for floats become floats, so that what
  comes back from JSON equals what was written. Hints may be built from `bool`,
  `int`, `float`, `str`, `None`, `Any`, `Literal`, unions, `tuple[T, ...]` and
  `Mapping`, whose contents are left alone.

  Args:
    cls: frozen dataclass.
    values: its fields.
    where: what to call it in errors.

  Raises:
    ValueError: names every unknown, missing or ill-typed field.
  """
  hints = typing.get_type_hints(cls)
  known = {f.name: f for f in dataclasses.fields(cls)}
  fields, problems = {}, []
  for name, value in values.items():
    if name not in known:
      close = difflib.get_close_matches(name, known, n=1)
      hint = f'did you mean {close[0]!r}?' if close else 'remove it'
      problems.append(f'unknown field {name!r}: {hint}')
      continue
    try:
      fields[name] = _conform(value, hints[name])
    except TypeError as e:
      problems.append(f'field {name!r} must be {e}, not {value!r}')
  for name, field in known.items():
    required = (
        field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    )
    if required and name not in values:
      problems.append(f'missing field {name!r}')
  if problems:
    raise ValueError(
        f'{where}: ' + '; '.join(problems) + f'. Fields are {", ".join(known)}.'
    )
  return cls(**fields)


def _conform(value: Any, hint: Any) -> Any:
  """`value` as an instance of a type hint; the error completes 'must be'."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if hint is Any:
    return tuple(value) if isinstance(value, list) else value
  if origin is typing.Literal:
    if value in args:
      return value
    raise TypeError('one of ' + ', '.join(map(repr, args)))
  if origin in (types.UnionType, typing.Union):
    for arg in args:
      try:
        return _conform(value, arg)
      except TypeError:
        continue
    raise TypeError(str(hint))
  if origin is tuple:
    if isinstance(value, Sequence) and not isinstance(value, str):
      try:
        return tuple(_conform(v, args[0]) for v in value)
      except TypeError as e:
        raise TypeError(f'a list {e}') from None
    raise TypeError('a list')
  if origin is Mapping:
    if isinstance(value, Mapping):
      return value
    raise TypeError('a mapping')
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is hint:
    return value
  raise TypeError('None' if hint is type(None) else f'of type {hint.__name__}')


def canonical_json(value: Any) -> str:
  """JSON with sorted keys and no spaces: equal values, equal text."""
  return json.dumps(value, sort_keys=True, separators=(',', ':'))


def flatten(
    values: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  """Dotted names and leaves of nested mappings."""
  for k, v in values.items():
    if isinstance(v, Mapping) and v:
      yield from flatten(v, f'{prefix}{k}.')
    else:
      yield f'{prefix}{k}', v


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Fields in which two configs differ, as 'name: old -> new'."""
  a, b = dict(flatten(old)), dict(flatten(new))
  gone = '(absent)'
  return [
      f'{k}: {a.get(k, gone)!r} -> {b.get(k, gone)!r}'
      for k in sorted(a | b)
      if canonical_json(a.get(k, gone)) != canonical_json(b.get(k, gone))
  ]
