# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Guidance and the two filters, ties included."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.sampling import guidance

INF = np.inf


def kept(logits):
  return np.isfinite(np.asarray(logits)).tolist()


def test_guide_moves_away_from_the_unconditional():
  cond, uncond = jnp.array([1.0, 2.0]), jnp.array([0.0, 3.0])
  np.testing.assert_array_equal(guidance.guide(cond, uncond, 0.0), cond)
  np.testing.assert_allclose(guidance.guide(cond, uncond, 2.0), [3.0, 0.0])


def test_top_k_keeps_ties_at_the_threshold():
  logits = jnp.array([[3.0, 1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
  np.testing.assert_array_equal(
      guidance.filter_top_k(logits, 2),
      [[3.0, -INF, 2.0, 2.0, -INF], [0.0, 0.0, 0.0, 0.0, 0.0]],
  )
  assert kept(guidance.filter_top_k(logits[0], 1)) == [1, 0, 0, 0, 0]


@pytest.mark.parametrize('k', [0, 5, 9])
def test_top_k_off(k):
  logits = jnp.arange(5.0)
  np.testing.assert_array_equal(guidance.filter_top_k(logits, k), logits)


def test_top_p_drops_while_the_rest_still_has_p():
  logits = jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3]))
  for p, expected in (
      (0.99, [1, 1, 1, 1]), (0.9, [1, 1, 0, 1]), (0.7, [0, 1, 0, 1]),
      (0.4, [0, 1, 0, 0]), (1e-6, [0, 1, 0, 0]),
  ):
    out = guidance.filter_top_p(logits, p)
    assert kept(out) == expected
    np.testing.assert_array_equal(out[1], logits[1])
  np.testing.assert_array_equal(guidance.filter_top_p(logits, 1.0), logits)


def test_top_p_drops_the_lower_index_of_equals():
  # Sums of quarters are exact: two of four are at 1 - p and go.
  assert kept(guidance.filter_top_p(jnp.zeros(4), 0.5)) == [0, 0, 1, 1]
  assert kept(guidance.filter_top_p(jnp.zeros(4), 0.25)) == [0, 0, 0, 1]


def test_top_p_agrees_with_a_loop_after_top_k():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(3, 4, 50)).astype(np.float32) * 2
  filtered = np.asarray(guidance.filter_top_k(jnp.asarray(logits), 20))
  out = np.asarray(guidance.filter_top_p(jnp.asarray(filtered), 0.8))
  for row, got in zip(
      filtered.reshape(-1, 50), out.reshape(-1, 50), strict=True
  ):
    p = np.exp(row - row.max())
    p /= p.sum()
    total, expected = 0.0, row.copy()
    for i in np.argsort(row, kind='stable')[:-1]:
      total += p[i]
      if total <= 1 - 0.8:
        expected[i] = -INF
    np.testing.assert_array_equal(got, expected)
    assert np.isfinite(got).sum() < 20


def test_top_p_from_the_top_keeps_the_first_that_crosses():
  logits = jnp.log(jnp.array([0.125, 0.5, 0.125, 0.25]))
  for p, expected in (
      (0.99, [1, 1, 1, 1]), (0.8, [1, 1, 0, 1]), (0.7, [0, 1, 0, 1]),
      (0.4, [0, 1, 0, 0]), (1e-6, [0, 1, 0, 0]),
  ):
    assert kept(guidance.filter_top_p(logits, p, descending=True)) == expected
  # A sum that is p does not exceed it, and of equals the first goes first.
  assert kept(
      guidance.filter_top_p(jnp.zeros(4), 0.5, descending=True)
  ) == [1, 1, 1, 0]
  np.testing.assert_array_equal(
      guidance.filter_top_p(logits, 1.0, descending=True), logits
  )


@pytest.mark.parametrize('p', [1e-8, 0.05, 0.4, 0.83, 0.97])
@pytest.mark.parametrize('descending', [False, True])
def test_top_p_agrees_with_a_loop_where_many_are_equal(p, descending):
  rng = np.random.default_rng(1)
  logits = np.round(rng.normal(size=(40, 37)) * 2).astype(np.float32) / 2
  logits[rng.random(logits.shape) < 0.2] = -0.0
  logits[rng.random(logits.shape) < 0.3] = -INF
  logits[:, 5] = 0.0
  filter_rows = jax.jit(functools.partial(
      guidance.filter_top_p, p=p, descending=descending
  ))
  got = np.asarray(filter_rows(logits))
  parted = 0
  for row, out in zip(logits, got, strict=True):
    mass = np.exp(row.astype(np.float64))
    mass /= mass.sum()
    total, stays = 0.0, np.zeros(37, bool)
    order = np.argsort(-row if descending else row, kind='stable')
    for i in order:
      before, total = total, total + mass[i]
      stays[i] = before <= p if descending else total > 1 - p
    stays[order[0 if descending else -1]] = True
    np.testing.assert_array_equal(out, np.where(stays, row, -INF))
    parted += (row[~stays] == row[stays].min()).any()
  assert parted > 10  # rows where of equals some stay


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('k', [1, 7, 100, 299])
def test_top_k_agrees_with_sorting(dtype, k):
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(20, 300)) * 10.0 ** rng.integers(-6, 4, (20, 1))
  logits[:5] = np.round(logits[:5])
  logits[::4, ::3] = -INF
  logits = jnp.asarray(logits, dtype)
  kth = jnp.sort(logits, axis=-1)[:, -k, None]
  got = jax.jit(guidance.filter_top_k, static_argnums=1)(logits, k)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, jnp.where(logits < kth, -INF, logits))


def test_temperature_divides():
  logits = jnp.array([1.0, -3.0, 0.1])
  np.testing.assert_allclose(guidance.temper(logits, 0.5), [2.0, -6.0, 0.2])
  assert guidance.temper(logits, 1.0) is logits


@pytest.mark.parametrize('temperature', [0, -1.0, INF, np.nan])
def test_bad_temperature(temperature):
  with pytest.raises(ValueError, match=f'temperature={temperature} must be'):
    guidance.temper(jnp.zeros(3), temperature)


def test_sets_of_pairs_do_not_name_the_temperature_that_changes_nothing():
  # These fields, in this order, were those of sets before there was one.
  old = {'cfg': 0.0, 'top_k': 0, 'top_p': 1.0, 'cfg_interval': -1}
  assert list(guidance.recorded(guidance.SETTINGS).items()) == [*old.items()]
  changed = guidance.SETTINGS | {'temperature': 0.7}
  assert guidance.recorded(changed) == changed


@pytest.mark.parametrize('p', [0.0, -0.1, 1.5])
def test_bad_top_p(p):
  with pytest.raises(ValueError, match='top_p'):
    guidance.filter_top_p(jnp.zeros(3), p)


def test_bad_top_k():
  with pytest.raises(ValueError, match='top_k=-1'):
    guidance.filter_top_k(jnp.zeros(3), -1)


def test_bad_cfg_interval():
  with pytest.raises(ValueError, match='cfg_interval=-2'):
    guidance.is_guided(0, -2)
