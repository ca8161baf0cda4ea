# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the scalings of denoisers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from dd_jax.ops.preconditioning import scalings


def test_inputs_and_targets_have_variance_one():
  rng = np.random.default_rng(0)
  for sigma in (0.01, 0.5, 20.0):
    x0 = 0.6 * rng.normal(size=200_000)
    x = x0 + sigma * rng.normal(size=x0.size)
    s = scalings(jnp.asarray(sigma), 0.6)
    np.testing.assert_allclose((s.inner * x).std(), 1, rtol=1e-2)
    target = (x0 - s.skip * x) / s.out
    np.testing.assert_allclose(target.std(), 1, rtol=1e-2)
    # The skip leaves as little as possible to the network.
    assert abs((target * x).mean()) < 1e-2 * x.std()
    np.testing.assert_allclose(s.noise, np.log(sigma) / 4, rtol=1e-5)
