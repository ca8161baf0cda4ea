# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the scores of points."""

from __future__ import annotations

import numpy as np
import pytest

from dd_jax.data import toys as data
from dd_jax.evals import toys

BOARD = data.checkerboard()


def score(points, count=20_000):
  real = BOARD.sample(count, 1)[0]
  return toys.score(points, real, BOARD.means, BOARD.std)


def test_real_points_score_well():
  found = score(BOARD.sample(20_000, 2)[0])
  assert found['sliced_w1'] < 0.02
  assert found['modes'] == 8 and found['variation'] < 0.02
  # Of a round Gaussian, within three standard deviations.
  np.testing.assert_allclose(found['near'], 1 - np.exp(-4.5), atol=2e-3)


def test_what_is_lost_shows():
  points, part = BOARD.sample(40_000, 2)
  some = score(points[part < 4][:10_000], 10_000)
  assert some['modes'] == 4
  np.testing.assert_allclose(some['variation'], 0.5, atol=0.01)
  nothing = score(np.full((100, 2), 5.0), 100)
  assert nothing['modes'] == nothing['near'] == 0
  assert nothing['variation'] == 1
  # A fifth of its share counts, less does not.
  few = np.concatenate([points[part == 0][:95], points[part == 1][:5]])
  assert score(few, 100)['modes'] == 2
  few = np.concatenate([points[part == 0][:98], points[part == 1][:2]])
  assert score(few, 100)['modes'] == 1


def test_sliced_w1_of_a_shift():
  real = BOARD.sample(5000, 1)[0]
  # The mean of |cos| over all directions.
  np.testing.assert_allclose(
      toys.sliced_w1(real, real + [0.5, 0.0]), 0.5 * 2 / np.pi, rtol=1e-3
  )


def test_errors():
  with pytest.raises(ValueError, match='NaN'):
    score(np.full((10, 2), np.nan), 10)
  with pytest.raises(ValueError, match='need'):
    toys.sliced_w1(np.zeros((3, 2)), np.zeros((4, 2)))


def test_pictures():
  points = BOARD.sample(100, 1)[0]
  picture = toys.scatter({'real': points, 'student': points})
  assert picture.size[0] == 600
  picture = toys.curve('x', [0, 1], {'student': [1.0, 0.5]}, {'real': 0.1})
  assert np.asarray(picture.convert('L')).min() < 100
