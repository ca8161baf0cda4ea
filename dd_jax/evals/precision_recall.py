# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Improved precision and recall of samples (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 3
_CHUNK = 1000  # rows of a distance matrix held at once


def precision(
    real: np.ndarray, samples: np.ndarray, *, k: int = NEIGHBOURS
) -> float:
  """Fraction of (M, D) samples that lie on the manifold of (N, D) real ones.

  The manifold is the union of balls around its points, each reaching to the
  point's k-th nearest neighbour.

  Raises:
    ValueError: if a set has no more than `k` points.
  """
  _require(real, k)
  _require(samples, k)
  radii = kth_distance(real, real, k + 1)  # the first is the point itself
  inside = [
      (distances <= radii[None, :]).any(1)
      for distances in _distances(samples, real)
  ]
  return float(np.concatenate(inside).mean())


def recall(
    real: np.ndarray, samples: np.ndarray, *, k: int = NEIGHBOURS
) -> float:
  """Fraction of real points on the manifold of samples; see `precision`."""
  return precision(samples, real, k=k)


def kth_distance(
    queries: np.ndarray, points: np.ndarray, k: int = 1
) -> np.ndarray:
  """(N,) Euclidean distances of (N, D) queries to their k-th nearest points.

  Raises:
    ValueError: if there are fewer than `k` points.
  """
  _require(points, k - 1)
  return np.concatenate([
      np.partition(distances, k - 1, axis=1)[:, k - 1]
      for distances in _distances(queries, points)
  ])


def _require(points: np.ndarray, k: int) -> None:
  if len(points) <= k:
    raise ValueError(f'{len(points)} points; need more than {k}')


def _distances(queries: np.ndarray, points: np.ndarray):
  """Yields (<= 1000, M) blocks of the (N, M) distance matrix."""
  queries = np.asarray(queries, np.float64)
  points = np.asarray(points, np.float64)
  norms = np.square(points).sum(1)
  for start in range(0, len(queries), _CHUNK):
    q = queries[start : start + _CHUNK]
    squared = np.square(q).sum(1)[:, None] + norms[None, :] - 2 * q @ points.T
    yield np.sqrt(np.maximum(squared, 0))  # rounding can leave -1e-15
