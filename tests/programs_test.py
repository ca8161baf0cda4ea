# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of sampling programs on networks that are known exactly."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import programs
from dd_jax.flow import edm, process
from dd_jax.ops import mixture

MEANS = np.array([[-1.0, 0.5], [0.7, -0.2], [0.3, 1.0]], np.float32)


def exact(x, sigma):
  return mixture.posterior_mean(
      x, sigma, jnp.asarray(MEANS), jnp.zeros(3), 0.1
  )


def network(apply):
  """A model that is one function, of images that are vectors."""
  config = types.SimpleNamespace(sigma_data=0.5, num_classes=0)
  return types.SimpleNamespace(apply=apply, config=config)


def told_sigma(params, x, sigma, condition):
  del params, condition
  return exact(x, sigma)


def told_time(params, x, time, condition):
  """The noise in VP states, where the time may be between two levels."""
  del params, condition
  grid = process.vp()
  sigma = edm.sigma_of_index(time, grid.sigma / grid.alpha)
  alpha = edm.vp_of_ve(sigma)[0][:, None]
  return (x / alpha - exact(x / alpha, sigma)) / sigma[:, None]


@pytest.fixture
def noise():
  return np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)


def distance(points):
  """Of samples to the nearest Gaussian, and how many each has."""
  apart = np.linalg.norm(np.asarray(points)[:, None] - MEANS[None], axis=-1)
  return apart.min(1), np.bincount(apart.argmin(1), minlength=3)


def test_many_steps_of_both_kinds_of_networks(noise):
  found = {
      kind: jax.jit(lambda x, net=net, kind=kind: programs.denoised(
          net, {}, x, None, steps=20, kind=kind
      ))(noise) for kind, net in (
          ('edm', network(told_sigma)), ('vp', network(told_time))
      )
  }
  sigmas = process.vp().visited(20)
  assert sigmas.shape == (21,) and sigmas[-1] == 0
  np.testing.assert_allclose(sigmas[0], 14.61, rtol=1e-3)
  # What the times say is what the levels say.
  np.testing.assert_allclose(
      found['vp'], edm.heun(exact, sigmas[0] * noise, sigmas), atol=2e-3
  )
  for points in found.values():
    apart, counts = distance(points)
    assert np.mean(apart < 0.3) > 0.95 and counts.min() > 50


def test_few_steps_of_both_kinds_of_networks(noise):
  keys = programs.fresh_keys(0, jnp.arange(len(noise)))
  for kind, net, levels in (
      ('edm', network(told_sigma), (999, 500, 350, 250)),
      ('vp', network(told_time), (999, 600, 300, 100)),
  ):
    run = jax.jit(lambda x, levels, net=net, kind=kind: programs.few_step(
        net, {}, x, None, keys, levels=levels, kind=kind
    ), static_argnames='levels')
    # From noise alone at most a mean; later steps settle for a Gaussian.
    one, four = run(noise, levels[:1]), run(noise, levels)
    apart = [np.mean(distance(points)[0] < 0.3) for points in (one, four)]
    assert apart[0] < 0.3 and apart[1] > 0.6, (kind, apart)
