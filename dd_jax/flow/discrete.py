# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The deterministic flow from Gaussian noise to one codebook entry."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

# The linear path x_t = (1 - t) * noise + t * code: t=0 is noise, t=1 is data.
# Everything is float32 with full-precision products: at t = 0.99 inner products
# are multiplied by 1e4 before the softmax, which bfloat16 or TF32 would turn
# into errors of tens.

Solver = Literal['deis', 'dpmpp_2m', 'heun', 'euler']


def posterior_logits(
    x: jax.Array, t: jax.Array | float, codes: jax.Array, log_p: jax.Array
) -> jax.Array:
  """Logits of the code that a state on the path leads to.

  log p_j - |x - t c_j|^2 / (2 (1-t)^2) without the term in |x|^2, which is the
  same for all codes (DD1, velocity of the flow matching ODE).

  Args:
    x: (N, C) states.
    t: scalar or (N,) times in [0, 1).
    codes: (V, C) codebook.
    log_p: (N, V) log-probabilities, up to a constant per row; -inf marks codes
      outside the support.

  Returns:
    (N, V) float32; -inf exactly where `log_p` is.
  """
  x, codes = x.astype(jnp.float32), codes.astype(jnp.float32)
  t = _column(t, x)
  dot = jnp.einsum('nc,vc->nv', x, codes, precision=jax.lax.Precision.HIGHEST)
  half_norm = 0.5 * jnp.sum(jnp.square(codes), axis=-1)[None, :]
  return log_p.astype(jnp.float32) + t / jnp.square(1 - t) * (
      dot - t * half_norm
  )


def posterior_mean(
    x: jax.Array, t: jax.Array | float, codes: jax.Array, log_p: jax.Array
) -> jax.Array:
  """(N, C) float32 expected code; arguments as for `posterior_logits`.

  A row of `log_p` without support gives zeros, never NaN.
  """
  logits = posterior_logits(x, t, codes, log_p)
  top = jnp.max(logits, axis=-1, keepdims=True)
  w = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
  total = jnp.sum(w, axis=-1, keepdims=True)
  codes = codes.astype(jnp.float32)
  mean = jnp.einsum('nv,vc->nc', w, codes, precision=jax.lax.Precision.HIGHEST)
  return mean / jnp.where(total > 0, total, 1)  # else total >= exp(0)


def velocity(
    x: jax.Array, t: jax.Array | float, codes: jax.Array, log_p: jax.Array
) -> jax.Array:
  """(N, C) float32 velocity dx/dt; arguments as for `posterior_logits`."""
  x = x.astype(jnp.float32)
  return (posterior_mean(x, t, codes, log_p) - x) / (1 - _column(t, x))


@functools.partial(jax.jit, static_argnames=('steps', 'solver', 'chunk'))
def flow_map(
    noise: jax.Array,
    log_p: jax.Array,
    codes: jax.Array,
    *,
    steps: int = 50,
    solver: Solver = 'deis',
    chunk: int | None = None,
) -> jax.Array:
  """Carries noise to codes; over Gaussian noise the codes follow `p`.

  The index is the argmax of the posterior logits at the last time evaluated,
  1 - 1/steps; ties go to the lowest index.

  Args:
    noise: (N, C) standard Gaussian noise.
    log_p: (N, V) log-probabilities, up to a constant per row; codes at -inf are
      never chosen. A row without support gives 0.
    codes: (V, C) codebook.
    steps: number of uniform steps from t=0 to t=1.
    solver: 'deis', 'dpmpp_2m' and 'euler' evaluate once a step, 'heun' twice.
    chunk: tokens to integrate at once, which bounds memory by about
      3 * chunk * V floats; None takes all.

  Returns:
    (N,) int32 indices into `codes`.

  Raises:
    ValueError: if `steps`, `solver` or `chunk` is out of range.
  """
  _check(steps, solver)
  if chunk is not None and chunk < 1:
    raise ValueError(f'chunk is {chunk}; give at least 1, or None for all')

  def index(noise: jax.Array, log_p: jax.Array) -> jax.Array:
    x, _ = _integrate(noise, log_p, codes, steps, solver, keep=False)
    logits = posterior_logits(x, (steps - 1) / steps, codes, log_p)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

  n = noise.shape[0]
  if chunk is None or chunk >= n:
    return index(noise, log_p)
  # Chunk k takes tokens k, k + n_chunks, ...: the leading axis stays whole, so
  # that every device works in every chunk when that axis is sharded.
  n_chunks = -(-n // chunk)

  def split(a: jax.Array) -> jax.Array:
    a = jnp.pad(a, ((0, n_chunks * chunk - n), (0, 0)))
    return jnp.swapaxes(a.reshape(chunk, n_chunks, a.shape[-1]), 0, 1)

  out = jax.lax.map(lambda pair: index(*pair), (split(noise), split(log_p)))
  return out.T.reshape(-1)[:n]


@functools.partial(jax.jit, static_argnames=('steps', 'solver'))
def path(
    noise: jax.Array,
    log_p: jax.Array,
    codes: jax.Array,
    *,
    steps: int = 50,
    solver: Solver = 'deis',
) -> jax.Array:
  """(steps, N, C) float32 states at t = 0, 1/steps, ..., 1 - 1/steps.

  Arguments and errors as for `flow_map`.
  """
  _check(steps, solver)
  last, states = _integrate(noise, log_p, codes, steps, solver, keep=True)
  return jnp.concatenate([states, last[None]])


def _check(steps: int, solver: str) -> None:
  if steps < 1:
    raise ValueError(f'steps is {steps}; give at least 1')
  if solver not in get_args(Solver):
    raise ValueError(
        f'unknown solver {solver!r}; choose one of {get_args(Solver)}'
    )


def _column(t: jax.Array | float, x: jax.Array) -> jax.Array:
  return jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1])[:, None]


def _deis(t: np.ndarray) -> np.ndarray:
  """DEIS: weights of the first and second backward difference of D, (n, 2).

  The flow from a to b is exact but for D, the posterior mean, which counts in
  proportion to 1 / (1-t)^2. A parabola through its last three values takes its
  place: D + s * diff + s (s+1) / 2 * diff of diff at t = a + s (b-a). The first
  step has one value, the second has two, which keeps the order at two with a
  smaller error than that of DPM-Solver++(2M).

  Source: tAB-DEIS, arXiv 2204.13902, with D for the noise.
  """
  nodes, measure = np.polynomial.legendre.leggauss(16)
  s = (nodes + 1) / 2
  at = t[:-1, None] + s * np.diff(t)[:, None]
  share = measure / np.square(1 - at)
  share /= share.sum(axis=1, keepdims=True)
  weights = np.stack([share @ s, share @ (s * (s + 1) / 2)], axis=1)
  weights[:1], weights[1:2, 1] = 0, 0
  return weights


def _dpmpp_2m(t: np.ndarray) -> np.ndarray:
  """DPM-Solver++(2M): weights as those of `_deis`, the second always 0.

  1/(2r) with r = h_prev / h and h a step of log-SNR, log(t / (1-t)). The
  log-SNR of t=0 is -inf, so that the first two steps are of first order.

  Source: arXiv 2211.01095, algorithm 2.
  """
  log_snr = np.log(t[1:] / (1 - t[1:]))
  h = np.diff(log_snr)
  weights = np.zeros((len(t) - 1, 2))
  weights[2:, 0] = h[1:] / (2 * h[:-1])
  return weights


def _integrate(
    noise: jax.Array,
    log_p: jax.Array,
    codes: jax.Array,
    steps: int,
    solver: str,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """State at t = 1 - 1/steps and, if `keep`, the states before it, stacked."""
  grid = np.arange(steps) / steps
  multistep = {'deis': _deis, 'dpmpp_2m': _dpmpp_2m}.get(solver)
  weights = multistep(grid) if multistep else np.zeros((steps - 1, 2))

  def step(carry, at):
    x, previous, last_diff = carry
    a, b, weight = at
    mean = posterior_mean(x, a, codes, log_p)
    diff = mean - previous
    # Exact if the mean is constant in [a, b]; Euler and DDIM coincide here.
    guess = mean + weight[0] * diff + weight[1] * (diff - last_diff)
    y = x + (b - a) / (1 - a) * (guess - x)
    if solver == 'heun':
      ends = (mean - x) / (1 - a) + velocity(y, b, codes, log_p)
      y = x + 0.5 * (b - a) * ends
    return (y, mean, diff), x if keep else None

  x, zero = noise.astype(jnp.float32), jnp.zeros(noise.shape, jnp.float32)
  at = tuple(
      jnp.asarray(v, jnp.float32) for v in (grid[:-1], grid[1:], weights)
  )
  (x, *_), states = jax.lax.scan(step, (x, zero, zero), at)
  return x, states
