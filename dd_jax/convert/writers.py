# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes weight files that other programs read: `.safetensors` and `.pth`.

Names, shapes and types are given first and the values one by one afterwards,
in any order, so that a file may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import json
import math
import os
import struct
from typing import BinaryIO
import zipfile

import numpy as np

# Name -> (shape, dtype), and the values in any order.
Specs = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Values = Iterable[tuple[str, np.ndarray]]

SUFFIXES = ('.safetensors', '.pth', '.pt')

_TYPES = {  # of NumPy: in .safetensors, in torch
    'float64': ('F64', 'Double'), 'float32': ('F32', 'Float'),
    'float16': ('F16', 'Half'), 'bfloat16': ('BF16', 'BFloat16'),
    'int64': ('I64', 'Long'), 'int32': ('I32', 'Int'),
    'int16': ('I16', 'Short'), 'int8': ('I8', 'Char'), 'uint8': ('U8', 'Byte'),
    'bool': ('BOOL', 'Bool'),
}


def write(
    path: str | os.PathLike, specs: Specs, values: Values,
    wrapper: Sequence[str] = (),
) -> None:
  """Writes a file; its suffix tells the format.

  Args:
    path: ends with one of `SUFFIXES`.
    specs: every tensor of the file, in its order.
    values: contiguous arrays of these shapes and types, each once.
    wrapper: keys of the dicts around the tensors; `.safetensors` has none.

  Raises:
    ValueError: another suffix, a type without a name in the format, or values
      that are not those of `specs`.
  """
  suffix = os.path.splitext(path)[1]
  if suffix not in SUFFIXES:
    raise ValueError(f'{path}: the name must end with one of {SUFFIXES}')
  for name, (_, dtype) in specs.items():
    if dtype.name not in _TYPES:
      raise ValueError(f'{name!r} has type {dtype}, which {suffix} lacks')
  if suffix == '.safetensors':
    with open(path, 'wb') as file:
      _write_safetensors(file, specs, values)
  else:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
      _write_torch(archive, specs, values, wrapper)


def _write_safetensors(file: BinaryIO, specs: Specs, values: Values) -> None:
  header, stop = {'__metadata__': {'format': 'pt'}}, 0
  for name, (shape, dtype) in sorted(  # wide types first keeps all aligned
      specs.items(), key=lambda item: -item[1][1].itemsize
  ):
    start, stop = stop, stop + math.prod(shape) * dtype.itemsize
    header[name] = {
        'dtype': _TYPES[dtype.name][0], 'shape': shape,
        'data_offsets': (start, stop),
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  file.write(struct.pack('<Q', len(text)) + text)
  base = file.tell()
  for name, value in _checked(specs, values):
    file.seek(base + header[name]['data_offsets'][0])
    file.write(_bytes(value))
  file.truncate(base + stop)


def _write_torch(
    archive: zipfile.ZipFile, specs: Specs, values: Values,
    wrapper: Sequence[str],
) -> None:
  """The zip format of torch.save."""
  keys = {name: str(i) for i, name in enumerate(specs)}
  tree = _mapping(
      (name, _tensor(keys[name], *spec)) for name, spec in specs.items()
  )
  for key in reversed(wrapper):
    tree = _mapping([(key, tree)])
  archive.writestr('archive/data.pkl', b'\x80\x02' + tree + b'.')
  archive.writestr('archive/byteorder', 'little')
  for name, value in _checked(specs, values):
    with archive.open(
        f'archive/data/{keys[name]}', 'w', force_zip64=True
    ) as part:
      part.write(_bytes(value))
  archive.writestr('archive/version', '3\n')


def _checked(specs: Specs, values: Values) -> Values:
  missing = set(specs)
  for name, value in values:
    if name not in missing or (value.shape, value.dtype) != specs[name]:
      raise ValueError(f'{name!r}: unexpected {value.dtype} {value.shape}')
    missing.remove(name)
    yield name, value
  if missing:
    raise ValueError(f'no values for {sorted(missing)}')


def _bytes(value: np.ndarray) -> memoryview | bytes:
  # Types that Python's buffers do not know go by their bytes.
  return value.reshape(-1).view(np.uint8).data if value.size else b''


# Instructions of a pickle, protocol 2.
def _text(text: str) -> bytes:
  data = text.encode()
  return b'X' + struct.pack('<I', len(data)) + data


def _integer(value: int) -> bytes:
  return b'\x8a\x08' + struct.pack('<q', value)


def _mapping(items: Iterable[tuple[str, bytes]]) -> bytes:
  return b'}(' + b''.join(_text(k) + v for k, v in items) + b'u'


def _tensor(key: str, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
  """A call of torch's function that makes a tensor of a storage."""
  strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
  return b''.join([
      b'ctorch._utils\n_rebuild_tensor_v2\n((', _text('storage'),
      f'ctorch\n{_TYPES[dtype.name][1]}Storage\n'.encode(), _text(key),
      _text('cpu'), _integer(math.prod(shape)), b'tQ', _integer(0),
      b'(', *map(_integer, shape), b't(', *map(_integer, strides), b't',
      b'\x89ccollections\nOrderedDict\n)RtR',
  ])
