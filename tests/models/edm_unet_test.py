# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the EDM UNet: golden parity, submodules, table, errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import checkpoint, conversion
from dd_jax.convert import readers, table
from dd_jax.flow import edm
from dd_jax.models import denoiser, layers
from dd_jax.models.discriminator import convert as head_convert
from dd_jax.models.discriminator import model as discriminator
from dd_jax.models.edm_unet import convert, model
from tests import released_files
from tests.convert import persistent_files
from tests.golden import golden_cases
from tests.usage import bounded

SMALL = {
    'image_size': 8, 'num_classes': 10, 'image_channels': 1, 'ch': 16,
    'ch_mult': (1, 2), 'res_blocks': 1, 'attention': (4,), 'head_dim': 8,
}


def network(case, **fields):
  """The network of an `edm_unet_*` case and its parameters."""
  c = case.config
  net = model.build({
      'image_size': c['img_resolution'], 'image_channels': c['img_channels'],
      'num_classes': c['label_dim'], 'ch': c['model_channels'],
      'ch_mult': c['channel_mult'], 'res_blocks': c['num_blocks'],
      'attention': c['attn_resolutions'], 'sigma_data': c['sigma_data'],
  } | fields)
  assert set(convert.EDM_UNET.buffers(net.config)) == set(case.meta['buffers'])
  return net, table.convert(
      convert.EDM_UNET.rows(net.config), case.tensors(), net.abstract()
  )


def noisy(case):
  """The stored inputs: sigma * noise and half of the noise of another."""
  side, batch = case.config['img_resolution'], case.config['batch']
  gauss = case.gauss('x', batch, 3, side, side)
  sigma = case.arrays['sigma'][:, None, None, None]
  x = sigma * gauss + 0.5 * gauss[::-1]
  return gauss.transpose(0, 2, 3, 1), x.transpose(0, 2, 3, 1)


@functools.cache
def small():
  """A narrow network with weights of ordinary size, none of them zero."""
  net = model.build(SMALL)
  return net, released_files.random(net, 0)


def batch(count=3):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(count, 8, 8, 1)).astype(np.float32)
  return x, np.geomspace(0.01, 20, count).astype(np.float32), (
      rng.integers(0, 10, count).astype(np.int32)
  )


def is_box(x):
  return hasattr(x, 'unbox')


def silu(x):
  x = np.asarray(x)
  return x / (1 + np.exp(-x))


def test_golden():
  case = golden_cases.load('edm_unet_tiny')
  net, params = network(case)
  gauss, x = noisy(case)
  sigma = case.arrays['sigma']
  label = case.arrays['label'].astype(np.int32)

  @jax.jit
  def run(params):
    denoise = functools.partial(net.apply, params, labels_B=label)
    return {
        'denoised': net.apply(params, x, sigma, label),
        'bottleneck': net.fns['features'](params, x, sigma, label),
        'heun6': edm.heun(denoise, 80 * gauss, edm.sampling_sigmas(6)),
    }

  for name, found in run(params).items():
    expected = case.arrays[name]
    found = found.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(),
        err_msg=name,
    )


@pytest.mark.slow
@bounded(seconds=300, gigabytes=8)
def test_golden_at_the_published_size():
  case = golden_cases.load('edm_unet_imagenet64')
  net, params = network(case)
  _, x = noisy(case)
  sigma = case.arrays['sigma']
  label = case.arrays['label'].astype(np.int32)
  options = {'xla_backend_optimization_level': 3}
  denoised, features = jax.jit(lambda p: (
      net.apply(p, x, sigma, label),
      net.fns['features'](p, x, sigma, label),
  ), compiler_options=options)(params)
  for expected, found in (
      (case.arrays['denoised'], denoised.transpose(0, 3, 1, 2)[..., ::4, ::4]),
      (case.arrays['bottleneck'], features.transpose(0, 3, 1, 2)),
  ):
    np.testing.assert_allclose(
        found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max()
    )


def test_published_size():
  net = model.build({'image_size': 64, 'num_classes': 1000})
  leaves = jax.tree.leaves(net.abstract())
  assert sum(x.size for x in leaves) == 295_899_267
  assert len(convert.EDM_UNET.buffers(net.config)) == 12
  names = [
      name for group in table.plan_inverse(
          convert.EDM_UNET.rows(net.config), net.abstract()
      ) for name in group.shapes
  ]
  assert sorted(names) == sorted(
      golden_cases.load('edm_unet_imagenet64').meta['params']
  )
  assert len(names) == 553 - 12
  # ADM's network for 64 x 64 images takes about 100 billion multiply-adds.
  assert 1.8e11 < net.flops() < 2.4e11


def test_condition_is_cosines_then_sines_plus_a_class():
  module = denoiser.Condition(8, 6, 3)
  noise = np.array([-1.2, 0.7, 0.7], np.float32)
  labels = np.array([2, 0, 3], np.int32)
  params = module.init(jax.random.key(0), noise, labels)['params']
  params = jax.tree.map(lambda x: np.asarray(x.value), params, is_leaf=is_box)
  found = module.apply({'params': params}, noise, labels)
  angle = noise[:, None] * 10000.0 ** (-np.arange(4) / 4)[None]
  wave = np.concatenate([np.cos(angle), np.sin(angle)], -1)
  e = silu(wave @ params['noise_0']['kernel'] + params['noise_0']['bias'])
  e = e @ params['noise_1']['kernel'] + params['noise_1']['bias']
  table_3xE = np.asarray(params['embedding'])
  e += np.stack([table_3xE[2], table_3xE[0], np.zeros(6)])
  np.testing.assert_allclose(found, silu(e), rtol=1e-4, atol=1e-5)
  wrong = module.apply({'params': params}, noise, np.array([-1, 4, 3]))
  np.testing.assert_array_equal(np.isnan(wrong).any(1), [True, True, False])
  # In float32 on any machine: neighbouring levels must not be one.
  traced = jax.make_jaxpr(module.apply)({'params': params}, noise, labels)
  passes, products = (
      layers.count_jaxpr(traced.jaxpr, passes) for passes in (True, False)
  )
  assert passes == 6 * products > 0


def test_attention_and_the_order_of_its_channels():
  """Against plain loops over heads on the file's layout of qkv."""
  rng = np.random.default_rng(0)
  channels, dim = 16, 8
  heads = channels // dim
  tensors = {
      'qkv.weight': rng.normal(size=(3 * channels, channels, 1, 1)),
      'qkv.bias': rng.normal(size=3 * channels),
      'proj.weight': rng.normal(size=(channels, channels, 1, 1)),
      'proj.bias': rng.normal(size=channels),
      'norm2.weight': rng.normal(size=channels),
      'norm2.bias': rng.normal(size=channels),
  }
  tensors = {f'b.{k}': v.astype(np.float32) for k, v in tensors.items()}
  module = model.Attention(dim, jnp.float32)
  x = rng.normal(size=(2, 4, 2, channels)).astype(np.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)['params']
  shapes = jax.tree.map(lambda x: x.value, shapes, is_leaf=is_box)
  rows = [
      row for row in convert._block('b', 'p', channels, dim)
      if row.dst[0].startswith('p/attention/')
  ]
  params = table.convert(rows, tensors, {'p': {'attention': shapes}})
  found = module.apply({'params': params['p']['attention']}, x)

  flat = x.reshape(2, 8, channels).transpose(0, 2, 1)  # channels first
  groups = flat.reshape(2, 4, -1)
  groups = groups - groups.mean(-1, keepdims=True)
  groups = groups / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
  h = groups.reshape(2, channels, 8)
  h = h * tensors['b.norm2.weight'][:, None] + tensors['b.norm2.bias'][:, None]
  qkv = np.einsum('oi,bin->bon', tensors['b.qkv.weight'][..., 0, 0], h)
  qkv += tensors['b.qkv.bias'][:, None]
  out = np.zeros((2, channels, 8))
  for head in range(heads):
    q, k, v = (
        np.stack([qkv[:, head * 3 * dim + c * 3 + i] for c in range(dim)], 1)
        for i in range(3)
    )
    logits = np.einsum('bcn,bcm->bnm', q, k) / np.sqrt(dim)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out[:, head * dim : (head + 1) * dim] = np.einsum(
        'bnm,bcm->bcn', weights, v
    )
  out = np.einsum('oi,bin->bon', tensors['b.proj.weight'][..., 0, 0], out)
  out += tensors['b.proj.bias'][:, None]
  np.testing.assert_allclose(
      found.reshape(2, 8, channels), out.transpose(0, 2, 1), rtol=1e-3,
      atol=1e-4,
  )


def test_resampling():
  x = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
  half = model._halve(x)
  assert half.shape == (1, 2, 2, 2)
  np.testing.assert_allclose(half[0, 1, 0], x[0, 2:, :2].mean((0, 1)))
  double = model._double(half)
  assert double.shape == x.shape
  np.testing.assert_array_equal(double[0, 2:, :2], np.broadcast_to(
      half[0, 1, 0], (2, 2, 2)
  ))


def test_fresh_networks_do_nothing_yet():
  """The last convolution starts with zeros: what remains is the skip."""
  net = model.build(SMALL)
  x, sigma, labels = batch()
  params = jax.jit(net.init)(jax.random.key(0))
  found = jax.jit(net.apply)(params, x, sigma, labels)
  skip = 0.25 / (sigma**2 + 0.25)
  np.testing.assert_allclose(found, skip[:, None, None, None] * x, atol=1e-6)
  kernel = params['encoder']['level_1_0']['conv_0']['kernel']
  bound = (9 * 16) ** -0.5
  assert 0.95 * bound < np.abs(kernel).max() <= bound
  np.testing.assert_allclose(np.std(kernel), bound / 3**0.5, rtol=0.05)
  assert np.abs(params['encoder']['level_1_0']['conv_0']['bias']).max() > 0


def test_choices_do_not_change_results():
  fields = SMALL | {'ch_mult': (1,), 'attention': (8,)}
  net = model.build(fields)
  params = released_files.random(net, 0)
  x, sigma, labels = batch()

  def run(net):
    def loss(params):
      return jnp.square(net.apply(params, x, sigma, labels)).mean()
    return jax.jit(jax.value_and_grad(loss))(params)

  value, grads = run(net)
  again, other = run(model.build(fields | {'remat': 'full'}))
  np.testing.assert_allclose(value, again, rtol=1e-5)
  scale = max(np.abs(g).max() for g in jax.tree.leaves(grads))
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale),
      grads, other,
  )
  high, low = (
      jax.jit(n.apply)(params, x, sigma, labels)
      for n in (net, model.build(fields | {'dtype': 'bfloat16'}))
  )
  assert low.dtype == jnp.float32
  assert 0 < np.abs(low - high).max() < 0.1 * np.abs(high).max()


def test_dropout_needs_keys_and_is_each_examples_own():
  fields = SMALL | {'ch_mult': (1,), 'attention': ()}
  net = model.build(fields | {'dropout': 0.5})
  params = released_files.random(net, 0)
  x, sigma, labels = batch()
  run = jax.jit(net.apply)
  plain = run(params, x, sigma, labels)
  np.testing.assert_array_equal(
      plain, jax.jit(model.build(fields).apply)(params, x, sigma, labels)
  )
  key = jax.random.split(jax.random.key(1), 3)
  dropped = run(params, x, sigma, labels, key=key)
  assert all(np.abs(dropped - plain).max((1, 2, 3)) > 1e-4)
  order = np.array([2, 0, 1])
  moved = run(params, x[order], sigma[order], labels[order], key=key[order])
  np.testing.assert_allclose(moved, dropped[order], rtol=1e-4, atol=1e-4)


def test_axes():
  net, params = small()
  names = {
      'kernel', 'conv_in', 'conv_out', 'embed', 'mlp', 'heads', 'vocab',
      'time', None,
  }

  def check(leaf, axes):
    assert len(axes) == leaf.ndim and set(axes) <= names

  jax.tree.map(check, params, net.axes())


def test_errors():
  for fields, text in (
      ({'image_size': 9}, 'image_size=9 cannot be halved'),
      ({'attention': [5]}, r'no level has side \[5\]'),
      ({'head_dim': 12}, 'not a multiple of head_dim=12'),
      ({'ch': 6}, 'ch=6 must be a multiple of 4'),
      ({'dropout': 1.0}, 'dropout=1.0'),
      ({'ch_mult': []}, 'at least 1'),
      ({'width': 3}, "unknown field 'width'"),
  ):
    with pytest.raises(ValueError, match=text):
      model.build(SMALL | fields)


def files(folder):
  """The same network in EDM's pickle and, beside others, in DMD2's files."""
  case = golden_cases.load('edm_unet_tiny')
  net, params = network(case)
  tensors = case.tensors() | convert.EDM_UNET.buffers(net.config)
  canary = folder / 'canary'
  persistent_files.save(folder / 'edm.pkl', {
      'ema': persistent_files.network(tensors, f'open({str(canary)!r}, "w")'),
      'loss_fn': None,
  })
  head = discriminator.build({'size': 4, 'channels': 128})
  made = table.invert(
      head_convert.HEAD.rows(head.config), released_files.random(head, 0)
  )
  released_files.save(folder / 'student.pth', tensors)
  released_files.save(folder / 'critic.pth', {
      **{f'real_unet.{k}': v for k, v in tensors.items()},
      **{f'fake_unet.{k}': v + 1 if k.endswith('bias') else v
         for k, v in tensors.items()},
      **{f'cls_pred_branch.{k}': v for k, v in made.items()},
      'karras_sigmas': np.ones(1000, np.float32),
  })
  return params, tensors, made


def test_files_there_and_back(tmp_path):
  params, tensors, head = files(tmp_path)
  trees = {}
  for family, file, under, expected in (
      ('edm_unet', 'edm.pkl', '', tensors),
      ('edm_unet', 'student.pth', '', tensors),
      ('dmd2_real_unet', 'critic.pth', 'real_unet.', tensors),
      ('dmd2_fake_unet', 'critic.pth', 'fake_unet.', None),
      ('dmd2_head', 'critic.pth', 'cls_pred_branch.', head),
  ):
    work = conversion.plan(family, [tmp_path / file])
    export = tmp_path / f'{family}_{file}'
    conversion.write(work, export, {})
    _, trees[family, file] = checkpoint.load(export)
    back = tmp_path / f'{family}.safetensors'
    conversion.restore(export, [back])
    found = readers.read(back).tree
    if expected is not None:
      assert set(found) == {under + k for k in expected}
      for k, v in expected.items():
        np.testing.assert_array_equal(np.asarray(found[under + k]), v)
  for key in (('edm_unet', 'edm.pkl'), ('edm_unet', 'student.pth'),
              ('dmd2_real_unet', 'critic.pth')):
    jax.tree.map(np.testing.assert_array_equal, trees[key], params)
  np.testing.assert_array_equal(
      trees['dmd2_fake_unet', 'critic.pth']['decoder']['conv_out']['bias'],
      params['decoder']['conv_out']['bias'] + 1,
  )
  assert not (tmp_path / 'canary').exists()


def test_files_of_the_wrong_kind(tmp_path):
  _, tensors, _ = files(tmp_path)
  with pytest.raises(ValueError, match='use --family=dmd2'):
    conversion.plan('edm_unet', [tmp_path / 'critic.pth'])
  with pytest.raises(ValueError, match='use --family=edm_unet'):
    conversion.plan('dmd2_head', [tmp_path / 'student.pth'])
  name = 'model.enc.4x4_down.conv0.resample_filter'
  wrong = tensors | {name: np.array([[[[0.1, 0.4], [0.4, 0.1]]]], np.float32)}
  released_files.save(tmp_path / 'a.pth', wrong)
  with pytest.raises(ValueError, match='not what the config makes'):
    conversion.plan('edm_unet', [tmp_path / 'a.pth'])
  lost = {k: v for k, v in tensors.items() if 'dec.8x8_block0.conv1' not in k}
  released_files.save(tmp_path / 'b.pth', lost)
  with pytest.raises(ValueError, match='is not filled'):
    conversion.plan('edm_unet', [tmp_path / 'b.pth'])
  released_files.save(tmp_path / 'c.pth', {
      f'{u}_unet.{k}': v for k, v in tensors.items() for u in ('fake', 'real')
  })
  with pytest.raises(ValueError, match='trained without'):
    conversion.plan('dmd2_head', [tmp_path / 'c.pth'])


@pytest.mark.parametrize('fields', [
    {'image_size': 64, 'num_classes': 1000},
    SMALL | {'head_dim': 64, 'ch': 64},
    SMALL | {'num_classes': 0, 'attention': (), 'ch': 32, 'embed_mult': 2,
             'head_dim': 64},
])
def test_sizes_are_read_from_the_tensors(fields):
  net = model.build(fields)
  tensors = convert.EDM_UNET.buffers(net.config) | {
      k: jax.ShapeDtypeStruct(shape, group.dtype)
      for group in table.plan_inverse(
          convert.EDM_UNET.rows(net.config), net.abstract()
      ) for k, shape in group.shapes.items()
  }
  found = convert.EDM_UNET.infer(tensors, {})
  assert model.build(found).config == net.config
  assert conversion.guess(tensors) == 'edm_unet'
