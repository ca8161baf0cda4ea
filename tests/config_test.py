# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of config dataclasses made from plain mappings."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any, Literal

import pytest

from dd_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Config:
  width: int
  sizes: tuple[int, ...]
  rate: float = 0.1
  unroll: bool | None = None
  kind: Literal['a', 'b'] = 'a'
  name: str = 'x'
  rest: Mapping[str, Any] | None = None


def test_make_round_trips_through_json():
  config = config_lib.make(
      Config, {'width': 3, 'sizes': [1, 2], 'rate': 1, 'unroll': True}, 'here'
  )
  assert config == Config(3, (1, 2), 1.0, True)
  assert type(config.rate) is float
  again = json.loads(json.dumps(dataclasses.asdict(config)))
  assert config_lib.make(Config, again, 'here') == config


@pytest.mark.parametrize('fields, message', [
    ({'widht': 3}, "unknown field 'widht': did you mean 'width'"),
    ({'zzz': 3}, "unknown field 'zzz': remove it"),
    ({'sizes': []}, "missing field 'width'"),
    ({'width': 3.0}, "field 'width' must be of type int, not 3.0"),
    ({'width': True}, "field 'width' must be of type int, not True"),
    ({'sizes': 3}, "field 'sizes' must be a list, not 3"),
    ({'sizes': [1, 'b']}, "field 'sizes' must be a list of type int"),
    ({'kind': 'c'}, "field 'kind' must be one of 'a', 'b', not 'c'"),
    ({'rate': '1'}, "field 'rate' must be of type float, not '1'"),
    ({'rest': 3}, "field 'rest' must be"),
    ({'unroll': 'yes'}, "field 'unroll' must be bool | None, not 'yes'"),
])
def test_make_names_the_field(fields, message):
  with pytest.raises(ValueError) as info:
    config_lib.make(Config, fields, 'here')
  assert str(info.value).startswith('here: ')
  assert message in str(info.value)
  assert 'Fields are width, sizes, rate' in str(info.value)


def test_differences_name_the_leaf():
  old, new = {'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'd': 2}}
  assert config_lib.differences(old, new) == [
      "a.c: 2 -> '(absent)'", "a.d: '(absent)' -> 2"
  ]
