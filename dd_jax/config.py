# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""From plain mappings to checked, frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import difflib
import json
from typing import Any, TypeVar

T = TypeVar('T')


def make(cls: type[T], values: Mapping[str, Any], where: str) -> T:
  """An instance of a config dataclass; lists become tuples.

  Args:
    cls: frozen dataclass.
    values: its fields.
    where: what to call it in errors.

  Raises:
    ValueError: unknown or missing field, naming it and the closest one.
  """
  names = [f.name for f in dataclasses.fields(cls)]
  for name in values:
    if name not in names:
      close = difflib.get_close_matches(name, names, 1)
      hint = f'did you mean {close[0]!r}?' if close else f'fields: {names}'
      raise ValueError(f'{where} has no field {name!r}; {hint}')
  required = [
      f.name for f in dataclasses.fields(cls)
      if f.default is dataclasses.MISSING
      and f.default_factory is dataclasses.MISSING
  ]
  if missing := [n for n in required if n not in values]:
    raise ValueError(f'{where} needs {", ".join(missing)}')
  return cls(**{
      k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
  })


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
