# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Arrays that are known by shape and made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
  """An array without its values; `np.asarray` makes them, each time anew.

  Attributes:
    shape: of the array.
    dtype: of the array.
    make: gives the values.
    sources: names of the tensors that it is made from.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]
  sources: tuple[str, ...] = ()

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    value = self.make()
    if value.shape != self.shape or value.dtype != self.dtype:
      raise ValueError(
          f'expected {self.dtype} {self.shape}, got {value.dtype} {value.shape}'
      )
    return value if dtype is None else value.astype(dtype)


def blank(shape: tuple[int, ...]) -> np.ndarray:
  """An array of a shape, for code that looks at shapes; takes no memory."""
  return np.broadcast_to(np.zeros((), np.int8), shape)
