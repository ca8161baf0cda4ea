# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the multi-scale VQ-VAE: golden parity, quantizer, gradients."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.models.vqvae import convert, model
from dd_jax.ops import resize
from tests.golden import golden_cases, networks

SMALL = dict(
    image_size=8, image_channels=1, ch=8, ch_mult=[1, 2], res_blocks=1,
    z_channels=4, vocab_size=16, patch_nums=[1, 2, 4],
)
RELEASED = dict(
    image_size=256, ch=160, ch_mult=[1, 1, 2, 2, 4], z_channels=32,
    vocab_size=4096, patch_nums=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
)


def weights(built):
  """Parameters of ordinary size, without the time that `init` compiles."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if 'kernel' in path[-1].key:
      values /= np.sqrt(math.prod(leaf.shape[:-1]))
    elif 'scale' in path[-1].key:
      values = 1 + 0.1 * values
    return jnp.asarray(values, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, built.abstract())


@functools.cache
def small(*patch_nums):
  """A small model, its parameters, and what all of its functions return."""
  sizes = {'patch_nums': patch_nums} if patch_nums else {}
  built = model.build(SMALL | sizes)
  params, fns = weights(built), built.fns
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.uniform(-1, 1, size=(8, 8, 8, 1)), jnp.float32)
  anything = jnp.asarray(
      rng.normal(size=(8, built.config.offsets[-1], 4)), jnp.float32
  )

  def advance(params, codes):
    f_hat, sums, maps = jnp.zeros((8, 4, 4, 4)), [], []
    for k, (start, stop) in enumerate(
        itertools.pairwise(built.config.offsets)
    ):
      f_hat, following = fns['advance'](
          params, f_hat, codes[:, start:stop], scale=k
      )
      sums.append(f_hat)
      maps.append(following)
    return {'sums': sums, 'maps': maps}

  @jax.jit
  def run(params):
    out = fns['forward'](params, image)
    latent = fns['encode'](params, image)
    codes = fns['codes'](params, out['indices'])
    f_hat = fns['accumulate'](params, codes)
    return out, {
        'encode': latent,
        'to_indices': fns['to_indices'](params, image),
        'latent_to_indices': fns['latent_to_indices'](params, latent),
        'codebook': fns['codebook'](params),
        'codes': codes,
        'accumulate': f_hat,
        'decode': fns['decode'](params, f_hat),
        'advance': advance(params, codes),
        'anything': {
            'advance': advance(params, anything),
            'accumulate': fns['accumulate'](params, anything),
            'var_input': fns['var_input'](params, anything),
        },
    }

  return built, params, image, *run(params)


def golden(name):
  case = golden_cases.load(name)
  return case, *networks.tokenizer(case)


@pytest.mark.parametrize('name', ['var_vqvae_tiny', 'var_vqvae_tiny_saln'])
def test_golden(name):
  case, built, params = golden(name)
  size = case.config['image_size']
  image = case.uniform('image', case.config['batch'], 3, size, size)

  @jax.jit
  def run(params, image_BxCxHxW):
    fns = built.fns
    latent = fns['encode'](params, image_BxCxHxW.transpose(0, 2, 3, 1))
    indices = fns['latent_to_indices'](params, latent)
    codes = fns['codes'](params, indices)
    f_hat = fns['accumulate'](params, codes)
    image = jnp.clip(fns['decode'](params, f_hat), -1, 1)
    return {
        'latent': latent.transpose(0, 3, 1, 2),
        'indices': indices,
        'f_hat': f_hat.transpose(0, 3, 1, 2),
        'var_input': fns['var_input'](params, codes),
        'reconstruction': image.transpose(0, 3, 1, 2),
    }

  got = run(params, image)
  assert got.keys() == case.arrays.keys()
  np.testing.assert_array_equal(got.pop('indices'), case.arrays['indices'])
  for key, value in got.items():
    np.testing.assert_allclose(
        value, case.arrays[key], rtol=1e-4, atol=1e-4, err_msg=key
    )


@pytest.mark.parametrize('name', ['var_vqvae_tiny', 'var_vqvae_tiny_saln'])
def test_weight_table_inverts(name):
  case, _, params = golden(name)
  tensors = table.invert(convert.TABLE, params)
  assert tensors.keys() == case.tensors().keys()
  for key, value in case.tensors().items():
    assert tensors[key].dtype == value.dtype
    np.testing.assert_array_equal(tensors[key], value, err_msg=key)


@pytest.mark.parametrize('changes', [
    {}, {'attention': False}, {'res_blocks': 3}, {'phi_count': 1},
    {'ch_mult': [1, 1, 2, 2], 'patch_nums': [1]},
    {'ch_mult': [2], 'patch_nums': [1, 8]},
])
def test_weight_table_fits_other_sizes(changes):
  built = model.build(SMALL | changes)
  shapes = built.abstract()
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  tensors = table.invert(convert.TABLE, params)
  assert len(tensors) == len(jax.tree.leaves(shapes))
  table.convert(convert.TABLE, tensors, shapes)


def test_released_size():
  built = model.build(RELEASED)
  leaves = jax.tree.leaves(built.abstract())
  assert sum(math.prod(x.shape) for x in leaves) == 108_948_355
  assert built.config.offsets == (
      0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680
  )


def test_axes_have_the_structure_of_the_parameters():
  built, params, *_ = small()
  axes = built.axes()
  ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
  assert ranks == jax.tree.map(jnp.ndim, params)
  assert axes['embedding'] == (None, 'code')


def test_init():
  built = model.build(SMALL | {
      'ch_mult': [1], 'patch_nums': [8], 'attention': False
  })
  params = built.init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(
      lambda x: x.shape, built.abstract()
  )
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    bias, scale = (name in path[-1].key for name in ('bias', 'scale'))
    assert bool((leaf == 0).all()) == bias, path
    assert bool((leaf == 1).all()) == scale, path
  assert 0.5 / 16 < jnp.abs(params['embedding']).max() <= 1 / 16


def test_phi_table():
  assert model.phi_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
  assert model.phi_table(1, 4) == (0,)
  assert model.phi_table(5, 1) == (0,) * 5
  assert model.phi_table(6, 6) == (0, 1, 2, 3, 4, 5)
  # The original's floats break every tie upwards with four phis.
  ticks = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4)
  for scales in range(2, 20):
    position = np.arange(scales) / (scales - 1)
    nearest = np.abs(ticks[None] - position[:, None]).argmin(1)
    assert model.phi_table(scales, 4) == tuple(nearest)


@pytest.mark.parametrize('changes, message', [
    ({'patch_nums': [1, 2, 3]}, r'ends with 3, but image_size 8 .* = 4:'),
    ({'image_size': 9}, r'ends with 4, but image_size 9 .* = 4.5:'),
    ({'patch_nums': [2, 1, 4]}, 'must not decrease'),
    ({'patch_nums': []}, 'at least 1'),
    ({'z_channels': 0}, 'at least 1'),
    ({'dtype': 'float64'}, "field 'dtype' must be one of"),
    ({'chanels': 4}, "unknown field 'chanels'"),
])
def test_build_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    model.build(SMALL | changes)


def test_config_is_json():
  built = model.build(SMALL)
  fields = json.loads(json.dumps(dataclasses.asdict(built.config)))
  assert model.build(fields).config == built.config


def test_shapes_and_types():
  _, params, _, out, other = small()
  described = jax.tree.map(lambda v: (v.shape, v.dtype.name), out)
  assert described == {
      'reconstruction': ((8, 8, 8, 1), 'float32'),
      'commitment': ((), 'float32'),
      'indices': ((8, 21), 'int32'),
      'counts': ((3, 16), 'int32'),
      'latent': ((8, 4, 4, 4), 'float32'),
      'targets': [((8, n, 4), 'float32') for n in (1, 4, 16)],
  }
  np.testing.assert_array_equal(other['codebook'], params['embedding'])
  np.testing.assert_array_equal(
      other['codes'], params['embedding'][out['indices']]
  )


def test_paths_to_indices_agree():
  *_, out, other = small()
  assert len(np.unique(out['indices'])) > 4
  np.testing.assert_allclose(out['latent'], other['encode'], atol=1e-5)
  for name in ('to_indices', 'latent_to_indices'):
    np.testing.assert_array_equal(other[name], out['indices'])


def test_reconstruction_is_the_decoded_sum():
  *_, out, other = small()
  np.testing.assert_allclose(out['reconstruction'], other['decode'], atol=1e-4)


def test_counts():
  built, _, _, out, _ = small()
  for counts, (start, stop) in zip(
      out['counts'], itertools.pairwise(built.config.offsets), strict=True
  ):
    used = np.asarray(out['indices'])[:, start:stop].reshape(-1)
    np.testing.assert_array_equal(counts, np.bincount(used, minlength=16))


@pytest.mark.parametrize('patch_nums', [(), (1, 1, 2, 2, 4)])
def test_advance_adds_up_for_any_codes(patch_nums):
  *_, other = small(*patch_nums)
  sums, maps = (other['anything']['advance'][k] for k in ('sums', 'maps'))
  np.testing.assert_allclose(
      other['anything']['accumulate'], sums[-1], atol=1e-5
  )
  np.testing.assert_allclose(
      other['anything']['var_input'], jnp.concatenate(maps[:-1], 1), atol=1e-5
  )
  assert maps[-1] is None
  for total, following in zip(sums, maps[:-1], strict=False):
    side = math.isqrt(following.shape[1])
    expected = resize.area(total, side).reshape(following.shape)
    np.testing.assert_allclose(following, expected, atol=1e-5)


def test_one_step_by_hand():
  built, params, _, _, other = small()
  codes = np.asarray(other['codes'], np.float64)[:, 1:5].reshape(8, 2, 2, 4)
  up = resize.bicubic_matrix(2, 4)
  h = np.einsum('ij,bjkc,lk->bilc', up, codes, up)
  assert model.phi_table(3, 4)[1] == 2
  padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
  conv = sum(
      padded[:, i : i + 4, j : j + 4] @ np.asarray(params['phi_2']['kernel'])[
          i, j
      ]
      for i in range(3) for j in range(3)
  ) + np.asarray(params['phi_2']['bias'])
  sums = other['advance']['sums']
  np.testing.assert_allclose(
      sums[1] - sums[0], 0.5 * h + 0.5 * conv, atol=1e-4
  )


def test_one_scale_has_no_transformer_input():
  built = model.build(SMALL | {'ch_mult': [1, 1, 2, 2], 'patch_nums': [1]})
  codes = jax.ShapeDtypeStruct((2, 1, 4), jnp.float32)
  maps = jax.eval_shape(built.fns['var_input'], built.abstract(), codes)
  assert maps.shape == (2, 0, 4)


@pytest.mark.parametrize('patch_nums', [(), (1, 1, 2, 2, 4)])
def test_each_scale_quantizes_what_those_before_left(patch_nums):
  built, params, _, out, other = small(*patch_nums)
  codebook = np.asarray(params['embedding'])
  residual = out['latent']
  for size, target, total, (start, stop) in zip(
      built.config.patch_nums, out['targets'], other['advance']['sums'],
      itertools.pairwise(built.config.offsets), strict=True,
  ):
    z = np.asarray(resize.area(residual, size)).reshape(8, -1, 1, 4)
    np.testing.assert_allclose(target, z[:, :, 0], atol=1e-4)
    distance = np.square(z - codebook[None, None]).sum(-1)
    np.testing.assert_array_equal(
        out['indices'][:, start:stop], distance.argmin(-1)
    )
    residual = out['latent'] - total


def test_commitment_value():
  built, _, _, out, other = small()
  errors = [
      jnp.square(total - out['latent']).mean()
      for total in other['advance']['sums']
  ]
  expected = (1 + built.config.beta) * np.mean(errors)
  np.testing.assert_allclose(out['commitment'], expected, rtol=1e-4)


@functools.cache
def gradients():
  """Gradients of the commitment and of the squared reconstruction."""
  built, params, image, _, other = small()
  # Without the encoder's weights: `quant_conv` shows what reaches it.
  inner = {k: v for k, v in params.items() if k not in ('encoder', 'decoder')}

  def commitment(inner, decoder):
    everything = params | inner | {'decoder': decoder}
    return built.apply(everything, image)['commitment']

  def reconstruction(inner):
    out = built.apply(params | inner, image)
    return jnp.square(out['reconstruction']).sum()

  def decoded(f_hat):
    return jnp.square(built.fns['decode'](params, f_hat)).sum()

  return jax.jit(lambda inner, decoder, f_hat: (
      *jax.grad(commitment, (0, 1))(inner, decoder),
      jax.grad(reconstruction)(inner),
      jax.grad(decoded)(f_hat),
  ))(inner, params['decoder'], other['accumulate'])


def size(tree):
  return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))


def test_reconstruction_gradient_goes_straight_through():
  _, _, grad, at_f_hat = gradients()
  for name in ('embedding', 'phi_0', 'phi_1', 'phi_2', 'phi_3'):
    assert size(grad[name]) == 0, name
  # The gradient at f_hat arrives unchanged at the quantizer's input.
  assert size(at_f_hat) > 0
  np.testing.assert_allclose(
      grad['quant_conv']['bias'], at_f_hat.sum((0, 1, 2)), rtol=1e-3, atol=1e-3
  )


def test_commitment_gradient():
  built, _, _, out, other = small()
  grad, to_decoder, *_ = gradients()
  assert size(to_decoder) == size(grad['post_quant_conv']) == 0
  assert size(grad['embedding']) > 0
  # By hand for biases: 2 (f_k - f) / size, averaged over scales k.
  sums, cfg = other['advance']['sums'], built.config
  pulls = [
      2 / total.size / 3 * (total - out['latent']).sum((0, 1, 2))
      for total in sums
  ]
  np.testing.assert_allclose(
      grad['quant_conv']['bias'], -cfg.beta * sum(pulls), rtol=1e-3, atol=1e-6
  )
  users = model.phi_table(3, 4)
  for phi in range(4):
    uses = [users[: k + 1].count(phi) for k in range(3)]
    expected = cfg.phi_ratio * np.einsum('k,kz->z', uses, np.stack(pulls))
    np.testing.assert_allclose(
        grad[f'phi_{phi}']['bias'], expected, rtol=1e-3, atol=1e-6
    )


def test_remat_recomputes_every_block():
  plain, remat = (model.build(SMALL | {'remat': r}) for r in ('none', 'full'))
  assert plain.abstract() == remat.abstract()
  assert plain.flops() == remat.flops()
  image = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  for built, times in ((plain, 0), (remat, 15)):
    jaxpr = jax.make_jaxpr(built.apply)(built.abstract(), image)
    names = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    assert names.count('checkpoint') + names.count('remat2') == times


def test_bfloat16_activations():
  _, params, image, exact, _ = small()
  built = model.build(SMALL | {'dtype': 'bfloat16'})
  latent = jax.jit(built.fns['encode'])(params, image)
  assert latent.dtype == jnp.float32
  error = jnp.abs(latent - exact['latent']).max()
  assert 0 < error < 0.1 * jnp.abs(exact['latent']).max()


def test_half_precision_parameters_quantize_in_float32():
  built, params, _, out, _ = small()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  @jax.jit
  def run(params):
    indices = built.fns['latent_to_indices'](params, out['latent'])
    codes = built.fns['codes'](params, indices)
    return indices, codes, built.fns['accumulate'](params, codes)

  same = jax.tree.map(lambda x: x.astype(jnp.float32), half)
  for found, exact in zip(run(half), run(same), strict=True):
    assert found.dtype == exact.dtype != jnp.bfloat16
    np.testing.assert_array_equal(found, exact)


def test_sharded_equals_unsharded():
  built, params, image, out, _ = small()
  mesh = jax.make_mesh(
      (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spread = jax.NamedSharding(mesh, jax.P('data'))
  sharded = jax.jit(built.apply)(params, jax.device_put(image, spread))
  for name in ('indices', 'counts'):
    np.testing.assert_array_equal(sharded[name], out[name])
  for name in ('commitment', 'latent', 'reconstruction'):
    np.testing.assert_allclose(sharded[name], out[name], atol=1e-4)


def test_no_attention():
  built = model.build(SMALL | {'attention': False})
  paths = jax.tree_util.tree_leaves_with_path(built.abstract())
  assert not any('attention' in jax.tree_util.keystr(p) for p, _ in paths)
  assert built.flops() < model.build(SMALL).flops()


def test_flops():
  # One level of one block at 4 x 4, no attention: every product by hand.
  built = model.build(SMALL | dict(
      image_size=4, ch_mult=[1], patch_nums=[4], attention=False, phi_count=1
  ))
  ends = [(1, 8), (8, 4), (4, 8), (8, 1)]
  blocks = 2 * (1 + 2 + 2 + 2) * [(8, 8)]  # encoder, two middles, decoder
  latent = 3 * [(4, 4)]  # before the quantizer, in it, after it
  products = sum(16 * 9 * i * o for i, o in ends + blocks + latent)
  assert built.flops() == 2 * (products + 16 * 4 * 16)  # and the nearest code
