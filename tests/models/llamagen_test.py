# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The LlamaGen transformer and its student: parity, caching, dependencies."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import sharding
from dd_jax.convert import table
from dd_jax.models.layers import CodeHead
from dd_jax.models.llamagen import convert, model, student
from tests.golden import golden_cases
from tests.golden import llamagen_networks as networks
from tests.usage import bounded

TINY = {
    'num_classes': 5, 'depth': 2, 'width': 32, 'heads': 4, 'latent_size': 3,
    'vocab_size': 24, 'code_dim': 6, 'mlp_width': 48,
}
CAPTIONS = TINY | {'num_classes': 0, 'caption_length': 5, 'caption_dim': 7}
KINDS = {'classes': TINY, 'captions': CAPTIONS}
BUILDS = (model.build, student.build)
both_kinds = pytest.mark.parametrize('kind', KINDS)
both_builds = pytest.mark.parametrize('build', BUILDS)


def golden(name):
  """A case, its model, its table and its converted weights."""
  case = golden_cases.load(name)
  is_student = name.startswith('dd_')
  net, params = (networks.student if is_student else networks.teacher)(case)
  rows = (convert.student_table if is_student else convert.llamagen_table)(
      net.config
  )
  return case, net, rows, params


golden_tiny = functools.cache(golden)


@pytest.mark.parametrize('name, field', [
    ('llamagen_gpt_c2i_tiny', 'teacher_forced_logits'),
    ('llamagen_gpt_t2i_tiny', 'teacher_forced_logits_no_mask'),
])
def test_teacher_forced_logits_match_the_original(name, field):
  case, net, _, params = golden_tiny(name)
  logits = jax.jit(net.apply)(
      params, networks.condition(case, mask=False),
      case.arrays['tokens'][:, :-1],
  )
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, case.arrays[field], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name, field', [
    ('llamagen_gpt_c2i_L', 'teacher_forced_logits'),
    ('llamagen_gpt_t2i_L', 'teacher_forced_logits_no_mask'),
])
@bounded(seconds=300, gigabytes=8)
def test_teacher_forced_logits_of_size_l_match_the_original(name, field):
  case, net, _, params = golden(name)
  logits = networks.fast_jit(net.apply)(
      params, networks.condition(case, mask=False),
      case.arrays['tokens'][:, :-1],
  )
  np.testing.assert_allclose(
      logits[:, ::16, ::64], case.arrays[field], rtol=2e-3, atol=2e-3
  )


def check_heads(name, jit, tolerance, some):
  case, net, _, params = golden(name)
  arrays, forward = case.arrays, jit(net.apply)
  data = arrays['noise'][:, :0]
  for i, t in enumerate(case.config['t_list']):
    x = np.concatenate([data[:, :t], arrays['noise'][:, t:]], axis=1)
    out = forward(params, x, arrays['label'], np.full(len(x), t))
    for ours, theirs in (
        (out['logits'][some], 'logits'), (out['codes'], 'tokens'),
    ):
      np.testing.assert_allclose(
          ours, arrays[f'step{i}_{theirs}'], rtol=tolerance, atol=tolerance
      )
    data = arrays[f'step{i}_final_sequence']


def test_both_heads_of_the_student_match_the_original():
  check_heads('dd_llamagen_tiny', jax.jit, 1e-4, np.s_[:])


@pytest.mark.slow
@bounded(seconds=300, gigabytes=8)
def test_both_heads_of_the_student_of_size_l_match_the_original():
  check_heads(
      'dd_llamagen_L', networks.fast_jit, 2e-3, np.s_[:, ::16, ::64]
  )


@pytest.mark.parametrize('name', [
    'llamagen_gpt_c2i_tiny', 'llamagen_gpt_t2i_tiny', 'dd_llamagen_tiny',
])
def test_table_gives_back_the_original_weights(name):
  case, _, rows, params = golden_tiny(name)
  tensors, back = case.tensors(), table.invert(rows, params)
  assert tensors.keys() == back.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(back[key], value)


# The original does not count its null caption, 120 x 2048, as a parameter. Of
# XXL its page says 1.4B; the count is what the fields of the size come to.
@pytest.mark.parametrize('build, size, classes, count', [
    (model.build, 'B', 1000, 110_888_448),
    (model.build, 'L', 1000, 342_910_976),
    (model.build, 'XL', 0, 777_678_080 + 245_760),
    (model.build, 'XXL', 1000, 1_410_972_672),
    (student.build, 'B', 1000, 98_321_672),
    (student.build, 'L', 1000, 326_155_272),
    (student.build, 'XL', 0, 756_733_448 + 245_760),
])
def test_published_sizes(build, size, classes, count):
  net = build({'size': size, 'num_classes': classes})
  assert sum(x.size for x in jax.tree.leaves(net.abstract())) == count


def test_sizes_by_name():
  c = model.build({'size': '3B', 'num_classes': 1000}).config
  assert (c.depth, c.heads, c.width) == (24, 32, 3200)
  assert c.hidden == 8704 and c.offsets == tuple(range(257))
  hidden = {
      s: model.build({'size': s, 'num_classes': 1}).config.hidden
      for s in ('B', 'L', 'XL')
  }
  assert hidden == {'B': 2048, 'L': 2816, 'XL': 3584}
  with pytest.raises(ValueError, match="size='M' must be one of .*'XXL'"):
    model.build({'size': 'M', 'num_classes': 1000})


def inputs(net, batch=2, seed=0):
  """Conditions, indices and student tokens."""
  c = net.config
  keys = jax.random.split(jax.random.key(seed), 4)
  length = c.offsets[-1]
  if c.num_classes:
    condition = jax.random.randint(keys[0], (batch,), 0, c.num_classes)
  else:
    shape = (batch, c.caption_length)
    condition = {
        'features': jax.random.normal(keys[0], (*shape, c.caption_dim)),
        'mask': jnp.arange(shape[1])[None] >= 1 + jnp.arange(batch)[:, None],
    }
  return (
      condition,
      jax.random.randint(keys[1], (batch, length), 0, c.vocab_size),
      jax.random.normal(keys[2], (batch, length, c.code_dim)),
  )


def random_params(net, seed=1):
  """Parameters at which every one of them matters, also those born zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
      net.abstract(),
  )


def outputs(net, params, key=None):
  """What `forward` gives for `inputs`, in one array."""
  condition, indices, x = inputs(net)
  if net.family == 'llamagen':
    return net.apply(params, condition, indices[:, :-1], key=key)
  out = net.apply(params, x, condition, jnp.array([0, 5]), key=key)
  return jnp.concatenate([out['logits'], out['codes']], axis=-1)


@both_kinds
@pytest.mark.parametrize('start', [0, 4])
def test_cache_gives_what_the_masked_sequence_gives(kind, start):
  net = model.build(KINDS[kind])
  params = random_params(net)
  condition, indices, _ = inputs(net)
  whole = jax.jit(net.apply)(params, condition, indices[:, :-1])

  @jax.jit
  def decode(params, condition, indices):
    cache = net.fns['init_cache'](params, 2)
    first, cache = net.fns['prefill'](
        params, cache, condition, indices[:, :start]
    )

    def step(cache, i):  # one program whatever the position
      logits, cache = net.fns['step'](params, cache, indices[:, i], i)
      return cache, logits

    _, rest = jax.lax.scan(step, cache, jnp.arange(start, 8))
    return jnp.concatenate([first[:, None], rest.swapaxes(0, 1)], axis=1)

  np.testing.assert_allclose(
      decode(params, condition, indices), whole[:, start:], rtol=1e-4,
      atol=1e-4,
  )


@both_kinds
@both_builds
def test_flops_agree_with_the_compiler(build, kind):
  net = build(KINDS[kind] | {
      'width': 128, 'mlp_width': 256, 'latent_size': 5, 'unroll': True,
  })
  condition, indices, x = jax.eval_shape(lambda: inputs(net, batch=1))
  last = jax.eval_shape(lambda i: i[:, :-1], indices)
  offset = jax.ShapeDtypeStruct((1,), jnp.int32)
  args = (
      (condition, last) if net.family == 'llamagen' else (x, condition, offset)
  )
  compiled = jax.jit(net.apply).lower(net.abstract(), *args).compile()
  assert net.flops() == pytest.approx(
      compiled.cost_analysis()['flops'], rel=0.05
  )


@both_kinds
@both_builds
def test_axes_name_every_dimension(build, kind):
  net = build(KINDS[kind])
  names = {'embed', 'mlp', 'heads', 'vocab', 'layers', 'code', None}
  is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
  shapes = jax.tree.map(lambda x: x.shape, net.abstract())
  for shape, axes in zip(
      jax.tree.leaves(shapes, is_leaf=is_axes),
      jax.tree.leaves(net.axes(), is_leaf=is_axes), strict=True,
  ):
    assert len(shape) == len(axes) and set(axes) <= names
  axes = net.axes()
  assert axes['layers']['attn']['q']['kernel'] == ('layers', 'embed', 'heads')
  assert axes['layers']['down']['kernel'] == ('layers', 'mlp', 'embed')
  assert axes['output']['kernel'] == ('embed', 'vocab')


def test_condition_slots_are_not_rotated_but_zero():
  c = model.build(CAPTIONS).config
  rotations = model.rotations(c)
  assert rotations.shape == (5 + 9, 4, 2) and not rotations[:5].any()
  np.testing.assert_allclose(
      np.square(rotations[5:]).sum(-1), 1, rtol=1e-6
  )
  # Token 5 is in row 1, column 2; pairs turn by 1 and by 1/100 a place.
  angle = np.array([1, 0.01, 2, 0.02])
  np.testing.assert_allclose(
      rotations[5 + 5], np.stack([np.cos(angle), np.sin(angle)], -1), rtol=1e-5
  )


@both_kinds
def test_teacher_sees_what_stands_before(kind):
  net = model.build(KINDS[kind])
  params = random_params(net)
  condition, indices, _ = inputs(net)
  moved = indices.at[:, 4].set((indices[:, 4] + 1) % 24)
  forward = jax.jit(net.apply)
  change = jnp.abs(
      forward(params, condition, moved[:, :-1])
      - forward(params, condition, indices[:, :-1])
  ).max(axis=2)
  assert (change[:, :5] == 0).all() and (change[:, 5:] > 1e-5).all()


@both_kinds
def test_student_sees_what_stands_before_and_its_own_noise(kind):
  net = student.build(KINDS[kind])
  params = random_params(net)
  condition, _, x = inputs(net)
  run = jax.jit(lambda x: jnp.concatenate(jax.tree.leaves(
      net.apply(params, x, condition, jnp.array([0, 5]))
  ), axis=-1))
  change = jnp.abs(run(x.at[:, 4].add(1.0)) - run(x)).max(axis=2)
  assert (change[:, :4] == 0).all() and (change[:, 4:] > 1e-5).all()


def test_flags_follow_the_offset_of_each_example():
  net = student.build(TINY)
  params = random_params(net)
  condition, _, x = inputs(net)
  labels, x = jnp.repeat(condition[:1], 3), jnp.repeat(x[:1], 3, axis=0)
  forward = jax.jit(net.apply)
  out = forward(params, x, labels, jnp.array([1, 2, 5]))['codes']
  # Tokens before the first flag that differs cannot tell.
  np.testing.assert_allclose(out[0, :1], out[1, :1], rtol=1e-5, atol=1e-5)
  assert jnp.abs(out[0, 1] - out[1, 1]).max() > 1e-3
  np.testing.assert_allclose(out[1, :2], out[2, :2], rtol=1e-5, atol=1e-5)
  assert jnp.abs(out[1, 2] - out[2, 2]).max() > 1e-3


@both_builds
def test_padding_of_captions_does_not_matter(build):
  net = build(CAPTIONS)
  params = random_params(net)
  condition, indices, x = inputs(net)
  assert condition['mask'].tolist() == [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]

  @jax.jit
  def run(condition):
    if net.family == 'llamagen':
      return [net.apply(params, condition, indices[:, :-1])]
    out = net.apply(params, x, condition, jnp.array([0, 5]))
    return [out['logits'], out['codes']]

  def change(condition):
    return max(
        jnp.abs(a - b).max()
        for a, b in zip(run(condition), whole, strict=True)
    )

  whole = run(condition)
  noise = jnp.where(condition['mask'], 0.0, 9.0)[..., None]
  assert change(condition | {'features': condition['features'] + noise}) == 0
  assert change(jax.tree.map(lambda x: x[:, 1:], condition)) < 1e-5
  assert change(condition | {'mask': jnp.ones((2, 5), bool)}) > 1e-3
  assert change(condition | {'features': 2 * condition['features']}) > 1e-3


def gelu(x):
  x = np.asarray(x, np.float64)
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# The release has no students of captions: no golden case has these two.
def test_the_mean_of_a_caption_modulates_the_code_head():
  net = student.build(CAPTIONS)
  params = random_params(net)
  # Blocks that add nothing: what enters them is what the head reads.
  for branch in (params['layers']['attn']['proj'], params['layers']['down']):
    branch['kernel'] = jnp.zeros_like(branch['kernel'])
  condition, _, x = inputs(net)
  offset = np.array([0, 5])
  out = jax.jit(net.apply)(params, x, condition, jnp.asarray(offset))['codes']
  mask, caption = np.asarray(condition['mask']), params['condition']
  assert mask.sum(1).tolist() == [4, 3]  # neither all slots nor one
  slots = gelu(condition['features'] @ caption['fc1']['kernel'])
  slots = slots @ np.asarray(caption['fc2']['kernel'])
  mean = np.stack([rows[valid].mean(0) for rows, valid in zip(
      slots, mask, strict=True
  )])
  embed = params['code_embed']
  is_data = (np.arange(9)[None] < offset[:, None]).astype(int)
  tokens = x @ embed['kernel'] + embed['bias'][None, None]
  tokens += params['flag_embed']['embedding'][is_data]
  expected = CodeHead(6, 0.02).apply(
      {'params': params['code_head']}, tokens, jnp.asarray(mean, jnp.float32)
  )
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_slots_of_a_caption_have_the_flag_of_data():
  net = student.build(CAPTIONS)
  params = random_params(net)
  condition, _, x = inputs(net)
  features = condition['features'].at[..., 0].set(1.0)
  condition = condition | {'features': features}
  caption = params['condition']
  # A hidden unit that is the same for every slot.
  fc1 = caption['fc1']['kernel'].at[:, 0].set(0.0).at[0, 0].set(1.0)
  caption['fc1']['kernel'] = fc1
  forward = jax.jit(net.apply)

  def logits(params):
    return forward(params, x, condition, jnp.zeros(2, jnp.int32))['logits']

  def replaced(params, path, value):
    name, *rest = path
    below = replaced(params[name], rest, value) if rest else value
    return params | {name: below}

  # Flags by hand instead: noise at all tokens, data at all of the caption.
  noise, data = params['flag_embed']['embedding']
  by_hand = replaced(params, ('flag_embed', 'embedding'), jnp.zeros((2, 32)))
  by_hand = replaced(
      by_hand, ('code_embed', 'bias'), params['code_embed']['bias'] + noise
  )
  by_hand = replaced(
      by_hand, ('condition', 'fc2', 'kernel'),
      caption['fc2']['kernel'].at[0].add(data / gelu(1.0)),
  )
  np.testing.assert_allclose(
      logits(params), logits(by_hand), rtol=1e-4, atol=1e-4
  )
  # From noise alone, nothing but the caption has the flag of data.
  moved = replaced(
      params, ('flag_embed', 'embedding'), jnp.stack([noise, data + 1])
  )
  change = jnp.abs(logits(moved) - logits(params)).max(-1)
  assert (change > 1e-3).all()


def test_null_conditions():
  net = model.build(TINY)
  labels = jnp.array([0, 3])
  assert net.fns['null'](random_params(net), labels).tolist() == [5, 5]
  net = model.build(CAPTIONS)
  params, (condition, *_) = random_params(net), inputs(net)
  null = net.fns['null'](params, condition)
  np.testing.assert_array_equal(null['mask'], condition['mask'])
  for row in null['features']:
    np.testing.assert_array_equal(row, params['condition']['null'])
  short = jax.tree.map(lambda x: x[:, 2:], condition)
  np.testing.assert_array_equal(
      net.fns['null'](params, short)['features'], null['features'][:, 2:]
  )


@both_kinds
def test_student_adopts_its_teacher(kind):
  net, teacher = student.build(KINDS[kind]), model.build(KINDS[kind])
  old = random_params(teacher)
  adopt = jax.jit(net.fns['adopt'])
  new = adopt(jax.random.key(0), old)
  assert jax.tree.map(jnp.shape, new) == jax.tree.map(
      jnp.shape, net.abstract()
  )
  for name in ('condition', 'layers', 'norm', 'output'):
    jax.tree.map(np.testing.assert_array_equal, new[name], old[name])
  assert new.keys() - old.keys() == {'code_embed', 'flag_embed', 'code_head'}
  other = adopt(jax.random.key(1), old)
  for path in (('code_embed', 'kernel'), ('flag_embed', 'embedding')):
    a, b = (functools.reduce(lambda t, k: t[k], path, t) for t in (new, other))
    assert jnp.abs(a - b).max() > 0


def test_initial_weights_have_the_scale_of_the_original():
  net = student.build({
      'num_classes': 0, 'depth': 3, 'width': 128, 'heads': 2, 'unroll': False,
      'caption_dim': 64, 'vocab_size': 8, 'latent_size': 2, 'mlp_width': 64,
  })
  params = jax.jit(net.init)(jax.random.key(0))
  teacher = model.build(TINY | {'width': 128, 'vocab_size': 200})
  tokens = jax.jit(teacher.init)(jax.random.key(0))
  layers, condition = params['layers'], params['condition']
  expected = {
      'tokens': (tokens['token_embed']['embedding'], 0.02),
      'qkv': (layers['attn']['k']['kernel'], 0.02),
      'proj': (layers['attn']['proj']['kernel'], 0.02),
      'mlp': (layers['down']['kernel'], 0.02),
      'caption': (condition['fc1']['kernel'], 0.02),
      'null': (condition['null'], 64**-0.5),
      'codes': (params['code_embed']['kernel'], 0.02),
      'flags': (params['flag_embed']['embedding'], 0.02),
      'code head': (params['code_head']['proj']['kernel'], 0.02),
      'shift': (params['code_head']['shift_scale'], 128**-0.5),
  }
  for name, (actual, wanted) in expected.items():
    assert actual.std() == pytest.approx(wanted, rel=0.15), name
  assert not params['output']['kernel'].any()
  assert (layers['attn_norm']['scale'] == 1).all()


def test_loops_and_recomputation_change_nothing():
  params = random_params(student.build(CAPTIONS))

  def run(**fields):
    net = student.build(CAPTIONS | fields)
    return jax.jit(jax.value_and_grad(
        lambda p: jnp.square(outputs(net, p)).mean()
    ))(params)

  value, grads = run(unroll=True)
  unused = grads['condition'].pop('null')  # a student is not guided
  assert not unused.any()
  assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
  for fields in (
      {'unroll': True, 'remat': 'dots'}, {'unroll': False, 'remat': 'full'},
  ):
    other, other_grads = run(**fields)
    del other_grads['condition']['null']
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        other_grads, grads,
    )


def test_bfloat16_stays_near_float32():
  net, half = (student.build(TINY | {'dtype': d})
               for d in ('float32', 'bfloat16'))
  params = random_params(net)
  exact, near = (
      jax.jit(functools.partial(outputs, n))(params) for n in (net, half)
  )
  assert near.dtype == jnp.float32
  assert 0 < jnp.abs(near - exact).max() < 0.05 * jnp.abs(exact).max()


@pytest.mark.parametrize('build, field', [
    (model.build, 'dropout'), (student.build, 'token_dropout'),
])
def test_dropout_depends_on_each_examples_key_alone(build, field):
  net = build(TINY | {field: 0.3})
  params = random_params(net)
  run = jax.jit(functools.partial(outputs, net))
  keys = jax.random.split(jax.random.key(3), 2)
  out = run(params, keys)
  other = run(params, jnp.stack([keys[0], jax.random.key(9)]))
  np.testing.assert_array_equal(out[0], other[0])
  assert jnp.abs(out[1] - other[1]).max() > 1e-3
  still = build(TINY)
  np.testing.assert_array_equal(
      run(params), jax.jit(functools.partial(outputs, still))(params)
  )


def test_dropout_keeps_the_mean():
  keys = jax.random.split(jax.random.key(0), 50)
  out = model.dropout(keys, jnp.ones((50, 10, 40)), 0.25)
  assert set(np.unique(out).tolist()) == {0.0, np.float32(1 / 0.75).item()}
  assert out.mean() == pytest.approx(1, abs=0.03)


@both_kinds
@both_builds
def test_sharded_equals_unsharded(build, kind):
  net = build(KINDS[kind])
  params = random_params(net)
  condition, indices, x = inputs(net, batch=8)
  offset = jnp.arange(8, dtype=jnp.int32)
  args = (
      (condition, indices[:, :-1]) if net.family == 'llamagen'
      else (x, condition, offset)
  )
  run = jax.jit(net.apply)
  whole = run(params, *args)
  mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
  placed = jax.device_put(params, sharding.shard_params(
      net.axes(), params, mesh, sharding.RULES['fsdp_tp']
  ))
  q = placed['layers']['attn']['q']['kernel']
  assert q.sharding.shard_shape(q.shape) == (2, 16, 16)
  out = run(placed, *jax.device_put(args, sharding.batch_sharding(mesh)))
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
      out, whole,
  )


def test_tokens_out_of_range_do_not_pass_unseen():
  net = model.build(TINY)
  labels, indices, _ = inputs(net)
  forward = jax.jit(net.apply)
  for bad in (24, -1):
    logits = forward(
        random_params(net), labels, indices[:, :-1].at[0, 3].set(bad)
    )
    assert np.isnan(logits[0, 4:]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize('build', [model.build, student.build])
def test_labels_out_of_range_do_not_pass_unseen(build):
  net = build(TINY)
  labels, indices, x = inputs(net)
  params, none = random_params(net), net.config.num_classes

  @jax.jit
  def forward(labels):
    if net.family == 'llamagen':
      return net.apply(params, labels, indices[:, :-1])
    return net.apply(params, x, labels, jnp.array([0, 5]))['logits']

  assert np.isfinite(forward(labels.at[0].set(none))).all()
  for bad in (none + 1, -1):
    out = forward(labels.at[0].set(bad))
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_inputs_of_the_wrong_size_are_refused():
  net = model.build(TINY)
  cache, zeros = {}, functools.partial(jnp.zeros, dtype=jnp.int32)
  with pytest.raises(ValueError, match='9 tokens: expected all 9 but the last'):
    net.apply({}, zeros(2), zeros((2, 9)))
  with pytest.raises(ValueError, match='prefix of 9 tokens leaves nothing'):
    net.fns['prefill']({}, cache, zeros(2), zeros((2, 9)))
  caption = {'features': jnp.zeros((2, 6, 7)), 'mask': jnp.ones((2, 6), bool)}
  with pytest.raises(ValueError, match='num_classes=5: .* must be labels'):
    net.fns['null']({}, caption)
  net = model.build(CAPTIONS)
  params = random_params(net)
  with pytest.raises(ValueError, match='6 tokens.*caption_length=5 slots'):
    net.apply(params, caption, zeros((2, 8)))
  with pytest.raises(ValueError, match='must be captions'):
    net.apply(params, zeros(2), zeros((2, 8)))
  with pytest.raises(ValueError, match=r'expected \(B, T, 7\) and \(B, T\)'):
    net.apply(
        params, caption | {'features': jnp.zeros((2, 6, 8))}, zeros((2, 8))
    )


@pytest.mark.parametrize('fields, message', [
    ({'widht': 32}, "did you mean 'width'"),
    ({'heads': 3}, r'not a multiple of 4 \* heads=12'),
    ({'num_classes': -1}, 'num_classes=-1'),
    ({'mlp_width': 0}, 'at least 1'),
    ({'token_dropout': 1.0}, 'token_dropout=1.0'),
    ({'dropout': -0.5}, 'dropout=-0.5'),
    ({'remat': 'all'}, 'remat'),
])
@both_builds
def test_bad_fields_are_named(build, fields, message):
  with pytest.raises(ValueError, match=message):
    build(TINY | fields)
