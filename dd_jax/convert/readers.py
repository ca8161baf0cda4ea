# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads weight files of other programs, and runs nothing that is in them.

`.safetensors`, both formats of `torch.save` (zip archives and what came before
them), and the pickled networks of EDM. Tensors are read from the file when they
are asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import io
import json
import os
import pathlib
import struct
from typing import Any, BinaryIO
import zipfile

import ml_dtypes
import numpy as np
import safetensors

from dd_jax.convert import persistent, pickles
from dd_jax.convert.lazy import LazyArray
from dd_jax.convert.pickles import ReadError


@dataclasses.dataclass(frozen=True)
class Contents:
  """What a file holds.

  Attributes:
    format: 'safetensors', 'torch zip', 'torch legacy' or 'persistent pickle'.
    tree: nested dicts, lists and tuples of plain values, `LazyArray`s, arrays
      and `pickles.Placeholder`s.
  """

  format: str
  tree: Any


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
      head = file.read(32)
      # Eight bytes of length before the text; any of these marks may be there.
      if head[6:9] == b'\0\0{':
        return Contents('safetensors', _read_safetensors(path, head, size))
      if head[:4] == b'PK\x03\x04':
        return Contents('torch zip', _read_zip(path, file, size, inert))
      if head[:1] == b'\x80':
        file.seek(0)
        if pickles.LEGACY_MARK in head:
          tree = pickles.read_legacy(path, file, size, inert)
          return Contents('torch legacy', tree)
        tree = persistent.read(path, file, size, inert)
        return Contents('persistent pickle', tree)
  except ReadError:
    raise
  except (OSError, ValueError) as e:  # ValueError: an impossible path
    raise ReadError(f'{path}: {getattr(e, "strerror", None) or e}') from e
  if path.suffix == '.safetensors':
    return Contents('safetensors', _read_safetensors(path, head, size))
  if head.startswith(b'version https://'):
    raise ReadError(
        f'{path}: a pointer of Git LFS instead of the file; fetch the file'
    )
  raise ReadError(
      f'{path}: neither .safetensors nor made by torch.save (it starts with '
      f'{head[:8]!r})'
  )


def expand(
    paths: Sequence[str | os.PathLike],
) -> tuple[str | os.PathLike, ...]:
  """Files in the place of the indices that name them.

  Args:
    paths: files; those that end with `.index.json` list, as Hugging Face has
      it, the files beside them that together hold a network.

  Raises:
    ReadError: an index that cannot be read.
  """
  files: list[str | os.PathLike] = []
  for given in paths:
    path = pathlib.Path(given)
    if not path.name.endswith('.index.json'):
      files.append(given)
      continue
    try:
      names = set(json.loads(path.read_text())['weight_map'].values())
      files += [path.parent / pathlib.PurePath(n).name for n in sorted(names)]
    except OSError as e:
      raise ReadError(f'{path}: {e.strerror or e}') from e
    except (AttributeError, KeyError, RecursionError, TypeError,
            ValueError) as e:
      raise ReadError(
          f'{path}: not an index of weight files ({_plain(str(e))})'
      ) from e
  return tuple(files)


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
      if max(map(len, tensors)) > _MAX_NAME:
        raise ReadError(f'{path}: a tensor has an endless name')
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
      names = ', '.join(map(_plain, list(value)[:_OUTLINE]))
      more = ', ...' if len(value) > _OUTLINE else ''
      inner = f' {{{names}{more}}}'
    parts.append(f'{_plain(key)}{inner}')
  return '; '.join(parts) + ('; ...' if len(tree) > _OUTLINE else '')


def _plain(key: Any) -> str:
  """A key as it can be printed."""
  text = pickles.short(key)
  return text[1:-1] if isinstance(key, str) else text


_OUTLINE = 6  # keys that are named
_MAX_EXPANSION = 8
_MAX_NAME = 1 << 10
# Bytes that name and describe tensors; a few of them take a kilobyte here.
_MIN_HEADER, _BYTES_PER_HEADER = 1 << 22, 64


def _follow(tree: Any, keys: Sequence[str]) -> Any:
  for key in keys:
    if not isinstance(tree, Mapping) or key not in tree:
      return None
    tree = tree[key]
  return tree


def _read_safetensors(
    path: pathlib.Path, head: bytes, size: int
) -> dict[str, LazyArray]:
  header = int.from_bytes(head[:8], 'little')
  if not 0 < header <= min(size - 8, _MIN_HEADER + size // _BYTES_PER_HEADER):
    raise ReadError(
        f'{path}: a broken .safetensors file (its header claims {header} '
        f'bytes of {size})'
    )
  try:
    file = safetensors.safe_open(path, 'numpy')
    tree = {}
    for name in file.keys():
      part = file.get_slice(name)
      dtype = _SAFETENSORS_TYPES.get(part.get_dtype())
      if dtype is None:
        raise ReadError(
            f'{path}: {pickles.short(name)} is of type {part.get_dtype()}, '
            'which is not supported'
        )
      tree[name] = LazyArray(
          tuple(part.get_shape()), np.dtype(dtype),
          lambda name=name: file.get_tensor(name), (name,),
      )
    return tree
  except safetensors.SafetensorError as e:
    raise ReadError(
        f'{path}: a broken .safetensors file ({_plain(str(e))})'
    ) from e


def _read_zip(
    path: pathlib.Path, file: BinaryIO, size: int, inert: Collection[str]
) -> Any:
  try:
    entries = zipfile.ZipFile(file).infolist()
  except Exception as e:  # whatever a broken directory leads to
    raise ReadError(
        f'{path}: cut short or no zip archive ({_plain(str(e))})'
    ) from e
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
    pickles.check_order(path, content(f'{root}byteorder', 16) == b'little')

  def find(key: str, storage: pickles.Storage) -> int:
    entry = members.get(f'{root}data/{key}')
    if entry is None:
      raise ReadError(
          f'{path}: there is no data for tensor storage {pickles.short(key)}'
      )
    if entry.file_size < storage.nbytes:
      raise ReadError(
          f'{path}: tensor storage {pickles.short(key)} should hold '
          f'{storage.nbytes} bytes, but has {entry.file_size}'
      )
    return locate(entry)

  data = content(f'{root}data.pkl', pickles.MAX_PICKLE)
  return pickles.Machine(path, find, inert, size).run(io.BytesIO(data))


_SAFETENSORS_TYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': ml_dtypes.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}
