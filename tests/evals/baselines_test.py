# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of onestep*: its counts, its law, its classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from dd_jax.evals import baselines


def test_fit_counts_by_position():
  counts = baselines.fit(np.array([[0, 2], [0, 1], [1, 2]]), 4)
  np.testing.assert_array_equal(counts, [[2, 1, 0, 0], [0, 1, 2, 0]])


def test_sample_follows_the_counts():
  counts = np.array([[10, 0, 30, 60], [0, 1, 0, 0]])
  draws = baselines.sample(np.random.default_rng(0), counts, 20_000)
  assert draws.shape == (20_000, 2) and draws.dtype == np.int32
  observed = np.bincount(draws[:, 0], minlength=4)
  assert observed[1] == 0
  keep = [0, 2, 3]
  fit = scipy.stats.chisquare(observed[keep], 200 * counts[0, keep])
  assert fit.pvalue > 0.001
  assert (draws[:, 1] == 1).all()


def test_the_last_places_follow_the_counts_on_the_device_too():
  counts = np.array([[9, 0, 0, 1], [10, 0, 30, 60], [0, 100, 0, 0]])
  draws = jax.jit(baselines.sample_last, static_argnums=2)(
      jax.random.split(jax.random.key(0), 20_000), jnp.cumsum(counts, axis=1), 2
  )
  assert draws.shape == (20_000, 2) and draws.dtype == jnp.int32
  observed = np.bincount(draws[:, 0], minlength=4)
  assert observed[1] == 0
  keep = [0, 2, 3]
  fit = scipy.stats.chisquare(observed[keep], 200 * counts[1, keep])
  assert fit.pvalue > 0.001
  assert (np.asarray(draws[:, 1]) == 1).all()


def test_positions_are_independent():
  # Positions always agree in the teacher's sequences.
  same = np.repeat(np.arange(2), 500)[:, None].repeat(2, axis=1)
  draws = baselines.sample(
      np.random.default_rng(0), baselines.fit(same, 2), 10_000
  )
  assert abs((draws[:, 0] == draws[:, 1]).mean() - 0.5) < 0.03


def test_per_class_uses_only_that_class():
  indices = np.array([[0, 1], [0, 1], [2, 3], [3, 3]])
  labels = np.array([7, 7, 4, 4])
  wanted = np.array([4, 7, 4, 7, 4])
  draws = baselines.sample_per_class(
      np.random.default_rng(0), indices, labels, wanted, vocab_size=4
  )
  np.testing.assert_array_equal(draws[wanted == 7], [[0, 1], [0, 1]])
  assert np.isin(draws[wanted == 4, 0], [2, 3]).all()
  assert (draws[wanted == 4, 1] == 3).all()


def test_mixed_pixels_are_those_of_the_class_at_their_place():
  n, size = 40, 3
  labels = np.arange(n) % 2
  place = np.arange(size * size).reshape(size, size, 1)
  images = 1000 * labels[:, None, None, None] + 10 * place + (
      np.arange(n)[:, None, None, None] // 2 % 10
  )
  wanted = np.array([1, 0, 1])
  mixed = baselines.mix_pixels(
      np.random.default_rng(0), images, labels, wanted
  )
  kept = 1000 * wanted[:, None, None, None] + 10 * place
  np.testing.assert_array_equal(mixed // 10 * 10, kept)
  assert len(np.unique(mixed[0] % 10)) > 1  # of several donors
  with pytest.raises(ValueError, match='no image of class 2'):
    baselines.mix_pixels(np.random.default_rng(0), images, labels, wanted + 1)


def test_same_seed_same_draws():
  counts = np.ones((5, 9), np.int64)
  a, b = (
      baselines.sample(np.random.default_rng(3), counts, 40) for _ in range(2)
  )
  np.testing.assert_array_equal(a, b)


def test_errors():
  with pytest.raises(ValueError, match=r'outside \[0, 4\)'):
    baselines.fit(np.array([[4]]), 4)
  with pytest.raises(ValueError, match='need'):
    baselines.fit(np.zeros((0, 3), np.int32), 4)
  with pytest.raises(ValueError, match=r'no teacher sequence of classes \[9\]'):
    baselines.sample_per_class(
        np.random.default_rng(0), np.array([[1]]), np.array([0]),
        np.array([9, 0]), 4,
    )
