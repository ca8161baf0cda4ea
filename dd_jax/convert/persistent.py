# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads pickled networks that bring the source of their classes with them.

So do the files of StyleGAN and EDM: a network is a call that, when unpickled,
executes the source and fills an object of its class. Here the source is never
looked at. What is kept of an object is its attributes, of which the tensors are
found by the names that PyTorch's modules give them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
import pathlib
from typing import Any, BinaryIO

from dd_jax.convert import pickles
from dd_jax.convert.lazy import LazyArray
from dd_jax.convert.pickles import ReadError


def read(
    path: pathlib.Path, file: BinaryIO, size: int, inert: Collection[str]
) -> Any:
  """What a pickle holds, networks as dicts of tensors by dotted name.

  Args:
    path: for errors and for reading tensors.
    file: the same file, at the start of the pickle.
    size: bytes of the file.
    inert: further names that the pickle may hold; they become placeholders.

  Raises:
    ReadError: no network there, or a name that networks do not need.
  """
  tree = _Machine(path, _nowhere, inert, size).run(file)
  if isinstance(tree, _Module):
    return _tensors(path, tree)
  found = tree.values() if isinstance(tree, Mapping) else ()
  if not any(isinstance(value, _Module) for value in found):
    raise ReadError(
        f'{path}: a pickle, but not one of torch.save, nor one of networks'
    )
  return {
      key: _tensors(path, value) if isinstance(value, _Module) else value
      for key, value in tree.items()
  }


@dataclasses.dataclass(eq=False)
class _Module:
  """An object of some class, by its attributes."""

  name: str
  state: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Bytes:
  """Where bytes stand in the file."""

  start: int
  count: int


class _Machine(pickles.Machine):
  """Knows networks, and tensors whose storages are files within the file."""

  def __init__(self, *args: Any):
    super().__init__(*args)
    self._inner: dict[_Bytes, pickles.Storage] = {}

  def step(self, name: str, argument: Any, position: int) -> None:
    if name in _LENGTHS:
      start = position + 1 + _LENGTHS[name]
      self.stack.append(_Bytes(start, len(argument)))
    elif name == 'BUILD' and isinstance(self.stack[-2], _Module):
      self.stack[-2].state = pickles.of(dict, self.stack[-1])
      self.stack.pop()
    else:
      super().step(name, argument, position)

  def network(self, meta: Any) -> _Module:
    """The object that a call would make, its source left alone."""
    meta = pickles.of(dict, meta)
    if meta.get('type') != 'class':
      raise ReadError(
          f'{self.path}: holds a pickled {pickles.short(meta.get("type"))}'
      )
    name = pickles.of(str, meta['class_name'])
    return _Module(name, pickles.of(dict, meta['state']))

  def storage(self, where: Any) -> pickles.Storage:
    """A storage that torch.save wrote into the bytes of this file."""
    where = pickles.of(_Bytes, where)
    if where not in self._inner:
      with self.path.open('rb') as file:
        file.seek(where.start)
        self._inner[where] = pickles.of(pickles.Storage, pickles.read_legacy(
            self.path, file, where.start + where.count, ()
        ))
    return self._inner[where]


def _nowhere(key: str, storage: pickles.Storage) -> int:
  raise ValueError(f'a storage {key!r} outside of the pickle')


def _tensors(path: pathlib.Path, root: _Module) -> dict[str, LazyArray]:
  """Parameters and buffers of a network by dotted name."""
  made: dict[str, LazyArray] = {}
  left = [('', root)]
  visits = entries = 0
  while left:
    prefix, module = left.pop()
    visits += 1
    entries += len(module.state)
    # Objects may hold each other in a circle, or one another many times over.
    if (visits > _MAX_MODULES or entries > _MAX_ENTRIES
        or prefix.count('.') > _MAX_DEPTH or len(prefix) > _MAX_NAME
        or len(made) > _MAX_TENSORS):
      raise ReadError(f'{path}: the modules in it are nested without end')
    inner = []
    for field in ('_parameters', '_buffers', '_modules'):
      items = module.state.get(field, {})
      if not isinstance(items, Mapping):
        raise ReadError(
            f'{path}: {field} of {pickles.short(prefix or "the network")} is '
            'no dict'
        )
      entries += len(items)
      for key, value in items.items():
        name = f'{prefix}{key}'
        if isinstance(value, LazyArray):
          made[name] = value
        elif isinstance(value, _Module):
          inner.append((f'{name}.', value))
        elif value is not None:
          raise ReadError(
              f'{path}: {pickles.short(name)} is a {type(value).__name__}, '
              'neither a tensor nor a module'
          )
    left += reversed(inner)
  return made


_MAX_MODULES = 1 << 14
_MAX_ENTRIES = 1 << 20  # of all of them, however often they are visited
_MAX_DEPTH = 32
_MAX_NAME = 1 << 10
_MAX_TENSORS = 1 << 16
# Bytes of the length that stands between an instruction and its bytes.
_LENGTHS = {'SHORT_BINBYTES': 1, 'BINBYTES': 4, 'BINBYTES8': 8}

_Machine.calls = pickles.CALLS | {
    'torch_utils.persistence._reconstruct_persistent_obj': _Machine.network,
    'torch.storage._load_from_bytes': _Machine.storage,
    'dnnlib.util.EasyDict': pickles.CALLS['collections.OrderedDict'],
    **{
        f'torch.nn.modules.container.{name}':
            lambda _, *arguments, name=name: _Module(name, {})
        for name in ('ModuleDict', 'ModuleList', 'Sequential')
    },
    # Arrays stand beside the weights; their bytes stay where they are.
    **{
        name: lambda _, *__, name=name: pickles.Placeholder(name)
        for name in (
            'numpy.dtype',
            *(f'{module}._reconstruct' for module in pickles.NUMPY),
        )
    },
}
_Machine.inert = pickles.INERT | {'torch.nn.parameter.Parameter'}
