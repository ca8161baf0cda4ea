# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of LlamaGen's training: what is predicted, and of what condition."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build
from dd_jax.method import Inputs, Role
from dd_jax.methods.llamagen import Config, TrainLlamaGen
from tests import released_files

B = 4
VQ = dict(
    name='llamagen_vq', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, code_dim=4, vocab_size=16,
)
GPT = dict(
    name='llamagen', depth=1, width=16, heads=2, latent_size=4, vocab_size=16,
    code_dim=4, mlp_width=32,
)
KINDS = {
    'classes': dict(num_classes=4),
    'captions': dict(num_classes=0, caption_length=3, caption_dim=5),
}


@functools.cache
def networks(kind):
  model, vae = (
      build.build_model(fields) for fields in (GPT | KINDS[kind], VQ)
  )
  # As `init` draws them, all logits are 0.
  params, vae_params = (
      released_files.random(m, seed) for seed, m in enumerate((model, vae))
  )
  return model, vae, params, vae_params


def method(model, vae, dropout=0.0):
  role = Role(model, None, lambda key, _: model.init(key))
  return TrainLlamaGen(
      Config(condition_dropout=dropout), {'teacher': role}, {'vae': vae}
  )


def make_inputs(kind, batch, count=B):
  _, _, params, vae_params = networks(kind)
  key = jax.random.key(3)
  return Inputs(
      {'teacher': params}, {'vae': vae_params}, None, batch, key,
      jax.random.split(key, count), {}, {},
  )


def steps(made, training=True):
  """A jitted `inputs -> (what the loss says, inputs with what it shares)`."""

  @jax.jit
  def run(inputs):
    inputs = inputs._replace(shared=made.prepare(inputs), training=training)
    return made.loss(inputs.params['teacher'], inputs), inputs

  return run


@functools.cache
def program(kind, dropout):
  model, vae, *_ = networks(kind)
  return steps(method(model, vae, dropout))


def loss(kind, dropout, batch):
  return program(kind, dropout)(make_inputs(kind, batch))


def batches(kind):
  """Two that differ in their conditions alone."""
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.uniform(-1, 1, (B, 4, 4, 1)), jnp.float32)
  for label in (0, 3):
    batch = {'image': image, 'label': jnp.full(B, label, jnp.int32)}
    if kind == 'captions':
      features = jnp.full((B, 3, 5), label, jnp.float32)
      batch |= {'features': features, 'mask': jnp.ones((B, 3), bool)}
    yield batch


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_is_that_of_the_next_token(kind):
  model, _, params, _ = networks(kind)
  batch = next(batches(kind))
  got, inputs = loss(kind, 0.0, batch)
  indices = inputs.shared['indices']

  @jax.jit
  def by_steps(params, condition):
    """Logits (L, B, V), token by token as a sampler gets them."""
    cache = model.fns['init_cache'](params, B)
    first, cache = model.fns['prefill'](
        params, cache, condition, indices[:, :0]
    )

    def step(cache, token):
      logits, cache = model.fns['step'](params, cache, *token)
      return cache, logits

    given = indices[:, :-1].T
    _, others = jax.lax.scan(step, cache, (given, jnp.arange(len(given))))
    return jnp.concatenate([first[None], others])

  logits = np.asarray(by_steps(params, inputs.condition)).swapaxes(0, 1)
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  hit = np.take_along_axis(log_p, np.asarray(indices)[..., None], axis=2)
  np.testing.assert_allclose(got.loss, -hit.mean(), rtol=1e-5)
  assert got.metrics['cross_entropy'] == got.loss
  accuracy = np.mean(logits.argmax(axis=-1) == indices)
  assert 0 < accuracy < 1
  np.testing.assert_allclose(got.metrics['accuracy'], accuracy, rtol=1e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_dropped_has_no_say(kind):
  (kept_a, _), (kept_b, _) = (loss(kind, 0.0, b) for b in batches(kind))
  (null_a, _), (null_b, _) = (loss(kind, 1.0, b) for b in batches(kind))
  assert abs(kept_a.loss - kept_b.loss) > 1e-4
  np.testing.assert_allclose(null_a.loss, null_b.loss, rtol=1e-6)


def seen(inputs, kind, dropout):
  """The condition and keys that the network is called with."""
  model, vae, params, _ = networks(kind)
  calls = []

  def apply(params, condition, indices, *, key):
    assert indices.shape[1] == inputs.shared['indices'].shape[1] - 1
    calls.append((jax.device_get(condition), key))
    return jnp.zeros((*inputs.shared['indices'].shape, 16))

  fake = SimpleNamespace(apply=apply, config=model.config, fns=model.fns)
  method(fake, vae, dropout).loss(params, inputs)
  return calls[0]


@pytest.mark.parametrize('kind', KINDS)
def test_conditions_are_dropped_by_each_examples_key(kind):
  count = 4000
  batch = {'label': np.arange(count) % 4}
  null = 4
  if kind == 'captions':
    batch = {
        'features': np.broadcast_to(
            np.arange(count, dtype=np.float32)[:, None, None], (count, 3, 5)
        ),
        'mask': np.arange(count)[:, None] % 4 > np.arange(3),
    }
    null = networks(kind)[2]['condition']['null'][None]
  inputs = make_inputs(kind, batch, count)._replace(
      shared={'indices': jnp.zeros((count, 16), jnp.int32)}
  )

  def dropped(inputs, dropout):
    """Which have the null condition; the others have their own."""
    condition, key = seen(inputs, kind, dropout)
    given = inputs.condition
    if kind == 'captions':
      # Where a caption is padded, so is that of none.
      np.testing.assert_array_equal(condition['mask'], given['mask'])
      condition, given = condition['features'], given['features']
    rest = tuple(range(1, condition.ndim))
    none = (condition == null).all(axis=rest)
    np.testing.assert_array_equal(condition[~none], given[~none])
    return none, key

  assert not dropped(inputs, 0.0)[0].any()
  none, keys = dropped(inputs, 0.25)
  np.testing.assert_allclose(none.mean(), 0.25, atol=0.03)
  turned = inputs._replace(keys=inputs.keys[::-1])
  backwards = jax.tree.map(lambda x: x[::-1], batch)
  np.testing.assert_array_equal(
      dropped(turned._replace(batch=backwards), 0.25)[0], none[::-1]
  )
  # What the network drops is drawn apart from the conditions.
  others = jax.vmap(jax.random.bernoulli, (0, None))(keys, 0.25)
  assert abs(np.corrcoef(others, none)[0, 1]) < 0.06


def test_tokens_are_dropped_in_training_and_not_in_sampling():
  _, vae, params, _ = networks('classes')
  batch = next(batches('classes'))
  inputs = make_inputs('classes', batch)
  others = inputs._replace(keys=jax.random.split(jax.random.key(5), B))
  whole, thinned = (
      build.build_model(GPT | KINDS['classes'] | {'token_dropout': rate})
      for rate in (0.0, 0.5)
  )
  found = {}
  for name, model in (('whole', whole), ('thinned', thinned)):
    run = steps(method(model, vae))
    found[name] = [float(run(given)[0].loss) for given in (inputs, others)]
  # The keys say what is dropped, if anything is.
  assert found['whole'][0] == found['whole'][1]
  assert len({found['whole'][0], *found['thinned']}) == 3
  looked_at, _ = steps(method(thinned, vae, 0.9), training=False)(inputs)
  np.testing.assert_allclose(looked_at.loss, found['whole'][0], rtol=1e-6)
  # Without keys, as in sampling, nothing is.
  tokens = np.zeros((B, 15), np.int32)
  np.testing.assert_array_equal(*(
      jax.jit(m.apply)(params, batch['label'], tokens)
      for m in (whole, thinned)
  ))
