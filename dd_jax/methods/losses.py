# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Losses that several methods use."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross-entropy of integer targets: (..., V), (...) -> (...), in nats."""
  logits = logits.astype(jnp.float32)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked


def check_share(name: str, value: float) -> None:
  """Raises ValueError where a probability is none."""
  if not 0 <= value <= 1:
    raise ValueError(f'{name}={value}: expected a share in [0, 1]')


def pixel_distance(a: jax.Array, b: jax.Array, norm: str) -> jax.Array:
  """Mean distance of pixels per image: (B, H, W, C) twice -> (B,).

  Raises:
    ValueError: norm is neither 'l1' nor 'l2' (squared).
  """
  if norm not in ('l1', 'l2'):
    raise ValueError(f"norm {norm!r}: expected 'l1' or 'l2'")
  difference = a - b
  per_pixel = jnp.abs(difference) if norm == 'l1' else jnp.square(difference)
  return per_pixel.mean(axis=(1, 2, 3))


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of values where mask is True; same shapes; 0 for an empty mask."""
  mask = mask.astype(values.dtype)
  return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)
