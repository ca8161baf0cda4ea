# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg

_RETRY = 1e-6  # on both diagonals where the product has no finite square root


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean (D,) and unbiased covariance (D, D) of (N, D) features, in float64.

  Raises:
    ValueError: if there are fewer than two rows or a value is not finite.
  """
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(
        f'features have shape {features.shape}; need (N, D) with N >= 2'
    )
  if not np.isfinite(features).all():
    raise ValueError('features hold NaN or infinity')
  return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), in squared feature units.

  As PyTorch-FID computes it: scipy's matrix square root, and where that is not
  finite, once more with 1e-6 added to both diagonals.

  Args:
    a: mean (D,) and covariance (D, D), as `moments` gives them.
    b: the other pair.

  Raises:
    ValueError: if the square root is not real.
  """
  (mean_a, cov_a), (mean_b, cov_b) = a, b
  root = _sqrtm(cov_a @ cov_b)
  if not np.isfinite(root).all():
    ridge = _RETRY * np.eye(len(cov_a))
    root = _sqrtm((cov_a + ridge) @ (cov_b + ridge))
  diagonal = np.diagonal(root)
  if not np.allclose(diagonal.imag, 0, atol=1e-3):
    raise ValueError(
        'the covariances have no real square root; largest imaginary part '
        f'{np.abs(diagonal.imag).max():.3g}'
    )
  gap = mean_a - mean_b
  distance = gap @ gap + np.trace(cov_a + cov_b) - 2 * diagonal.real.sum()
  return float(max(distance, 0.0))  # rounding can leave -1e-12


def _sqrtm(matrix: np.ndarray) -> np.ndarray:
  with warnings.catch_warnings():
    # A singular product, of constant pixels say, is expected.
    warnings.simplefilter('ignore')
    return np.asarray(scipy.linalg.sqrtm(matrix))
