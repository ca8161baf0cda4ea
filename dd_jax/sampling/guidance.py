# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What happens to logits before a token is drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import math
from typing import Any

import jax
import jax.numpy as jnp

# What a run may say of how a teacher is sampled, and what it does otherwise.
SETTINGS = {
    'cfg': 0.0, 'temperature': 1.0, 'top_k': 0, 'top_p': 1.0,
    'cfg_interval': -1,
}


def guide(
    cond: jax.Array, uncond: jax.Array, scale: jax.Array | float
) -> jax.Array:
  """Classifier-free guidance: (1 + scale) * cond - scale * uncond.

  Args:
    cond: (..., V) logits with the condition.
    uncond: (..., V) logits without it.
    scale: 0 gives `cond`.

  Source: VAR, models/var.py.
  """
  return (1 + scale) * cond - scale * uncond


def settings_of(config: Any) -> dict[str, Any]:
  """`SETTINGS` as the fields of a stage have them."""
  return {
      'cfg': config.cfg, 'temperature': config.temperature,
      'top_k': config.top_k, 'top_p': config.top_p,
      'cfg_interval': config.cfg_interval,
  }


def recorded(settings: Mapping[str, Any]) -> dict[str, Any]:
  """What a set of pairs says of its `SETTINGS`; what it lacks is as there.

  A temperature of 1 is left out, so that sets that were begun before there was
  one can be finished, and come out the same, manifest included.
  """
  return {k: v for k, v in settings.items() if (k, v) != ('temperature', 1)}


def is_guided(step: Any, cfg_interval: int) -> Any:
  """Whether a step, counted from 0, lies before the end of guidance.

  Args:
    step: an integer, which may be traced.
    cfg_interval: the last guided step is the one after it; -1 guides all.

  Raises:
    ValueError: an interval below -1.

  Source: LlamaGen, autoregressive/models/generate.py, whose count begins at the
  second token.
  """
  if cfg_interval < -1:
    raise ValueError(f'cfg_interval={cfg_interval} must be -1 (no end) or more')
  return cfg_interval == -1 or step <= cfg_interval + 1


def temper(logits: jax.Array, temperature: float) -> jax.Array:
  """Logits divided by a temperature, before they are filtered; 1 is off.

  Raises:
    ValueError: a temperature that is not a positive number.

  Source: LlamaGen, autoregressive/models/generate.py. VAR has none.
  """
  if not 0 < temperature < math.inf:
    raise ValueError(
        f'temperature={temperature} must be positive and finite; 1 is off'
    )
  return logits if temperature == 1 else logits / temperature


def log_probs(
    logits: jax.Array, temperature: float, top_k: int, top_p: float, *,
    descending: bool = False,
) -> jax.Array:
  """What is drawn from, given guided logits (..., V): temper, filter, norm.

  Log-probabilities, -inf outside of the support; for `descending` see
  `filter_top_p`.
  """
  logits = temper(logits, temperature)
  logits = filter_top_k(logits, top_k)
  logits = filter_top_p(logits, top_p, descending=descending)
  return jax.nn.log_softmax(logits)


def filter_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Sets all but the k largest of (..., V) logits to -inf.

  Logits equal to the k-th largest are all kept. k=0, or k of at least V, keeps
  everything.

  Raises:
    ValueError: negative k.

  Source: VAR, models/helpers.py.
  """
  if k < 0:
    raise ValueError(f'top_k={k} must be 0 (off) or the number of codes kept')
  if not 0 < k < logits.shape[-1]:
    return logits
  key = _sortable(logits)
  kth = _largest(key, lambda kept: jnp.sum(kept, -1, keepdims=True) >= k)
  return jnp.where(key < kth, -jnp.inf, logits)


def filter_top_p(
    logits: jax.Array, p: float, *, descending: bool = False
) -> jax.Array:
  """Keeps the most likely of (..., V) logits, of probability p together.

  In ascending order, logits become -inf while the probability summed so far
  is at most 1 - p; of equal ones those of lower index go first. In descending
  order, which differs in equal ones and by rounding, they become -inf once the
  sum before them exceeds p. The largest always stays. p=1 keeps everything.

  Raises:
    ValueError: p outside of (0, 1].

  Source: VAR, models/helpers.py; descending: LlamaGen,
  autoregressive/models/generate.py.
  """
  if not 0 < p <= 1:
    raise ValueError(f'top_p={p} must be in (0, 1]; 1 is off')
  if p == 1:
    return logits
  key = _sortable(logits)
  probs = jax.nn.softmax(logits, axis=-1)

  def mass(where: jax.Array) -> jax.Array:
    return jnp.sum(probs, -1, keepdims=True, where=where)

  # The edge: what is larger stays and what is smaller goes, of its equals some.
  if descending:
    edge = _largest(key, lambda kept: mass(kept) > p)
  else:
    edge = _largest(key, lambda kept: mass(~kept) <= 1 - p)
    edge = jnp.minimum(edge, jnp.max(key, -1, keepdims=True))
  equal = key == edge
  place = jnp.cumsum(equal, -1)
  one = jnp.max(probs, -1, keepdims=True, initial=0, where=equal)
  if descending:
    drop = mass(key > edge) + (place - 1) * one > p
  else:
    # All of them together are too many, by the choice of the edge.
    drop = (mass(key < edge) + place * one <= 1 - p) & (place < place[..., -1:])
  return jnp.where((key < edge) | (equal & drop), -jnp.inf, logits)


def _sortable(x: jax.Array) -> jax.Array:
  """Unsigned integers, of as many bits, in the order of the floats; -0 is 0."""
  kind = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), kind)
  sign = jnp.array(1 << (8 * x.dtype.itemsize - 1), kind)
  return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(
    key: jax.Array, holds: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """The largest number (..., 1) of which `holds(key >= number)` is true.

  It is found bit by bit, in as many sums over the (..., V) keys as they have
  bits, which on a CPU takes about a twentieth of the time of sorting them.
  (For lax.top_k XLA gathers a batch that is split over devices.)

  Args:
    key: as `_sortable` makes them.
    holds: true of 0, and of no number that is larger than one where it is
      false.
  """
  bits = 8 * key.dtype.itemsize

  def body(i: jax.Array, found: jax.Array) -> jax.Array:
    bit = jnp.array(1, key.dtype) << (bits - 1 - i).astype(key.dtype)
    more = found | bit
    return jnp.where(holds(key >= more), more, found)

  return jax.lax.fori_loop(0, bits, body, jnp.zeros_like(key[..., :1]))
