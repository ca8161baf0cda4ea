# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What sets of files beside a manifest have in common."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import hashlib
import os
import pathlib
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished file: its size in bytes and its SHA-256 in hexadecimal."""

  size: int
  sha256: str


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
