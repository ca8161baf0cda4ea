# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of LlamaGen's training: what is predicted, and of what condition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build
from dd_jax.method import Inputs, Role
from dd_jax.methods.llamagen import Config, TrainLlamaGen

B = 4
VQ = dict(
    name='llamagen_vq', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, code_dim=4, vocab_size=16,
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
  params = model.init(jax.random.key(0))
  # At the start all logits are 0.
  params = params | {'output': {'kernel': 0.1 * jax.random.normal(
      jax.random.key(2), params['output']['kernel'].shape
  )}}
  return model, vae, params, vae.init(jax.random.key(1))


def loss(kind, dropout, batch):
  model, vae, params, vae_params = networks(kind)
  role = Role(model, None, lambda key, _: model.init(key))
  method = TrainLlamaGen(
      Config(condition_dropout=dropout), {'teacher': role}, {'vae': vae}
  )
  key = jax.random.key(3)
  inputs = Inputs(
      {'teacher': params}, {'vae': vae_params}, None, batch, key,
      jax.random.split(key, B), {}, {},
  )
  inputs = inputs._replace(shared=method.prepare(inputs))
  return jax.jit(method.loss)(params, inputs).loss, inputs


def batches(kind):
  """Two that differ in their conditions alone."""
  rng = np.random.default_rng(0)
  image = jnp.asarray(rng.uniform(-1, 1, (B, 8, 8, 1)), jnp.float32)
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
  logits = model.apply(params, inputs.condition, indices[:, :-1])
  log_p = np.asarray(jax.nn.log_softmax(logits))
  hit = np.take_along_axis(log_p, np.asarray(indices)[..., None], axis=2)
  np.testing.assert_allclose(got, -hit.mean(), rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_what_is_dropped_has_no_say(kind):
  (kept_a, _), (kept_b, _) = (loss(kind, 0.0, b) for b in batches(kind))
  (null_a, _), (null_b, _) = (loss(kind, 1.0, b) for b in batches(kind))
  assert abs(kept_a - kept_b) > 1e-4
  np.testing.assert_allclose(null_a, null_b, rtol=1e-6)
