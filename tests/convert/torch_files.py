# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes files as torch.save does, good ones and bad ones, without torch."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import math
import pickle
import struct
import sys
import types
from typing import Any
import zipfile

import numpy as np

STORAGES = {
    'float32': 'FloatStorage', 'float64': 'DoubleStorage',
    'float16': 'HalfStorage', 'bfloat16': 'BFloat16Storage',
    'int64': 'LongStorage', 'int32': 'IntStorage', 'int16': 'ShortStorage',
    'int8': 'CharStorage', 'uint8': 'ByteStorage', 'bool': 'BoolStorage',
}


def _function(module: str, name: str) -> Any:
  """Something that pickle writes as that name."""
  made = type(name, (), {'__module__': module})
  made.__qualname__ = name
  return made


_NAMES = {
    ('torch._utils', '_rebuild_tensor_v2'), ('torch._utils', '_rebuild_tensor'),
    ('torch._utils', '_rebuild_parameter'), ('torch', 'Size'),
    *(('torch', name) for name in STORAGES.values()),
}
FAKES = {names: _function(*names) for names in _NAMES}


@contextlib.contextmanager
def installed(fakes):
  """Modules with these names, while something is written."""
  before = dict(sys.modules)
  for (module, name), made in fakes.items():
    parts = module.split('.')
    for i in range(len(parts)):
      path = '.'.join(parts[: i + 1])
      if path not in sys.modules or path.startswith('torch'):
        sys.modules.setdefault(path, types.ModuleType(path))
    setattr(sys.modules[module], name, made)
  try:
    yield
  finally:
    for name in set(sys.modules) - set(before):
      del sys.modules[name]


class Storage:
  """A run of values; `claimed` is the number that the pickle says."""

  def __init__(self, values: np.ndarray, claimed: int | None = None):
    self.values = np.ascontiguousarray(values).reshape(-1)
    self.claimed = len(self.values) if claimed is None else claimed


@dataclasses.dataclass
class Tensor:
  """A view of a storage."""

  storage: Storage
  shape: tuple[int, ...]
  strides: tuple[int, ...] | None = None
  offset: int = 0
  parameter: bool = False
  rebuild: str = '_rebuild_tensor_v2'

  def __reduce__(self):
    strides = self.strides
    if strides is None:
      strides = tuple(
          math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))
      )
    if self.parameter:
      data = dataclasses.replace(self, parameter=False)
      return FAKES['torch._utils', '_rebuild_parameter'], (
          data, True, collections.OrderedDict()
      )
    arguments = (self.storage, self.offset, self.shape, strides)
    if self.rebuild == '_rebuild_tensor_v2':
      arguments += (False, collections.OrderedDict())
    return FAKES['torch._utils', self.rebuild], arguments


def tensor(values: Any, **kwargs) -> Tensor:
  values = np.asarray(values)
  return Tensor(Storage(values), values.shape, **kwargs)


class Call:
  """Written as a call of a name with arguments, when the file is read."""

  def __init__(self, module: str, name: str, *arguments: Any):
    self.function = _function(module, name)
    self.arguments = arguments

  def __reduce__(self):
    return self.function, self.arguments


class _Pickler(pickle._Pickler):  # the one whose rules can be bent

  def __init__(self, file, legacy: bool):
    super().__init__(file, 2)
    self.legacy = legacy
    self.storages: dict[int, tuple[str, Storage]] = {}

  def persistent_id(self, obj):
    if not isinstance(obj, Storage):
      return None
    key, _ = self.storages.setdefault(
        id(obj), (str(len(self.storages)), obj)
    )
    kind = FAKES['torch', STORAGES[obj.values.dtype.name]]
    view = (None,) if self.legacy else ()
    return ('storage', kind, key, 'cpu', obj.claimed, *view)

  def save_type(self, obj):
    if obj.__module__.split('.')[0] in ('argparse', 'collections'):
      return super().save_global(obj)
    self.write(f'c{obj.__module__}\n{obj.__qualname__}\n'.encode())
    self.memoize(obj)

  dispatch = pickle._Pickler.dispatch | {type: save_type}


def pickled(tree: Any, legacy: bool = False) -> tuple[bytes, list]:
  file = io.BytesIO()
  with installed(FAKES):
    pickler = _Pickler(file, legacy)
    pickler.dump(tree)
  return file.getvalue(), list(pickler.storages.values())


def save_zip(
    path, tree: Any, *, compression=zipfile.ZIP_STORED, byteorder='little',
    data: bytes | None = None, without: tuple[str, ...] = (),
) -> None:
  made, storages = pickled(tree)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('any/data.pkl', made if data is None else data)
    archive.writestr('any/byteorder', byteorder)
    for key, storage in storages:
      if key not in without:
        archive.writestr(f'any/data/{key}', storage.values.tobytes())
    archive.writestr('any/version', '3\n')


def save_legacy(path, tree: Any, *, little_endian: bool = True) -> None:
  made, storages = pickled(tree, legacy=True)
  with open(path, 'wb') as file:
    for value in (
        0x1950A86A20F9469CFC6C, 1001,
        {'protocol_version': 1001, 'little_endian': little_endian},
    ):
      pickle.dump(value, file, 2)
    file.write(made)
    pickle.dump([key for key, _ in storages], file, 2)
    for _, storage in storages:
      file.write(struct.pack('<q', len(storage.values)))
      file.write(storage.values.tobytes())
