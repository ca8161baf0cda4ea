# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Nearest-code search and code statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def nearest_code(x_NxC: Array, codebook_VxC: Array) -> Array:
  """Returns the index of the nearest code of each vector, int32 (N,).

  Squared Euclidean distance in float32, as one matrix product at highest
  precision: no (N, V, C) array is formed and ||x||^2, the same for all codes,
  is left out. Of equally near codes the lowest index is returned.
  """
  x_NxC = x_NxC.astype(jnp.float32)
  codebook_VxC = codebook_VxC.astype(jnp.float32)
  inner_NxV = jnp.einsum(
      'nc,vc->nv', x_NxC, codebook_VxC, precision=jax.lax.Precision.HIGHEST
  )
  half_V = 0.5 * jnp.square(codebook_VxC).sum(-1)
  return jnp.argmin(half_V[None] - inner_NxV, axis=-1).astype(jnp.int32)


def straight_through(x: Array, quantized: Array) -> Array:
  """Returns the values of `quantized` with the gradient of `x`."""
  return x + jax.lax.stop_gradient(quantized - x)


def count_codes(index_N: Array, vocab_size: int) -> Array:
  """Returns how often each code occurs, int32 (vocab_size,)."""
  return jnp.zeros(vocab_size, jnp.int32).at[index_N].add(1)
