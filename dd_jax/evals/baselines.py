# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Samples without dependence: what a judge must tell from the real thing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def fit(indices: np.ndarray, vocab_size: int) -> np.ndarray:
  """(L, V) int64 counts of each code at each position of (N, L) sequences.

  Raises:
    ValueError: if there is no sequence or an index is not in [0, vocab_size).
  """
  indices = np.asarray(indices)
  if indices.ndim != 2 or not len(indices):
    raise ValueError(f'indices have shape {indices.shape}; need (N, L), N > 0')
  if indices.min() < 0 or indices.max() >= vocab_size:
    raise ValueError(
        f'indices lie in [{indices.min()}, {indices.max()}], outside '
        f'[0, {vocab_size})'
    )
  return np.stack([
      np.bincount(column, minlength=vocab_size) for column in indices.T
  ])


def sample(
    rng: np.random.Generator, counts: np.ndarray, n: int
) -> np.ndarray:
  """(n, L) int32 sequences, positions independent (DD1, onestep*)."""
  draws = rng.integers(counts.sum(1), size=(n, len(counts)))
  out = np.empty(draws.shape, np.int32)
  for i, cumulative in enumerate(counts.cumsum(1)):
    out[:, i] = np.searchsorted(cumulative, draws[:, i], side='right')
  return out


def sample_last(
    keys: jax.Array, cumulative: jax.Array, count: int
) -> jax.Array:
  """The last `count` columns of `sample` on the device, (B, count) int32.

  Args:
    keys: (B,), one for each sequence.
    cumulative: (L, V) int32, sums along the codes of what `fit` counts.
    count: at most L.
  """
  tail = cumulative[len(cumulative) - count :]

  def one(key: jax.Array) -> jax.Array:
    draws = jax.random.randint(key, (count,), 0, tail[:, -1])
    return jax.vmap(
        lambda column, draw: jnp.searchsorted(column, draw, side='right')
    )(tail, draws)

  return jax.vmap(one)(keys).astype(jnp.int32)


def sample_per_class(
    rng: np.random.Generator,
    indices: np.ndarray,
    labels: np.ndarray,
    wanted: np.ndarray,
    vocab_size: int,
) -> np.ndarray:
  """As `sample`, from the teacher's sequences of the wanted class only.

  Counts are held for one class at a time.

  Args:
    rng: source of randomness.
    indices: (N, L) teacher sequences.
    labels: (N,) their classes.
    wanted: (M,) classes to sample.
    vocab_size: number of codes.

  Returns:
    (M, L) int32.

  Raises:
    ValueError: if a wanted class has no sequence, or as `fit` does.
  """
  indices, labels = np.asarray(indices), np.asarray(labels)
  wanted = np.asarray(wanted)
  if missing := sorted(set(wanted.tolist()) - set(labels.tolist())):
    raise ValueError(f'no teacher sequence of classes {missing}')
  out = np.empty((len(wanted), indices.shape[1]), np.int32)
  for c in np.unique(wanted):
    rows = wanted == c
    counts = fit(indices[labels == c], vocab_size)
    out[rows] = sample(rng, counts, int(rows.sum()))
  return out


def mix_pixels(
    rng: np.random.Generator,
    images: np.ndarray,
    labels: np.ndarray,
    wanted: np.ndarray,
) -> np.ndarray:
  """Images of which every pixel is taken from another real image of the class.

  They have the right marginals and no strokes. A judge that prefers them to
  real images that it has not seen cannot judge.

  Args:
    rng: source of randomness.
    images: (N, H, W, C) real images.
    labels: (N,) their classes.
    wanted: (M,) classes to make.

  Returns:
    (M, H, W, C).

  Raises:
    ValueError: if a wanted class has no image.
  """
  out = np.empty((len(wanted), *images.shape[1:]), images.dtype)
  row, column = np.indices(images.shape[1:3])
  for c in np.unique(wanted):
    pool, mine = np.flatnonzero(labels == c), wanted == c
    if not len(pool):
      raise ValueError(f'no image of class {c}')
    donor = rng.choice(pool, size=(int(mine.sum()), *row.shape))
    out[mine] = images[donor, row, column]
  return out
