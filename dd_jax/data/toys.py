# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Points of the plane from densities that are known exactly."""

from __future__ import annotations

import dataclasses

import numpy as np

from dd_jax.data.sources import SPLITS, ArraySource

_SEEDS = {'train': 20260201, 'heldout': 20260202}
TEST_SEED = 20260210  # and those after it: points of no split


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """Round Gaussians of equal weight.

  Attributes:
    means: (K, D) float64.
    std: of every one, in all directions.
  """

  means: np.ndarray
  std: float

  @property
  def sigma_data(self) -> float:
    """Root of the mean variance of a coordinate."""
    return float(np.sqrt(self.means.var(axis=0).mean() + self.std**2))

  def sample(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, D) float64 and the int32 numbers of their Gaussians.

    They are made of raw Philox bits, whose stream NumPy guarantees.
    """
    size = self.means.shape[1]
    bits = np.random.Philox(seed).random_raw((1 + 2 * size) * count)
    draws = ((bits >> np.uint64(11)) * 2.0**-53).reshape(1 + 2 * size, count)
    part = (draws[0] * len(self.means)).astype(np.int32)
    radius = np.sqrt(-2 * np.log1p(-draws[1 : 1 + size]))
    noise = radius * np.cos(2 * np.pi * draws[1 + size :])
    return self.means[part] + self.std * noise.T, part

  def log_density(self, x: np.ndarray, sigma: float = 0.0) -> np.ndarray:
    """Of points (..., D) with noise of standard deviation `sigma` added."""
    joint, variance = self._joint(x, sigma)
    top = joint.max(axis=-1, keepdims=True)
    total = np.log(np.exp(joint - top).mean(axis=-1)) + top[..., 0]
    return total - 0.5 * x.shape[-1] * np.log(2 * np.pi * variance)

  def score(self, x: np.ndarray, sigma: float = 0.0) -> np.ndarray:
    """Gradient (..., D) of `log_density`."""
    joint, variance = self._joint(x, sigma)
    weights = np.exp(joint - joint.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ self.means - x) / variance

  def denoise(self, x: np.ndarray, sigma: float) -> np.ndarray:
    """The posterior mean of points, by Tweedie's formula."""
    return x + sigma**2 * self.score(x, sigma)

  def _joint(self, x: np.ndarray, sigma: float) -> tuple[np.ndarray, float]:
    variance = self.std**2 + sigma**2
    squares = np.square(x[..., None, :] - self.means).sum(-1)
    return -0.5 * squares / variance, variance


def checkerboard(std: float = 0.06) -> Mixture:
  """Eight Gaussians at the black cells of a 4x4 board on [-1, 1]^2."""
  cells = np.linspace(-1, 1, 4)
  return Mixture(np.array([
      (cells[i], cells[j])
      for i in range(4) for j in range(4) if (i + j) % 2 == 0
  ]), std)


def toy2d(split: str, *, count: int = 20_000, std: float = 0.06) -> ArraySource:
  """Points of `checkerboard`, drawn once and for all.

  Args:
    split: 'train' or 'heldout', drawn apart.
    count: number of points.
    std: of every Gaussian.

  Returns:
    Records `image` float32 (2,), under the name that all data have, and
    `label` int32 in [0, 8), the number of the Gaussian.

  Raises:
    ValueError: there is no such split.
  """
  if split not in SPLITS:
    raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
  mixture = checkerboard(std)
  points, part = mixture.sample(count, _SEEDS[split])
  return ArraySource(
      {'image': points.astype(np.float32), 'label': part},
      num_classes=len(mixture.means),
  )
