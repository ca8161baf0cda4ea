# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Resizing of square maps by one matrix per axis."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.cache
def bicubic_matrix(source: int, target: int) -> np.ndarray:
  """Interpolation weights (target, source), float32.

  Keys' cubic with a = -0.75, half-pixel centres, no antialiasing, and samples
  beyond the border clamped to it: PyTorch's `bicubic` with
  `align_corners=False`. `jax.image.resize` differs in all but the centres.
  """
  position = (np.arange(target) + 0.5) * (source / target) - 0.5
  first = np.floor(position).astype(int)
  matrix = np.zeros((target, source))
  for tap in range(-1, 3):
    column = np.clip(first + tap, 0, source - 1)
    weight = _cubic(np.abs(position - first - tap))
    np.add.at(matrix, (np.arange(target), column), weight)
  return matrix.astype(np.float32)


@functools.cache
def bilinear_matrix(source: int, target: int) -> np.ndarray:
  """Interpolation weights (target, source), float32.

  Half-pixel centres, no antialiasing, and samples beyond the border clamped to
  it: PyTorch's `bilinear` with `align_corners=False`.
  """
  position = (np.arange(target) + 0.5) * (source / target) - 0.5
  position = np.clip(position, 0, source - 1)
  column = np.arange(source)
  weights = np.maximum(1 - np.abs(position[:, None] - column[None]), 0)
  return weights.astype(np.float32)


@functools.cache
def area_matrix(source: int, target: int) -> np.ndarray:
  """Averaging weights (target, source), float32.

  Row i is the mean over [floor(i s / t), ceil((i + 1) s / t)); windows overlap
  where t does not divide s. PyTorch's `area`, alias adaptive average pooling.
  """
  matrix = np.zeros((target, source))
  for i in range(target):
    start, stop = i * source // target, -(-(i + 1) * source // target)
    matrix[i, start:stop] = 1 / (stop - start)
  return matrix.astype(np.float32)


def bicubic(x_BxHxHxC: Array, size: int) -> Array:
  """Resizes H to `size` on both axes with `bicubic_matrix`."""
  return _resize(x_BxHxHxC, bicubic_matrix, size)


def bilinear(x_BxHxHxC: Array, size: int) -> Array:
  """Resizes H to `size` on both axes with `bilinear_matrix`."""
  return _resize(x_BxHxHxC, bilinear_matrix, size)


def area(x_BxHxHxC: Array, size: int) -> Array:
  """Resizes H to `size` on both axes with `area_matrix`."""
  return _resize(x_BxHxHxC, area_matrix, size)


def _resize(x_BxHxHxC: Array, weights, size: int) -> Array:
  _, height, width, _ = x_BxHxHxC.shape
  if height != width:
    raise ValueError(f'maps must be square, not {height} x {width}')
  if height == size:
    return x_BxHxHxC
  matrix = jnp.asarray(weights(height, size))
  # Codes are chosen by distance to resized maps: bfloat16 passes would show.
  return jnp.einsum(
      'th,bhwc,sw->btsc', matrix, x_BxHxHxC, matrix,
      precision=jax.lax.Precision.HIGHEST,
  ).astype(x_BxHxHxC.dtype)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
  near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
  far = a * (((distance - 5) * distance + 8) * distance - 4)
  return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
