# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the writers, read back by the readers and by safetensors."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dd_jax.convert import readers, writers

VALUES = {
    'b.bias': np.ones(3, ml_dtypes.bfloat16),
    'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
    'steps': np.array(5, np.int64),
    'mask': np.array([True, False, True]),
    'none': np.zeros((0, 2), np.float16),
    'wide': np.arange(2.0),
}
SPECS = {k: (v.shape, v.dtype) for k, v in VALUES.items()}


@pytest.mark.parametrize('suffix', writers.SUFFIXES)
def test_what_is_written_is_read(suffix, tmp_path):
  path = tmp_path / f'f{suffix}'
  keys = ('trainer', 'ema_parameters')
  writers.write(path, SPECS, reversed(VALUES.items()), keys)
  found = readers.select(path, readers.read(path).tree)
  assert found.tensors.keys() == VALUES.keys()
  if suffix == '.safetensors':
    others = load_file(path)
  else:
    assert found.wrapper == keys
    assert list(found.tensors) == list(VALUES)  # the order of `specs`
    others = found.tensors
  for name, value in VALUES.items():
    for back in (np.asarray(found.tensors[name]), np.asarray(others[name])):
      assert (back.shape, back.dtype) == SPECS[name]
      assert back.tobytes() == value.tobytes()


@pytest.mark.parametrize('suffix', writers.SUFFIXES)
def test_values_must_be_those_announced(suffix, tmp_path):
  path = tmp_path / f'f{suffix}'
  with pytest.raises(ValueError, match="no values for .*'a.weight'"):
    writers.write(path, SPECS, [])
  with pytest.raises(ValueError, match="'steps': unexpected float64"):
    writers.write(path, SPECS, [('steps', np.array(1.0))])
  twice = [('steps', VALUES['steps'])] * 2
  with pytest.raises(ValueError, match="'steps': unexpected"):
    writers.write(path, SPECS, twice)


def test_formats_and_types_have_limits(tmp_path):
  with pytest.raises(ValueError, match='must end with'):
    writers.write(tmp_path / 'f.npz', SPECS, VALUES.items())
  with pytest.raises(ValueError, match="'c' has type complex64"):
    writers.write(
        tmp_path / 'f.pth', {'c': ((), np.dtype(np.complex64))}, []
    )
  assert not list(tmp_path.iterdir())
