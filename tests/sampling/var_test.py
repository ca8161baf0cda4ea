# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Rollouts, few-step sampling and the mix of both, against golden cases."""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from dd_jax.models.var import model as var_model
from dd_jax.models.var import student as student_model
from dd_jax.models.vqvae import model as vqvae_model
from dd_jax.sampling import guidance
from dd_jax.sampling import var as sampling
from tests.golden import golden_cases, networks
from tests.sampling import distributions

CASES = ('tiny', 'tiny_saln')
SIZES = {
    'num_classes': 5, 'depth': 1, 'width': 32, 'heads': 2,
    'patch_nums': [1, 2, 4], 'vocab_size': 24, 'code_dim': 6,
}
VAE = {
    'image_size': 8, 'ch': 8, 'ch_mult': [1, 2], 'res_blocks': 1,
    'attention': False, 'z_channels': 6, 'vocab_size': 24,
    'patch_nums': [1, 2, 4], 'image_channels': 1,
}
OPEN = {'top_k': 0, 'top_p': 1.0}
LABELS = jnp.array([1, 4])


def random_params(net, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
      net.abstract(),
  )


@functools.cache
def nets():
  """Random teacher, student and tokenizer: models, then parameters."""
  models = (
      var_model.build(SIZES), student_model.build(SIZES),
      vqvae_model.build(VAE),
  )
  return *models, *(random_params(m, i) for i, m in enumerate(models))


@functools.cache
def draw_noise(seed=0):
  return jax.random.normal(jax.random.key(seed), (2, 21, 6))


@functools.cache
def rollout(start=0):
  """A greedy rollout of the random teacher, after a prefix of its own."""
  teacher, _, vae, tp, _, vp = nets()
  return jax.jit(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=1.5,
      start=start, **OPEN,
  ))(tp, vp, LABELS, prefix=rollout() if start else None)


@functools.cache
def few_step_program(t_list, split):
  _, student, vae, _, sp, vp = nets()
  return functools.partial(jax.jit(functools.partial(
      sampling.few_step, student, vae, t_list=t_list, split=split
  )), sp, vp)


def few_step(t_list, split=1, seed=0):
  return few_step_program(t_list, split)(draw_noise(seed), LABELS)


@functools.cache
def golden_teacher(name):
  case = golden_cases.load(f'var_transformer_{name}')
  return case, *networks.teacher(case)


@functools.cache
def golden_vae(name):
  """The tokenizer of a case, its weights and a jitted decoder of codes."""
  net, params = networks.tokenizer(
      golden_cases.load(f'var_transformer_{name}')
  )
  decode = jax.jit(functools.partial(sampling.images_from_codes, net))
  return net, params, functools.partial(decode, params)


def assert_image(image_BxHxWxC, golden_BxCxHxW):
  np.testing.assert_allclose(
      (image_BxHxWxC.transpose(0, 3, 1, 2) + 1) / 2, golden_BxCxHxW,
      rtol=1e-4, atol=1e-4,
  )


@pytest.mark.parametrize('name', CASES)
def test_greedy_sampling_matches_the_original(name):
  case, teacher, tp = golden_teacher(name)
  vae, vp, decode = golden_vae(name)
  indices = jax.jit(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy,
      cfg=case.config['cfg'], top_k=1, top_p=1.0,
  ))(tp, vp, case.arrays['label'])
  np.testing.assert_array_equal(indices, case.arrays['greedy_cfg_indices'])
  image = decode(vae.fns['codes'](vp, indices))
  assert_image(image, case.arrays['greedy_cfg_image'])


@pytest.mark.parametrize('name', CASES)
def test_greedy_continuation_matches_the_original(name):
  case, teacher, tp = golden_teacher(name)
  vae, vp, _ = golden_vae(name)
  start = int(case.arrays['involved_start_scale'])
  indices = jax.jit(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy,
      cfg=float(case.arrays['involved_cfg']), top_k=1, top_p=1.0, start=start,
      prefill_mask='full',
  ))(
      tp, vp, case.arrays['label'],
      prefix=case.arrays['prefix_indices'].astype(np.int32),
  )
  np.testing.assert_array_equal(indices, case.arrays['involved_greedy_indices'])


@pytest.mark.parametrize('name', CASES)
def test_few_steps_match_the_original(name):
  case = golden_cases.load(f'dd_var_{name}')
  student, sp = networks.student(case)
  vae, vp, decode = golden_vae(name)
  out = jax.jit(functools.partial(
      sampling.few_step, student, vae, t_list=case.config['t_list'],
      split=case.config['loss_split_t'],
  ))(sp, vp, case.arrays['noise'], case.arrays['label'])
  np.testing.assert_allclose(
      out['codes'], case.arrays['step1_final_sequence'], rtol=1e-4, atol=1e-4
  )
  assert_image(decode(out['codes']), case.arrays['image'])


def see(**settings):
  """What `choose` sees of every token, and logits with and without labels."""
  teacher, _, vae, tp, _, vp = nets()

  def run(tp, vp):
    seen = []

    def choose(log_p, scale, codebook):
      seen.append(log_p)
      assert codebook.shape == (24, 6)
      assert log_p.shape == (2, SIZES['patch_nums'][scale] ** 2, 24)
      return sampling.greedy(log_p, scale, codebook)

    indices = sampling.rollout(
        teacher, vae, tp, vp, LABELS, choose, top_k=9, top_p=0.8, **settings
    )
    maps = vae.fns['var_input'](vp, vae.fns['codes'](vp, indices))
    cond, null = (
        teacher.apply(tp, y, maps) for y in (LABELS, jnp.full_like(LABELS, 5))
    )
    return jnp.concatenate(seen, axis=1), cond, null

  return jax.jit(run)(tp, vp)


@pytest.mark.parametrize('cfg, interval', [(0.0, -1), (1.5, -1), (1.5, 0)])
def test_choose_sees_the_distribution_that_is_sampled(cfg, interval):
  log_p, cond, null = see(cfg=cfg, cfg_interval=interval)
  levels = nets()[0].config.levels[None, :, None]
  ramp = cfg * levels / 2
  if interval > -1:
    ramp *= levels <= interval + 1
  expected = guidance.filter_top_p(
      guidance.filter_top_k((1 + ramp) * cond - ramp * null, 9), 0.8
  )
  np.testing.assert_allclose(
      log_p, jax.nn.log_softmax(expected), rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(jnp.exp(log_p).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_temperature_comes_between_guidance_and_filters(temperature):
  log_p, cond, null = map(np.asarray, see(cfg=1.5, temperature=temperature))
  ramp = 1.5 * np.repeat([0, 1, 2], [1, 4, 16])[None, :, None] / 2
  expected, at_one = (
      distributions.drawn_from(
          (1 + ramp) * cond - ramp * null, temperature=t, top_k=9, top_p=0.8
      ) for t in (temperature, 1)
  )
  # Another support: what is filtered first keeps that of temperature 1.
  assert ((expected > 0) != (at_one > 0)).any() == (temperature != 1)
  np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-3, atol=1e-5)


def test_temperature_one_is_as_if_there_were_none(monkeypatch):
  base = see(cfg=1.5)[0]
  monkeypatch.setattr(guidance, 'temper', lambda logits, _: logits)
  np.testing.assert_array_equal(see(cfg=1.5)[0], base)


def test_a_causal_prefix_changes_nothing():
  assert rollout().shape == (2, 21) and rollout().dtype == jnp.int32
  np.testing.assert_array_equal(rollout(start=2), rollout())


def test_categorical_draws_from_the_support_example_by_example():
  keys = jax.random.split(jax.random.key(0), 400)
  p = jnp.array([0.5, 0.0, 0.3, 0.2])
  log_p = jnp.broadcast_to(jnp.log(p), (400, 9, 4))
  draws = sampling.categorical(keys)(log_p, 1, None)
  assert draws.shape == (400, 9) and draws.dtype == jnp.int32
  share = np.bincount(np.asarray(draws).reshape(-1), minlength=4) / draws.size
  assert share[1] == 0
  np.testing.assert_allclose(share, p, atol=0.04)  # 5 standard deviations
  order = jnp.arange(400)[::-1]
  np.testing.assert_array_equal(
      sampling.categorical(keys[order])(log_p, 1, None), draws[order]
  )
  assert (sampling.categorical(keys)(log_p, 2, None) != draws).any()


@pytest.mark.parametrize('t_list', [(0,), (0, 2)])
def test_few_steps_are_a_function_of_the_noise(t_list):
  first, again = few_step(t_list), few_step(t_list)
  jax.tree.map(np.testing.assert_array_equal, first, again)
  other = few_step(t_list, seed=1)
  assert (first['indices'] != other['indices']).any()
  assert (jnp.abs(first['codes'] - other['codes'])[:, 1:] > 0).all()


@pytest.mark.parametrize('split, cut', [(1, 1), (3, 21)])
def test_split_says_which_scales_are_codes(split, cut):
  book, out = nets()[5]['embedding'], few_step((0,), split)
  exact = (out['codes'] == book[out['indices']]).all(axis=-1)
  assert exact[:, :cut].all() and not exact[:, cut:].any()


def test_the_second_step_keeps_what_is_data():
  one, two = few_step((0,)), few_step((0, 2))
  np.testing.assert_array_equal(two['codes'][:, :5], one['codes'][:, :5])
  assert jnp.abs(two['codes'] - one['codes'])[:, 5:].min() > 0
  # Beyond the split that is what the code head gave, near to some code.
  book = np.asarray(nets()[5]['embedding'])
  data = np.asarray(two['codes'])[:, 1:5, None]
  nearest = np.linalg.norm(data - book, axis=-1).argmin(-1)
  np.testing.assert_array_equal(two['indices'][:, 1:5], nearest)
  np.testing.assert_array_equal(two['indices'][:, 0], one['indices'][:, 0])


def involve(start, resume, wrap=lambda net: net):
  """Arguments of a jittable `teacher_involved`, and the function."""
  teacher, student, vae, tp, sp, vp = nets()
  return functools.partial(
      sampling.teacher_involved, wrap(student), wrap(teacher), vae,
      choose=sampling.greedy, start=start, resume=resume, split=1, cfg=1.5,
      **OPEN,
  ), (sp, tp, vp, draw_noise(), LABELS)


def test_teacher_involved_takes_over_and_hands_back():
  book = nets()[5]['embedding']
  run, args = involve(0, 3)
  whole = jax.jit(run)(*args)
  np.testing.assert_array_equal(whole['indices'], rollout())
  np.testing.assert_array_equal(whole['codes'], book[rollout()])
  run, args = involve(1, 2)
  out = jax.jit(run)(*args)
  np.testing.assert_array_equal(
      out['indices'][:, :1], few_step((0,))['indices'][:, :1]
  )
  _, student, _, _, sp, _ = nets()
  codes = book[out['indices'][:, :5]]
  np.testing.assert_array_equal(out['codes'][:, :5], codes)
  x = jnp.concatenate([codes, draw_noise()[:, 5:]], axis=1)
  last = jax.jit(student.apply)(sp, x, LABELS, jnp.array([5, 5]))
  np.testing.assert_allclose(
      out['codes'][:, 5:], last['codes'][:, 5:], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('start, resume, end, steps', [
    (0, 5, 10, 6), (3, 5, 10, 4), (4, 5, 10, 3),  # VAR
    (0, 80, 256, 81), (40, 80, 256, 42), (60, 80, 256, 22),  # LlamaGen
    (0, 10, 10, 10),
])
def test_steps_are_counted_as_in_the_paper(start, resume, end, steps):
  assert sampling.count_steps(start, resume, end) == steps


@pytest.mark.parametrize('start, resume', [(0, 2), (1, 2), (1, 3), (0, 3)])
def test_network_calls_are_as_many_as_counted(start, resume):
  calls = collections.Counter()

  def wrap(net):
    def counted(name, fn, *args, **kwargs):
      calls[name] += 1
      return fn(*args, **kwargs)

    return dataclasses.replace(net, fns={
        k: functools.partial(counted, k, f) for k, f in net.fns.items()
    })

  run, args = involve(start, resume, wrap)
  jax.eval_shape(run, *args)
  total = calls['forward'] + calls['step'] + calls['prefill']
  assert total == sampling.count_steps(start, resume, 3)


def test_skip_n_decodes_what_a_stopped_rollout_gives():
  teacher, _, vae, tp, _, vp = nets()
  short = jax.eval_shape(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=1.5, stop=2,
      **OPEN,
  ), tp, vp, LABELS)
  assert short.shape == (2, 5)
  # So cold, draws are what greedy sampling takes.
  image = jax.jit(functools.partial(
      sampling.skip_n, teacher, vae, skip=1, cfg=1.5, temperature=1e-4,
      choose=sampling.categorical(jax.random.split(jax.random.key(0), 2)),
      **OPEN,
  ))(tp, vp, LABELS)
  assert image.shape == (2, 8, 8, 1) and jnp.abs(image).max() <= 1

  @jax.jit
  def expected(vp, indices):
    fns, codes = vae.fns, vp['embedding'][indices]
    f_hat = jnp.zeros((2, 4, 4, 6))
    f_hat, _ = fns['advance'](vp, f_hat, codes[:, :1], 0)
    f_hat, _ = fns['advance'](vp, f_hat, codes[:, 1:5], 1)
    return jnp.clip(fns['decode'](vp, f_hat), -1, 1)

  np.testing.assert_allclose(
      image, expected(vp, rollout()), rtol=1e-4, atol=1e-4
  )


def test_a_rollout_over_devices_needs_no_communication():
  teacher, _, vae, tp, _, vp = nets()
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  split = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())
  labels = jnp.tile(LABELS, 8)
  run = functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=1.5, top_k=9,
      top_p=0.8,
  )
  compiled = jax.jit(
      run, in_shardings=(whole, whole, split), out_shardings=split
  ).lower(tp, vp, labels).compile()
  program = compiled.as_text()
  assert 'num_partitions=8' in program
  for name in ('all-', 'collective-', 'reduce-scatter'):
    assert name not in program
  sharded = compiled(
      *jax.device_put((tp, vp, labels), (whole, whole, split))
  )
  # The filters keep the most likely code.
  np.testing.assert_array_equal(sharded, jnp.tile(rollout(), (8, 1)))


def test_impossible_requests_are_refused():
  teacher, student, vae, tp, sp, vp = nets()
  run = functools.partial(
      sampling.rollout, teacher, vae, tp, vp, LABELS, sampling.greedy, cfg=1.5,
      **OPEN,
  )
  with pytest.raises(ValueError, match='need 0 <= start <= stop <= 3'):
    run(stop=4)
  with pytest.raises(ValueError, match='0 < stop'):
    run(stop=0)
  with pytest.raises(ValueError, match='prefix of 5 tokens'):
    run(start=2, prefix=jnp.zeros((2, 4), jnp.int32))
  with pytest.raises(ValueError, match='must start with 0'):
    sampling.few_step(
        student, vae, sp, vp, draw_noise(), LABELS, t_list=(2,), split=2
    )
