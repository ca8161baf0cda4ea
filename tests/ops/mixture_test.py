# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of exact densities of mixtures."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dd_jax.ops import mixture

MEANS = np.array([[0.5, -1.0], [-0.5, 0.5]], np.float32)
LOG_WEIGHTS = np.log(np.array([0.8, 0.2], np.float32))


def test_density_has_mass_one():
  line = np.linspace(-6, 6, 201, dtype=np.float32)
  x = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
  found = mixture.log_density(
      x, jnp.full(len(x), 0.5), MEANS, LOG_WEIGHTS, 0.2
  )
  mass = np.exp(found).sum() * (line[1] - line[0]) ** 2
  np.testing.assert_allclose(mass, 1, rtol=1e-3)


def test_posterior_mean_is_the_best_guess():
  """By a regression on draws whose noisy values fall into one bin."""
  rng = np.random.default_rng(0)
  part = (rng.random(400_000) > 0.8).astype(int)
  x0 = MEANS[part] + 0.2 * rng.normal(size=(part.size, 2))
  x = x0 + 0.7 * rng.normal(size=x0.shape)
  point = np.array([0.2, -0.1], np.float32)
  near = np.abs(x - point).max(-1) < 0.08
  assert near.sum() > 1000
  found = mixture.posterior_mean(
      point[None], jnp.array([0.7]), MEANS, LOG_WEIGHTS, 0.2
  )[0]
  np.testing.assert_allclose(found, x0[near].mean(0), atol=0.03)
