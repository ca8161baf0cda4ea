# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Follows the instructions of pickles, and runs nothing that is in them.

A small machine stands in the place of Python's unpickler. It knows the few
names that weights need and refuses every other one before anything is made of
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
import dataclasses
import math
import pathlib
import pickletools
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dd_jax.convert.lazy import LazyArray


class ReadError(ValueError):
  """A file that cannot or must not be read; names it and says why."""


@dataclasses.dataclass(frozen=True)
class Placeholder:
  """Stands for an object of some class, which is never imported."""

  name: str


MAX_PICKLE = 1 << 26  # bytes; names and shapes of a network need far less
_MAX_HEADER = 1 << 16
_MAX_RANK, _MAX_SIDE, _MAX_COUNT = 32, 1 << 40, 1 << 60
_MAX_SAID = 100  # characters of a file's own words
_MAX_KEY = 1 << 10  # characters of a name
# Instructions of a pickle: some make objects of hundreds of bytes from one.
_MIN_WORK = 1 << 18
_BYTES_PER_WORK = 256

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# As it stands in the first pickle of such a file.
LEGACY_MARK = LEGACY_MAGIC.to_bytes(10, 'little')
_LEGACY_VERSION = 1001


def read_legacy(
    path: pathlib.Path, file: BinaryIO, size: int, inert: Collection[str]
) -> Any:
  """The format before torch 1.6: pickles, then the storages one by one."""
  storages: dict[str, list[Storage]] = {}

  def find(key: str, storage: Storage) -> None:
    storages.setdefault(key, []).append(storage)

  def run() -> Any:
    return Machine(path, find, inert, size).run(file)

  # Of numbers alone: other objects have their own idea of a comparison.
  magic = run()
  if type(magic) is not int or magic != LEGACY_MAGIC:
    raise ReadError(f'{path}: a pickle, but not one of torch.save')
  version, system = run(), run()
  if type(version) is not int or version != _LEGACY_VERSION or not isinstance(
      system, Mapping):
    raise ReadError(
        f'{path}: version {short(version)} of torch.save is not known'
    )
  check_order(path, system.get('little_endian', True) is True)
  tree = run()
  keys = run()
  if not isinstance(keys, list) or {k for k in keys if isinstance(k, str)} != (
      set(storages)) or len(keys) != len(storages):
    raise ReadError(f'{path}: its list of tensor storages is inconsistent')
  for key in keys:
    head = file.read(8)
    start = file.tell()
    count = struct.unpack('<q', head)[0] if len(head) == 8 else -1
    end = start + count * storages[key][0].dtype.itemsize
    for storage in storages[key]:
      if end > size or start + storage.nbytes > end:
        raise ReadError(
            f'{path}: cut short, or tensor storage {short(key)} is smaller '
            f'than the {storage.nbytes} bytes it should hold'
        )
      storage.start = start
    file.seek(end)
  return tree


def short(value: Any) -> str:
  """A few words on a value, however large it is or deeply nested."""
  if isinstance(value, str | bytes):
    return repr(value[:_MAX_SAID])
  if value is None or isinstance(value, float) or (
      isinstance(value, int) and abs(value) < _MAX_COUNT):
    return repr(value)
  return f'a {type(value).__name__}'


def check_order(path: pathlib.Path, little: bool) -> None:
  if not little:
    raise ReadError(f'{path}: written by a big-endian machine')


@dataclasses.dataclass(eq=False)
class Storage:
  """A run of values in the file; `start` is known once that was found."""

  dtype: np.dtype
  count: int
  start: int | None = None

  @property
  def nbytes(self) -> int:
    return self.count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Global:
  """A name in a pickle that was allowed."""

  name: str


_MARK = object()


class Machine:
  """Follows the instructions of a pickle without importing or calling.

  Subclasses may know more names: `calls` by what they mean, as in `CALLS`, and
  `inert` ones, which become placeholders.

  Args:
    path: file, for errors and for reading tensors.
    find: `(key, storage) -> start` of a storage.
    inert: names that become placeholders, beside the known ones.
    size: bytes of the file; no tensor can have more.
  """

  calls: Mapping[str, Callable[..., Any]]
  inert: Collection[str]

  def __init__(
      self, path: pathlib.Path,
      find: Callable[[str, Storage], int | None],
      inert: Collection[str], size: int,
  ):
    self.path, self._find, self.size = path, find, size
    self._read_past = frozenset(inert)
    self._inert = {*self.inert, *inert}
    self.stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._storages: dict[str, Storage] = {}
    self._work = _MIN_WORK + size // _BYTES_PER_WORK

  def run(self, file: BinaryIO) -> Any:
    """The object that one pickle describes; stops behind it."""
    try:
      for opcode, argument, position in pickletools.genops(_Short(file)):
        self.spend(1)
        self.step(opcode.name, argument, position)
      return self.stack[-1]
    except ReadError:
      raise
    except Exception as e:  # whatever nonsense a broken pickle leads to
      raise ReadError(
          f'{self.path}: cut short, or the pickle in it is broken '
          f'({type(e).__name__}: {short(str(e))})'
      ) from e

  def spend(self, work: int) -> None:
    """Counts instructions, and items that they copy."""
    self._work -= work
    if self._work < 0:
      raise ReadError(
          f'{self.path}: the pickle in it does more than weights of that size '
          'need'
      )

  def step(self, name: str, argument: Any, position: int) -> None:
    """One instruction, which stands at a position of the file."""
    del position
    stack = self.stack
    if name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _EMPTY:
      stack.append(_EMPTY[name]())
    elif name in _VALUES:
      stack.append(argument)
    elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
      self._memo[_count(argument)] = stack[-1]  # as keys are, see `_key`
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
      of(list, stack[-1]).append(item)
    elif name == 'APPENDS':
      items = self._to_mark()
      of(list, stack[-1]).extend(items)
    elif name == 'ADDITEMS':
      items = self._to_mark()
      of(set, stack[-1]).update(map(_key, items))
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
      stack.append(self._allowed(of(str, module), of(str, attribute)))
    elif name in ('REDUCE', 'NEWOBJ'):
      arguments, called = stack.pop(), stack.pop()
      stack.append(self._call(of(Global, called), of(tuple, arguments)))
    elif name == 'BUILD':
      state = stack.pop()
      self._build(stack[-1], state)
    elif name == 'BINPERSID':
      stack.append(self._storage(stack.pop()))
    elif name not in ('PROTO', 'FRAME', 'STOP'):
      raise ReadError(
          f'{self.path}: the pickle in it uses {name}, which weights do not '
          'need'
      )

  def _to_mark(self) -> list[Any]:
    position = len(self.stack) - 1
    while self.stack[position] is not _MARK:
      position -= 1
      if position < 0:
        raise ValueError('no mark')
    items = self.stack[position + 1 :]
    del self.stack[position:]
    return items

  def _fill(self, target: Any, items: Sequence[Any]) -> None:
    if isinstance(target, Placeholder):
      return
    keys, values = items[::2], items[1::2]
    of(dict, target).update(zip(map(_key, keys), values, strict=True))

  def _build(self, target: Any, state: Any) -> None:
    if isinstance(target, np.ndarray):
      self._build_array(target, of(tuple, state))
    elif isinstance(target, np.dtype):
      check_order(self.path, of(tuple, state)[1] != '>')
    elif not isinstance(target, dict | Placeholder | LazyArray):
      raise ReadError(
          f'{self.path}: a pickle that changes a {type(target).__name__} is '
          'not one of weights'
      )
    # Of others it sets attributes, which are of no use here.

  def _build_array(self, target: np.ndarray, state: tuple[Any, ...]) -> None:
    """Fills an array, once: whoever has a view of it must not lose its bytes.
    """
    _, shape, dtype, fortran, data = state
    if not isinstance(dtype, np.dtype):
      raise ReadError(
          f'{self.path}: an array of a type that weights do not have. '
          f'--inert={",".join(f"{m}._reconstruct" for m in NUMPY)} reads past '
          'arrays'
      )
    if target.size:
      raise ValueError('an array that is built twice')
    data = of(bytes, data)
    self.spend(len(data) // _BYTES_PER_WORK)
    # NumPy compares the bytes with the shape.
    target.__setstate__((
        1, tuple(map(_count, of(tuple, shape))), dtype, of(bool, fortran), data
    ))
    target.setflags(write=False)  # the bytes may be another's too

  def _allowed(self, module: str, attribute: str) -> Any:
    module = _PYTHON_2.get(module, module)
    name = f'{module}.{attribute}'
    if name in _DTYPES:
      return _DTYPES[name]
    if name not in self.calls and name not in self._inert:
      hint = (
          f'. If you know what it is, --inert={name} reads past it without '
          'importing it'
      ) if name.replace('.', '_').isidentifier() else ''
      raise ReadError(
          f'{self.path}: refused: the pickle in it names {short(name)}, which '
          'weights do not need and which could run code. Nothing was run'
          f'{hint}'
      )
    return Global(name)

  def _call(self, called: Global, arguments: tuple[Any, ...]) -> Any:
    rebuild = self.calls.get(called.name)
    if rebuild is None or called.name in self._read_past:
      return Placeholder(called.name)
    self.spend(len(arguments))
    for argument in arguments:
      if isinstance(argument, _CONTAINERS):
        self.spend(len(argument))
    return rebuild(self, *arguments)

  def _storage(self, pid: Any) -> Storage | Any:
    """What stands behind a persistent id, as torch.save writes them."""
    if of(tuple, pid)[:1] == ('module',):  # legacy: a class with its source
      return pid[1]
    kind, dtype, key, _, count, *view = pid
    if kind != 'storage' or not isinstance(dtype, np.dtype):
      raise ReadError(
          f'{self.path}: holds {short(kind)}, which is no tensor'
      )
    count, key = _count(count), str(of((str, int), _key(key)))
    storage = self._storages.get(key)
    if storage is None or storage.dtype != dtype or storage.count < count:
      storage = Storage(dtype, count)
      storage.start = self._find(key, storage)
      self._storages[key] = storage
    if view and view[0] is not None:
      raise ReadError(f'{self.path}: views of storages are not supported')
    return storage

  def tensor(
      self, storage: Any, offset: Any, shape: Any, strides: Any,
      dtype: np.dtype | None = None,
  ) -> LazyArray:
    """A tensor of a storage; what it needs is compared with what is there."""
    storage, offset = of(Storage, storage), _count(offset)
    shape, strides = (tuple(map(_count, of(tuple, x))) for x in
                      (shape, strides))
    dtype = dtype or storage.dtype
    if len(shape) > _MAX_RANK or max(shape, default=0) > _MAX_SIDE:
      raise ReadError(f'{self.path}: a tensor of impossible shape')
    available = storage.nbytes // dtype.itemsize
    needed = offset
    if math.prod(shape):
      needed += 1 + sum(
          (n - 1) * s for n, s in zip(shape, strides, strict=True)
      )
    if needed > available:
      raise ReadError(
          f'{self.path}: a tensor of shape {shape} needs {needed} values, but '
          f'its storage has {available}'
      )
    if math.prod(shape) * dtype.itemsize > self.size:
      raise ReadError(
          f'{self.path}: a tensor of shape {shape} would be larger than the '
          'file that holds it'
      )

    def make() -> np.ndarray:
      if not math.prod(shape):
        return np.zeros(shape, dtype)
      start = storage.start + offset * dtype.itemsize
      flat = np.memmap(self.path, dtype, 'r', start, (needed - offset,))
      return np.lib.stride_tricks.as_strided(
          flat.view(np.ndarray), shape,
          # What no step ever takes can be any number.
          [s * dtype.itemsize if n > 1 else 0
           for n, s in zip(shape, strides, strict=True)],
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
    return self._file.read(min(count, MAX_PICKLE))

  def readline(self) -> bytes:
    return self._file.readline(_MAX_HEADER)


def of(kind: type | tuple[type, ...], value: Any) -> Any:
  if not isinstance(value, kind):
    kinds = kind if isinstance(kind, tuple) else (kind,)
    wanted = ' or '.join(k.__name__ for k in kinds)
    raise TypeError(f'{type(value).__name__} where {wanted} should be')
  return value


def _count(value: Any) -> int:
  if not isinstance(value, int) or isinstance(value, bool) or not (
      0 <= value < _MAX_COUNT):
    raise ValueError(f'{short(value)} is no size')
  return value


def _key(value: Any) -> Any:
  """A value that can be hashed, and written down, at no risk.

  Tuples and large numbers can be chosen so that all have the same hash, and
  long texts cost their length each time. Weights have names and small numbers.
  """
  if not isinstance(value, _KEYS):
    raise TypeError(f'a key that is a {type(value).__name__}')
  if isinstance(value, str | bytes) and len(value) > _MAX_KEY:
    raise ValueError(f'a key of {len(value)} characters')
  if isinstance(value, int) and abs(value) >= _MAX_COUNT:
    raise ValueError(f'a key that is {short(value)}')
  return value


def _pairs(items: Sequence[Any]) -> dict[Any, Any]:
  return dict(zip(map(_key, items[::2]), items[1::2], strict=True))


def _dict(_: Machine, pairs: Any = ()) -> dict[Any, Any]:
  if isinstance(pairs, dict):
    return dict(pairs)
  return {_key(k): v for k, v in of(_CONTAINERS, pairs)}


def _set(_: Machine, items: Any = ()) -> set[Any]:
  return set(map(_key, of(_CONTAINERS, items)))


def _array(_: Machine, kind: Any, *__: Any) -> np.ndarray:
  """An array that is to be built."""
  if of(Global, kind).name != 'numpy.ndarray':
    raise ValueError(f'{short(kind.name)} is no kind of array')
  return np.zeros(0)


def _array_type(_: Machine, code: Any, *__: Any) -> np.dtype | Placeholder:
  if isinstance(code, str) and code in _ARRAY_TYPES:
    return np.dtype(code)
  return Placeholder('numpy.dtype')  # of a lone value, perhaps


def _encode(machine: Machine, text: Any, encoding: Any) -> bytes:
  """Bytes, as the second protocol of pickles writes those that are there."""
  if encoding != 'latin1':
    raise ValueError(f'bytes as {short(encoding)}')
  machine.spend(len(of(str, text)) // _BYTES_PER_WORK)
  return text.encode(encoding)


# What calls may go through item by item. Text, bytes and arrays are not: every
# item of theirs would become an object.
_CONTAINERS = (tuple, list, dict, set, frozenset)
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY = {
    'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_SET': set,
    'EMPTY_TUPLE': tuple,
}
_FROM_MARK = {
    'TUPLE': tuple, 'LIST': list, 'DICT': _pairs,
    'FROZENSET': lambda items: frozenset(map(_key, items)),
}
_VALUES = frozenset({
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT',
    'BINFLOAT', 'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES',
    'BINBYTES8', 'SHORT_BINBYTES', 'UNICODE', 'BINUNICODE', 'BINUNICODE8',
    'SHORT_BINUNICODE',
})
_KEYS = (str, bytes, int, float, type(None), np.dtype, Placeholder, Global)
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

_ARRAY_TYPES = frozenset({
    'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1',
})
# The second name is that of NumPy 2.
NUMPY = tuple(f'numpy.{core}.multiarray' for core in ('core', '_core'))

# What a pickle of weights calls, and what that means here: (machine, *args).
CALLS: dict[str, Callable[..., Any]] = {
    'collections.OrderedDict': _dict,
    'collections.defaultdict': lambda _, *factory: {},
    'builtins.set': _set,
    'torch.Size': lambda _, shape: tuple(of(_CONTAINERS, shape)),
    'torch._utils._rebuild_tensor':
        lambda m, storage, offset, shape, strides:
            m.tensor(storage, offset, shape, strides),
    'torch._utils._rebuild_tensor_v2':
        lambda m, storage, offset, shape, strides, *_:
            m.tensor(storage, offset, shape, strides),
    'torch._utils._rebuild_tensor_v3':
        lambda m, storage, offset, shape, strides, grad, hooks, dtype, *_:
            m.tensor(storage, offset, shape, strides, of(np.dtype, dtype)),
    'torch._utils._rebuild_parameter': lambda _, data, *rest: data,
    'torch._utils._rebuild_parameter_with_state': lambda _, data, *rest: data,
    # Statistics, for instance, are saved as they are.
    '_codecs.encode': _encode,
    'builtins.bytes': lambda _: b'',
    'numpy.dtype': _array_type,
    **dict.fromkeys((f'{module}._reconstruct' for module in NUMPY), _array),
}
# Classes whose objects stand beside weights; their contents do not matter.
INERT = frozenset({
    'argparse.Namespace', 'types.SimpleNamespace', 'torch.device',
    'builtins.dict', 'builtins.list', 'builtins.int', 'builtins.float',
    'numpy.ndarray', *(f'{module}.scalar' for module in NUMPY),
})
Machine.calls, Machine.inert = CALLS, INERT
