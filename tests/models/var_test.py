# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The VAR transformer and its student: parity, caching, dependencies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.models.var import convert, model, student
from tests.golden import golden_cases, networks

TINY = {
    'num_classes': 5, 'depth': 2, 'width': 32, 'heads': 2,
    'patch_nums': [1, 2, 3], 'vocab_size': 24, 'code_dim': 6,
}
PATCH_NUMS = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
PATCH_NUMS_512 = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
CASES = ('tiny', 'tiny_saln')
KINDS = {
    'var_transformer': (networks.teacher, convert.var_table),
    'dd_var': (networks.student, convert.student_table),
}


def full_size(depth):
  large = depth == 36  # the one for images of 512 x 512
  return {
      'num_classes': 1000, 'depth': depth, 'width': 64 * depth, 'heads': depth,
      'patch_nums': PATCH_NUMS_512 if large else PATCH_NUMS,
      'vocab_size': 4096, 'code_dim': 32, 'shared_aln': large,
  }


@functools.cache
def golden(kind, name):
  """A case, its model, its table and its converted weights."""
  case = golden_cases.load(f'{kind}_{name}')
  make, make_table = KINDS[kind]
  net, params = make(case)
  return case, net, make_table(net.config), params


def inputs(net, batch=2, seed=0):
  """Labels, teacher-forcing maps and student tokens."""
  c = net.config
  keys = jax.random.split(jax.random.key(seed), 3)
  length = c.offsets[-1]
  return (
      jax.random.randint(keys[0], (batch,), 0, c.num_classes),
      jax.random.normal(keys[1], (batch, length - 1, c.code_dim)),
      jax.random.normal(keys[2], (batch, length, c.code_dim)),
  )


def random_params(net, seed=1):
  """Parameters at which every one of them matters, also those born zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype),
      net.abstract(),
  )


def outputs(net, params, key=None):
  """What `forward` gives for `inputs`, in one array."""
  labels, maps, x = inputs(net)
  if net.family == 'var':
    return net.apply(params, labels, maps, key=key)
  out = net.apply(params, x, labels, jnp.array([0, 5]), key=key)
  return jnp.concatenate([out['logits'], out['codes']], axis=-1)


@pytest.mark.parametrize('name', CASES)
def test_teacher_forced_logits_match_the_original(name):
  case, net, _, params = golden('var_transformer', name)
  maps = golden_cases.load(f'var_vqvae_{name}').arrays['var_input']
  logits = jax.jit(net.apply)(params, case.arrays['label'], maps)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(
      logits, case.arrays['teacher_forced_logits'], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('name', CASES)
def test_both_heads_of_the_student_match_the_original(name):
  case, net, _, params = golden('dd_var', name)
  arrays, forward = case.arrays, jax.jit(net.apply)
  data = arrays['noise'][:, :0]
  for i, t in enumerate(case.config['t_list']):
    offset = net.config.offsets[t]
    x = np.concatenate([data[:, :offset], arrays['noise'][:, offset:]], axis=1)
    out = forward(params, x, arrays['label'], np.full(len(x), offset))
    for field, name in (('logits', 'logits'), ('codes', 'tokens')):
      np.testing.assert_allclose(
          out[field], arrays[f'step{i}_{name}'], rtol=1e-4, atol=1e-4
      )
    data = arrays[f'step{i}_final_sequence']


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kind', KINDS)
def test_table_gives_back_the_original_weights(kind, name):
  case, _, rows, params = golden(kind, name)
  tensors, back = case.tensors(), table.invert(rows, params)
  assert tensors.keys() == back.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(back[key], value)


def test_buffers_are_optional_and_weights_are_not():
  case, net, rows, _ = golden('dd_var', 'tiny')
  tensors = case.tensors()
  table.convert(rows, tensors, net.abstract(), ignore=convert.IGNORE)
  del tensors['layerwise_n_d_embed.1.weight']
  with pytest.raises(table.ConversionError, match='n_d_embed.1.weight'):
    table.convert(rows, tensors, net.abstract(), ignore=convert.IGNORE)


@pytest.mark.parametrize('build, depth, count', [
    (model.build, 16, 310_283_520),
    (model.build, 20, 600_917_136),
    (model.build, 24, 1_033_399_360),
    (model.build, 30, 2_010_020_356),
    (model.build, 36, 2_353_893_904),
    (student.build, 16, 328_165_664),
    (student.build, 20, 635_399_088),
    (student.build, 24, 1_092_478_560),
])
def test_published_sizes(build, depth, count):
  net = build(full_size(depth) | {'unroll': False})
  assert sum(x.size for x in jax.tree.leaves(net.abstract())) == count


def test_offsets_and_levels():
  config = student.build(full_size(16)).config
  assert config.offsets == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)
  assert np.bincount(config.levels).tolist() == [n * n for n in PATCH_NUMS]
  assert config.slot_levels[:7].tolist() == [0, 1, 2, 2, 2, 2, 3]
  assert len(config.slot_levels) == 681


@pytest.mark.parametrize('shared_aln', [False, True])
@pytest.mark.parametrize('build', [model.build, student.build])
def test_flops_agree_with_the_compiler(build, shared_aln):
  net = build(TINY | {
      'width': 128, 'patch_nums': [1, 2, 3, 4], 'shared_aln': shared_aln,
      'unroll': True,
  })
  labels, maps, x = jax.eval_shape(lambda: inputs(net, batch=1))
  args = (labels, maps) if net.family == 'var' else (x, labels, labels)
  compiled = jax.jit(net.apply).lower(net.abstract(), *args).compile()
  assert net.flops() == pytest.approx(
      compiled.cost_analysis()['flops'], rel=0.05
  )


@pytest.mark.parametrize('build', [model.build, student.build])
def test_axes_name_every_dimension(build):
  net = build(TINY)
  names = {
      'embed', 'mlp', 'heads', 'vocab', 'layers', 'code', None
  }
  shapes = jax.tree.map(lambda x: x.shape, net.abstract())
  for shape, axes in zip(
      jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)),
      jax.tree.leaves(net.axes(), is_leaf=lambda x: isinstance(x, tuple)),
      strict=True,
  ):
    assert len(shape) == len(axes) and set(axes) <= names
  assert net.axes()['layers']['attn']['q']['kernel'] == (
      'layers', 'embed', 'heads'
  )
  assert net.axes()['head']['logits']['kernel'] == ('embed', 'vocab')


@pytest.mark.parametrize('variant', [
    {}, {'shared_aln': True, 'attn_l2_norm': False},
    {'patch_nums': [1, 1, 2, 2]},
])
def test_cache_gives_what_the_masked_sequence_gives(variant):
  net = model.build(TINY | variant)
  offsets, params = net.config.offsets, random_params(net)
  labels, maps, _ = inputs(net)
  whole = jax.jit(net.apply)(params, labels, maps)
  step = jax.jit(net.fns['step'], static_argnames='scale')
  prefill = jax.jit(
      net.fns['prefill'], static_argnames=('stop_scale', 'mask')
  )

  def steps(cache, start):
    logits = []
    for scale in range(start, len(offsets) - 1):
      part = maps[:, offsets[scale] - 1 : offsets[scale + 1] - 1]
      out, cache = step(
          params, cache, labels, part if scale else None, scale=scale
      )
      logits.append(out)
    return jnp.concatenate(logits, axis=1)

  empty = net.fns['init_cache'](params, 2)
  np.testing.assert_allclose(steps(empty, 0), whole, rtol=1e-4, atol=1e-4)

  def resumed(mask):
    out, cache = prefill(
        params, empty, labels, maps[:, : offsets[2] - 1], stop_scale=2,
        mask=mask,
    )
    return jnp.concatenate([out, steps(cache, 2)], axis=1)

  np.testing.assert_allclose(resumed('causal'), whole, rtol=1e-4, atol=1e-4)
  full = jnp.abs(resumed('full') - whole).max(axis=(0, 2))
  # The second scale saw all there was. What differs is the first slot and,
  # through what the cache holds of it, every slot after the first layer.
  assert full[0] > 1e-3 and full[offsets[2] :].min() > 1e-4


def test_prefill_refuses_an_unknown_mask():
  net = model.build(TINY)
  with pytest.raises(ValueError, match="mask='none'"):
    net.fns['prefill'](None, None, None, None, 1, 'none')


def test_teacher_sees_its_own_scale_and_coarser_ones():
  net = model.build(TINY)
  offsets, params = net.config.offsets, random_params(net)
  labels, maps, _ = inputs(net)
  token = offsets[1] + 2
  moved = maps.at[:, token - 1].add(1.0)  # maps lack the first token
  forward = jax.jit(net.apply)
  change = jnp.abs(
      forward(params, labels, moved) - forward(params, labels, maps)
  ).max(axis=(0, 2))
  assert (change[: offsets[1]] == 0).all()
  assert (change[offsets[1] :] > 1e-5).all()


def test_student_token_sees_itself_and_coarser_scales():
  net = student.build(TINY | {'zero_flags': False})
  offsets, params = net.config.offsets, random_params(net)
  labels, _, x = inputs(net)
  token = offsets[1] + 2
  offset = jnp.array([0, 5])

  @jax.jit
  def run(x):
    out = net.apply(params, x, labels, offset)
    return jnp.concatenate([out['logits'], out['codes']], axis=-1)

  change = jnp.abs(run(x.at[:, token].add(1.0)) - run(x)).max(axis=2)
  expected = np.arange(offsets[-1]) >= offsets[2]
  expected[token] = True
  assert (change[:, expected] > 1e-5).all()
  assert (change[:, ~expected] == 0).all()


def test_flags_follow_the_offset_of_each_example():
  net = student.build(TINY | {'zero_flags': False})
  params = random_params(net)
  labels, _, x = inputs(net)
  labels, x = jnp.repeat(labels[:1], 3), jnp.repeat(x[:1], 3, axis=0)
  forward = jax.jit(net.apply)
  out = forward(params, x, labels, jnp.array([1, 2, 5]))['codes']
  # Tokens before the first flag that differs cannot tell.
  np.testing.assert_allclose(out[0, :1], out[1, :1], rtol=1e-5, atol=1e-5)
  assert jnp.abs(out[0, 1] - out[1, 1]).max() > 1e-3
  np.testing.assert_allclose(out[1, :2], out[2, :2], rtol=1e-5, atol=1e-5)
  assert jnp.abs(out[1, 2] - out[2, 2]).max() > 1e-3
  one_by_one = [
      forward(params, x, labels, jnp.full(3, n))['codes'][0] for n in (1, 2, 5)
  ]
  np.testing.assert_allclose(out, jnp.stack(one_by_one), rtol=1e-4, atol=1e-4)


def test_student_without_layerwise_flags_has_none():
  net = student.build(TINY | {'layerwise_flags': False})
  assert 'head_flag' not in net.abstract()
  assert 'flag' not in net.abstract()['layers']
  params = random_params(net)
  back = table.invert(convert.student_table(net.config), params)
  assert not [k for k in back if k.startswith('layerwise')]
  assert jax.eval_shape(functools.partial(outputs, net), params).shape == (
      2, 14, 24 + 6
  )


@pytest.mark.parametrize('shared_aln', [False, True])
def test_student_adopts_its_teacher(shared_aln):
  config = TINY | {'shared_aln': shared_aln}
  net, teacher = student.build(config), model.build(config)
  old = random_params(teacher)
  adopt = jax.jit(net.fns['adopt'])
  new = adopt(jax.random.key(0), old)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(
      jnp.shape, net.abstract()
  )
  same = ('class_embed', 'pos_start', 'word_embed', 'head')
  for name in same + ('shared_ada',) * shared_aln:
    jax.tree.map(np.testing.assert_array_equal, new[name], old[name])
  for name in ('level_embed', 'pos_embed'):
    ours, theirs = new[name]['embedding'], old[name]['embedding']
    np.testing.assert_array_equal(ours[0], theirs[0])
    np.testing.assert_array_equal(ours[2:], theirs[1:])
    assert len(ours) == len(theirs) + 1
    assert not np.isin(ours[1], theirs).any()
  layers = dict(new['layers'])
  flag = layers.pop('flag')
  jax.tree.map(np.testing.assert_array_equal, layers, old['layers'])
  for leaf in jax.tree.leaves([flag, new['head_flag']]):
    assert not leaf.any()
  other = adopt(jax.random.key(1), old)
  assert jnp.abs(
      new['pos_embed']['embedding'][1] - other['pos_embed']['embedding'][1]
  ).max() > 0


def test_initial_weights_have_the_scale_of_the_original():
  c = TINY | {'width': 128, 'depth': 3, 'num_classes': 200, 'unroll': False}
  net = student.build(c | {'zero_flags': False})
  params = jax.jit(net.init)(jax.random.key(0))
  std, layers = (3 * 128) ** -0.5, params['layers']
  ada = layers['ada']['kernel'].reshape(3, 128, 6, 128).std(axis=(0, 1, 3))
  expected = {
      'class': (params['class_embed']['embedding'].std(), std),
      'qkv': (layers['attn']['k']['kernel'].std(), std),
      'proj': (layers['attn']['proj']['kernel'].std(), std / 6**0.5),
      'fc1': (layers['fc1']['kernel'].std(), std),
      'fc2': (layers['fc2']['kernel'].std(), std / 6**0.5),
      'gates': (ada[:2].mean(), 1e-5 * std),
      'scales and shifts': (ada[2:].mean(), 0.5 * std),
      'head ada': (params['head']['ada']['kernel'].std(), 0.5 * std),
      'head': (params['head']['logits']['kernel'].std(), 0.02 * std),
      'flags': (layers['flag']['kernel'].std(), std),
      'code head': (params['code_head']['proj']['kernel'].std(), std),
      'shift': (params['code_head']['shift_scale'].std(), 128**-0.5),
  }
  for name, (actual, wanted) in expected.items():
    assert actual == pytest.approx(wanted, rel=0.15), name
  np.testing.assert_allclose(layers['attn']['log_scale'], np.log(4), rtol=1e-6)
  assert not layers['fc1']['bias'].any()


def test_loops_and_recomputation_change_nothing():
  params = random_params(student.build(TINY))

  def run(**fields):
    net = student.build(TINY | fields)
    return jax.jit(jax.value_and_grad(
        lambda p: jnp.square(outputs(net, p)).mean()
    ))(params)

  value, grads = run(unroll=True)
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  for fields in (
      {'unroll': True, 'remat': 'dots'}, {'unroll': False, 'remat': 'full'},
  ):
    other, other_grads = run(**fields)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        other_grads, grads,
    )


@pytest.mark.parametrize('depth, times', [(8, 8), (9, 1)])
def test_many_blocks_are_a_loop(depth, times):
  """Even on CPU: XLA takes minutes for each of them in each step."""
  net = model.build(TINY | {'depth': depth})
  jaxpr = jax.make_jaxpr(net.apply)(
      net.abstract(), *jax.eval_shape(lambda: inputs(net))[:2]
  )
  assert f'unroll={times}\n' in str(jaxpr)


def test_bfloat16_stays_near_float32():
  net, half = (student.build(TINY | {'dtype': d})
               for d in ('float32', 'bfloat16'))
  params = random_params(net)
  exact, near = (
      jax.jit(functools.partial(outputs, n))(params) for n in (net, half)
  )
  assert near.dtype == jnp.float32
  assert 0 < jnp.abs(near - exact).max() < 0.05 * jnp.abs(exact).max()


@pytest.mark.parametrize('build', [model.build, student.build])
def test_drop_path_depends_on_each_examples_key_alone(build):
  net = build(TINY | {'drop_path': 0.5})
  params = random_params(net)
  run = jax.jit(functools.partial(outputs, net))
  keys = jax.random.split(jax.random.key(3), 2)
  out = run(params, keys)
  other = run(params, jnp.stack([keys[0], jax.random.key(9)]))
  np.testing.assert_array_equal(out[0], other[0])
  samples = np.stack([
      run(params, jax.random.split(jax.random.key(s), 2)) for s in range(12)
  ])
  # The first of two blocks never skips; the second has two branches.
  kinds = np.unique(samples[:, 0].reshape(12, -1), axis=0)
  assert 1 < len(kinds) <= 4


@pytest.mark.parametrize('build', [model.build, student.build])
def test_labels_out_of_range_do_not_pass_unseen(build):
  net = build(TINY)
  labels, maps, x = inputs(net)
  params, none = random_params(net), net.config.num_classes

  @jax.jit
  def forward(labels):
    if net.family == 'var':
      return net.apply(params, labels, maps)
    return net.apply(params, x, labels, jnp.array([0, 5]))['logits']

  assert np.isfinite(forward(labels.at[0].set(none))).all()
  for bad in (none + 1, -1):
    out = forward(labels.at[0].set(bad))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_one_scale_is_a_classifier_of_classes():
  net = model.build(TINY | {'patch_nums': [1]})
  params = random_params(net)
  logits = jax.jit(net.apply)(params, jnp.arange(3), jnp.zeros((3, 0, 6)))
  assert logits.shape == (3, 1, 24)


@pytest.mark.parametrize('fields, message', [
    ({'widht': 32}, "did you mean 'width'"),
    ({'heads': 3}, 'not a multiple of heads=3'),
    ({'patch_nums': [2, 3]}, 'must start with 1'),
    ({'patch_nums': [1, 3, 2]}, 'must start with 1 and not decrease'),
    ({'drop_path': 1.0}, 'drop_path=1.0'),
    ({'depth': 0}, 'at least 1'),
    ({'remat': 'all'}, 'remat'),
])
@pytest.mark.parametrize('build', [model.build, student.build])
def test_bad_fields_are_named(build, fields, message):
  with pytest.raises(ValueError, match=message):
    build(TINY | fields)
