# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads weight files of other programs, and runs nothing that is in them.

`.safetensors`, and both formats of `torch.save`: zip archives and what came
before them. The pickles in the latter are not given to Python's unpickler: a
small machine follows their instructions, knows the few names that weights
need, and refuses every other name before anything is made of it. Tensors are
read from the file when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import io
import math
import os
import pathlib
import pickletools
import struct
from typing import Any, BinaryIO
import zipfile

import ml_dtypes
import numpy as np
import safetensors

from dd_jax.convert.lazy import LazyArray


class ReadError(ValueError):
  """A file that cannot or must not be read; names it and says why."""


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a file holds.

  Attributes:
    format: 'safetensors', 'torch zip' or 'torch legacy'.
    tree: nested dicts, lists and tuples of plain values, `LazyArray`s and
      `Placeholder`s.
  """

  format: str
  tree: Any


@dataclasses.dataclass(frozen=True)
class Placeholder:
  """Stands for an object of some class, which is never imported."""

  name: str


@dataclasses.dataclass(frozen=True)
class Weights:
  """The tensors of one network in a file.

  Attributes:
    wrapper: keys that lead to them.
    prefix: what stood before every name.
    tensors: by name without the prefix, in the order of the file.
    others: names of what is no tensor there.
  """

  wrapper: tuple[str, ...]
  prefix: str
  tensors: Mapping[str, LazyArray]
  others: tuple[str, ...]


# Where released files keep weights, the best first: averages over training,
# then the last step, then a file that is nothing but weights.
WRAPPERS = (
    ('trainer', 'ema_parameters'), ('trainer', 'var_wo_ddp'), ('ema',),
    ('model',), ('module',), ('state_dict',), (),
)
PREFIXES = ('module.', '_orig_mod.', 'var_wo_ddp.')


def read(path: str | os.PathLike, inert: Collection[str] = ()) -> Contents:
  """Opens a weight file; tensors stay in it until they are asked for.

  Args:
    path: a file of any of the formats; told by its first bytes.
    inert: further 'module.name's that a pickle may hold; they become
      placeholders.

  Raises:
    ReadError: no such file, another format, cut short, inconsistent, or a
      pickle that names what weights do not need.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      head = file.read(16)
      # Eight bytes of length before the text; any of these marks may be there.
      if head[6:9] == b'\0\0{':
        return Contents('safetensors', _read_safetensors(path))
      if head[:4] == b'PK\x03\x04':
        return Contents('torch zip', _read_zip(path, file, size, inert))
      if head[:1] == b'\x80':
        file.seek(0)
        return Contents('torch legacy', _read_legacy(path, file, size, inert))
  except OSError as e:
    raise ReadError(f'{path}: {e.strerror or e}') from e
  if path.suffix == '.safetensors':
    return Contents('safetensors', _read_safetensors(path))
  if head.startswith(b'version https://'):
    raise ReadError(
        f'{path}: a pointer of Git LFS instead of the file; fetch the file'
    )
  raise ReadError(
      f'{path}: neither .safetensors nor made by torch.save (it starts with '
      f'{head[:8]!r})'
  )


def select(
    path: str | os.PathLike, tree: Any, wrapper: Sequence[str] | None = None
) -> Weights:
  """The weights in what `read` gave.

  Args:
    path: for errors.
    tree: `Contents.tree`.
    wrapper: keys that lead to the weights; None takes the first of `WRAPPERS`
      that is there.

  Raises:
    ReadError: no tensors there.
  """
  options = WRAPPERS if wrapper is None else (tuple(wrapper),)
  for keys in options:
    found = _follow(tree, keys)
    if not isinstance(found, Mapping):
      continue
    tensors = {
        k: v for k, v in found.items()
        if isinstance(k, str) and isinstance(v, LazyArray)
    }
    if tensors:
      others = tuple(str(k) for k in found if k not in tensors)
      prefix = ''
      while step := next(
          (p for p in PREFIXES
           if all(k.startswith(prefix + p) for k in tensors)), '',
      ):
        prefix += step
      tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
      total = sum(x.nbytes for x in tensors.values())
      # Several names may share a tensor, but not without end.
      if total > _MAX_EXPANSION * os.path.getsize(path):
        raise ReadError(
            f'{path}: its tensors make {total} bytes, far more than the file '
            'holds'
        )
      return Weights(keys, prefix, tensors, others)
  where = ' or '.join('/'.join(k) or 'the top' for k in options)
  raise ReadError(
      f'{path}: no tensors at {where}; there is {outline(tree)}'
  )


def outline(tree: Any) -> str:
  """The first levels of a file's keys in one line."""
  if not isinstance(tree, Mapping):
    return f'a {type(tree).__name__}'
  parts = []
  for key, value in list(tree.items())[:_OUTLINE]:
    inner = ''
    if isinstance(value, Mapping):
      names = ', '.join(map(str, list(value)[:_OUTLINE]))
      more = ', ...' if len(value) > _OUTLINE else ''
      inner = f' {{{names}{more}}}'
    parts.append(f'{key}{inner}')
  return '; '.join(parts) + ('; ...' if len(tree) > _OUTLINE else '')


_OUTLINE = 6  # keys that are named
_MAX_EXPANSION = 8
_MAX_PICKLE = 1 << 26  # bytes; names and shapes of a network need far less
_MAX_HEADER = 1 << 16


def _follow(tree: Any, keys: Sequence[str]) -> Any:
  for key in keys:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def _read_safetensors(path: pathlib.Path) -> dict[str, LazyArray]:
  try:
    file = safetensors.safe_open(path, 'numpy')
    tree = {}
    for name in file.keys():
      part = file.get_slice(name)
      dtype = _SAFETENSORS_TYPES.get(part.get_dtype())
      if dtype is None:
        raise ReadError(
            f'{path}: {name!r} is of type {part.get_dtype()}, which is not '
            'supported'
        )
      tree[name] = LazyArray(
          tuple(part.get_shape()), np.dtype(dtype),
          lambda name=name: file.get_tensor(name), (name,),
      )
    return tree
  except safetensors.SafetensorError as e:
    raise ReadError(f'{path}: a broken .safetensors file ({e})') from e


def _read_zip(
    path: pathlib.Path, file: BinaryIO, size: int, inert: Collection[str]
) -> Any:
  try:
    entries = zipfile.ZipFile(file).infolist()
  except Exception as e:  # whatever a broken directory leads to
    raise ReadError(f'{path}: cut short or no zip archive ({e})') from e
  members = {}
  for entry in entries:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
      raise ReadError(
          f'{path}: {entry.filename!r} is compressed or encrypted '
          f'({entry.compress_size} bytes that claim to be {entry.file_size}); '
          'torch.save stores plain bytes, so this file is not its work'
      )
    members[entry.filename] = entry
  claimed = sum(entry.file_size for entry in entries)
  if claimed > size:
    raise ReadError(
        f'{path}: cut short or forged: its parts claim {claimed} bytes, the '
        f'file has {size}'
    )
  roots = [n for n in members if n.count('/') == 1 and n.endswith('/data.pkl')]
  if len(roots) != 1:
    raise ReadError(f'{path}: a zip archive, but not one of torch.save')
  root = roots[0].removesuffix('data.pkl')

  def locate(entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a part start."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b'PK\x03\x04':
      raise ReadError(f'{path}: {entry.filename!r} is not where it should be')
    start = entry.header_offset + 30 + sum(struct.unpack('<HH', header[26:]))
    if start + entry.file_size > size:
      raise ReadError(f'{path}: cut short inside {entry.filename!r}')
    return start

  def content(name: str, limit: int) -> bytes:
    entry = members[name]
    if entry.file_size > limit:
      raise ReadError(f'{path}: {name!r} is too large: {entry.file_size} bytes')
    file.seek(locate(entry))
    return file.read(entry.file_size)

  if f'{root}byteorder' in members:
    _check_order(path, content(f'{root}byteorder', 16) == b'little')

  def find(key: str, storage: _Storage) -> int:
    entry = members.get(f'{root}data/{key}')
    if entry is None:
      raise ReadError(f'{path}: there is no data for tensor storage {key!r}')
    if entry.file_size < storage.nbytes:
      raise ReadError(
          f'{path}: tensor storage {key!r} should hold {storage.nbytes} bytes, '
          f'but has {entry.file_size}'
      )
    return locate(entry)

  data = content(f'{root}data.pkl', _MAX_PICKLE)
  return _Machine(path, find, inert, size).run(io.BytesIO(data))


_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001


def _read_legacy(
    path: pathlib.Path, file: BinaryIO, size: int, inert: Collection[str]
) -> Any:
  """The format before torch 1.6: pickles, then the storages one by one."""
  storages: dict[str, list[_Storage]] = {}

  def find(key: str, storage: _Storage) -> None:
    storages.setdefault(key, []).append(storage)

  def run() -> Any:
    return _Machine(path, find, inert, size).run(file)

  if run() != _LEGACY_MAGIC:
    raise ReadError(f'{path}: a pickle, but not one of torch.save')
  version, system = run(), run()
  if version != _LEGACY_VERSION or not isinstance(system, Mapping):
    raise ReadError(f'{path}: version {version!r} of torch.save is not known')
  _check_order(path, system.get('little_endian', True) is True)
  tree = run()
  keys = run()
  if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
    raise ReadError(f'{path}: its list of tensor storages is inconsistent')
  for key in map(str, keys):
    head = file.read(8)
    start = file.tell()
    count = struct.unpack('<q', head)[0] if len(head) == 8 else -1
    end = start + count * storages[key][0].dtype.itemsize
    for storage in storages[key]:
      if end > size or start + storage.nbytes > end:
        raise ReadError(
            f'{path}: cut short, or tensor storage {key!r} is smaller than '
            f'the {storage.nbytes} bytes it should hold'
        )
      storage.start = start
    file.seek(end)
  return tree


def _check_order(path: pathlib.Path, little: bool) -> None:
  if not little:
    raise ReadError(f'{path}: written by a big-endian machine')


@dataclasses.dataclass(eq=False)
class _Storage:
  """A run of values in the file; `start` is known once that was found."""

  dtype: np.dtype
  count: int
  start: int | None = None

  @property
  def nbytes(self) -> int:
    return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Global:
  """A name in a pickle that was allowed."""

  name: str


_MARK = object()


class _Machine:
  """Follows the instructions of a pickle without importing or calling.

  Args:
    path: file, for errors and for reading tensors.
    find: `(key, storage) -> start` of a storage.
    inert: names that become placeholders, beside the known ones.
    size: bytes of the file; no tensor can have more.
  """

  def __init__(
      self, path: pathlib.Path,
      find: Callable[[str, _Storage], int | None],
      inert: Collection[str], size: int,
  ):
    self._path, self._find, self._size = path, find, size
    self._inert = _INERT | set(inert)
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._storages: dict[str, _Storage] = {}

  def run(self, file: BinaryIO) -> Any:
    """The object that one pickle describes; stops behind it."""
    try:
      for opcode, argument, _ in pickletools.genops(_Short(file)):
        self._step(opcode.name, argument)
      return self._stack[-1]
    except ReadError:
      raise
    except Exception as e:  # whatever nonsense a broken pickle leads to
      raise ReadError(
          f'{self._path}: cut short, or the pickle in it is broken '
          f'({type(e).__name__}: {str(e)[:100]})'
      ) from e

  def _step(self, name: str, argument: Any) -> None:
    stack = self._stack
    if name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name in _VALUES:
      stack.append(argument)
    elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
      self._memo[argument] = stack[-1]
    elif name == 'MEMOIZE':
      self._memo[len(self._memo)] = stack[-1]
    elif name in ('BINGET', 'LONG_BINGET', 'GET'):
      stack.append(self._memo[argument])
    elif name == 'MARK':
      stack.append(_MARK)
    elif name == 'POP':
      stack.pop()
    elif name == 'POP_MARK':
      self._to_mark()
    elif name == 'DUP':
      stack.append(stack[-1])
    elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
      count = int(name[-1])
      items = tuple(stack[-count:])
      del stack[-count:]
      stack.append(items)
    elif name in _FROM_MARK:
      stack.append(_FROM_MARK[name](self._to_mark()))
    elif name == 'APPEND':
      item = stack.pop()
      _of(list, stack[-1]).append(item)
    elif name == 'APPENDS':
      items = self._to_mark()
      _of(list, stack[-1]).extend(items)
    elif name == 'ADDITEMS':
      items = self._to_mark()
      _of(set, stack[-1]).update(items)
    elif name == 'SETITEM':
      key, value = stack[-2:]
      del stack[-2:]
      self._fill(stack[-1], [key, value])
    elif name == 'SETITEMS':
      items = self._to_mark()
      self._fill(stack[-1], items)
    elif name == 'GLOBAL':
      stack.append(self._allowed(*argument.split(' ', 1)))
    elif name == 'STACK_GLOBAL':
      module, attribute = stack[-2:]
      del stack[-2:]
      stack.append(self._allowed(_of(str, module), _of(str, attribute)))
    elif name in ('REDUCE', 'NEWOBJ'):
      arguments, called = stack.pop(), stack.pop()
      stack.append(self._call(_of(_Global, called), _of(tuple, arguments)))
    elif name == 'BUILD':  # attributes: of no use here
      stack.pop()
      if not isinstance(stack[-1], dict | Placeholder | LazyArray):
        raise ReadError(
            f'{self._path}: a pickle that changes a {type(stack[-1]).__name__} '
            'is not one of weights'
        )
    elif name == 'BINPERSID':
      stack.append(self._storage(stack.pop()))
    elif name not in ('PROTO', 'FRAME', 'STOP'):
      raise ReadError(
          f'{self._path}: the pickle in it uses {name}, which weights do not '
          'need'
      )

  def _to_mark(self) -> list[Any]:
    position = len(self._stack) - 1
    while self._stack[position] is not _MARK:
      position -= 1
      if position < 0:
        raise ValueError('no mark')
    items = self._stack[position + 1 :]
    del self._stack[position:]
    return items

  def _fill(self, target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, Placeholder):
      return
    keys, values = items[::2], items[1::2]
    _of(dict, target).update(zip(keys, values, strict=True))

  def _allowed(self, module: str, attribute: str) -> Any:
    module = _PYTHON_2.get(module, module)
    name = f'{module}.{attribute}'
    if name in _DTYPES:
      return _DTYPES[name]
    if name not in _CALLS and name not in self._inert:
      raise ReadError(
          f'{self._path}: refused: the pickle in it names {name!r}, which '
          'weights do not need and which could run code. Nothing was run. If '
          f'you know what it is, --inert={name} reads past it without '
          'importing it'
      )
    return _Global(name)

  def _call(self, called: _Global, arguments: tuple[Any, ...]) -> Any:
    rebuild = _CALLS.get(called.name)
    if rebuild is None:
      return Placeholder(called.name)
    return rebuild(self, *arguments)

  def _storage(self, pid: Any) -> _Storage | Any:
    """What stands behind a persistent id, as torch.save writes them."""
    if _of(tuple, pid)[:1] == ('module',):  # legacy: a class with its source
      return pid[1]
    kind, dtype, key, _, count, *view = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise ReadError(f'{self._path}: holds {kind!r}, which is no tensor')
    count, key = _count(count), str(key)
    storage = self._storages.get(key)
    if storage is None or storage.dtype != dtype or storage.count < count:
      storage = _Storage(dtype, count)
      storage.start = self._find(key, storage)
      self._storages[key] = storage
    if view and view[0] is not None:
      raise ReadError(f'{self._path}: views of storages are not supported')
    return storage

  def tensor(
      self, storage: Any, offset: Any, shape: Any, strides: Any,
      dtype: np.dtype | None = None,
  ) -> LazyArray:
    """A tensor of a storage; what it needs is compared with what is there."""
    storage, offset = _of(_Storage, storage), _count(offset)
    shape, strides = (tuple(map(_count, _of(tuple, x))) for x in
                      (shape, strides))
    dtype = dtype or storage.dtype
    available = storage.nbytes // dtype.itemsize
    needed = offset
    if math.prod(shape):
      needed += 1 + sum(
          (n - 1) * s for n, s in zip(shape, strides, strict=True)
      )
    if needed > available:
      raise ReadError(
          f'{self._path}: a tensor of shape {shape} needs {needed} values, but '
          f'its storage has {available}'
      )
    if math.prod(shape) * dtype.itemsize > self._size:
      raise ReadError(
          f'{self._path}: a tensor of shape {shape} would be larger than the '
          'file that holds it'
      )

    def make() -> np.ndarray:
      if not math.prod(shape):
        return np.zeros(shape, dtype)
      start = storage.start + offset * dtype.itemsize
      flat = np.memmap(self._path, dtype, 'r', start, (needed - offset,))
      return np.lib.stride_tricks.as_strided(
          flat.view(np.ndarray), shape, [s * dtype.itemsize for s in strides],
          writeable=False,
      )

    return LazyArray(shape, dtype, make)


class _Short:
  """A file from which nobody asks for more than is sensible at once.

  A few bytes can announce a string of many gigabytes.
  """

  def __init__(self, file: BinaryIO):
    self._file = file
    self.tell = file.tell

  def read(self, count: int) -> bytes:
    return self._file.read(min(count, _MAX_PICKLE))

  def readline(self) -> bytes:
    return self._file.readline(_MAX_HEADER)


def _of(kind: type, value: Any) -> Any:
  if not isinstance(value, kind):
    raise TypeError(f'{type(value).__name__} where {kind.__name__} should be')
  return value


def _count(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or value < 0:
    raise ValueError(f'{value!r} is no size')
  return value


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
  return dict(zip(items[::2], items[1::2], strict=True))


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_SET': set,
    'EMPTY_TUPLE': tuple,
}
_FROM_MARK = {
    'TUPLE': tuple, 'LIST': list, 'DICT': _pairs, 'FROZENSET': frozenset,
}
_VALUES = frozenset({
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT',
    'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES',
    'BINBYTES8', 'SHORT_BINBYTES', 'UNICODE', 'BINUNICODE', 'BINUNICODE8',
    'SHORT_BINUNICODE',
})
_PYTHON_2 = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}

_TORCH_TYPES = {
    'float32': ('float', 'Float', np.float32),
    'float64': ('double', 'Double', np.float64),
    'float16': ('half', 'Half', np.float16),
    'bfloat16': (None, 'BFloat16', ml_dtypes.bfloat16),
    'float8_e4m3fn': (None, None, ml_dtypes.float8_e4m3fn),
    'float8_e5m2': (None, None, ml_dtypes.float8_e5m2),
    'int64': ('long', 'Long', np.int64),
    'int32': ('int', 'Int', np.int32),
    'int16': ('short', 'Short', np.int16),
    'int8': (None, 'Char', np.int8),
    'uint8': (None, 'Byte', np.uint8),
    'bool': (None, 'Bool', np.bool_),
}
_DTYPES: dict[str, np.dtype] = {
    'torch.UntypedStorage': np.dtype(np.uint8),
    'torch.storage.UntypedStorage': np.dtype(np.uint8),
}
for _name, (_alias, _storage_name, _type) in _TORCH_TYPES.items():
  _DTYPES[f'torch.{_name}'] = np.dtype(_type)
  if _alias:
    _DTYPES[f'torch.{_alias}'] = np.dtype(_type)
  if _storage_name:
    for _module in ('torch', 'torch.cuda'):
      _DTYPES[f'{_module}.{_storage_name}Storage'] = np.dtype(_type)

_SAFETENSORS_TYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': ml_dtypes.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}

# What a pickle of weights calls, and what that means here: (machine, *args).
_CALLS: dict[str, Callable[..., Any]] = {
    'collections.OrderedDict': lambda _, *pairs: dict(*pairs),
    'collections.defaultdict': lambda _, *factory: {},
    'builtins.set': lambda _, *items: set(*items),
    'torch.Size': lambda _, shape: tuple(shape),
    'torch._utils._rebuild_tensor':
        lambda m, storage, offset, shape, strides:
            m.tensor(storage, offset, shape, strides),
    'torch._utils._rebuild_tensor_v2':
        lambda m, storage, offset, shape, strides, *_:
            m.tensor(storage, offset, shape, strides),
    'torch._utils._rebuild_tensor_v3':
        lambda m, storage, offset, shape, strides, grad, hooks, dtype, *_:
            m.tensor(storage, offset, shape, strides, _of(np.dtype, dtype)),
    'torch._utils._rebuild_parameter': lambda _, data, *rest: data,
    'torch._utils._rebuild_parameter_with_state': lambda _, data, *rest: data,
}
# Classes whose objects stand beside weights; their contents do not matter.
_INERT = frozenset({
    'argparse.Namespace', 'types.SimpleNamespace', 'torch.device',
    'builtins.dict', 'builtins.list', 'builtins.int', 'builtins.float',
})
