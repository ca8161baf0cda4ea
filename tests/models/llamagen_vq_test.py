# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of LlamaGen's tokenizer: golden parity, quantizer, gradients."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.models.llamagen_vq import convert, model
from dd_jax.models.vqvae import model as vqvae
from tests.golden import golden_cases
from tests.golden import llamagen_networks as networks
from tests.usage import bounded

SMALL = dict(
    image_size=8, image_channels=1, ch=8, ch_mult=[1, 2], res_blocks=1,
    z_channels=6, code_dim=4, vocab_size=16,
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
def small():
  """A small model, its parameters, and what all of its functions return."""
  built = model.build(SMALL)
  params, fns = weights(built), built.fns
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.uniform(-1, 1, size=(8, 8, 8, 1)), jnp.float32)

  @jax.jit
  def run(params):
    out = fns['forward'](params, image)
    codes = fns['codes'](params, out['indices'])
    latent = fns['accumulate'](params, codes)
    return out, {
        'encode': fns['encode'](params, image),
        'to_indices': fns['to_indices'](params, image),
        'codebook': fns['codebook'](params),
        'codes': codes,
        'accumulate': latent,
        'decode': fns['decode'](params, latent),
    }

  return built, params, image, *run(params)


def check_golden(name, jit, tolerance, stride):
  case = golden_cases.load(name)
  c = case.config
  built, params = networks.tokenizer(case)
  size, fns, arrays = c['image_size'], built.fns, case.arrays
  image = case.uniform('image', c['batch'], 3, size, size)

  @jit
  def run(params, image, indices):
    codes = fns['codes'](params, indices)
    decoded = fns['decode'](params, fns['accumulate'](params, codes))
    return fns['encode'](params, image), fns['to_indices'](params, image), (
        decoded.transpose(0, 3, 1, 2)
    )

  latent, indices, decoded = run(
      params, image.transpose(0, 2, 3, 1), arrays['indices'].astype(np.int32)
  )
  close = functools.partial(
      np.testing.assert_allclose, rtol=tolerance, atol=tolerance
  )
  close(latent.transpose(0, 3, 1, 2), arrays['latent'])
  close(decoded[:, :, ::stride, ::stride], arrays['reconstruction'])
  return (indices == arrays['indices']).mean()


def test_golden():
  assert check_golden('llamagen_vq_tiny', jax.jit, 1e-4, 1) == 1


@pytest.mark.slow
@bounded(seconds=300, gigabytes=3)
def test_golden_at_the_released_size():
  assert check_golden('llamagen_vq_L', networks.fast_jit, 2e-3, 4) >= 0.99


def test_table_gives_back_the_original_weights():
  case = golden_cases.load('llamagen_vq_tiny')
  built, params = networks.tokenizer(case)
  tensors = case.tensors()
  back = table.invert(convert.vq_table(built.config), params)
  assert back.keys() == tensors.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize('changes', [
    {}, {'attention': False}, {'res_blocks': 3}, {'ch_mult': [1, 1, 2, 2]},
    {'ch_mult': [2]},
])
def test_weight_table_fits_other_sizes(changes):
  built = model.build(SMALL | changes)
  shapes = built.abstract()
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  rows = convert.vq_table(built.config)
  tensors = table.invert(rows, params)
  qkv = sum(k.endswith('/qkv/kernel') for k, _ in table.flatten(shapes))
  assert len(tensors) == len(jax.tree.leaves(shapes)) + 4 * qkv
  table.convert(rows, tensors, shapes)


def test_released_size():
  built = model.build({'image_size': 256})
  leaves = jax.tree.leaves(built.abstract())
  assert sum(math.prod(x.shape) for x in leaves) == 71_883_403
  assert built.config.latent_size == 16


def test_axes_have_the_structure_of_the_parameters():
  built, params, *_ = small()
  axes = built.axes()
  ranks = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
  assert ranks == jax.tree.map(jnp.ndim, params)
  assert axes['embedding'] == (None, 'code')


def test_codes_start_on_the_sphere():
  built = model.build(SMALL | {'ch_mult': [1], 'attention': False})
  book = jax.jit(built.init)(jax.random.key(0))['embedding']
  np.testing.assert_allclose(jnp.linalg.norm(book, axis=1), 1, rtol=1e-5)
  assert jnp.abs(book.mean(0)).max() < 0.5


def test_training_outputs_are_those_of_the_other_tokenizer():
  built, _, _, out, _ = small()
  other = vqvae.build({
      k: v for k, v in SMALL.items() if k != 'code_dim'
  } | {'patch_nums': [4]})
  image = jax.ShapeDtypeStruct((8, 8, 8, 1), jnp.float32)
  theirs = jax.eval_shape(other.apply, other.abstract(), image)
  assert out.keys() == theirs.keys()
  assert len(out['targets']) == len(theirs['targets'])
  for name in out.keys() - {'latent', 'targets'}:  # those are of other size
    assert out[name].dtype == theirs[name].dtype
    assert out[name].shape == theirs[name].shape, name
  # What revives dead codes moves them in this leaf.
  assert built.abstract()['embedding'].shape == (16, 4)
  assert out['latent'].shape == (8, 4, 4, 4)
  np.testing.assert_array_equal(
      out['targets'][0], out['latent'].reshape(8, 16, 4)
  )


def test_codes_have_length_one_whatever_is_stored():
  _, params, _, out, other = small()
  stored = np.asarray(params['embedding'])
  length = np.linalg.norm(stored, axis=1, keepdims=True)
  assert length.max() > 1.5 * length.min()
  np.testing.assert_allclose(other['codebook'], stored / length, rtol=1e-5)
  np.testing.assert_array_equal(
      other['codes'], np.asarray(other['codebook'])[out['indices']]
  )


def test_the_nearest_code_is_chosen_by_angle():
  *_, out, other = small()
  latent = np.asarray(other['encode'])
  latent = latent / np.linalg.norm(latent, axis=-1, keepdims=True)
  np.testing.assert_allclose(out['latent'], latent, atol=1e-5)
  distance = np.square(
      latent.reshape(8, 16, 1, 4) - np.asarray(other['codebook'])[None, None]
  ).sum(-1)
  np.testing.assert_array_equal(out['indices'], distance.argmin(-1))
  np.testing.assert_array_equal(other['to_indices'], out['indices'])
  assert len(np.unique(out['indices'])) > 4
  used = np.bincount(np.asarray(out['indices']).reshape(-1), minlength=16)
  np.testing.assert_array_equal(out['counts'][0], used)


def test_codes_stand_row_by_row():
  *_, out, other = small()
  np.testing.assert_array_equal(
      other['accumulate'][:, 1, 2], other['codes'][:, 6]
  )
  np.testing.assert_allclose(out['reconstruction'], other['decode'], atol=1e-4)


def test_commitment_value():
  built, _, _, out, other = small()
  error = jnp.square(other['accumulate'] - out['latent']).mean()
  np.testing.assert_allclose(
      out['commitment'], (1 + built.config.beta) * error, rtol=1e-4
  )


@functools.cache
def gradients():
  """Gradients of the commitment and of the squared reconstruction."""
  built, params, image, _, _ = small()

  def loss(params, field):
    return jnp.square(built.apply(params, image)[field]).sum()

  return jax.jit(lambda p: (
      jax.grad(loss)(p, 'commitment'), jax.grad(loss)(p, 'reconstruction'),
  ))(params)


def size(tree):
  return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))


def test_who_learns_from_what():
  commitment, reconstruction = gradients()
  for name in ('embedding', 'encoder', 'quant_conv'):
    assert size(commitment[name]) > 0, name
  for name in ('decoder', 'post_quant_conv'):
    assert size(commitment[name]) == 0, name
    assert size(reconstruction[name]) > 0, name
  assert size(reconstruction['embedding']) == 0
  assert size(reconstruction['encoder']) > 0  # straight through
  # Codes move along the sphere only.
  _, params, *_ = small()
  along = (commitment['embedding'] * params['embedding']).sum(-1)
  np.testing.assert_allclose(along, 0, atol=1e-5)


def test_bfloat16_activations():
  _, params, image, _, exact = small()
  built = model.build(SMALL | {'dtype': 'bfloat16'})
  latent = jax.jit(built.fns['encode'])(params, image)
  assert latent.dtype == jnp.float32
  error = jnp.abs(latent - exact['encode']).max()
  assert 0 < error < 0.1 * jnp.abs(exact['encode']).max()


def test_half_precision_parameters_make_float32_codes():
  built, params, *_ = small()
  half = params | {'embedding': params['embedding'].astype(jnp.bfloat16)}
  same = half | {'embedding': half['embedding'].astype(jnp.float32)}
  codes = jax.jit(built.fns['codebook'])
  np.testing.assert_array_equal(codes(half), codes(same))
  assert codes(half).dtype == jnp.float32


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


def test_codes_out_of_range_do_not_pass_unseen():
  built, params, *_ = small()
  codes = built.fns['codes'](params, jnp.array([[0, 16, -1, 15]]))
  assert np.isnan(codes).all(-1).tolist() == [[False, True, True, False]]


def test_flops():
  # One level of one block at 4 x 4, no attention: every product by hand.
  built = model.build(SMALL | dict(
      image_size=4, ch_mult=[1], attention=False
  ))
  ends = [(1, 8), (8, 6), (6, 8), (8, 1)]
  blocks = 2 * (1 + 2 + 2 + 2) * [(8, 8)]  # encoder, two middles, decoder
  products = sum(16 * 9 * i * o for i, o in ends + blocks)
  latent = 2 * 16 * 6 * 4 + 16 * 4 * 16  # both convolutions, nearest code
  assert built.flops() == 2 * (products + latent)


@pytest.mark.parametrize('changes, message', [
    ({'image_size': 9}, r'image_size=9 is not a multiple of .* = 2'),
    ({'ch_mult': []}, 'at least 1'),
    ({'code_dim': 0}, 'at least 1'),
    ({'dtype': 'float64'}, "field 'dtype' must be one of"),
    ({'patch_nums': [1]}, "unknown field 'patch_nums'"),
])
def test_build_refuses(changes, message):
  with pytest.raises(ValueError, match=message):
    model.build(SMALL | changes)


def test_config_is_json():
  built = model.build(SMALL)
  fields = json.loads(json.dumps(dataclasses.asdict(built.config)))
  assert model.build(fields).config == built.config
