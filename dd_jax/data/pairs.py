# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Noise-to-data pairs on disk: ArrayRecord shards beside a manifest.

A set of pairs is a folder on a local or mounted file system:

    manifest.json                      what the pairs are, hash of each shard
    pairs-00000-of-00002.array_record  pairs [0, shard_size)
    pairs-00001-of-00002.array_record  pairs [shard_size, pairs)

The noise of a pair is not stored: it is a function of `seed` and `pair_id`. A
record is packed and little-endian: pair_id u8, seed u4, label i4, and one u2
code index for each of the `length` tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
import grain
import numpy as np

from dd_jax.data import files, sources
from dd_jax.data.files import Shard

_READ_AS = {  # types that JAX keeps with 64-bit types off
    'pair_id': np.uint32,
    'seed': np.uint32,
    'label': np.int32,
    'indices': np.int32,
}
# Grain wants one record to a group. Codes hardly compress, and what a
# compressor writes depends on its version, which would break byte-identity.
_WRITER_OPTIONS = 'group_size:1,uncompressed'
_IN_MEMORY_BYTES = 2**31  # smaller sets are held in memory by default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(files.Manifest):
  """What a set of pairs is.

  Attributes:
    pairs: number of pairs; pair ids are [0, pairs).
    shard_size: pairs in each shard; the last one may hold fewer.
    length: code indices in a pair.
    vocab_size: indices lie in [0, vocab_size), at most 65,536.
    num_classes: labels lie in [0, num_classes).
    provenance: how the pairs were made, as JSON: hash of the teacher, cfg,
      temperature unless it is 1, top_k, top_p, solver, steps, micro_batch, ...
    shards: the finished files in order; empty until `PairWriter.finalize`.
  """

  KIND, SUFFIX, VERSION = 'pairs', 'array_record', 1

  pairs: int
  shard_size: int
  length: int
  vocab_size: int
  num_classes: int
  provenance: Mapping[str, Any]
  shards: tuple[Shard, ...] = ()

  def __post_init__(self):
    self.check_count()
    for name in ('length', 'num_classes'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be positive: {getattr(self, name)}')
    if not 1 <= self.vocab_size <= 2**16:  # an index is stored as uint16
      raise ValueError(
          f'vocab_size must lie in [1, 65536], got {self.vocab_size}'
      )

  @property
  def dtype(self) -> np.dtype:
    """Layout of one record."""
    return np.dtype(
        [
            ('pair_id', '<u8'),
            ('seed', '<u4'),
            ('label', '<i4'),
            ('indices', '<u2', (self.length,)),
        ]
    )


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
  """Reads the manifest of the set of pairs in the folder `path`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged or its format is newer than this library; the
      message names the file.
  """
  return Manifest.read(_folder(path))


def check_origin(
    path: str | os.PathLike[str], manifest: Manifest, **hashes: str
) -> None:
  """Raises where pairs were made by other networks than these.

  Args:
    path: what to call the set.
    manifest: of the set; what it does not name is not compared.
    hashes: of 'teacher' and 'vae'.

  Raises:
    ValueError: names the network.
  """
  for name, digest in hashes.items():
    made_by = manifest.provenance.get(name, digest)
    if made_by != digest:
      raise ValueError(
          f'the pairs in {path} were made with the {name} {made_by[:12]}, this '
          f'stage has {digest[:12]}: take the one they were made with'
      )


class PairWriter(files.Writer):
  """Writes a set of pairs; see `files.Writer`."""

  def check(self, manifest: Manifest, shard: int) -> None:
    _read_records(self._path, manifest, shard)

  def write(
      self, shard: int, *, seed: int, label: np.ndarray, indices: np.ndarray
  ) -> None:
    """Writes all pairs of one shard, and only then gives the file its name.

    Args:
      shard: which one; its pairs are `Manifest.shard_ids(shard)`, N of them.
      seed: of the noise, in [0, 2**32).
      label: integers (N,) in [0, num_classes).
      indices: integers (N, length) in [0, vocab_size).

    Raises:
      ValueError: wrong shapes or values out of range; nothing is written.
    """
    manifest = self._manifest
    ids = np.asarray(manifest.shard_ids(shard))
    _check_integers('label', label, (len(ids),))
    _check_integers('indices', indices, (len(ids), manifest.length))
    if not 0 <= seed < 2**32:
      raise ValueError(f'seed must lie in [0, 2**32), got {seed}')
    _check_values(self._path, manifest, ids, label, indices)
    records = np.empty(len(ids), manifest.dtype)
    records['pair_id'] = ids
    records['seed'] = seed
    records['label'] = label
    records['indices'] = indices
    with self._written(shard) as part:
      writer = array_record_module.ArrayRecordWriter(
          str(part), _WRITER_OPTIONS
      )
      for record in records:
        writer.write(record.tobytes())
      writer.close()


def describe_records(
    manifest: Manifest,
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and type of each field that `PairSource` gives."""
  return {
      name: ((manifest.length,) if name == 'indices' else (), dtype)
      for name, dtype in _READ_AS.items()
  }


class PairSource:
  """A finished set of pairs as a `sources.BatchSource`.

  Records are `pair_id` uint32, `seed` uint32, `label` int32 and `indices`
  int32 (length,); record `i` is the pair with id `i`.

  Attributes:
    manifest: what the pairs are.
  """

  def __init__(
      self,
      path: str | os.PathLike[str],
      *,
      in_memory: bool | None = None,
      verify: bool = True,
  ):
    """Opens the set of pairs in the folder `path`.

    Args:
      path: folder of the set.
      in_memory: holds all records in memory; None does so below 2 GiB.
      verify: compares every file with its hash in the manifest.

    Raises:
      FileNotFoundError: the manifest or a shard is missing.
      ValueError: the set is not finished, its format is too new, or a shard
        is truncated, changed or holds values out of range; the message names
        the file.
    """
    self._path = _folder(path)
    self.manifest = read_manifest(self._path)
    self.manifest.check_finished(self._path)
    if in_memory is None:
      size = self.manifest.pairs * self.manifest.dtype.itemsize
      in_memory = size < _IN_MEMORY_BYTES
    shards = [
        self.manifest.check_file(self._path, shard, verify=verify)
        for shard in range(self.manifest.num_shards)
    ]
    self._records = self._files = None
    if in_memory:
      self._records = np.empty(self.manifest.pairs, self.manifest.dtype)
      for shard in range(self.manifest.num_shards):
        ids = self.manifest.shard_ids(shard)
        self._records[ids.start : ids.stop] = _read_records(
            self._path, self.manifest, shard
        )
    else:
      self._files = grain.sources.ArrayRecordDataSource(
          [str(file) for file in shards]
      )

  def __len__(self) -> int:
    return self.manifest.pairs

  def __getitem__(self, i: int) -> sources.Record:
    if not 0 <= i < len(self):
      raise IndexError(f'there is no pair {i} of {len(self)}')
    return {name: a[0] for name, a in self.take(np.array([i])).items()}

  def take(self, rows: np.ndarray) -> sources.Batch:
    if self._records is not None:
      records = self._records[rows]
    else:
      # Three times as fast as `__getitems__`, which starts threads each time.
      raw = [self._files[int(row)] for row in rows]
      records = _unpack(self._path, self.manifest, rows, raw)
    return {k: records[k].astype(dtype) for k, dtype in _READ_AS.items()}


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
  return files.local_folder(path, 'ArrayRecord')


def _read_records(
    path: pathlib.Path, manifest: Manifest, shard: int
) -> np.ndarray:
  """Reads and checks all records of a shard."""
  file = path / manifest.shard_name(shard)
  try:
    reader = array_record_module.ArrayRecordReader(str(file))
    raw = reader.read_all()
    reader.close()
  except RuntimeError as e:
    raise ValueError(f'{file} is truncated or damaged: {e}') from e
  ids = np.asarray(manifest.shard_ids(shard))
  if len(raw) != len(ids):
    raise ValueError(f'{file} holds {len(raw)} pairs instead of {len(ids)}')
  return _unpack(path, manifest, ids, raw)


def _unpack(
    path: pathlib.Path, manifest: Manifest, ids: np.ndarray, raw: list[bytes]
) -> np.ndarray:
  """Decodes and checks the records of the pairs `ids`."""
  size = manifest.dtype.itemsize
  for i, record in zip(ids, raw, strict=True):
    if len(record) != size:
      raise ValueError(
          f'{_where(path, manifest, i)} has {len(record)} bytes instead of '
          f'{size}'
      )
  records = np.frombuffer(b''.join(raw), manifest.dtype)
  if (wrong := records['pair_id'] != ids).any():
    first = np.argmax(wrong)
    raise ValueError(
        f'{_where(path, manifest, ids[first])} says that it is pair '
        f'{records["pair_id"][first]}'
    )
  _check_values(path, manifest, ids, records['label'], records['indices'])
  return records


def _check_values(
    path: pathlib.Path,
    manifest: Manifest,
    ids: np.ndarray,
    label: np.ndarray,
    indices: np.ndarray,
) -> None:
  for name, values, bound in (
      ('label', label[:, None], manifest.num_classes),
      ('code', indices, manifest.vocab_size),
  ):
    outside = (values < 0) | (values >= bound)
    if outside.any():
      first = np.argmax(outside.any(axis=1))
      raise ValueError(
          f'{_where(path, manifest, ids[first])} has {name} '
          f'{values[first][outside[first]][0]} outside [0, {bound})'
      )


def _check_integers(
    name: str, values: np.ndarray, shape: tuple[int, ...]
) -> None:
  if values.shape != shape or not np.issubdtype(values.dtype, np.integer):
    raise ValueError(
        f'{name} must hold integers {list(shape)}, got '
        f'{values.dtype}{list(values.shape)}'
    )


def _where(path: pathlib.Path, manifest: Manifest, pair_id: int) -> str:
  name = manifest.shard_name(int(pair_id) // manifest.shard_size)
  return f'{path / name}: pair {pair_id}'
