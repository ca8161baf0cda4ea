# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""How well each solver of the flow agrees with a fine float64 solution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax.flow import discrete

REFERENCE_STEPS = 2000
STEPS = (10, 20, 50, 100)
SOLVERS: tuple[discrete.Solver, ...] = ('euler', 'heun', 'dpmpp_2m', 'deis')
_CHUNK = 128  # tokens; keeps the solvers' working set in the cache
_REFERENCE_CHUNK = 4


@dataclasses.dataclass(frozen=True)
class Problem:
  """Random codes and next-token distributions.

  Codes are standard normal. Each token has its own distribution: a softmax of
  normal logits of standard deviation `spread`, cut to the `top_k` largest.

  Attributes:
    name: for the table.
    vocab_size: number of codes.
    code_dim: size of a code.
    top_k: codes in the support of each token.
    unit_norm: whether codes are divided by their length.
    spread: of the logits.
  """

  name: str
  vocab_size: int
  code_dim: int
  top_k: int
  unit_norm: bool
  spread: float = 2.5

  def draw(
      self, tokens: int, seed: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise (N, C), log_p (N, V) and codes (V, C), all float32."""
    rng = np.random.default_rng(seed)
    codes = rng.standard_normal((self.vocab_size, self.code_dim))
    if self.unit_norm:
      codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    noise = rng.standard_normal((tokens, self.code_dim), np.float32)
    log_p = rng.standard_normal((tokens, self.vocab_size), np.float32)
    log_p *= self.spread
    cut = np.partition(log_p, -self.top_k, axis=1)[:, -self.top_k, None]
    log_p = np.where(log_p < cut, -np.inf, log_p)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    return noise, log_p, codes.astype(np.float32)


PROBLEMS = (
    Problem('VAR', 4096, 32, top_k=900, unit_norm=False),
    Problem('LlamaGen', 16384, 8, top_k=4000, unit_norm=True),
)


def reference(
    noise: np.ndarray,
    log_p: np.ndarray,
    codes: np.ndarray,
    *,
    steps: int = REFERENCE_STEPS,
) -> np.ndarray:
  """Indices (N,) of the flow by Heun's method in float64.

  Written apart from `flow.discrete`: codes outside the support are left out
  rather than given no weight. Rows of `log_p` need supports of one size.
  """
  support = np.argsort(~np.isfinite(log_p), axis=1, kind='stable')
  support = support[:, : np.isfinite(log_p[0]).sum()]
  with jax.enable_x64(True):
    arrays = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64),
        (noise, np.take_along_axis(log_p, support, axis=1), codes),
    )
    best = _heun(*arrays, jnp.asarray(support), steps=steps)
    return np.asarray(best)


@functools.partial(jax.jit, static_argnames=('steps',))
def _heun(noise, log_p, codes, support, *, steps):
  half_norm = 0.5 * jnp.square(codes).sum(-1)

  def token(args):
    x, log_p, support = args
    c = codes[support].T  # contiguous along the support, for long vectors
    half = half_norm[support]

    def logits(x, t):
      return log_p + t / (1 - t) ** 2 * (x @ c - t * half)

    def velocity(x, t):
      return (c @ jax.nn.softmax(logits(x, t)) - x) / (1 - t)

    def step(i, x):
      t, u = i / steps, (i + 1) / steps
      v = velocity(x, t)
      return x + 0.5 / steps * (v + velocity(x + v / steps, u))

    x = jax.lax.fori_loop(0, steps - 1, step, x)
    return support[jnp.argmax(logits(x, 1 - 1 / steps))]

  return jax.lax.map(
      token, (noise, log_p, support), batch_size=_REFERENCE_CHUNK
  )


def measure(
    problem: Problem,
    tokens: int,
    seed: int = 0,
    *,
    steps: Iterable[int] = STEPS,
    solvers: Sequence[discrete.Solver] = SOLVERS,
) -> dict[tuple[int, str], float]:
  """(steps, solver) to the fraction of tokens that reach the same code."""
  noise, log_p, codes = problem.draw(tokens, seed)
  expected = reference(noise, log_p, codes)
  return {
      (n, solver): float(np.mean(expected == np.asarray(discrete.flow_map(
          noise, log_p, codes, steps=n, solver=solver, chunk=_CHUNK
      ))))
      for n in steps
      for solver in solvers
  }
