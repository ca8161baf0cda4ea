# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the critic: a denoiser and a discriminator on its encoder."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from dd_jax import build, checkpoint
from tests import released_files

MLP = dict(name='mlp', shape=[2], width=64, blocks=4)
UNET = dict(
    name='edm_unet', image_size=8, num_classes=3, image_channels=1, ch=16,
    ch_mult=[1, 2], res_blocks=1, attention=[], head_dim=16,
)


def make(denoiser, **fields):
  net = build.build_model(dict(name='critic', denoiser=denoiser, **fields))
  return net, build.build_model(denoiser)


def inputs(denoiser, batch=3):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, *denoiser.config.shape)).astype(np.float32)
  return x, np.array([0.01, 1, 60], np.float32), np.array([0, 1, 2], np.int32)


@pytest.mark.parametrize('config', [MLP, UNET], ids=lambda c: c['name'])
def test_functions(config):
  net, denoiser = make(config)
  params = released_files.random(net, 0)
  given = inputs(denoiser)
  np.testing.assert_array_equal(
      jax.jit(net.apply)(params, *given),
      jax.jit(denoiser.apply)(params['denoiser'], *given),
  )
  run = jax.jit(net.fns['logits'])
  logits = run(params, *given)
  assert logits.shape == (3,) and logits.dtype == np.float32
  features = jax.jit(denoiser.fns['features'])(params['denoiser'], *given)
  other = run(params, *inputs(denoiser)[:2], np.array([2, 1, 0], np.int32))
  assert features.shape[0] == 3
  assert (np.abs(other - logits).max() > 1e-5) == (config is UNET)
  # The decoder has no part in it, and costs nothing.
  slope = jax.jit(jax.grad(lambda p: net.fns['logits'](p, *given).sum()))(
      params
  )
  parts = slope['denoiser']
  late, early = (
      (parts['decoder'], parts['encoder']) if config is UNET
      else (parts['block_2'], parts['block_0'])
  )
  assert not any(np.any(x) for x in jax.tree.leaves(late))
  assert any(np.any(x) for x in jax.tree.leaves(early))
  assert any(np.any(x) for x in jax.tree.leaves(slope['head']))

  def cost(fn):
    compiled = jax.jit(fn).lower(params, *given).compile()
    return compiled.cost_analysis()['flops']

  assert net.flops() > denoiser.flops()
  np.testing.assert_allclose(
      cost(net.fns['logits']) / 3, net.flops() - denoiser.flops(), rtol=0.3
  )
  assert jax.tree.structure(
      jax.tree.map(lambda a: 0, net.axes(), is_leaf=lambda a: type(a) is tuple)
  ) == jax.tree.structure(net.abstract())


def test_it_begins_as_the_teacher():
  net, denoiser = make(MLP)
  teacher = released_files.random(denoiser, 1)
  one, two = (
      net.fns['adopt'](jax.random.key(i), teacher) for i in (0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one['denoiser'], teacher)
  kernels = [p['head']['hidden']['kernel'] for p in (one, two)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0
  # Another critic's denoiser, with a head that knows nothing.
  again = net.fns['adopt'](jax.random.key(1), one)
  jax.tree.map(np.testing.assert_array_equal, again, two)
  small, _ = make(dict(MLP, width=32))
  with pytest.raises(ValueError, match='other weights than the denoiser'):
    small.fns['adopt'](jax.random.key(0), teacher)


def test_without_a_head():
  net, denoiser = make(MLP, head=False)
  assert set(net.fns) == {'forward', 'adopt'}
  assert set(net.abstract()) == set(net.axes()) == {'denoiser'}
  assert net.flops() == denoiser.flops()
  exact = dict(name='mixture', means=[[0.0, 1.0]], std=0.1)
  make(exact, head=False)
  with pytest.raises(ValueError, match="'mixture' has no features"):
    make(exact)
  with pytest.raises(ValueError, match="unknown field 'heads'"):
    make(MLP, heads=True)


def test_an_export_is_rebuilt(tmp_path):
  net, denoiser = make(MLP)
  params = released_files.random(net, 0)
  checkpoint.export(tmp_path / 'critic', net, params, {})
  meta = json.loads((tmp_path / 'critic/model.json').read_text())
  assert meta['config']['denoiser'] == MLP
  loaded, again = checkpoint.load(tmp_path / 'critic')
  given = inputs(denoiser)
  np.testing.assert_array_equal(
      jax.jit(loaded.fns['logits'])(again, *given),
      jax.jit(net.fns['logits'])(params, *given),
  )
