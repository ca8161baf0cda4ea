# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Every kernel computes what the reference does."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build, model, plan, sharding
from dd_jax.kernels import attention, splash
from dd_jax.models import layers

SCALES = np.square((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
LEVELS = tuple(np.repeat(np.arange(10), SCALES).tolist())
VALID = np.arange(6)[None] >= np.array([[0], [4]])
# None of the lengths is a multiple of 128. Of 530 slots the kernel makes five
# blocks, so that it skips some.
MASKS = {
    'var': attention.Mask(LEVELS),
    'dd_var': attention.Mask((-1, *LEVELS), alone=True),
    'llamagen': attention.causal(530),
    'captions': attention.causal(130, VALID),
    'full': attention.Mask((0,) * 100),
}
VAR = dict(
    num_classes=4, depth=2, width=16, heads=2, patch_nums=[1, 2, 4],
    vocab_size=16, code_dim=4, gamma_init=1.0,
)
GPT = dict(
    num_classes=4, depth=2, width=16, heads=2, latent_size=4, vocab_size=16,
    code_dim=4, mlp_width=32,
)
CAPTIONS = dict(GPT, num_classes=0, caption_length=6, caption_dim=8)
MODELS = {
    'var': dict(VAR, attn_l2_norm=False),
    'dd_var': dict(VAR, zero_flags=False, remat='full'),
    'llamagen': dict(CAPTIONS, remat='dots'),
    'dd_llamagen': GPT,
}


def normal(i, shape, dtype='float32'):
  return jax.random.normal(jax.random.key(i), shape).astype(dtype)


def outcome(fn, mask, dtype, shape=None):
  """Output and gradients of attention by `fn`."""
  batch = 1 if mask.valid_BxT is None else len(mask.valid_BxT)
  shape = shape or (batch, len(mask.levels), 2, 8)
  inputs = [normal(i, shape, dtype) for i in range(3)]

  @jax.jit
  def run(*inputs):
    out, pull = jax.vjp(lambda *x: fn(*x, mask, scale=0.5), *inputs)
    return out, pull(normal(3, shape, dtype))

  return run(*inputs)


def assert_close(want, got, dtype):
  limit = {'float32': 2e-5, 'bfloat16': 5e-2}[dtype]
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a.astype(jnp.float32), b.astype(jnp.float32), rtol=limit, atol=limit
      ), want, got,
  )


@pytest.fixture
def interpreted(monkeypatch):
  """Programs are traced as for TPU, and their kernels run here."""
  calls = []

  def attend(*args, run=splash.attend, **kwargs):
    calls.append(args[3])
    return run(*args, **kwargs, interpret=True)

  monkeypatch.setattr(splash, 'attend', attend)
  with model.for_platform('tpu'):
    yield calls


@pytest.mark.parametrize('name', sorted(MASKS))
def test_masks_as_they_are_described(name):
  mask = MASKS[name]
  n = len(mask.levels)
  levels = np.array(mask.levels)
  want = {
      'var': levels[:, None] >= levels[None],
      'dd_var': (levels[:, None] > levels[None]) | np.eye(n, dtype=bool),
      'full': np.ones((n, n), bool),
  }.get(name, np.tri(n, dtype=bool))[None]
  if name == 'captions':
    want = np.repeat(want, 2, axis=0)
    want[1, :4] = want[1, :, :4] = False
    want[1, range(n), range(n)] = True
  np.testing.assert_array_equal(mask.array(), want[:, None])
  padded = mask.padded(128)
  assert len(padded.levels) % 128 == 0
  np.testing.assert_array_equal(
      padded.array()[:, :, :n],
      np.pad(want[:, None], [(0, 0)] * 3 + [(0, len(padded.levels) - n)]),
  )


@pytest.mark.parametrize('name, dtype', [
    *((name, 'float32') for name in sorted(MASKS)), ('dd_var', 'bfloat16'),
])
def test_splash_is_the_reference(name, dtype):
  fn = functools.partial(splash.attend, interpret=True)
  assert_close(
      outcome(attention.reference, MASKS[name], dtype),
      outcome(fn, MASKS[name], dtype), dtype,
  )


@pytest.mark.parametrize('batch, heads, spec', [
    (4, 2, (('data', 'fsdp'), 'tensor')),
    (2, 3, ('data', None)),  # neither four groups of examples nor two of heads
])
def test_splash_is_the_same_on_any_mesh(batch, heads, spec):
  mask = attention.causal(130, np.tile(VALID, (batch // 2, 1)))
  run = functools.partial(
      outcome, functools.partial(splash.attend, interpret=True), mask,
      'float32', (batch, 130, heads, 8),
  )
  want = run()
  with sharding.kernels_on(
      sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  ):
    got = run()
  assert_close(want, got, 'float32')
  out = (*got[0].sharding.spec, None, None)
  assert (out[0], out[2]) == spec


def test_flops_of_a_kernel_are_those_of_all_blocks_and_chips():
  mask = attention.causal(530)
  q = jax.ShapeDtypeStruct((4, 530, 2, 8), 'float32')
  want = 4 * 4 * 2 * 640**2 * 8  # two products over five blocks of 128 slots
  run = functools.partial(splash.attend, mask=mask)
  assert layers.count_flops(run, q, q, q) == want
  with sharding.kernels_on(sharding.make_mesh(dict(data=4, tensor=2))):
    assert layers.count_flops(run, q, q, q) == want


def inputs_of(name):
  rng = np.random.default_rng(0)
  labels = np.arange(4, dtype=np.int32)
  x = rng.normal(size=(4, 21, 4)).astype(np.float32)
  captions = {
      'features': rng.normal(size=(4, 6, 8)).astype(np.float32),
      'mask': np.tile(VALID, (2, 1)),
  }
  return {
      'var': (labels, x[:, 1:]),
      'dd_var': (x, labels, np.array([0, 1, 5, 21], np.int32)),
      'llamagen': (
          captions, rng.integers(0, 16, (4, 15)).astype(np.int32)
      ),
      'dd_llamagen': (x[:, :16], labels, np.array([0, 1, 5, 16], np.int32)),
  }[name]


def gradients(net, params, *inputs):
  def loss(params):
    out = jax.tree.leaves(net.apply(params, *inputs))
    return sum(jnp.square(x).mean() for x in out), out

  return jax.grad(loss, has_aux=True)(params)


@pytest.mark.parametrize('name', sorted(MODELS))
def test_networks_with_splash_on_a_mesh(name, interpreted):
  config = dict(MODELS[name], name=name)
  net, by_kernel = (
      build.build_model(dict(config, attention=kind))
      for kind in ('reference', 'splash')
  )
  params = jax.tree.map(
      lambda x: x + 0.1 * normal(x.size, x.shape), net.init(jax.random.key(0))
  )
  want = jax.jit(functools.partial(gradients, net))(params, *inputs_of(name))
  assert not interpreted
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  placed = jax.device_put(params, sharding.shard_params(
      net.axes(), params, mesh, sharding.RULES['fsdp_tp']
  ))
  inputs = jax.device_put(inputs_of(name), sharding.batch_sharding(mesh))
  with sharding.kernels_on(mesh):
    got = jax.jit(functools.partial(gradients, by_kernel))(placed, *inputs)
  assert interpreted
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
      want, got,
  )


def test_few_queries_and_a_cache_stay_with_the_reference(interpreted):
  net = build.build_model(dict(VAR, name='var', attention='splash'))

  def prefill(params):
    cache = net.fns['init_cache'](params, 2)
    return net.fns['prefill'](
        params, cache, jnp.zeros(2, jnp.int32), jnp.zeros((2, 4, 4)), 2
    )

  def step(params, cache):
    return net.fns['step'](
        params, cache, jnp.zeros(2, jnp.int32), jnp.zeros((2, 16, 4)), 2
    )

  _, cache = jax.eval_shape(prefill, net.abstract())
  assert {len(mask.levels) for mask in interpreted} == {5}
  interpreted.clear()
  jax.eval_shape(step, net.abstract(), cache)
  assert not interpreted


@pytest.mark.parametrize('kind', ['auto', 'reference', 'splash', 'cudnn'])
def test_other_platforms_run_the_reference(kind):
  for mask in (MASKS['full'], None, MASKS['full'].array()):
    q, k, v = (normal(i, (1, 100, 1, 8)) for i in range(3))
    np.testing.assert_array_equal(
        attention.attend(q, k, v, mask, kind=kind),
        attention.reference(q, k, v, mask),
    )


@pytest.mark.parametrize('name', sorted(MASKS))
def test_what_cudnn_is_asked_for(name, monkeypatch):
  """cuDNN itself needs a GPU: here XLA computes what it would be asked for."""
  asked = []
  plain = jax.nn.dot_product_attention

  def spy(*args, implementation=None, **kwargs):
    asked.append((implementation, kwargs.get('is_causal'), args[0].shape[1]))
    return plain(*args, **kwargs)

  mask = MASKS[name]
  want = outcome(attention.reference, mask, 'bfloat16')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', spy)
  with model.for_platform('gpu'):
    fn = functools.partial(attention.attend, kind='cudnn')
    got = outcome(fn, mask, 'bfloat16')
  assert_close(want, got, 'bfloat16')
  # With a mask there are no gradients for odd lengths.
  causal = name == 'llamagen'
  n = len(mask.levels)
  assert asked == [('cudnn', causal or None, n if causal else n + n % 2)]


def test_what_kernels_cannot_do_is_refused():
  for name, config in (('var', VAR), ('dd_llamagen', GPT)):
    config = dict(config, name=name)
    assert build.build_model(config).config.attention == 'auto'
    with pytest.raises(ValueError, match="'attention' must be one of 'auto'"):
      build.build_model(dict(config, attention='flash'))
    with pytest.raises(ValueError, match="'cudnn' needs dtype='bfloat16'"):
      build.build_model(dict(config, attention='cudnn'))
    config |= dict(attention='cudnn', dtype='bfloat16', heads=4)
    with pytest.raises(ValueError, match='width / heads = 4'):
      build.build_model(config)
    build.build_model(dict(config, heads=2))


def test_the_tpu_compiler_takes_it():
  pytest.importorskip(
      'libtpu', reason="the TPU compiler is in the extra 'tpu'"
  )
  net = build.build_model(dict(
      VAR, name='dd_var', heads=4, width=256, patch_nums=[1, 2, 3, 4, 5, 6, 8],
      dtype='bfloat16', remat='full', attention='splash',
  ))
  mesh = sharding.make_mesh(
      dict(data=2, fsdp=2, tensor=2), plan.make_target('v5e:2x4').devices
  )
  shapes = net.abstract()
  params = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
      sharding.shard_params(
          net.axes(), shapes, mesh, sharding.RULES['fsdp_tp']
      ),
  )
  rows = sharding.batch_sharding(mesh)
  inputs = [
      jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for shape, dtype in
      (((8, 155, 4), 'float32'), ((8,), 'int32'), ((8,), 'int32'))
  ]
  run = jax.jit(functools.partial(gradients, net))
  with model.for_platform('tpu'):
    with sharding.kernels_on(mesh):
      compiled = run.trace(params, *inputs).lower().compile()
    # Forward, forward again for the backward pass, and two gradients.
    assert compiled.as_text().count('"tpu_custom_call"') == 4
    # What happens where nobody says over which mesh.
    run.clear_cache()
    with pytest.raises(NotImplementedError, match='shard_map'):
      run.trace(params, *inputs).lower()
