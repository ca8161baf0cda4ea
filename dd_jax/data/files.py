# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What sets of files beside a manifest have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any, ClassVar, Self
import uuid

MANIFEST = 'manifest.json'


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished file: its size in bytes and its SHA-256 in hexadecimal."""

  size: int
  sha256: str


class Manifest:
  """What a set is; subclasses are dataclasses with its fields.

  Among them are the number of records, under the name `KIND`, `shard_size`,
  `provenance` and `shards`, which is empty until the set is finished.

  Attributes:
    KIND: what records are called, 'pairs' for instance.
    SUFFIX: of the files.
    VERSION: of the format; readers refuse newer ones.
  """

  KIND: ClassVar[str]
  SUFFIX: ClassVar[str]
  VERSION: ClassVar[int]

  @classmethod
  def read(cls, folder: pathlib.Path) -> Self:
    """Reads the manifest in a folder.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged or its format is newer than this library; the
        message names the file.
    """
    file = folder / MANIFEST
    if not file.exists():
      raise FileNotFoundError(
          f'{file} is missing: this is no set of {cls.KIND}'
      )
    try:
      fields = json.loads(file.read_text())
      version = fields.pop('format_version')
      if version <= cls.VERSION:
        fields['shards'] = tuple(Shard(**shard) for shard in fields['shards'])
        return cls(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      raise ValueError(f'{file} is damaged: {e!r}') from e
    raise ValueError(
        f'{file} has format {version}, newer than format {cls.VERSION} of '
        'this library: upgrade dd_jax'
    )

  def check_count(self) -> None:
    """Raises ValueError for impossible numbers of records or shards."""
    if not 1 <= self.count <= 2**32:  # readers hand ids on as uint32
      raise ValueError(f'{self.KIND} must lie in [1, 2**32], got {self.count}')
    if self.shard_size < 1:
      raise ValueError(f'shard_size must be positive: {self.shard_size}')
    if len(self.shards) not in (0, self.num_shards):
      raise ValueError(
          f'{len(self.shards)} shards are recorded of {self.num_shards}'
      )

  @property
  def count(self) -> int:
    """Number of records; their ids are [0, count)."""
    return getattr(self, self.KIND)

  @property
  def num_shards(self) -> int:
    return -(-self.count // self.shard_size)

  @property
  def sha256(self) -> str:
    """Of all that is known of the set."""
    return hashlib.sha256(self.to_json().encode()).hexdigest()

  def shard_name(self, shard: int) -> str:
    return f'{self.KIND}-{shard:05d}-of-{self.num_shards:05d}.{self.SUFFIX}'

  def shard_ids(self, shard: int) -> range:
    """Returns the ids of the records that belong to `shard`."""
    if not 0 <= shard < self.num_shards:
      raise ValueError(f'there is no shard {shard} of {self.num_shards}')
    start = shard * self.shard_size
    return range(start, min(start + self.shard_size, self.count))

  def to_json(self) -> str:
    fields = {'format_version': self.VERSION, **dataclasses.asdict(self)}
    return json.dumps(fields, indent=2, allow_nan=False) + '\n'

  def flat_fields(self) -> dict[str, Any]:
    """Fields as JSON knows them, those of `provenance` by dotted name."""
    fields = json.loads(self.to_json())
    del fields['shards']
    provenance = fields.pop('provenance')
    return fields | {f'provenance.{k}': v for k, v in provenance.items()}

  def check_file(
      self, folder: pathlib.Path, shard: int, *, verify: bool = True
  ) -> pathlib.Path:
    """Returns the file of a shard if it is there and as `shards` has it.

    Raises:
      FileNotFoundError: it is missing.
      ValueError: it is truncated or changed.
    """
    expected = self.shards[shard] if self.shards else None
    return check_file(folder / self.shard_name(shard), expected, verify=verify)

  def check_finished(self, folder: pathlib.Path) -> None:
    """Raises ValueError for a set without its last step."""
    if not self.shards:
      raise ValueError(
          f'{folder / MANIFEST} is of an unfinished set: run the stage that '
          f'makes the {self.KIND} again'
      )


class Writer:
  """Writes a set shard by shard, in any order and over many runs.

  A shard is there in full or not at all, and the same records give the same
  bytes. Processes may share the folder if each writes shards of its own; one
  of them then calls `finalize`. Subclasses write shards and read them back.
  """

  def __init__(self, path: str | os.PathLike[str], manifest: Manifest):
    """Starts a set, or goes on with one.

    Args:
      path: folder of the set, made if missing.
      manifest: what the records are, without `shards`.

    Raises:
      ValueError: the folder is no local or mounted one, or it holds records of
        another kind; the message names the fields that differ.
    """
    self._path = local_folder(path, f'a set of {manifest.KIND}')
    self._manifest = dataclasses.replace(manifest, shards=())
    self._path.mkdir(parents=True, exist_ok=True)
    file = self._path / MANIFEST
    if file.exists():
      check_same(
          file, manifest.read(self._path).flat_fields(),
          self._manifest.flat_fields(), manifest.KIND,
      )
    else:
      self._write_manifest(self._manifest)

  def check(self, manifest: Manifest, shard: int) -> None:
    """Raises ValueError unless the file of a shard holds what it should."""
    raise TypeError(f'{type(self).__name__} cannot read its shards')

  def pending(self) -> list[int]:
    """Returns the shards that are missing or damaged, in order.

    In a finished set it also compares the hashes.
    """
    manifest = self._manifest.read(self._path)
    shards = []
    for shard in range(manifest.num_shards):
      try:
        manifest.check_file(self._path, shard)
        self.check(manifest, shard)
      except (FileNotFoundError, ValueError):
        shards.append(shard)
    return shards

  def finalize(self) -> Manifest:
    """Records the hashes of all shards, which completes the set.

    Returns:
      The manifest as written.

    Raises:
      FileNotFoundError: a shard is missing.
      ValueError: a shard is damaged; the message names the file.
    """
    shards = []
    for shard in range(self._manifest.num_shards):
      file = self._manifest.check_file(self._path, shard)
      self.check(self._manifest, shard)
      shards.append(Shard(file.stat().st_size, sha256(file)))
    manifest = dataclasses.replace(self._manifest, shards=tuple(shards))
    self._write_manifest(manifest)
    return manifest

  @contextlib.contextmanager
  def _written(self, shard: int) -> Iterator[pathlib.Path]:
    """Where to write a shard, which then gets its name.

    Raises:
      OSError: writing failed, in whatever library it did.
    """
    file = self._path / self._manifest.shard_name(shard)
    # The name is fixed, so that the next attempt writes over a killed one.
    part = file.with_name(f'{file.name}.part')
    try:
      yield part
      publish(part, file)
    except Exception as e:
      raise OSError(
          f'{file} could not be written ({type(e).__name__}: {e}); is the '
          'disk full? Those before it are whole: free space and run the same '
          'command again'
      ) from e

  def _write_manifest(self, manifest: Manifest) -> None:
    # Processes that start together may all come here, with the same text.
    part = self._path / f'{MANIFEST}.{uuid.uuid4().hex}.part'
    part.write_text(manifest.to_json())
    publish(part, self._path / MANIFEST)


def local_folder(path: str | os.PathLike[str], reader: str) -> pathlib.Path:
  """A folder on a local or mounted file system.

  Raises:
    ValueError: an address; the message says that `reader` cannot take it.
  """
  if '://' in os.fspath(path):
    raise ValueError(
        f'{os.fspath(path)}: {reader} needs a local or mounted file system'
    )
  return pathlib.Path(path)


def sha256(file: pathlib.Path) -> str:
  """SHA-256 of a file's bytes, in hexadecimal."""
  with file.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def publish(part: pathlib.Path, file: pathlib.Path) -> None:
  """Renames a finished file after its bytes have reached the disk."""
  with part.open('rb') as f:
    os.fsync(f.fileno())
  part.replace(file)


def check_file(
    file: pathlib.Path, expected: Shard | None, *, verify: bool = True
) -> pathlib.Path:
  """Returns a file if it is there and as expected.

  Args:
    file: path of it.
    expected: what is recorded of it; None where nothing is.
    verify: compares the hash too, which reads the file.

  Raises:
    FileNotFoundError: it is missing.
    ValueError: it is truncated or changed.
  """
  if not file.exists():
    raise FileNotFoundError(f'{file} is missing')
  if expected is None:
    return file
  size = file.stat().st_size
  if size != expected.size:
    raise ValueError(
        f'{file} has {size} bytes instead of {expected.size}: it is truncated '
        'or not the file that was written'
    )
  if verify and (found := sha256(file)) != expected.sha256:
    raise ValueError(
        f'{file} was changed: its SHA-256 is {found}, the manifest says '
        f'{expected.sha256}'
    )
  return file


def check_same(
    file: pathlib.Path, stored: Mapping[str, Any], wanted: Mapping[str, Any],
    what: str,
) -> None:
  """Compares the fields of two manifests.

  Raises:
    ValueError: they differ; names the file and every field that does.
  """
  differing = [
      f'{name} is {stored.get(name)!r} there and {wanted.get(name)!r} here'
      for name in sorted(stored.keys() | wanted.keys())
      if stored.get(name) != wanted.get(name)
  ]
  if differing:
    raise ValueError(
        f'{file} is of other {what}: {"; ".join(differing)}. Write to another '
        'folder, or delete this one'
    )
