# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A grid of noise levels, and how networks are asked at each of them.

Methods draw places in the grid and see clean data and states; what a network
is told, what it predicts and how its errors weigh is in here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax.flow import edm

LEVELS = 1000

# Networks that are told sigma and predict x0, or the time and the noise.
Kind = Literal['edm', 'vp']

# (states (B, ...), places (B,) in the grid) -> clean data (B, ...).
Denoise = Callable[[jax.Array, jax.Array], jax.Array]
# Number of a step -> standard normal noise (B, ...).
Noise = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Process:
  """States x = alpha * x0 + sigma * epsilon at N levels, least noise first.

  Attributes:
    alpha: (N,) float32.
    sigma: (N,) float32.
    told: (N,) what networks get as the level.
    start: (N,) standard deviation of the noise that samplers start from there.
    weight: (N,) of the squared error of x0 in a network's loss.
    epsilon: whether networks predict the noise, not x0.
  """

  alpha: np.ndarray
  sigma: np.ndarray
  told: np.ndarray
  start: np.ndarray
  weight: np.ndarray
  epsilon: bool = False

  def diffuse(
      self, x0: jax.Array, noise: jax.Array, place: jax.Array
  ) -> jax.Array:
    """States of data (B, ...) at places (B,)."""
    return edm.diffuse(
        x0, noise, _at(self.alpha, place), _at(self.sigma, place)
    )

  def level(self, place: jax.Array) -> jax.Array:
    """What networks are told, (B,)."""
    return _at(self.told, place)

  def denoise(
      self, apply: Callable[..., jax.Array], params: Any, x: jax.Array,
      place: jax.Array, condition: Any,
  ) -> jax.Array:
    """Clean data, float32, by a network `(params, x, level, condition)`."""
    out = apply(params, x, self.level(place), condition).astype(jnp.float32)
    if not self.epsilon:
      return out
    return edm.x0_of_epsilon(
        x, out, _at(self.alpha, place), _at(self.sigma, place)
    )

  def denoise_ve(
      self, apply: Callable[..., jax.Array], params: Any, x: jax.Array,
      sigma: jax.Array, condition: Any,
  ) -> jax.Array:
    """Clean data of VE states x0 + sigma * epsilon, also between the levels.

    Args:
      apply: the network, as in `denoise`.
      params: of the network.
      x: (B, ...).
      sigma: (B,), within `visited(...)`.
      condition: of every example.
    """
    if not self.epsilon:
      return apply(params, x, sigma, condition)
    alpha, _ = edm.vp_of_ve(sigma)
    time = edm.index_of_sigma(sigma, self.sigma / self.alpha)
    state = alpha.reshape(-1, *[1] * (x.ndim - 1)) * x
    out = apply(params, state, time, condition).astype(jnp.float32)
    return edm.x0_of_epsilon(x, out, 1.0, sigma)

  def visited(self, steps: int) -> np.ndarray:
    """VE levels of a sampler of many steps, from the greatest to 0."""
    if not self.epsilon:
      return edm.sampling_sigmas(steps)
    least, most = (float(self.sigma[i] / self.alpha[i]) for i in (0, -1))
    return edm.sampling_sigmas(steps, sigma_min=least, sigma_max=most)

  def error(
      self, x0: jax.Array, target: jax.Array, place: jax.Array
  ) -> jax.Array:
    """Weighted mean squared error of each example, (B,)."""
    squares = jnp.square(x0 - target).reshape(x0.shape[0], -1)
    return _at(self.weight, place) * squares.mean(-1)

  def input_of_step(
      self, denoise: Denoise, levels: Sequence[int], step: Any,
      first: jax.Array, fresh: Noise,
  ) -> jax.Array:
    """What a sampler of few steps gives its network at one of them.

    At step 0 that is noise alone; at step k, the clean data of step k - 1 with
    fresh noise of level k.

    Args:
      denoise: the network.
      levels: places in the grid, one for each step.
      step: which one; an int or an int32 scalar.
      first: standard normal noise (B, ...) of step 0.
      fresh: noise of the later steps.

    Source: DMD2 (arXiv 2405.14867), sections 4.4 and 4.5.
    """
    x = float(self.start[levels[0]]) * first
    if len(levels) == 1:
      return x
    places = jnp.asarray(levels, jnp.int32)

    def body(k, x):
      now, after = (
          jnp.broadcast_to(places[i], x.shape[:1]) for i in (k, k + 1)
      )
      return self.diffuse(denoise(x, now), fresh(k + 1), after)

    return jax.lax.fori_loop(0, step, body, x)

  def sample(
      self, denoise: Denoise, levels: Sequence[int], first: jax.Array,
      fresh: Noise,
  ) -> jax.Array:
    """Clean data of a sampler of few steps; see `input_of_step`."""
    x = self.input_of_step(denoise, levels, len(levels) - 1, first, fresh)
    return denoise(x, jnp.full(x.shape[:1], levels[-1], jnp.int32))


def nothing(condition: Any, classes: int) -> Any:
  """The condition that stands for none: no class, or captions of zeros.

  Args:
    condition: labels (B,) int32 or a dict of captions.
    classes: how many the network has.
  """
  if isinstance(condition, Mapping):
    return jax.tree.map(jnp.zeros_like, condition)
  return jnp.full_like(condition, classes)


def guided(
    apply: Callable[..., jax.Array], scale: float, classes: int
) -> Callable[..., jax.Array]:
  """A network with guidance: without + scale * (with - without) condition.

  Both are one call on twice the batch. A scale of 1 is the network itself.

  Args:
    apply: `(params, x, level_B, condition)` -> x0 or noise.
    scale: of the guidance.
    classes: see `nothing`.

  Source: classifier-free guidance (arXiv 2207.12598).
  """
  if scale == 1:
    return apply

  def both(
      params: Any, x: jax.Array, level: jax.Array, condition: Any
  ) -> jax.Array:
    twice = jax.tree.map(
        lambda *parts: jnp.concatenate(parts),
        (x, level, nothing(condition, classes)), (x, level, condition),
    )
    without, wanted = jnp.split(apply(params, *twice), 2)
    return without + scale * (wanted - without)

  return both


def ve(sigma_data: float, count: int = LEVELS) -> Process:
  """The grid of EDM: networks are told sigma and predict x0.

  Source: EDM (arXiv 2206.00364), table 1 and eq. 5.
  """
  sigma = edm.karras_sigmas(count)
  return Process(
      alpha=np.ones_like(sigma), sigma=sigma, told=sigma, start=sigma,
      weight=edm.loss_weight(sigma, sigma_data),
  )


def vp() -> Process:
  """The grid of Stable Diffusion: networks are told t and predict the noise.

  Samplers start from noise of standard deviation one, whatever they tell the
  network. The weight makes the error that of the noise.
  """
  bars = edm.alpha_bars()
  alpha, sigma = np.sqrt(bars), np.sqrt(1 - bars)
  return Process(
      alpha=alpha, sigma=sigma, told=np.arange(len(bars), dtype=np.float32),
      start=np.ones_like(alpha), weight=(alpha / sigma) ** 2, epsilon=True,
  )


def make(kind: Kind, network: Any) -> Process:
  """The grid of a kind of networks, for one of this config."""
  return vp() if kind == 'vp' else ve(network.sigma_data)


def _at(table: np.ndarray, place: jax.Array) -> jax.Array:
  return jnp.asarray(table)[place]
