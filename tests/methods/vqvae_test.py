# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the tokenizers' training: its loss, and what becomes of codes."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dd_jax import build
from dd_jax.method import Role
from dd_jax.methods.vqvae import Config, TrainVQVAE
from dd_jax.ops import resize
from dd_jax.state import TrainState
from dd_jax.step import train_step
from tests import released_files

VQVAE = dict(
    name='vqvae', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, vocab_size=16,
    patch_nums=[1, 2, 4],
)
LLAMAGEN = dict(
    name='llamagen_vq', image_size=4, image_channels=1, ch=4, ch_mult=[1],
    res_blocks=1, attention=False, z_channels=4, code_dim=4, vocab_size=16,
)


PATCHGAN = dict(
    name='patchgan', image_size=8, image_channels=1, ch=4, halvings=1
)
OF_8 = dict(VQVAE, image_size=8, ch_mult=[1, 1])


def method(model=VQVAE, frozen=None, others=None, tx=None, **fields):
  nets = {'tokenizer': build.build_model(model)} | {
      name: build.build_model(config) for name, config in (others or {}).items()
  }
  tx = tx or optax.with_extra_args_support(optax.set_to_zero())
  roles = {
      name: Role(net, tx, lambda key, _, net=net: net.init(key))
      for name, net in nets.items()
  }
  return TrainVQVAE(Config(**fields), roles, frozen or {})


def by_scales(model, params, codes):
  """The latent map of the scales up to each, coarsest first."""
  config, f_hat = model.config, jnp.zeros((len(codes), 4, 4, 4))
  for scale, places in enumerate(itertools.pairwise(config.offsets)):
    f_hat, _ = model.fns['advance'](
        params, f_hat, codes[:, slice(*places)], scale
    )
    yield f_hat


def quantize(model, params, image):
  """Indices, latents, their approximations by scale, and images."""

  @jax.jit
  def run(params, image):
    latent = model.fns['encode'](params, image)
    indices = model.fns['to_indices'](params, image)
    codes = model.fns['codes'](params, indices)
    if model.family == 'vqvae':
      sums = [*by_scales(model, params, codes)]
    else:
      sums = [model.fns['accumulate'](params, codes)]
    return indices, latent, sums, model.fns['decode'](params, sums[-1])

  indices, latent, sums, decoded = jax.device_get(run(params, image))
  if model.family == 'llamagen_vq':  # its latents and codes have length 1
    latent = latent / np.linalg.norm(latent, axis=-1, keepdims=True)
  return indices, latent, sums, decoded


def targets_by_scale(latent, sums):
  """What the scales before each leave of the latents, at its size."""
  before = [np.zeros_like(latent), *sums[:-1]]
  sides = [4] if len(sums) == 1 else VQVAE['patch_nums']
  return [
      np.asarray(resize.area(latent - total, side)).reshape(-1, side**2, 4)
      for total, side in zip(before, sides, strict=True)
  ]


def frequencies(model, indices):
  """Mean over the scales of each code's share of a scale's tokens."""
  offsets = getattr(model.config, 'offsets', (0, indices.shape[1]))
  return np.mean([
      np.bincount(indices[:, slice(*places)].reshape(-1), minlength=16)
      / indices[:, slice(*places)].size
      for places in itertools.pairwise(offsets)
  ], axis=0)


@functools.cache
def seen(share, patch_nums=(1, 2, 4), training=True):
  """What a step says of pixels, and pixels by the number of scales."""
  made = method(VQVAE | {'patch_nums': patch_nums}, scale_dropout=share)
  model = made.roles['tokenizer'].model
  params = released_files.random(model, 0)
  # Codes as large as the latents, so that every scale is seen in the images.
  params['embedding'] = 0.5 * jax.random.normal(
      jax.random.key(1), params['embedding'].shape
  )
  image = jax.random.uniform(
      jax.random.key(2), (64, 4, 4, 1), minval=-1, maxval=1
  )
  inputs = SimpleNamespace(
      batch={'image': image}, keys=jax.random.split(jax.random.key(3), 64),
      frozen={}, aux=made.init_aux(), training=training,
  )

  @jax.jit
  def run(params):
    fns = model.fns
    codes = fns['codes'](params, fns['to_indices'](params, image))
    pixels = [
        jnp.square(fns['decode'](params, f_hat) - image).mean()
        for f_hat in by_scales(model, params, codes)
    ]
    return made.loss(params, inputs).metrics['pixels'], pixels

  return jax.device_get(run(params))


def test_all_scales_are_decoded_without_dropout():
  found, pixels = seen(0.0)
  np.testing.assert_allclose(found, pixels[-1], rtol=1e-4)


def test_a_dropped_scale_is_not_decoded():
  found, pixels = seen(1.0, (1, 4))
  np.testing.assert_allclose(found, pixels[0], rtol=1e-4)
  assert abs(pixels[0] - pixels[1]) > 1e-2 * pixels[1]
  looked_at, _ = seen(1.0, (1, 4), training=False)
  np.testing.assert_allclose(looked_at, pixels[1], rtol=1e-4)


def test_images_end_at_any_scale():
  draw = jax.vmap(method(scale_dropout=0.6)._draw_scales)
  scales = draw(jax.random.split(jax.random.key(0), 20_000))
  share = np.bincount(scales, minlength=5)[1:] / len(scales)
  np.testing.assert_allclose(share, [0.3, 0.3, 0.4, 0], atol=0.015)


@pytest.mark.parametrize('model, share, message', [
    (VQVAE, 1.5, r'scale_dropout=1.5: expected a share in \[0, 1\]'),
    (VQVAE, -0.1, 'scale_dropout=-0.1'),
    (LLAMAGEN, 0.1, 'this llamagen_vq has no scales to leave out'),
    (VQVAE | {'patch_nums': [4]}, 0.1, 'this vqvae has no scales'),
])
def test_settings_that_do_not_fit(model, share, message):
  with pytest.raises(ValueError, match=message):
    method(model, scale_dropout=share)


def test_a_distance_without_its_network():
  with pytest.raises(ValueError, match="needs a frozen network 'perceptual'"):
    method(perceptual=1.0)


@pytest.mark.parametrize('model, norm', [(VQVAE, 'l2'), (LLAMAGEN, 'l1')])
def test_the_loss_is_what_its_definition_says(model, norm):
  # Stands in for LPIPS; its parameter is its scale.
  network = SimpleNamespace(
      fns={'distance': lambda p, a, b: p * jnp.abs(a - b).max((1, 2, 3))}
  )
  made = method(
      model, {'perceptual': network}, reconstruction=norm,
      commitment=0.7, perceptual=0.2, revive_below=0.5,
  )
  net = made.roles['tokenizer'].model
  params = released_files.random(net, 0)
  image = np.random.default_rng(1).uniform(-1, 1, (6, 4, 4, 1))
  image = image.astype(np.float32)
  # Sixteen codes: 1/32 is half of the uniform frequency.
  usage = np.array([0.031] * 5 + [0.032] * 3 + [0.0935] * 8, np.float32)

  @jax.jit
  def run(params, image, usage):
    inputs = SimpleNamespace(
        batch={'image': image}, frozen={'perceptual': 3.0},
        aux={'usage': usage}, keys=None,
    )
    return made.loss(params, inputs)

  got = run(params, image, usage)
  indices, latent, sums, decoded = quantize(net, params, image)
  difference = np.abs(decoded - image)
  want = {
      'pixels': (difference if norm == 'l1' else difference**2).mean(),
      # The encoder's and the codes' terms are of one value.
      'commitment': np.mean([
          (1 + net.config.beta) * np.square(f - latent).mean() for f in sums
      ]),
      'perceptual': 3 * difference.max((1, 2, 3)).mean(),
      'codes_in_use': 11 / 16,
  }
  assert got.metrics.keys() == want.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got.metrics[name], value, 2e-4, err_msg=name)
  loss = want['pixels'] + 0.7 * want['commitment'] + 0.2 * want['perceptual']
  np.testing.assert_allclose(got.loss, loss, rtol=2e-4)
  counts = np.bincount(indices.reshape(-1), minlength=16)
  np.testing.assert_array_equal(got.extras['counts'].sum(axis=0), counts)
  assert got.extras.keys() == {'counts', 'targets'}
  for found, target in zip(
      got.extras['targets'], targets_by_scale(latent, sums), strict=True
  ):
    np.testing.assert_allclose(found, target, atol=1e-4)


def make_state(made, params, usage, step, **others):
  params = {'tokenizer': params} | others
  return TrainState(
      step=jnp.int32(step), params=params,
      opt={name: made.roles[name].tx.init(p) for name, p in params.items()},
      ema={}, updates=dict.fromkeys(params, jnp.int32(step)),
      aux={'usage': usage}, key=jax.random.key_data(jax.random.key(5)),
  )


@functools.cache
def contest(step, micro_batches=1):
  """One step of descent against a discriminator that waits for step 3.

  Returns the method, parameters before and after, losses, and the image.
  """
  descent = optax.with_extra_args_support(optax.sgd(0.1))
  made = method(
      OF_8, others={'discriminator': PATCHGAN}, tx=descent, adversarial=0.3,
      adversarial_from=3, scale_dropout=0.5, revive_every=0,
  )
  before = {
      name: released_files.random(role.model, seed)
      for seed, (name, role) in enumerate(made.roles.items())
  }
  # The later, the fainter: some are harder than others.
  image = np.random.default_rng(1).uniform(-1, 1, (6, 8, 8, 1))
  image = (image / np.arange(1, 7)[:, None, None, None]).astype(np.float32)
  batch = {'image': image, 'index': np.arange(6)}
  usage = np.full(16, 1 / 16, np.float32)
  state = make_state(made, before['tokenizer'], usage, step,
                     discriminator=before['discriminator'])
  after, metrics = jax.device_get(jax.jit(
      lambda state, batch: train_step(
          made, made.updates(step), micro_batches, True, state, {}, batch
      )
  )(state, batch))
  metrics = {name: float(m.compute()) for name, m in metrics.items()}
  return made, before, after.params, metrics, batch, state


def reconstruct(made, params, batch, state):
  """What the tokenizer makes of the batch, with the scales of this step."""
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch['index'])
  inputs = SimpleNamespace(batch=batch, keys=keys, training=True)
  return made._forward(params['tokenizer'], inputs)


def test_a_discriminator_judges_what_the_tokenizer_is_charged_for():
  made, before, after, metrics, batch, state = contest(3)
  judge = made.roles['discriminator'].model.apply

  def balance(discriminator, image):
    """What makes both gradients at an image equally long."""
    image = jax.lax.stop_gradient(image)
    pull, push = (jax.grad(cost)(image) for cost in (
        lambda x: jnp.square(x - batch['image']).mean(),
        lambda x: judge(discriminator, x).mean(),
    ))
    squares = (jnp.square(x).sum(axis=(1, 2, 3)) for x in (pull, push))
    return jnp.sqrt(jnp.divide(*squares))

  def costs(tokenizer, discriminator):
    out = reconstruct(made, {'tokenizer': tokenizer}, batch, state)
    of_real = judge(discriminator, batch['image'])
    of_made = judge(discriminator, out['reconstruction'])
    pixels = jnp.square(out['reconstruction'] - batch['image']).mean()
    weights = 0.3 * balance(discriminator, out['reconstruction'])
    return (
        pixels + out['commitment']
        - (weights * of_made.mean(axis=1)).mean(),
        0.5 * jnp.maximum(1 - of_real, 0).mean()
        + 0.5 * jnp.maximum(1 + of_made, 0).mean(),
        of_real, of_made,
    )

  nets = before['tokenizer'], before['discriminator']
  ours, theirs, of_real, of_made = jax.jit(costs)(*nets)
  np.testing.assert_allclose(metrics['tokenizer/loss'], ours, rtol=1e-4)
  np.testing.assert_allclose(metrics['discriminator/loss'], theirs, rtol=1e-4)
  np.testing.assert_allclose(
      metrics['tokenizer/adversarial'], -of_made.mean(), rtol=1e-4, atol=1e-5
  )
  for name, right in ('real', of_real > 0), ('made', of_made < 0):
    assert metrics[f'discriminator/accuracy_{name}'] == pytest.approx(
        np.mean(right)
    )
  # Each moves by its own loss, and both from where this step began.
  for i, name in enumerate(('tokenizer', 'discriminator')):
    slope = jax.jit(jax.grad(lambda *p, i=i: costs(*p)[i], argnums=i))(*nets)
    want = jax.tree.map(lambda p, g: p - 0.1 * g, before[name], slope)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        after[name], want,
    )


def test_no_image_weighs_more_for_the_company_it_is_in():
  (_, _, whole, *_), (_, _, parts, *_) = contest(3), contest(3, 3)
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-6),
      parts, whole,
  )


def test_a_discriminator_waits_for_its_time():
  made, before, after, metrics, *_ = contest(2)
  assert [u.name for u in made.updates(2)] == ['tokenizer']
  assert [u.name for u in made.updates(3)] == ['tokenizer', 'discriminator']
  assert 'tokenizer/adversarial' not in metrics
  jax.tree.map(
      np.testing.assert_array_equal, after['discriminator'],
      before['discriminator'],
  )
  kernels = (
      params['tokenizer']['encoder']['conv_in']['kernel']
      for params in (before, after)
  )
  assert np.not_equal(*kernels).any()


def test_a_discriminator_of_other_images():
  with pytest.raises(ValueError, match=r'\(16, 1\), those of the tokenizer'):
    method(OF_8, others={'discriminator': dict(PATCHGAN, image_size=16)})


def test_a_judge_of_another_kind():
  judge = dict(name='judge', image_size=8, image_channels=1, num_classes=10)
  with pytest.raises(ValueError, match='is a judge; it must be a patchgan'):
    method(OF_8, others={'discriminator': judge})


@pytest.mark.parametrize('fields', [
    {'adversarial': -1.0}, {'adversarial': float('nan')},
    {'adversarial_from': -5},
])
def test_weights_and_steps_below_zero(fields):
  with pytest.raises(ValueError, match='expected numbers of at least 0'):
    Config(**fields)


def test_work_of_a_discriminator_is_counted():
  made = method(OF_8, others={'discriminator': PATCHGAN}, adversarial_from=1)
  alone, both = (made.flops(made.updates(step), 4) for step in (0, 1))
  judged = made.roles['discriminator'].model.flops()
  # Forward and back of two images, and through to the reconstruction.
  assert judged and both - alone == 4 * (2 * 3 + 2) * judged


@pytest.mark.parametrize('model, micro_batches', [(VQVAE, 2), (LLAMAGEN, 1)])
def test_a_step_revives_codes_that_have_long_not_been_used(
    model, micro_batches
):
  made = method(model, usage_decay=0.9, revive_every=10, revive_below=0.25)
  net = made.roles['tokenizer'].model
  params = released_files.random(net, 0)
  table = params['embedding']
  # Of equal codes the first is taken: 3 and 8 are never used.
  table[[3, 8]] = table[[0, 1]]
  # Their moving frequency comes below 1/64, a quarter of the uniform one; that
  # of 4, which this batch uses, comes above it.
  usage = np.full(16, 0.07, np.float32)
  usage[[3, 8, 4]] = 0.016, 0.017, 0.01
  image = np.random.default_rng(1).uniform(-1, 1, (6, 4, 4, 1))
  batch = {'image': image.astype(np.float32), 'index': np.arange(6)}

  @jax.jit
  def step(state, batch):
    return train_step(
        made, made.updates(9), micro_batches, True, state, {}, batch
    )[0]

  after = jax.device_get(step(make_state(made, params, usage, 9), batch))
  indices, latent, sums, _ = quantize(net, params, batch['image'])
  share = frequencies(net, indices)
  assert share[4] > 0.08 and (np.delete(share, [3, 8]) == 0).any()
  want = 0.9 * usage + 0.1 * share
  want[[3, 8]] = 1 / 16
  np.testing.assert_allclose(after.aux['usage'], want, rtol=1e-5)
  # Other codes and weights stay: the optimizer moves nothing.
  found = after.params['tokenizer']
  revived = found['embedding'][[3, 8]]
  table[[3, 8]] = revived
  jax.tree.map(np.testing.assert_array_equal, found, params)
  targets = np.concatenate(
      [z.reshape(-1, 1, 4) for z in targets_by_scale(latent, sums)]
  )
  apart = np.abs(targets - revived).max(axis=-1)
  assert (apart.min(axis=0) < 1e-5).all()
  assert len({*apart.argmin(axis=0).tolist()}) == 2


@pytest.mark.parametrize('step, fields, due', [
    (20, {}, True), (21, {}, False), (20, {'revive_until': 20}, True),
    (20, {'revive_until': 19}, False), (20, {'revive_every': 0}, False),
    (20, {'revive_below': 0.2}, False),
])
def test_codes_are_revived_when_it_is_time(step, fields, due):
  made = method(**{
      'revive_every': 10, 'revive_below': 0.25, 'usage_decay': 0.5, **fields,
  })
  counts = np.zeros((2, 3, 16), np.int32)
  counts[0, 0, 1:] = 2
  counts[:, 1, 1:] = 3
  counts[1, 2, 1:] = 4
  targets = [np.full((2, 3, n, 4), 7, np.float32) for n in (1, 4, 16)]
  extras = {'counts': counts, 'targets': targets}
  usage = np.array([0.025] + [0.065] * 15, np.float32)
  state = make_state(made, {'embedding': np.zeros((16, 4))}, usage, step)
  after = jax.jit(made.after)(state, {'tokenizer': extras})
  table = np.zeros((16, 4))
  want = 0.5 * usage + 0.5 * np.array([0] + [1 / 15] * 15)
  if due:
    table[0], want[0] = 7, 1 / 16
  np.testing.assert_array_equal(after.params['tokenizer']['embedding'], table)
  np.testing.assert_allclose(after.aux['usage'], want, rtol=1e-5)


def test_scales_count_alike_and_get_as_many_of_the_revived_codes():
  made = method(
      VQVAE | {'vocab_size': 3000}, revive_every=10, revive_below=0.1,
      usage_decay=0.0,
  )
  counts = np.zeros((1, 3, 3000), np.int32)
  counts[0, 0, 0] = 6  # of 6 tokens, 24 and 96
  counts[0, 1, :2] = 6, 18
  counts[0, 2, 1:3] = 24, 72
  targets = [
      np.broadcast_to(1000 * k + np.arange(n)[:, None], (1, 6, n, 4))
      for k, n in enumerate((1, 4, 16))
  ]
  state = make_state(
      made, {'embedding': np.full((3000, 4), -1.0)}, np.zeros(3000), 10
  )
  outputs = {'tokenizer': {'counts': counts, 'targets': targets}}
  after = jax.device_get(jax.jit(made.after)(state, outputs))
  np.testing.assert_allclose(
      after.aux['usage'][:3], np.array([1.25, 1, 0.75]) / 3, rtol=1e-6
  )
  table = after.params['tokenizer']['embedding']
  assert (table[:3] == -1).all()
  scale, place = np.divmod(table[3:, 0], 1000)
  np.testing.assert_allclose(
      np.bincount(scale.astype(int)) / 2997, [1 / 3] * 3, atol=0.03
  )
  assert len({*place[scale == 2].tolist()}) == 16
