# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What a teacher's tokens are drawn from, in NumPy and token by token."""

from __future__ import annotations

import numpy as np


def drawn_from(logits, *, temperature, top_k, top_p):
  """Probabilities (..., V) of guided logits, in float64."""
  logits = np.asarray(logits, np.float64)
  flat = [
      _one(row / temperature, top_k, top_p)
      for row in logits.reshape(-1, logits.shape[-1])
  ]
  return np.reshape(flat, logits.shape)


def _one(row, top_k, top_p):
  order = np.argsort(-row)[:top_k]
  p = np.exp(row[order] - row[order[0]])
  p /= p.sum()
  kept = order[np.cumsum(p) - p <= top_p]
  out = np.zeros_like(row)
  out[kept] = np.exp(row[kept] - row[order[0]])
  return out / out.sum()
