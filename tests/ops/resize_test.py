# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the resizing matrices against scalar definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.ops import resize


def cubic_sample(line, position):
  """One interpolated value, by Keys' kernel with a = -3/4."""
  total = 0.0
  for tap in range(math.floor(position) - 1, math.floor(position) + 3):
    d = abs(position - tap)
    if d <= 1:
      weight = 1.25 * d**3 - 2.25 * d**2 + 1
    else:
      weight = -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
    total += weight * line[min(max(tap, 0), len(line) - 1)]
  return total


@pytest.mark.parametrize('source', [1, 2, 3, 5, 8, 13, 16])
def test_bicubic_matches_scalar_definition(source):
  line = np.random.default_rng(source).normal(size=source)
  expected = [
      cubic_sample(line, (i + 0.5) * source / 16 - 0.5) for i in range(16)
  ]
  matrix = resize.bicubic_matrix(source, 16)
  np.testing.assert_allclose(matrix @ line, expected, atol=1e-6)


def test_bicubic_fixture():
  # The weights at a quarter are -27/256, 225/256, 67/256, -9/256.
  expected = np.array([[283, -27], [198, 58], [58, 198], [-27, 283]]) / 256
  np.testing.assert_array_equal(resize.bicubic_matrix(2, 4), expected)


@pytest.mark.parametrize('source, target', [(1, 5), (4, 7), (64, 299), (9, 4)])
def test_bilinear_matches_scalar_definition(source, target):
  line = np.random.default_rng(source).normal(size=source)
  expected = np.interp(
      (np.arange(target) + 0.5) * source / target - 0.5, np.arange(source), line
  )
  matrix = resize.bilinear_matrix(source, target)
  np.testing.assert_allclose(matrix @ line, expected, atol=1e-6)
  image = np.broadcast_to(line[None, :, None, None], (1, source, source, 1))
  resized = resize.bilinear(jnp.asarray(image, jnp.float32), target)
  np.testing.assert_allclose(resized[0, :, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize('target', [1, 2, 3, 4, 5, 6, 8, 10, 13, 16])
def test_area_averages_windows(target):
  line = np.random.default_rng(target).normal(size=16)
  expected = [
      line[math.floor(16 * i / target) : math.ceil(16 * (i + 1) / target)]
      .mean() for i in range(target)
  ]
  matrix = resize.area_matrix(16, target)
  np.testing.assert_allclose(matrix @ line, expected, atol=1e-6)


def test_area_windows_of_thirteen_overlap():
  windows = [
      (row.nonzero()[0].min(), row.nonzero()[0].max() + 1)
      for row in resize.area_matrix(16, 13)
  ]
  assert windows == [
      (0, 2), (1, 3), (2, 4), (3, 5), (4, 7), (6, 8), (7, 9), (8, 10), (9, 12),
      (11, 13), (12, 14), (13, 15), (14, 16),
  ]


@pytest.mark.parametrize('fn, matrix', [
    (resize.area, resize.area_matrix), (resize.bicubic, resize.bicubic_matrix),
])
def test_both_axes_are_resized(fn, matrix):
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
  rows = matrix(4, 6).astype(np.float64)
  expected = np.einsum('ij,bjkc,lk->bilc', rows, np.asarray(x), rows)
  np.testing.assert_allclose(fn(x, 6), expected, atol=1e-6)
  assert fn(x, 4) is x
  # Of half precision is what comes and goes, not what is between.
  half = x.astype(jnp.bfloat16)
  np.testing.assert_array_equal(
      fn(half, 6), fn(half.astype(jnp.float32), 6).astype(jnp.bfloat16)
  )


def test_maps_must_be_square():
  with pytest.raises(ValueError, match='square, not 4 x 2'):
    resize.area(jnp.zeros((1, 4, 2, 1)), 2)
