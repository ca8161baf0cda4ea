# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Your own images: a folder of each class, or lines of JSON."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent import futures
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

from absl import logging
import numpy as np
from PIL import Image, ImageOps

from dd_jax.data import sources

SUFFIXES = ('.png', '.jpg', '.jpeg')
_MODES = {1: 'L', 3: 'RGB'}  # by number of channels
_HELDOUT = 5  # one image in so many of a class
_IN_MEMORY_BYTES = 2**31  # smaller sets are kept once they are decoded
_THREADS = 16  # at most; Pillow decodes and resizes without the lock


class ImageSource:
  """Labelled images that are decoded when they are read; a `BatchSource`.

  Records are `image` float32 (size, size, channels) in [-1, 1] and `label`
  int32.

  Attributes:
    num_classes: labels lie in [0, num_classes).
  """

  def __init__(
      self,
      read: Callable[[int], tuple[Image.Image, int]],
      length: int,
      *,
      size: int,
      channels: int,
      num_classes: int,
      in_memory: bool | None = None,
  ):
    """Decodes nothing.

    Args:
      read: image, of any size and mode, and label of a row; raises where it
        is broken.
      length: number of rows.
      size: side of the square to which images are resized and cut.
      channels: 3 for RGB, 1 for gray.
      num_classes: see above.
      in_memory: keeps what was decoded, a byte a pixel; None does so where all
        images together have less than 2 GiB.

    Raises:
      ValueError: a size or a number of channels that cannot be.
    """
    if channels not in _MODES:
      raise ValueError(f'channels={channels}: use 1 (gray) or 3 (RGB)')
    if size < 1:
      raise ValueError(f'size={size} must be at least 1')
    self.num_classes = num_classes
    self._read, self._size, self._channels = read, size, channels
    shape = (length, size, size, channels)
    if in_memory is None:
      in_memory = np.prod(shape, dtype=np.int64) < _IN_MEMORY_BYTES
    # Memory that is not written to is not taken.
    self._pixels = np.empty(shape, np.uint8) if in_memory else None
    self._labels = np.full(length, -1, np.int32)

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, i: int) -> sources.Record:
    if not 0 <= i < len(self):
      raise IndexError(f'there is no image {i} of {len(self)}')
    pixels, label = self._get(i)
    return {'image': _scale(pixels), 'label': np.int32(label)}

  def take(self, rows: np.ndarray) -> sources.Batch:
    pixels, labels = zip(
        *_pool().map(self._get, np.asarray(rows).tolist()), strict=True
    )
    return {
        'image': _scale(np.stack(pixels)), 'label': np.asarray(labels, np.int32)
    }

  @functools.cached_property
  def arrays(self) -> sources.Batch:
    """All records, float32: for sets that fit in memory."""
    return self.take(np.arange(len(self)))

  def _get(self, i: int) -> tuple[np.ndarray, int]:
    if self._pixels is not None and self._labels[i] >= 0:
      return self._pixels[i], self._labels[i]
    image, label = self._read(i)
    if not 0 <= label < self.num_classes:
      raise ValueError(
          f'image {i} has label {label} outside [0, {self.num_classes})'
      )
    pixels = fit(image, self._size, self._channels)
    if self._pixels is not None:
      self._pixels[i] = pixels
      self._labels[i] = label  # last: another thread may be reading
    return pixels, label


class FolderSource(ImageSource):
  """A folder with a sub-folder of PNG or JPEG files for each class.

  Classes are the names of the sub-folders in alphabetical order, or in the
  order of numbers where all of them are numbers. In each class one file in
  five is held out, chosen by a hash of the names, so that a file stays on its
  side, but for a few, when others are added.

  Attributes:
    classes: names of the classes; a label is a position in it.
    files: path of each record.
  """

  def __init__(
      self,
      path: str | os.PathLike[str],
      split: str,
      *,
      size: int,
      channels: int = 3,
      num_classes: int | None = None,
      in_memory: bool | None = None,
  ):
    """Lists the files and opens none; warns of what will not be read.

    Args:
      path: the folder.
      split: 'train', 'heldout' or 'all', which holds nothing out.
      size: see `ImageSource`; so are `channels` and `in_memory`.
      num_classes: how many sub-folders there must be; None takes any number.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: a class without images, no classes, another number of them
        than `num_classes`, or nothing to hold out; reading raises it for a
        file that is not an image. The message names the folder or file.
    """
    root = pathlib.Path(path)
    if not root.is_dir():
      raise FileNotFoundError(f'{root} is no folder of images')
    folders = {
        f.name: f for f in root.iterdir()
        if f.is_dir() and not f.name.startswith('.')
    }
    self.classes = tuple(sorted_names(folders))
    if not self.classes:
      raise ValueError(
          f'{root} has no sub-folders: put the images of each class into a '
          'folder of its own'
      )
    _check_count(root, self.classes, num_classes)
    files, labels, others = [], [], []
    for label, name in enumerate(self.classes):
      found = []
      for file in sorted(folders[name].iterdir()):
        if not file.name.startswith('.'):
          known = file.suffix.lower() in SUFFIXES
          (found if known else others).append(file)
      if not found:
        raise ValueError(
            f'{folders[name]} holds no image ({", ".join(SUFFIXES)}): add '
            'some, or remove the folder'
        )
      files += found
      labels += [label] * len(found)
    if others:
      inner = sum(f.is_dir() for f in others)
      _warn(
          f'{root}: {len(others) - inner} file(s) and {inner} folder(s) in its '
          f'classes are not read, such as {others[0].relative_to(root)}; an '
          f'image ends in {", ".join(SUFFIXES)} and lies right in the folder '
          'of its class'
      )
    rows = split_rows(
        [f.relative_to(root).as_posix() for f in files], labels, split, root
    )
    self.files = [files[i] for i in rows]
    super().__init__(
        functools.partial(_read_nth, self.files, np.asarray(labels)[rows]),
        len(rows), size=size, channels=channels,
        num_classes=len(self.classes), in_memory=in_memory,
    )


class JsonlSource(ImageSource):
  """Lines of JSON, each with an image file and its label.

      {"image": "photos/0001.jpg", "label": "rose"}

  Paths are relative to the folder of the file. Labels are integers from 0, or
  names, which are numbered as `FolderSource` does. Other fields are not read.
  The split is that of `FolderSource`.

  Attributes:
    files: path of each record.
  """

  def __init__(
      self,
      path: str | os.PathLike[str],
      split: str,
      *,
      size: int,
      channels: int = 3,
      num_classes: int | None = None,
      in_memory: bool | None = None,
  ):
    """Reads the lines and opens no image.

    Args:
      path: the file of lines.
      split: 'train', 'heldout' or 'all', which holds nothing out.
      size: see `ImageSource`; so are `channels` and `in_memory`.
      num_classes: integer labels lie in [0, num_classes), and names must be
        so many; None takes what there is.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that is not as above, named by its number, labels
        of both kinds, another number of classes, or nothing to hold out;
        reading raises it for a file that is not an image.
    """
    file = pathlib.Path(path)
    if not file.is_file():
      raise FileNotFoundError(f'{file} does not exist')
    names, labels = [], []
    number = 0
    try:
      with file.open(encoding='utf-8') as lines:
        for number, line in enumerate(lines, 1):
          if line.strip():
            name, label = _parse_line(f'{file}:{number}', line, num_classes)
            names.append(name)
            labels.append(label)
    except UnicodeDecodeError as e:
      raise ValueError(f'{file}:{number + 1}: not UTF-8 text ({e})') from e
    if not names:
      raise ValueError(f'{file} holds no lines')
    if len({type(label) for label in labels}) > 1:
      raise ValueError(f'{file}: labels are names in some lines and integers '
                       'in others; use one kind')
    if isinstance(labels[0], str):
      classes = sorted_names(set(labels))
      _check_count(file, classes, num_classes)
      number_of = {name: i for i, name in enumerate(classes)}
      labels = [number_of[label] for label in labels]
    num_classes = num_classes or max(labels) + 1
    rows = split_rows(names, labels, split, file)
    self.files = [file.parent / names[i] for i in rows]
    super().__init__(
        functools.partial(_read_nth, self.files, np.asarray(labels)[rows]),
        len(rows), size=size, channels=channels, num_classes=num_classes,
        in_memory=in_memory,
    )


def describe_records(
    *, size: int, channels: int = 3, **_: Any
) -> dict[str, tuple[tuple[int, ...], Any]]:
  """Shape and type of each field of a source of images, by its arguments."""
  return {
      'image': ((size, size, channels), np.float32), 'label': ((), np.int32),
  }


def read(file: Any, name: str) -> Image.Image:
  """The image in a file, decoded.

  Args:
    file: path or file object.
    name: what to call it in errors.

  Raises:
    ValueError: it cannot be read, or has more than 8 bits a channel.
  """
  try:
    with Image.open(file) as image:
      image.load()
  except Exception as e:  # decoders raise anything on broken bytes
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise ValueError(
        f'{name}: not an image that can be read ({reason}); remove or replace '
        'it'
    ) from e
  if image.mode.startswith(('I', 'F')):
    raise ValueError(
        f'{name}: more than 8 bits a channel (mode {image.mode}); convert it '
        'to 8 bits'
    )
  return image


def fit(image: Image.Image, size: int, channels: int) -> np.ndarray:
  """Turns upright, resizes the shorter side, and cuts out the middle.

  Args:
    image: of any size, 8 bits a channel; transparent parts become white.
    size: side of the result.
    channels: 1 or 3.

  Returns:
    uint8 (size, size, channels).
  """
  image = ImageOps.exif_transpose(image)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  image = image.convert(_MODES[channels])
  image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
  return np.asarray(image).reshape(size, size, channels)


def split_rows(
    names: Sequence[str], labels: Sequence[int], split: str, where: Any
) -> np.ndarray:
  """Rows of one side of the fixed split, in order.

  Of the n records of a class the n // 5 whose names have the smallest hashes
  are held out, so that every class is in both splits where it can be.

  Args:
    names: of the records; decides alone who is held out.
    labels: class of each.
    split: 'train', 'heldout' or 'all'.
    where: file or folder, for messages.

  Raises:
    ValueError: unknown split, or nothing is held out.
  """
  if split == 'all':
    return np.arange(len(labels))
  if split not in sources.SPLITS:
    raise ValueError(
        f"split must be one of {(*sources.SPLITS, 'all')}, got {split!r}"
    )
  labels = np.asarray(labels)
  hashes = np.array([hashlib.sha256(n.encode()).hexdigest() for n in names])
  held = np.zeros(len(labels), bool)
  # By hash, then, in a stable sort, by class: ranks within each class.
  order = np.argsort(hashes, kind='stable')
  order = order[np.argsort(labels[order], kind='stable')]
  _, starts, counts = np.unique(
      labels[order], return_index=True, return_counts=True
  )
  for start, count in zip(starts, counts, strict=True):
    held[order[start : start + count // _HELDOUT]] = True
  if not held.any():
    raise ValueError(
        f'{where}: no class has {_HELDOUT} images, so that none can be held '
        'out; add images'
    )
  return np.flatnonzero(held if split == 'heldout' else ~held)


def sorted_names(names: Collection[str]) -> list[str]:
  """Names of classes in the order in which they are numbered.

  That of the alphabet, or that of numbers where all of them are numbers.
  """
  numbers = all(name.isdecimal() for name in names)
  return sorted(names, key=lambda n: (int(n), n) if numbers else (0, n))


def _check_count(
    where: pathlib.Path, classes: Sequence[str], wanted: int | None
) -> None:
  if wanted is not None and len(classes) != wanted:
    shown = ', '.join(classes[:5]) + (', ...' if len(classes) > 5 else '')
    raise ValueError(
        f'{where} has {len(classes)} classes ({shown}), not {wanted}: correct '
        'the number of classes'
    )


@functools.cache
def _warn(message: str) -> None:
  """Once, though every stage opens its sources anew."""
  logging.warning('%s', message)


def _parse_line(
    where: str, line: str, num_classes: int | None
) -> tuple[str, int | str]:
  """Image and label of a line."""
  try:
    record = json.loads(line)
  except ValueError as e:
    raise ValueError(f'{where}: not JSON ({e})') from e
  if not isinstance(record, dict):
    raise ValueError(f'{where}: not an object in braces')
  name, label = record.get('image'), record.get('label')
  if not isinstance(name, str) or not name:
    raise ValueError(f"{where}: 'image' must be the path of a file, got "
                     f'{name!r}')
  if isinstance(label, bool) or not isinstance(label, int | str):
    raise ValueError(f"{where}: 'label' must be an integer or a name, got "
                     f'{label!r}')
  if isinstance(label, int) and not 0 <= label < (num_classes or label + 1):
    raise ValueError(
        f"{where}: 'label' must lie in [0, {num_classes or '...'}), got {label}"
    )
  return name, label


def _read_nth(
    files: Sequence[pathlib.Path], labels: np.ndarray, i: int
) -> tuple[Image.Image, int]:
  return read(files[i], str(files[i])), labels[i]


def _scale(pixels: np.ndarray) -> np.ndarray:
  return pixels.astype(np.float32) / np.float32(127.5) - 1


@functools.cache
def _pool() -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
