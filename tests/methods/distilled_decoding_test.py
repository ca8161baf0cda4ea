# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of Distilled Decoding's loss and settings; of its steps by mesh."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build
from dd_jax.method import Inputs, Role
from dd_jax.methods.distilled_decoding import Config, DistilledDecoding
from tests import released_files

B = 6
VAE = dict(
    name='llamagen_vq', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, code_dim=4, vocab_size=16,
)
STUDENT = dict(
    name='dd_llamagen', num_classes=4, depth=1, width=16, heads=2,
    latent_size=4, vocab_size=16, code_dim=4, mlp_width=32,
)
VQVAE = dict(
    name='vqvae', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, vocab_size=16,
    patch_nums=[1, 2, 4],
)
VAR_STUDENT = dict(
    name='dd_var', num_classes=4, depth=1, width=16, heads=2,
    patch_nums=[1, 2, 4], vocab_size=16, code_dim=4,
)
# Steps on both sides of the split, and how many tokens stand before each.
FAMILIES = {
    'var': (VAR_STUDENT, VQVAE, (0, 1, 2), 1, {0, 1, 5}, 1),
    'llamagen': (STUDENT, VAE, (0, 3, 9), 5, {0, 3, 9}, 5),
}


def method(student=STUDENT, vae=VAE, frozen=None, **fields):
  student, vae = build.build_model(student), build.build_model(vae)
  role = Role(student, None, lambda key, _: student.init(key))
  return DistilledDecoding(
      Config(**fields), {'student': role}, {'vae': vae, **(frozen or {})}
  )


@functools.cache
def case(family):
  """A student with random weights, and a batch whose examples mix steps."""
  student, vae, t_set, split, offsets, _ = FAMILIES[family]
  # Stands in for LPIPS; its parameter is its scale.
  network = SimpleNamespace(
      fns={'distance': lambda p, a, b: p * jnp.abs(a - b).max((1, 2, 3))}
  )
  made = method(
      student, vae, {'perceptual': network}, t_set=t_set, split=split,
      ce=0.7, perceptual=2.0, embedding=0.3,
  )
  model = made.roles['student'].model
  rng = np.random.default_rng(1)
  batch = {
      'indices': rng.integers(0, 16, (B, model.config.offsets[-1])),
      'label': rng.integers(0, 4, B),
      'seed': np.array([5] * 3 + [6] * 3, np.uint32),
      'pair_id': np.array([0, 1, 2] * 2, np.uint32),
  }
  frozen = {
      'vae': released_files.random(made.frozen['vae'], 2), 'perceptual': 3.0,
  }
  key = jax.random.key(4)
  inputs = Inputs(
      {'student': released_files.random(model, 0)}, frozen, {}, batch, key,
      jax.random.split(key, B), {}, {},
  )
  shared = jax.device_get(jax.jit(made.prepare)(inputs))
  assert {*shared['offset'].tolist()} == offsets
  return made, inputs._replace(shared=shared)


@functools.cache
def by_definition(family):
  """Parts of the loss token by token, images of the student and of codes."""
  made, inputs = case(family)
  offset, stop = inputs.shared['offset'], FAMILIES[family][-1]
  codebook = inputs.frozen['vae']['embedding']
  if family == 'llamagen':  # its codes have length 1
    codebook = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
  indices = inputs.batch['indices']
  codes = codebook[indices]
  noise = np.stack([
      jax.random.normal(
          jax.random.fold_in(jax.random.key(seed), number), codes.shape[1:]
      )
      for seed, number in zip(
          inputs.batch['seed'], inputs.batch['pair_id'], strict=True
      )
  ])
  x = np.stack([
      np.concatenate([codes[i, :k], noise[i, k:]])
      for i, k in enumerate(offset)
  ])
  out = jax.device_get(jax.jit(made.roles['student'].model.apply)(
      inputs.params['student'], x, inputs.batch['label'], offset
  ))
  best = out['logits'].argmax(-1)
  shifted = out['logits'] - out['logits'].max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  places = [(i, j) for i, k in enumerate(offset) for j in range(k, x.shape[1])]
  merged = np.stack([
      np.concatenate([
          codes[i, :k],
          codebook[best[i, k:stop]],
          out['codes'][i, max(k, stop):],
      ])
      for i, k in enumerate(offset)
  ])
  fns = made.frozen['vae'].fns

  @jax.jit
  def decode(params, x):
    return fns['decode'](params, fns['accumulate'](params, x))

  images = jax.device_get(
      decode(inputs.frozen['vae'], np.concatenate([merged, codes]))
  )
  return {
      'cross_entropy': np.mean([-log_p[p][indices[p]] for p in places]),
      'embedding': np.mean(
          [np.square(out['codes'][p] - codes[p]) for p in places]
      ),
      'accuracy': np.mean([best[p] == indices[p] for p in places]),
  }, images[:B], images[B:]


@pytest.mark.parametrize('family, counts', [
    ('var', {'l2': 0}),
    ('llamagen', {'l1': 2, 'network': 0, 'none': 0}),
])
def test_the_loss_is_what_its_definition_says(family, counts):
  made, inputs = case(family)

  def run(inputs, norm, count):
    config = dataclasses.replace(
        made.config, loss_norm=norm, perceptual_batch=count
    )
    one = dataclasses.replace(made, config=config)
    given = inputs._replace(shared=one.prepare(inputs))
    return one.loss(inputs.params['student'], given)

  parts, image, target = by_definition(family)
  assert 0 < parts['accuracy'] < 1
  difference = np.abs(image - target)
  distances = {
      'l2': {'perceptual': np.square(difference).mean()},
      'l1': {'perceptual': difference[[0, 3]].mean()},
      'network': {'perceptual': 3 * difference.max((1, 2, 3)).mean()},
      'none': {},
  }
  # One program, which shares what they have in common.
  losses = jax.jit(
      lambda inputs: {n: run(inputs, n, count) for n, count in counts.items()}
  )(inputs)
  for norm, got in losses.items():
    want = parts | distances[norm]
    assert got.metrics.keys() == want.keys()
    for name, value in want.items():
      np.testing.assert_allclose(got.metrics[name], value, 2e-4, err_msg=norm)
    np.testing.assert_allclose(
        got.loss,
        0.7 * want['cross_entropy'] + 0.3 * want['embedding']
        + 2.0 * want.get('perceptual', 0.0), rtol=2e-4,
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_codes_are_read_before_the_step_and_noise_behind_it(family):
  made, inputs = case(family)

  # Its targets are indices: what moves it has been given to the student.
  def cross_entropy(codes, noise):
    shared = inputs.shared | {'codes': codes, 'noise': noise}
    return made.loss(
        inputs.params['student'], inputs._replace(shared=shared)
    ).metrics['cross_entropy']

  codes, noise = inputs.shared['codes'], inputs.shared['noise']
  slopes = jax.jit(jax.grad(cross_entropy, (0, 1)))(codes, noise)
  read_codes, read_noise = (np.asarray(s).any(axis=-1) for s in slopes)
  before = np.arange(codes.shape[1]) < inputs.shared['offset'][:, None]
  np.testing.assert_array_equal(read_codes, before)
  np.testing.assert_array_equal(read_noise, ~before)


@pytest.mark.parametrize('family', FAMILIES)
def test_each_head_learns_from_the_tokens_that_it_answers_for(family):
  made, inputs = case(family)
  # A student whose parameters are what it says.
  student = SimpleNamespace(
      config=made.roles['student'].model.config,
      apply=lambda params, *_: params,
  )
  made = dataclasses.replace(made, roles={'student': Role(student, None, None)})
  codes = inputs.shared['codes']
  out = {
      'logits': jax.random.normal(jax.random.key(0), (*codes.shape[:2], 16)),
      'codes': jax.random.normal(jax.random.key(1), codes.shape),
  }
  slopes = jax.jit(jax.jacrev(lambda p: made.loss(p, inputs).metrics))(out)
  place = np.arange(codes.shape[1])
  behind = place >= inputs.shared['offset'][:, None]
  decoded = behind & (place >= FAMILIES[family][-1])
  for name, logits, vectors in [
      ('cross_entropy', behind, False),
      ('embedding', False, behind),
      # Which code is best has no gradient.
      ('perceptual', False, decoded),
  ]:
    for head, wanted in ('logits', logits), ('codes', vectors):
      got = np.asarray(slopes[name][head]).any(axis=-1)
      np.testing.assert_array_equal(
          got, np.broadcast_to(wanted, got.shape), f'{name}, {head}'
      )


def test_steps_are_drawn_by_each_example_as_often_as_they_are_named():
  made, inputs = method(t_set=(0, 4, 4), loss_norm='none'), case('llamagen')[1]
  batch = {
      name: np.repeat(inputs.batch[name], 500, axis=0)
      for name in ('indices', 'seed', 'pair_id')
  }
  keys = jax.random.split(jax.random.key(0), 500 * B)

  @jax.jit
  def offsets(keys):
    return made.prepare(inputs._replace(batch=batch, keys=keys))['offset']

  drawn = np.asarray(offsets(keys))
  assert {*drawn.tolist()} == {0, 4}
  np.testing.assert_allclose(np.mean(drawn == 4), 2 / 3, atol=0.03)
  np.testing.assert_array_equal(offsets(keys[::-1]), drawn[::-1])


def test_flops_count_the_images_that_are_compared():
  def count(batch_size=8, **fields):
    made = method(**fields)
    return made.flops(made.updates(0), batch_size)

  plain, all_of_them = count(loss_norm='none'), count()
  assert plain == 8 * 3 * build.build_model(STUDENT).flops()
  assert all_of_them - plain == 4 * (count(perceptual_batch=2) - plain) > 0
  assert count(perceptual_batch=99) == all_of_them


@pytest.mark.parametrize('count, expected', [
    (0, range(8)), (8, range(8)), (9, range(8)), (2, [0, 4]),
    (4, range(0, 8, 2)),
    (3, range(3)),
])
def test_images_are_compared_of_every_part_of_a_batch(count, expected):
  picked = method(perceptual_batch=count)._some(jnp.arange(16).reshape(8, 2))
  assert picked[:, 0].tolist() == [2 * i for i in expected]


@pytest.mark.parametrize('fields, message', [
    ({'t_set': (0, 16)}, r't_set=\(0, 16\): expected steps in \[0, 16\)'),
    ({'t_set': ()}, 't_set'),
    ({'split': 17}, r'split=17: expected a step in \[0, 16\]'),
    ({'loss_norm': 'l3'}, "loss_norm='l3'"),
    ({'perceptual_batch': -3}, 'perceptual_batch=-3 is negative'),
    ({'loss_norm': 'network'}, "needs a frozen network 'perceptual'"),
])
def test_settings_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    method(**fields)
