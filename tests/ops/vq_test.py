# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the nearest-code search."""

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax.ops import vq


def test_nearest_code_matches_direct_distances():
  rng = np.random.default_rng(0)
  x, codes = rng.normal(size=(300, 8)), rng.normal(size=(64, 8))
  distance = np.square(x[:, None] - codes[None]).sum(-1)
  index = vq.nearest_code(jnp.asarray(x), jnp.asarray(codes))
  assert index.dtype == jnp.int32
  np.testing.assert_array_equal(index, distance.argmin(-1))


def test_codes_are_nearest_to_themselves():
  codes = jax.random.normal(jax.random.key(1), (512, 16))
  np.testing.assert_array_equal(vq.nearest_code(codes, codes), np.arange(512))


def test_lowest_index_of_equally_near_codes():
  codes = jnp.array([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
  x = jnp.array([[0.0, 5.0], [1.0, 0.0]])
  np.testing.assert_array_equal(vq.nearest_code(x, codes), [1, 1])


def test_bfloat16_vectors_are_compared_in_float32():
  # 256 and 257 are the same number in bfloat16 arithmetic.
  codes = jnp.array([[257.0], [256.0]])
  x = jnp.array([[256.0]], jnp.bfloat16)
  np.testing.assert_array_equal(vq.nearest_code(x, codes), [1])


def test_straight_through():
  x, q = jnp.array([0.2, 0.7]), jnp.array([0.0, 1.0])
  value, pull = jax.vjp(vq.straight_through, x, q)
  np.testing.assert_allclose(value, q)
  to_x, to_q = pull(jnp.array([3.0, 4.0]))
  np.testing.assert_array_equal(to_x, [3, 4])
  np.testing.assert_array_equal(to_q, [0, 0])


def test_count_codes():
  counts = vq.count_codes(jnp.array([3, 1, 3, 3]), 5)
  np.testing.assert_array_equal(counts, [0, 1, 0, 3, 0])
