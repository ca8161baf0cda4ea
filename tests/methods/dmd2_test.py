# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of DMD2: closed forms, clocks, and what moves what."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build, optim, registry, sharding, train
from dd_jax import config as config_lib
from dd_jax.flow import process
from dd_jax.method import Inputs, Role
from dd_jax.methods.dmd2 import DMD2, Config
from tests import released_files

FLOOR = 1e6  # greater than any distance: gradients without their normaliser


def network(apply, classes=0, **fns):
  """A model that is one function of `(params, x, sigma, condition)`."""
  return types.SimpleNamespace(
      apply=apply, fns={'forward': apply, **fns},
      config=types.SimpleNamespace(num_classes=classes, sigma_data=0.5),
  )


def method(student, critic, teacher, **fields):
  roles = {'student': Role(student, None, None),
           'critic': Role(critic, None, None)}
  return DMD2(Config(**fields), roles, {'teacher': teacher})


def make_inputs(size, shape=(1,), params=None, frozen=None, step=0, **batch):
  key = jax.random.key(step)
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(size))
  batch = {'image': jnp.zeros((size, *shape)), **batch}
  return Inputs(
      params or {}, {'teacher': frozen}, {}, batch, key, keys, {}, {}
  )


def prepared(dmd, given):
  return given._replace(shared=jax.lax.stop_gradient(dmd.prepare(given)))


def gaussian(spread):
  """The exact denoiser of a centred Gaussian."""
  return lambda p, x, sigma, _: (
      x * (spread(p)**2 / (spread(p)**2 + sigma**2))[:, None]
  )


def test_location_has_the_closed_gradient():
  s, theta, level = 0.7, 0.4, 600
  sigma = float(process.ve(0.5).sigma[level])

  def fake(p, x, sigma_B, _):  # of N(theta, s^2)
    return p + (x - p) * (s**2 / (s**2 + sigma_B**2))[:, None]

  dmd = method(
      network(lambda p, x, sigma_B, _: p + s * x / sigma_B[:, None]),
      network(fake), network(gaussian(lambda _: s)),
      gan=0.0, floor=FLOOR, first=level, last=level,
  )
  params = {'student': theta, 'critic': theta}
  given = prepared(dmd, make_inputs(64, params=params))
  value, slope = jax.value_and_grad(
      lambda p: dmd.student_loss(p, given).loss
  )(theta)
  want = theta * sigma**2 / (s**2 + sigma**2) / FLOOR
  # For every sample and noise, so that the mean is exact; and it is positive:
  # descent moves the student to the data.
  np.testing.assert_allclose(slope, want, rtol=1e-4)
  np.testing.assert_allclose(value, 0.5 * want**2, rtol=1e-3)


@pytest.mark.parametrize('r, level', [(0.9, 350), (0.3, 300)])
def test_scale_has_the_gradient_of_the_divergence(r, level):
  s = 0.5
  sigma = float(process.ve(0.5).sigma[level])
  dmd = method(
      network(lambda p, x, sigma_B, _: p * x / sigma_B[:, None]),
      network(gaussian(lambda p: p)), network(gaussian(lambda _: s)),
      gan=0.0, floor=FLOOR, first=level, last=level,
  )
  given = make_inputs(100_000, params={'student': r, 'critic': r})

  @jax.jit
  def slope(r):
    ready = prepared(dmd, given._replace(params={'student': r, 'critic': r}))
    return jax.grad(lambda p: dmd.student_loss(p, ready).loss)(r)

  want = r * sigma**2 * (r**2 - s**2) / (
      (s**2 + sigma**2) * (r**2 + sigma**2)
  )
  np.testing.assert_allclose(slope(r) * FLOOR, want, rtol=0.01)
  assert abs(slope(s) * FLOOR) < 1e-6

  # That is sigma^2 times the slope of KL of the two noisy Gaussians.
  def divergence(r):
    ratio = (r**2 + sigma**2) / (s**2 + sigma**2)
    return 0.5 * (ratio - 1 - jnp.log(ratio))

  np.testing.assert_allclose(
      want, sigma**2 * jax.grad(divergence)(r), rtol=1e-3
  )


def test_the_gradient_at_samples_is_exact():
  size, shape = 3, (4, 2)
  rng = np.random.default_rng(0)
  # Large samples: subtracting the gradient from them would round it away.
  x, real, made = (1e4 * rng.normal(size=(3, size, *shape))).astype(np.float32)
  made = real + 1e-4 * made
  dmd = method(
      network(lambda p, *_: p), network(lambda p, *_: p),
      network(lambda p, *_: p), gan=0.0,
  )
  given = make_inputs(
      size, shape, {'student': x, 'critic': made}, frozen=real
  )
  given = prepared(dmd, given)
  value, slope = jax.value_and_grad(
      lambda p: dmd.student_loss(p, given).loss
  )(jnp.asarray(x))
  want = (made - real) / np.abs(x - real).mean((1, 2), keepdims=True)
  np.testing.assert_allclose(slope, want / x.size, rtol=1e-6)
  np.testing.assert_allclose(value, 0.5 * np.square(want).mean(), rtol=1e-5)

  # Critic and teacher are not moved by the student's loss.
  def loss(critic, teacher):
    params = {**given.params, 'critic': critic}
    return dmd.student_loss(x, given._replace(
        params=params, frozen={'teacher': teacher}
    )).loss

  for slope in jax.grad(loss, (0, 1))(jnp.asarray(made), jnp.asarray(real)):
    assert not np.any(slope)


def test_a_sample_that_the_teacher_leaves_alone_gives_no_infinity():
  x = np.ones((2, 3), np.float32)
  dmd = method(*[network(lambda p, *_: p)] * 3, gan=0.0, floor=1e-4)
  given = prepared(dmd, make_inputs(
      2, (3,), {'student': x, 'critic': x + 1}, frozen=x
  ))
  slope = jax.grad(lambda p: dmd.student_loss(p, given).loss)(jnp.asarray(x))
  np.testing.assert_allclose(slope, np.full((2, 3), 1e4 / 6), rtol=1e-3)


def test_the_discriminator_pushes_samples():
  """A discriminator that is linear in what it sees has a known push."""
  weight = jnp.asarray([0.5, -2.0, 1.0])

  def logits(p, x, sigma, _):
    del sigma
    return 0 * x.sum(-1) + p @ weight + (x - jax.lax.stop_gradient(x)) @ weight

  x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
  same = network(lambda p, *_: p)
  dmd = method(
      same, network(lambda p, *_: jnp.zeros_like(x), logits=logits),
      network(lambda *_: jnp.zeros_like(x)), gan=0.1,
  )
  critic = jnp.asarray([0.3, 0.0, 0.0])
  given = prepared(dmd, make_inputs(4, (3,), {'student': x, 'critic': critic}))
  slope = jax.grad(lambda p: dmd.student_loss(p, given).loss)(jnp.asarray(x))
  # Teacher and critic agree: what is left is -0.1 * sigmoid(-logit) / 4.
  push = -0.1 / (1 + np.exp(0.15)) / 4 * weight
  np.testing.assert_allclose(slope, np.tile(push, (4, 1)), rtol=1e-5)
  out = dmd.student_loss(x, given)
  np.testing.assert_allclose(out.metrics['gan_share'], 1, rtol=1e-4)
  # Its own loss: what it takes for data must be data.
  out = dmd.critic_loss(critic, given)
  plus, minus = np.log1p(np.exp([0.15, -0.15]))
  np.testing.assert_allclose(out.metrics['gan'], plus + minus, rtol=1e-5)
  np.testing.assert_allclose(
      out.loss, out.metrics['denoising'] + 1e-2 * (plus + minus), rtol=1e-5
  )
  assert out.metrics['accuracy_fake'] == 0 and out.metrics['accuracy_real'] == 1


def test_the_critic_denoises_samples_at_all_levels():
  seen = {}

  def spy(p, x, sigma, condition):
    seen.update(x=x, sigma=sigma, condition=condition)
    return jnp.zeros_like(x) + p

  x = np.ones((20_000, 2), np.float32)
  dmd = method(
      network(lambda p, *_: p, 10), network(spy, 10), network(spy, 10), gan=0.0
  )
  given = prepared(dmd, make_inputs(
      20_000, (2,), {'student': x, 'critic': 0.25}
  ))
  out = dmd.critic_loss(0.25, given)
  sigma = np.asarray(seen['sigma'])
  grid = process.ve(0.5).sigma
  assert sigma.min() < grid[5] and sigma.max() > grid[994]
  np.testing.assert_allclose(
      np.searchsorted(grid, sigma).mean(), 499.5, atol=8
  )
  weight = 1 / sigma**2 + 4
  np.testing.assert_allclose(out.loss, (weight * 0.75**2).mean(), rtol=1e-4)
  noise = (seen['x'] - x) / sigma[:, None]
  np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.02)
  # Classes are drawn evenly, and are those that the student was asked for.
  labels = np.asarray(seen['condition'])
  assert np.bincount(labels).min() > 1800 and labels.max() == 9
  np.testing.assert_array_equal(labels, given.shared['condition'])
  # The student compares at fewer levels.
  dmd.student_loss(x, given._replace(frozen={'teacher': 0.0}))
  sigma = np.asarray(seen['sigma'])
  assert grid[20] <= sigma.min() < grid[25]
  assert grid[975] < sigma.max() <= grid[980]


def test_a_network_with_classes_needs_labels():
  net = network(lambda p, x, *_: x, 10)
  with pytest.raises(ValueError, match='10 classes, but the data have no lab'):
    prepared(
        method(net, net, net, gan=0.0, wanted='batch'),
        make_inputs(4, (2,), {'student': 0.0, 'critic': 0.0}),
    )


def test_guidance_is_of_the_teacher_alone():
  calls = []

  def net(name):
    def apply(p, x, sigma, condition):
      calls.append((name, condition))
      return jnp.zeros_like(x) + condition[:, None]
    return network(apply, 10)

  dmd = method(
      net('student'), net('critic'), net('teacher'), gan=0.0, guidance=2.0,
      wanted='batch',
  )
  given = make_inputs(2, label=jnp.asarray([3, 4]))
  given = given._replace(params={'student': 0, 'critic': 0})
  dmd.student_loss(0, prepared(dmd, given))
  asked = {}
  for name, condition in calls:
    asked.setdefault(name, set()).add(tuple(np.asarray(condition).tolist()))
  assert asked['teacher'] == {(10, 10, 3, 4)}
  assert asked['student'] == asked['critic'] == {(3, 4)}


LEVELS = (999, 749, 499, 249)


def tagged(p, x, sigma, _):
  del p
  return jnp.zeros_like(x) + sigma[:, None]


def test_later_steps_are_simulated():
  grid = process.ve(0.5)
  net = network(tagged)
  dmd = method(net, net, net, gan=0.0, levels=LEVELS)
  run = jax.jit(dmd.prepare)
  steps = set()
  for i in range(12):
    given = make_inputs(500, params={'student': 0.0}, step=i)
    shared = run(given)
    # One step for all examples.
    (place,) = set(np.asarray(shared['place']).tolist())
    step = LEVELS.index(place)
    steps.add(step)
    x = np.asarray(shared['input'])
    mean = grid.sigma[LEVELS[step - 1]] if step else 0
    spread = grid.sigma[place]
    np.testing.assert_allclose(x.mean(), mean, atol=0.15 * spread)
    np.testing.assert_allclose(x.std(), spread, rtol=0.1)
  assert steps == {0, 1, 2, 3}


def test_later_steps_may_begin_with_data():
  net = network(tagged)
  dmd = method(net, net, net, gan=0.0, levels=LEVELS, simulate=False)
  given = make_inputs(
      4000, image=100 * jnp.ones((4000, 1)), params={'student': 0.0}
  )
  shared = jax.jit(dmd.prepare)(given)
  x, place = np.asarray(shared['input'])[:, 0], np.asarray(shared['place'])
  assert set(place.tolist()) == set(LEVELS)
  np.testing.assert_allclose(x[place == 249].mean(), 100, atol=0.1)
  np.testing.assert_allclose(x[place == 999].mean(), 0, atol=10)


def test_times_and_noise_of_other_networks():
  """Networks that are told the time and predict the noise."""
  seen = []

  def apply(p, x, time, condition):
    seen.append((x, time))
    return p * x

  net = network(apply)
  dmd = method(net, net, net, gan=0.0, process='vp', levels=(399,))
  given = make_inputs(4, params={'student': 0.5, 'critic': 0.5}, frozen=0.25)
  given = prepared(dmd, given)
  x, time = seen[0]
  np.testing.assert_array_equal(time, np.full(4, 399.0))
  np.testing.assert_array_equal(x, given.shared['input'])  # noise alone
  alpha, sigma = (getattr(process.vp(), n)[399] for n in ('alpha', 'sigma'))
  np.testing.assert_allclose(
      given.shared['fake'], (x - sigma * 0.5 * x) / alpha, rtol=1e-5
  )
  assert np.isfinite(dmd.student_loss(0.5, given).loss)
  assert np.isfinite(dmd.critic_loss(0.5, given).loss)


MLP = dict(name='mlp', shape=[2], width=32, blocks=2)


def trained(ratio, steps, **fields):
  """Runs steps of small networks; returns method, programs and states."""
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])
  tx = optim.make_optimizer(config_lib.make(
      optim.OptimizerConfig, {'lr': 1e-3, 'clock': 'step'}, 'x'
  ), 100)
  models = {
      'student': build.build_model(MLP),
      'critic': build.build_model(dict(name='critic', denoiser=MLP)),
  }
  teacher = models['student']
  dmd = DMD2(Config(ratio=ratio, **fields), {
      n: Role(m, tx, lambda key, _, m=m: released_files.random(m, 1))
      for n, m in models.items()
  }, {'teacher': teacher})
  sources = dict.fromkeys(models)
  state = train.fresh_state(dmd, 0, sources, mesh, 'dp')[1](sources)
  frozen = {'teacher': released_files.random(teacher, 2)}
  programs = train.Programs(dmd, 1, mesh)
  source = registry.get('sources', 'toy2d')('train', count=2000)
  states = [jax.device_get(state)]
  for step in range(steps):
    rows = np.arange(64 * step, 64 * (step + 1)) % 2000
    batch = {**source.take(rows), 'index': rows.astype(np.uint32)}
    state, metrics = programs(
        dmd.updates(step), state, frozen, sharding.place_batch(batch, mesh)
    )
    states.append(jax.device_get(state))
  return dmd, programs, states, metrics, (frozen, batch, mesh)


@functools.cache
def seven():
  return trained(3, 7)


def test_clocks():
  dmd, programs, states, _, _ = seven()
  assert len(programs.compiled) == 2
  assert [u.role for u in dmd.updates(0)] == ['student', 'critic']
  assert [u.role for u in dmd.updates(1)] == ['critic']
  counts = [(int(s.updates['student']), int(s.updates['critic']))
            for s in states]
  assert counts[-1] == (3, 7)  # ceil(7 / 3) and 7
  for i, (a, b) in enumerate(zip(states, states[1:], strict=False)):
    same = jax.tree.map(
        np.array_equal, a.params['student'], b.params['student']
    )
    assert all(jax.tree.leaves(same)) == bool(i % 3)
    moved = jax.tree.map(
        np.array_equal, a.params['critic'], b.params['critic']
    )
    assert not all(jax.tree.leaves(moved))


def test_the_critic_learns_what_the_student_made_before_its_update():
  dmd, programs, states, _, (frozen, batch, mesh) = seven()
  both, critic = dmd.updates(0), dmd.updates(1)
  after = [
      jax.device_get(programs.compiled[u](
          jax.device_put(states[0], sharding.replicated(mesh)), frozen,
          sharding.place_batch(batch, mesh),
      )[0]) for u in (both, critic)
  ]
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
      *(s.params['critic'] for s in after),
  )
  differs = jax.tree.map(
      np.array_equal, *(s.params['student'] for s in after)
  )
  assert not all(jax.tree.leaves(differs))


def test_the_student_makes_samples_once():
  """A second forward pass for its gradient would show in the count."""
  dmd, programs, *_ = seven()
  for updates, program in programs.compiled.items():
    found = program.cost_analysis()['flops']
    want = dmd.flops(updates, 64)
    # Elementwise work is not in the analytic count.
    assert 0.9 < found / want < 1.35, (updates, found / want)


@pytest.mark.parametrize('fields, message', [
    ({'ratio': 0}, 'ratio=0 must be at least 1'),
    ({'levels': (1000,)}, r'levels=\(1000,\).*\[0, 999\]'),
    ({'levels': ()}, 'levels='),
    ({'levels': (499, 999)}, 'must descend'),
    ({'last': 1000}, r'last=1000: expected places in \[0, 999\]'),
    ({'first': -1}, 'first=-1'),
    ({'first': 30, 'last': 20}, 'first=30 must not exceed last=20'),
    ({'floor': 0.0}, 'floor=0.0 must be positive'),
    ({'guidance': 0.5}, 'guidance=0.5 at least 1'),
    ({'critic_gan': 0.0}, 'the discriminator must learn'),
])
def test_configs_that_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    Config(**fields)


def test_networks_that_are_refused():
  net = network(tagged)
  role = Role(net, None, None)
  roles = {'student': role, 'critic': role}
  with pytest.raises(ValueError, match="frozen network 'teacher'"):
    DMD2(Config(), roles, {})
  with pytest.raises(ValueError, match="role 'critic'"):
    DMD2(Config(), {'student': role}, {'teacher': net})
  with pytest.raises(ValueError, match='head=True'):
    DMD2(Config(), roles, {'teacher': net})
  with pytest.raises(ValueError, match='needs a network with classes'):
    method(net, net, net, gan=0.0, guidance=2.0)
