# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Noise of a pair as a function of its seed and number alone."""

from __future__ import annotations

import jax


def pair_noise(
    seed: jax.Array, pair_id: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
  """Standard normal noise that generation and training both regenerate.

  Args:
    seed: (B,) uint32, seed of the job that made each pair.
    pair_id: (B,) uint32, number of each pair in its job.
    shape: shape of one pair's noise, (L, C).

  Returns:
    (B, L, C) float32; a row depends on its seed and number alone, not on the
    batch, the mesh or the number of hosts.
  """

  def one(s, i):
    key = jax.random.fold_in(jax.random.key(s), i)
    return jax.random.normal(key, shape)

  return jax.vmap(one)(seed, pair_id)
