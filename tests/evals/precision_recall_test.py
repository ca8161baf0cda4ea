# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of precision and recall against hand-made sets and brute force."""

import numpy as np
import pytest

from dd_jax.evals import precision_recall


def test_kth_distance_matches_brute_force(monkeypatch):
  rng = np.random.default_rng(0)
  q, x = rng.normal(size=(53, 4)), rng.normal(size=(31, 4))
  expected = np.sort(np.linalg.norm(q[:, None] - x[None], axis=-1), axis=1)
  whole = precision_recall.kth_distance(q, x, 3)
  np.testing.assert_allclose(whole, expected[:, 2], rtol=1e-9)
  monkeypatch.setattr(precision_recall, '_CHUNK', 10)
  chunked = precision_recall.kth_distance(q, x, 3)
  np.testing.assert_allclose(chunked, whole, rtol=1e-12)


def test_ball_reaches_to_the_third_neighbour():
  real = np.array([[0.0], [1.0], [2.0], [3.0]])
  # Radii are 3, 2, 2 and 3: the union of the balls is [-3, 6].
  samples = np.array([[-3.1], [-2.9], [5.9], [6.1]])
  assert precision_recall.precision(real, samples) == 0.5


def test_missing_mode_costs_recall_and_outliers_cost_precision():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 400, 8))
  modes = np.concatenate([a, b + 100])
  one = rng.normal(size=(400, 8))
  assert precision_recall.precision(modes, one) > 0.8
  assert 0.4 < precision_recall.recall(modes, one) <= 0.5
  assert 0.4 < precision_recall.precision(one, modes) <= 0.5


def test_same_set_has_both():
  x = np.random.default_rng(0).normal(size=(50, 3))
  assert precision_recall.precision(x, x) == 1
  assert precision_recall.recall(x, x) == 1


def test_too_few_points():
  x = np.zeros((3, 2))
  with pytest.raises(ValueError, match='3 points; need more than 3'):
    precision_recall.precision(x, x)
