# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the Fréchet distance against closed forms."""

import numpy as np
import pytest

from dd_jax.evals import frechet


def test_moments():
  x = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 4.0]], np.float32)
  mean, cov = frechet.moments(x)
  assert cov.dtype == np.float64
  np.testing.assert_allclose(mean, [3, 4])
  np.testing.assert_allclose(cov, [[4, 2], [2, 4]])


def test_moments_refuse_bad_features():
  with pytest.raises(ValueError, match='N >= 2'):
    frechet.moments(np.zeros((1, 4)))
  with pytest.raises(ValueError, match='NaN'):
    frechet.moments(np.array([[0.0], [np.nan]]))


def test_diagonal_gaussians():
  a = np.array([0.0, 1.0, 2.0]), np.diag([1.0, 4.0, 9.0])
  b = np.array([3.0, 1.0, 0.0]), np.diag([4.0, 4.0, 1.0])
  # Means 9 + 0 + 4; standard deviations 1, 0 and 2 apart.
  expected = 13 + 1 + 0 + 4
  np.testing.assert_allclose(frechet.frechet_distance(a, b), expected)


def test_rotation_scaling_and_symmetry():
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(400, 6)), 2 * rng.normal(size=(300, 6)) + 1
  rotation, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  a, b = frechet.moments(x), frechet.moments(y)
  distance = frechet.frechet_distance(a, b)
  turned = frechet.frechet_distance(
      frechet.moments(3 * x @ rotation), frechet.moments(3 * y @ rotation)
  )
  np.testing.assert_allclose(turned, 9 * distance)
  np.testing.assert_allclose(frechet.frechet_distance(b, a), distance)


def test_same_set_is_at_zero():
  a = frechet.moments(np.random.default_rng(0).normal(size=(500, 64)))
  assert 0 <= frechet.frechet_distance(a, a) < 1e-9


def test_singular_covariances():
  # Constant features, as the border pixels of digits.
  rng = np.random.default_rng(0)
  x = np.pad(rng.normal(size=(200, 5)), ((0, 0), (0, 20)))
  a, b = frechet.moments(x), frechet.moments(2 * x)
  # Each standard deviation doubles: the distance is that of the means and
  # the trace of the smaller covariance.
  expected = np.square(a[0]).sum() + np.trace(a[1])
  np.testing.assert_allclose(
      frechet.frechet_distance(a, b), expected, rtol=1e-4
  )


def test_retries_with_a_ridge_when_the_root_is_not_finite(monkeypatch):
  sqrtm, calls = frechet.scipy.linalg.sqrtm, []

  def first_fails(matrix):
    calls.append(matrix)
    return np.full_like(matrix, np.nan) if len(calls) == 1 else sqrtm(matrix)

  monkeypatch.setattr(frechet.scipy.linalg, 'sqrtm', first_fails)
  a, b = (np.zeros(3), np.eye(3)), (np.zeros(3), 4 * np.eye(3))
  np.testing.assert_allclose(frechet.frechet_distance(a, b), 3, rtol=1e-5)
  np.testing.assert_allclose(
      calls[1], (1 + 1e-6) * (4 + 1e-6) * np.eye(3), rtol=1e-12
  )


def test_a_root_that_is_not_real_is_an_error():
  a, b = (np.zeros(2), np.eye(2)), (np.zeros(2), -np.eye(2))
  with pytest.raises(ValueError, match='no real square root'):
    frechet.frechet_distance(a, b)
