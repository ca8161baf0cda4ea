# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Labelled images that TensorFlow Datasets prepared as ArrayRecord.

Reading needs no TensorFlow and no network.
"""

from __future__ import annotations

from collections.abc import Sequence
import functools
import io
import os
import pathlib
from typing import Any

from PIL import Image

from dd_jax.data import images, sources

_FORMAT = 'array_record'  # the only one that is read without TensorFlow


def by_name(
    name: str,
    split: str,
    *,
    size: int,
    channels: int = 3,
    num_classes: int | None = None,
    train: str = 'train',
    heldout: str = 'test',
    sort_classes: bool = False,
    data_dir: str | None = None,
    download: bool = False,
    in_memory: bool | None = None,
) -> images.ImageSource:
  """A set by its name in TFDS, 'cifar10' or 'my_set/config:1.0.0'.

  Args:
    name: see above.
    split: 'train' or 'heldout'.
    size: see `images.ImageSource`; so are `channels` and `in_memory`.
    num_classes: how many classes there must be; None takes any number.
    train: what TFDS calls the first split; slices such as 'train[:90%]' too.
    heldout: what it calls the second.
    sort_classes: numbers classes in the order of their names, as folders are
      numbered, instead of in the set's own: networks of ImageNet know its
      classes so, while some sets have them in another order.
    data_dir: where sets are prepared; None for TFDS's own folder.
    download: prepares a set that is not there, which reaches for the network;
      many sets need TensorFlow for that.

  Raises:
    FileNotFoundError: the set is not prepared and `download` is False.
    ImportError: `download` needs a package that is missing.
    ValueError: no such split, no features `image` and `label`, another number
      of classes, or another file format; reading raises it for a record that
      is broken. The message names the folder.
  """
  import tensorflow_datasets as tfds  # takes seconds

  try:
    builder = tfds.core.read_only_builder.builder_from_files(
        name, data_dir=data_dir
    )
  except tfds.core.registered.DatasetNotFoundError as e:
    if not download:
      where = data_dir or tfds.core.constants.DATA_DIR
      raise FileNotFoundError(
          f'{name!r} is not prepared in {where}: set data_dir to where it is, '
          'or download=True to let TensorFlow Datasets prepare it'
      ) from e
    builder = tfds.builder(name, data_dir=data_dir, file_format=_FORMAT)
    builder.download_and_prepare()
  return _open(
      builder, split, train, heldout, sort_classes, size=size,
      channels=channels, num_classes=num_classes, in_memory=in_memory,
  )


def from_folder(
    path: str | os.PathLike[str],
    split: str,
    *,
    size: int,
    channels: int = 3,
    num_classes: int | None = None,
    train: str = 'train',
    heldout: str = 'test',
    sort_classes: bool = False,
    in_memory: bool | None = None,
) -> images.ImageSource:
  """A set that was prepared in a folder with `file_format='array_record'`.

  Args:
    path: folder that holds dataset_info.json and features.json.
    split: 'train' or 'heldout'.
    size: see `by_name`; so are the others.

  Raises:
    FileNotFoundError: the folder holds no prepared set.
    ValueError: see `by_name`.
  """
  import tensorflow_datasets as tfds  # takes seconds

  path = pathlib.Path(path)
  for name in ('dataset_info.json', 'features.json'):
    if not (path / name).exists():
      raise FileNotFoundError(
          f'{path / name} is missing: {path} is no folder that TensorFlow '
          'Datasets prepared (it is called like its version, 1.0.0 say)'
      )
  return _open(
      tfds.builder_from_directory(path), split, train, heldout, sort_classes,
      size=size, channels=channels, num_classes=num_classes,
      in_memory=in_memory,
  )


def _open(
    builder: Any, split: str, train: str, heldout: str, sort_classes: bool, *,
    size: int, num_classes: int | None, **options: Any,
) -> images.ImageSource:
  import tensorflow_datasets as tfds  # takes seconds

  where, features = builder.data_dir, builder.info.features
  if split not in sources.SPLITS:
    raise ValueError(f'split must be one of {sources.SPLITS}, got {split!r}')
  if missing := sorted({'image', 'label'} - set(features)):
    raise ValueError(f'{where} has no feature {missing[0]!r}: it has '
                     f'{sorted(features)}')
  if not isinstance(features['label'], tfds.features.ClassLabel):
    raise ValueError(f"{where}: feature 'label' is no class but "
                     f'{features["label"]}')
  found = features['label'].num_classes
  if num_classes not in (None, found):
    raise ValueError(f'{where} has {found} classes, not {num_classes}: '
                     'correct the number of classes')
  if not isinstance(features['image'], tfds.features.Image):
    raise ValueError(f"{where}: feature 'image' is no image but "
                     f'{features["image"]}')
  name = train if split == 'train' else heldout
  try:
    records = builder.as_data_source(
        name, file_format=_FORMAT,
        decoders={'image': tfds.decode.SkipDecoding()},
    )
  except (ValueError, NotImplementedError) as e:
    raise ValueError(
        f'{where}: split {name!r} cannot be read as ArrayRecord; it has splits '
        f'{sorted(builder.info.splits)} in format '
        f'{builder.info.file_format.value}'
    ) from e
  number = list(range(found))
  if sort_classes:
    names = features['label'].names
    place = {name: i for i, name in enumerate(images.sorted_names(names))}
    number = [place[name] for name in names]
  return images.ImageSource(
      functools.partial(_read, str(where), records, number), len(records),
      size=size, num_classes=found, **options,
  )


def _read(
    where: str, records: Any, number: Sequence[int], i: int
) -> tuple[Image.Image, int]:
  try:
    record = records[i]
  except RuntimeError as e:
    raise ValueError(f'{where}: record {i} cannot be read ({e})') from e
  image = images.read(io.BytesIO(record['image']), f'{where}: record {i}')
  label = int(record['label'])
  return image, number[label] if 0 <= label < len(number) else label
