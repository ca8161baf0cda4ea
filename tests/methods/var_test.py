# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of VAR's training: what is predicted, and of which class."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build
from dd_jax.method import Inputs, Role
from dd_jax.methods.var import Config, TrainVAR
from tests import released_files

B = 6
VQVAE = dict(
    name='vqvae', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, vocab_size=16,
    patch_nums=[1, 2, 4],
)
VAR = dict(
    name='var', num_classes=4, depth=1, width=16, heads=2,
    patch_nums=[1, 2, 4], vocab_size=16, code_dim=4,
)


def make_inputs(batch, shared=None, params=None, frozen=None):
  key = jax.random.key(3)
  keys = jax.random.split(key, len(batch['label']))
  return Inputs(
      {'teacher': params}, {'vae': frozen}, {}, batch, key, keys, {},
      shared or {},
  )


def by_steps(model, vae, params, frozen, indices, labels):
  """Logits of all tokens, scale by scale as a sampler gets them."""
  cache = model.fns['init_cache'](params, B)
  so_far, maps, logits = jnp.zeros((B, 4, 4, 4)), None, []
  places = itertools.pairwise(model.config.offsets)
  for scale, (start, stop) in enumerate(places):
    ours, cache = model.fns['step'](params, cache, labels, maps, scale)
    logits.append(ours)
    codes = frozen['embedding'][indices[:, start:stop]]
    so_far, maps = vae.fns['advance'](frozen, so_far, codes, scale)
  return jnp.concatenate(logits, axis=1)


@pytest.mark.parametrize('dropout, smooth', [(0.0, 0.0), (1.0, 0.2)])
def test_the_loss_is_that_of_each_scale_after_the_coarser_ones(dropout, smooth):
  model, vae = build.build_model(VAR), build.build_model(VQVAE)
  params, frozen = (
      released_files.random(m, seed) for seed, m in enumerate((model, vae))
  )
  rng = np.random.default_rng(2)
  batch = {
      'image': rng.uniform(-1, 1, (B, 4, 4, 1)).astype(np.float32),
      'label': rng.integers(0, 4, B),
  }
  made = TrainVAR(
      Config(label_dropout=dropout, label_smoothing=smooth),
      {'teacher': Role(model, None, None)}, {'vae': vae},
  )

  @jax.jit
  def run(inputs):
    inputs = inputs._replace(shared=made.prepare(inputs), training=True)
    return made.loss(inputs.params['teacher'], inputs)

  @jax.jit
  def expected(params, frozen, image, labels):
    indices = vae.fns['to_indices'](frozen, image)
    return indices, by_steps(model, vae, params, frozen, indices, labels)

  got = run(make_inputs(batch, params=params, frozen=frozen))
  labels = np.full(B, 4) if dropout else batch['label']
  indices, logits = jax.device_get(
      expected(params, frozen, batch['image'], labels)
  )
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  nats = -np.take_along_axis(log_p, indices[..., None], axis=-1).mean()
  hits = logits.argmax(axis=-1) == indices
  want = {
      'cross_entropy': nats, 'accuracy': hits.mean(),
      'accuracy_last_scale': hits[:, 5:].mean(),
  }
  assert 0 < want['accuracy'] != want['accuracy_last_scale'] > 0
  assert got.metrics.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got.metrics[name], value, 2e-4, err_msg=name)
  # Smoothed targets: a share of the mass is spread evenly over all codes.
  np.testing.assert_allclose(
      got.loss, (1 - smooth) * nats - smooth * log_p.mean(), rtol=2e-4
  )


def seen(inputs, dropout):
  """The labels and keys that the network is called with."""
  calls = []

  def apply(params, labels, maps, *, key):
    calls.append((np.asarray(labels), key))
    return jnp.zeros((*inputs.shared['indices'].shape, 16))

  model = build.build_model(VAR)
  fake = SimpleNamespace(apply=apply, config=model.config, fns=model.fns)
  made = TrainVAR(
      Config(label_dropout=dropout), {'teacher': Role(fake, None, None)},
      {'vae': build.build_model(VQVAE)},
  )
  made.loss(None, inputs)
  return calls[0]


def test_labels_are_dropped_by_each_examples_key():
  count = 4000
  labels = np.arange(count) % 4
  shared = {'indices': jnp.zeros((count, 21), jnp.int32), 'maps': None}
  inputs = make_inputs({'label': labels}, shared)
  kept, _ = seen(inputs, 0.0)
  np.testing.assert_array_equal(kept, labels)
  got, keys = seen(inputs, 0.25)
  dropped = got == 4  # the class that means none
  np.testing.assert_array_equal(got[~dropped], labels[~dropped])
  np.testing.assert_allclose(dropped.mean(), 0.25, atol=0.03)
  turned, _ = seen(inputs._replace(keys=inputs.keys[::-1]), 0.25)
  np.testing.assert_array_equal(turned == 4, dropped[::-1])
  looked_at, key = seen(inputs._replace(training=False), 0.25)
  np.testing.assert_array_equal(looked_at, labels)
  assert key is None
  # The branches that drop-path skips are drawn apart from the labels.
  skipped = jax.vmap(jax.random.bernoulli, (0, None))(keys, 0.25)
  assert abs(np.corrcoef(skipped, dropped)[0, 1]) < 0.06


def trained(made):
  return lambda p, inputs: made.loss(p, inputs._replace(training=True))


@pytest.mark.parametrize('fields, message', [
    ({'label_dropout': 10}, 'label_dropout=10.*share in'),
    ({'label_smoothing': -0.1}, 'label_smoothing=-0.1'),
])
def test_shares_that_are_none(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(**fields)


@pytest.mark.parametrize('roles, frozen, message', [
    (['teacher'], None, "needs a frozen network 'vae'; there are \\[\\]"),
    (['student'], VQVAE, "needs a role 'teacher'; there are .'student'"),
    (['teacher'], VQVAE | {'vocab_size': 8},
     "'var' predicts 16 codes of size 4, but this 'vqvae' has 8 of size 4"),
])
def test_networks_that_do_not_go_together(roles, frozen, message):
  teacher = Role(build.build_model(VAR), None, None)
  vae = {'vae': build.build_model(frozen)} if frozen else {}
  with pytest.raises(ValueError, match=message):
    TrainVAR(Config(), dict.fromkeys(roles, teacher), vae)


def test_branches_are_skipped_in_training():
  params, made = None, []
  for rate in (0.0, 0.5):
    model = build.build_model(VAR | {'depth': 2, 'drop_path': rate})
    params = params or released_files.random(model, 0)
    made.append(TrainVAR(
        Config(label_dropout=0.0), {'teacher': Role(model, None, None)},
        {'vae': build.build_model(VQVAE)},
    ))
  rng = np.random.default_rng(1)
  shared = {
      'indices': rng.integers(0, 16, (B, 21)),
      'maps': rng.normal(size=(B, 20, 4)).astype(np.float32),
  }
  inputs = make_inputs({'label': np.zeros(B, np.int32)}, shared)
  others = inputs._replace(keys=jax.random.split(jax.random.key(5), B))
  whole, thinned = (
      [float(run(params, given).loss) for given in (inputs, others)]
      for run in (jax.jit(trained(m)) for m in made)
  )
  assert whole[0] == whole[1]
  assert len({whole[0], *thinned}) == 3
