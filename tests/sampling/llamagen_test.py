# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Rollouts, few-step sampling and the mix of both, against golden cases."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from dd_jax import sharding
from dd_jax.models.llamagen import model as llamagen_model
from dd_jax.models.llamagen import student as student_model
from dd_jax.models.llamagen_vq import model as vq_model
from dd_jax.sampling import guidance
from dd_jax.sampling import llamagen as sampling
from tests.golden import golden_cases
from tests.golden import llamagen_networks as networks
from tests.sampling import distributions
from tests.usage import bounded

SIZES = {
    'num_classes': 5, 'depth': 1, 'width': 32, 'heads': 2, 'latent_size': 3,
    'vocab_size': 24, 'code_dim': 6, 'mlp_width': 48,
}
CAPTIONS = SIZES | {'num_classes': 0, 'caption_length': 4, 'caption_dim': 3}
VAE = {
    'image_size': 6, 'ch': 8, 'ch_mult': [1, 2], 'res_blocks': 1,
    'attention': False, 'z_channels': 6, 'code_dim': 6, 'vocab_size': 24,
    'image_channels': 1,
}
OPEN = {'top_k': 0, 'top_p': 1.0}
LABELS = jnp.array([1, 4])


def random_params(net, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
      net.abstract(),
  )


@functools.cache
def nets():
  """Random teacher, student and tokenizer: models, then parameters."""
  models = (
      llamagen_model.build(SIZES), student_model.build(SIZES),
      vq_model.build(VAE),
  )
  return *models, *(random_params(m, i) for i, m in enumerate(models))


@functools.cache
def draw_noise(seed=0):
  return jax.random.normal(jax.random.key(seed), (2, 9, 6))


@functools.cache
def rollout(start=0):
  """A greedy rollout of the random teacher, after a prefix of its own."""
  teacher, _, vae, tp, _, vp = nets()
  return jax.jit(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=1.5,
      start=start, **OPEN,
  ))(tp, vp, LABELS, prefix=rollout() if start else None)


@functools.cache
def few_step(t_list, split=2, seed=0):
  _, student, vae, _, sp, vp = nets()
  return jax.jit(functools.partial(
      sampling.few_step, student, vae, t_list=t_list, split=split
  ))(sp, vp, draw_noise(seed), LABELS)


def codes_only(teacher):
  """A tokenizer that is never asked for pixels, and its parameters."""
  net = vq_model.build({
      'image_size': teacher.config.latent_size, 'ch': 1, 'ch_mult': [1],
      'res_blocks': 1, 'attention': False, 'z_channels': 1, 'code_dim': 8,
      'vocab_size': teacher.config.vocab_size,
  })
  return net, random_params(net, 0)


@pytest.mark.parametrize('kind', ['c2i', 't2i'])
def test_greedy_sampling_matches_the_original(kind):
  case = golden_cases.load(f'llamagen_gpt_{kind}_tiny')
  arrays, condition = case.arrays, networks.condition(case)
  teacher, tp = networks.teacher(case)
  vae, vp = codes_only(teacher)
  run = functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy,
      cfg=case.config['cfg_scale'], top_k=1, top_p=1.0,
  )
  np.testing.assert_array_equal(
      jax.jit(run)(tp, vp, condition), arrays['greedy_cfg_tokens']
  )
  if kind == 'c2i':
    start = int(arrays['intermediate_prefix_length'])
    prefix = arrays['tokens'].astype(np.int32)
    np.testing.assert_array_equal(
        jax.jit(functools.partial(run, start=start))(
            tp, vp, condition, prefix=prefix
        ), arrays['intermediate_greedy_tokens'],
    )


def check_few_steps(name, jit, tolerance, stride):
  """Few steps as the original's; where its choices are ties, ours differ."""
  case = golden_cases.load(name)
  c, arrays = case.config, case.arrays
  student, sp = networks.student(case)
  vae, vp = networks.tokenizer(case)
  out = jit(functools.partial(
      sampling.few_step, student, vae, t_list=c['t_list'], split=c['split_t']
  ))(sp, vp, arrays['noise'], arrays['label'])
  final = arrays['step1_final_sequence']
  close = functools.partial(
      np.testing.assert_allclose, rtol=tolerance, atol=tolerance
  )
  same = np.abs(out['codes'] - final).max(-1) <= 10 * tolerance
  close(out['codes'][same], final[same])
  image = jit(functools.partial(sampling.images_from_codes, vae))(vp, final)
  image = (image.transpose(0, 3, 1, 2) + 1) / 2
  # The original cuts off what is out of range when it writes files.
  close(image[:, :, ::stride, ::stride], arrays['image'].clip(0, 1))
  return same.mean()


def test_few_steps_match_the_original():
  assert check_few_steps('dd_llamagen_tiny', jax.jit, 1e-4, 1) == 1


@pytest.mark.slow
@bounded(seconds=300, gigabytes=8)
def test_few_steps_of_size_l_match_the_original():
  assert check_few_steps('dd_llamagen_L', networks.fast_jit, 2e-3, 4) >= 0.99


def see(teacher, condition, **settings):
  """What `choose` sees of every token, and logits with and without labels."""
  tp, (vae, vp) = random_params(teacher, 0), (nets()[2], nets()[5])
  seen = {}

  def note(log_p, step):
    seen[int(step)] = log_p

  def choose(log_p, step, codebook):
    assert log_p.shape == (2, 1, 24) and codebook.shape == (24, 6)
    jax.debug.callback(note, log_p, step)
    return sampling.greedy(log_p, step, codebook)

  def run(tp, vp):
    indices = sampling.rollout(
        teacher, vae, tp, vp, condition, choose, top_k=9, top_p=0.8, **settings
    )
    return indices, *(
        teacher.apply(tp, y, indices[:, :-1])
        for y in (condition, teacher.fns['null'](tp, condition))
    )

  indices, cond, null = jax.jit(run)(tp, vp)
  jax.effects_barrier()
  log_p = np.concatenate([seen[i] for i in range(9)], axis=1)
  np.testing.assert_array_equal(indices, log_p.argmax(-1))
  return log_p, cond, null


@pytest.mark.parametrize('kind', ['classes', 'captions'])
@pytest.mark.parametrize('cfg, interval', [(1.0, -1), (2.5, -1), (2.5, 3)])
def test_choose_sees_the_distribution_that_is_sampled(cfg, interval, kind):
  teacher = llamagen_model.build(CAPTIONS if kind == 'captions' else SIZES)
  condition = LABELS
  if kind == 'captions':
    condition = {
        'features': jax.random.normal(jax.random.key(0), (2, 4, 3)),
        'mask': jnp.array([[False, True, True, True], [True] * 4]),
    }
  log_p, cond, null = see(
      teacher, condition, cfg=cfg, cfg_interval=interval, temperature=0.7
  )
  # The first token has no number in LlamaGen's count: 0 to 4 are guided.
  unguided = (interval > -1) & (np.arange(9) > interval + 1)
  guided = jnp.where(unguided[None, :, None], cond, null + cfg * (cond - null))
  expected = guidance.filter_top_k(guided / 0.7, 9)
  expected = guidance.filter_top_p(expected, 0.8, descending=True)
  np.testing.assert_allclose(
      log_p, jax.nn.log_softmax(expected), rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_temperature_comes_between_guidance_and_filters(temperature):
  log_p, cond, null = map(
      np.asarray, see(nets()[0], LABELS, cfg=2.5, temperature=temperature)
  )
  expected, at_one = (
      distributions.drawn_from(
          null + 2.5 * (cond - null), temperature=t, top_k=9, top_p=0.8
      ) for t in (temperature, 1)
  )
  # Another support: what is filtered first keeps that of temperature 1.
  assert ((expected > 0) != (at_one > 0)).any() == (temperature != 1)
  np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-3, atol=1e-5)


def test_temperature_one_is_as_if_there_were_none(monkeypatch):
  base = see(nets()[0], LABELS, cfg=2.5)[0]
  monkeypatch.setattr(guidance, 'temper', lambda logits, _: logits)
  np.testing.assert_array_equal(see(nets()[0], LABELS, cfg=2.5)[0], base)


def test_a_prefix_changes_nothing():
  assert rollout().shape == (2, 9) and rollout().dtype == jnp.int32
  assert len(np.unique(rollout())) > 3
  for start in (4, 8):
    np.testing.assert_array_equal(rollout(start), rollout())


def test_the_whole_decode_is_one_loop():
  teacher, _, vae, tp, _, vp = nets()
  program = jax.make_jaxpr(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=1.5, **OPEN
  ))(tp, vp, LABELS)
  loops = [e for e in program.eqns if e.primitive.name == 'scan']
  assert [e.params['length'] for e in loops if e.params['length'] > 1] == [8]


def test_categorical_draws_follow_each_examples_key():
  teacher, _, vae, tp, _, vp = nets()

  @jax.jit
  def run(keys):
    return sampling.rollout(
        teacher, vae, tp, vp, LABELS, sampling.categorical(keys), cfg=1.5,
        top_k=5, top_p=1.0,
    )

  keys = jax.random.split(jax.random.key(0), 2)
  first, other = run(keys), run(keys.at[1].set(jax.random.key(7)))
  np.testing.assert_array_equal(first[0], other[0])
  assert (first[1] != other[1]).any() and (first != rollout()).any()


@pytest.mark.parametrize('t_list', [(0,), (0, 4)])
def test_few_steps_are_a_function_of_the_noise(t_list):
  first, other = few_step(t_list), few_step(t_list, seed=1)
  assert (first['indices'] != other['indices']).any()
  assert (jnp.abs(first['codes'] - other['codes'])[:, 2:] > 0).all()


@pytest.mark.parametrize('split', [0, 2, 9])
def test_split_says_which_tokens_are_codes(split):
  vae, vp = nets()[2], nets()[5]
  book, out = vae.fns['codebook'](vp), few_step((0,), split)
  exact = jnp.abs(out['codes'] - book[out['indices']]).max(-1) < 1e-6
  assert exact[:, :split].all() and not exact[:, split:].any()


def test_the_second_step_keeps_what_is_data():
  one, two = few_step((0,)), few_step((0, 4))
  np.testing.assert_array_equal(two['codes'][:, :4], one['codes'][:, :4])
  assert jnp.abs(two['codes'] - one['codes'])[:, 4:].min() > 0


def involve(start, resume):
  teacher, student, vae, tp, sp, vp = nets()
  return jax.jit(functools.partial(
      sampling.teacher_involved, student, teacher, vae, choose=sampling.greedy,
      start=start, resume=resume, split=2, cfg=1.5, **OPEN,
  ))(sp, tp, vp, draw_noise(), LABELS)


def test_teacher_involved_takes_over_and_hands_back():
  _, student, vae, _, sp, vp = nets()
  book = vae.fns['codebook'](vp)
  whole = involve(0, 9)
  np.testing.assert_array_equal(whole['indices'], rollout())
  np.testing.assert_allclose(whole['codes'], book[rollout()], atol=1e-6)
  out = involve(1, 2)  # one token of the teacher's
  np.testing.assert_array_equal(
      out['indices'][:, :1], few_step((0,))['indices'][:, :1]
  )
  x = jnp.concatenate(
      [book[out['indices'][:, :2]], draw_noise()[:, 2:]], axis=1
  )
  last = jax.jit(student.apply)(sp, x, LABELS, jnp.array([2, 2]))
  np.testing.assert_allclose(
      out['codes'][:, 2:], last['codes'][:, 2:], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('filled', [False, True])
def test_skip_n_decodes_what_a_stopped_rollout_gives(filled):
  teacher, _, vae, tp, _, vp = nets()
  fill = jnp.arange(18).reshape(2, 9) if filled else None
  # So cold, draws are what greedy sampling takes.
  image = jax.jit(functools.partial(
      sampling.skip_n, teacher, vae, skip=3, cfg=1.5, temperature=1e-4,
      choose=sampling.categorical(jax.random.split(jax.random.key(0), 2)),
      **OPEN,
  ))(tp, vp, LABELS, fill=fill)
  assert image.shape == (2, 6, 6, 1) and jnp.abs(image).max() <= 1
  codes = vae.fns['codes'](vp, rollout())
  rest = vae.fns['codes'](vp, fill)[:, 6:] if filled else jnp.zeros((2, 3, 6))
  expected = jax.jit(functools.partial(sampling.images_from_codes, vae))(
      vp, jnp.concatenate([codes[:, :6], rest], axis=1)
  )
  np.testing.assert_allclose(image, expected, rtol=1e-4, atol=1e-4)


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


def test_a_rollout_split_over_heads_is_that_of_one_device():
  teacher, _, vae, tp, _, vp = nets()
  labels, keys = jnp.arange(16) % 5, jax.random.split(jax.random.key(0), 16)

  @jax.jit
  def run(tp, vp, labels, keys):
    return sampling.rollout(
        teacher, vae, tp, vp, labels, sampling.categorical(keys), cfg=1.5,
        **OPEN,
    )

  mesh = sharding.make_mesh(dict(data=4, tensor=2))
  where = (
      sharding.shard_params(
          teacher.axes(), tp, mesh, sharding.RULES['fsdp_tp']
      ),
      sharding.replicated(mesh), *[sharding.batch_sharding(mesh)] * 2,
  )
  placed = jax.device_put((tp, vp, labels, keys), where)
  with sharding.kernels_on(mesh):
    split = run.lower(*placed).compile()
  # A device caches one head, of the two rows of each of four examples.
  caches = re.findall(r'f32\[1,\d+,\d+,9,16\]', split.as_text())
  assert set(caches) == {'f32[1,8,1,9,16]'}
  alone = run(tp, vp, labels, keys)
  assert len(np.unique(alone, axis=0)) > 12
  np.testing.assert_array_equal(split(*placed), alone)


def test_impossible_requests_are_refused():
  teacher, student, vae, tp, sp, vp = nets()
  run = functools.partial(
      sampling.rollout, teacher, vae, tp, vp, LABELS, sampling.greedy, cfg=1.5,
      **OPEN,
  )
  with pytest.raises(ValueError, match='need 0 <= start <= stop <= 9'):
    run(stop=10)
  with pytest.raises(ValueError, match='0 < stop'):
    run(stop=0)
  with pytest.raises(ValueError, match='prefix of 5 tokens'):
    run(start=5, prefix=jnp.zeros((2, 4), jnp.int32))
  with pytest.raises(ValueError, match='temperature=0'):
    run(temperature=0)
  few = functools.partial(
      sampling.few_step, student, vae, sp, vp, draw_noise(), LABELS
  )
  for t_list in (), (2,), (0, 0, 5), (0, 5, 3), (0, 9):
    with pytest.raises(ValueError, match='must start with 0, increase and'):
      few(t_list=t_list, split=2)
  for split in -1, 10:
    with pytest.raises(ValueError, match=r'split=.* must lie in \[0, 9\]'):
      few(t_list=(0,), split=split)
  with pytest.raises(ValueError, match=r'expected \(B, 9, 6\)'):
    sampling.few_step(
        student, vae, sp, vp, draw_noise()[:, 1:], LABELS, t_list=(0,), split=2
    )


def test_another_tokenizer_is_refused():
  teacher, student, _, tp, sp, _ = nets()
  other = vq_model.build(VAE | {'vocab_size': 25})
  params = random_params(other, 0)
  message = "predicts 24 codes of size 6, but this 'llamagen_vq' has 25"
  with pytest.raises(ValueError, match=message):
    sampling.rollout(
        teacher, other, tp, params, LABELS, sampling.greedy, cfg=1.5, **OPEN
    )
  with pytest.raises(ValueError, match=message):
    sampling.few_step(
        student, other, sp, params, draw_noise(), LABELS, t_list=(0,), split=2
    )
