# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of LPIPS: golden parity, gradients, tables, errors."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dd_jax import checkpoint, conversion
from dd_jax.convert import table
from dd_jax.models.lpips import convert, model
from tests.golden import golden_cases

HEADS = pathlib.Path(golden_cases.__file__).parent / 'lpips_vgg_heads.npz'


def released_tensors():
  with np.load(HEADS) as heads:
    return golden_cases.load('lpips_vgg').tensors() | dict(heads)


@functools.cache
def slim(remat='none'):
  """A narrow network with weights of ordinary size."""
  built = model.build({'slim': 16, 'remat': remat})
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      values /= np.sqrt(np.prod(leaf.shape[:-1]) / 2)
    elif path[-1].key == 'bias':
      values *= 0.1
    return jnp.asarray(np.abs(values) if leaf.ndim == 1 else values,
                       jnp.float32)

  return built, jax.tree_util.tree_map_with_path(draw, built.abstract())


def images(count=2, size=16, channels=3, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(
      rng.uniform(-1, 1, (count, size, size, channels)), jnp.float32
  )


def test_golden():
  case = golden_cases.load('lpips_vgg')
  built = model.build({})
  params = table.convert(
      convert.TABLE, released_tensors(), built.abstract()
  )
  a, b = (
      case.uniform(f'image{i}', 3, 3, 32, 32).transpose(0, 2, 3, 1)
      for i in range(2)
  )
  distance = jax.jit(built.fns['distance'])(params, a, b)
  np.testing.assert_allclose(distance, case.arrays['distance'], rtol=1e-4)


def test_tables_are_total_and_bijective():
  tensors = released_tensors()
  classifier = {f'classifier.{i}.{leaf}': np.zeros(1)
                for i in (0, 3, 6) for leaf in ('weight', 'bias')}
  built = model.build({})
  params = table.convert(
      convert.TABLE, tensors | classifier, built.abstract(),
      ignore=convert.IGNORE,
  )
  back = table.invert(convert.TABLE, params)
  assert set(back) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name], value)
  trunk = {k: v for k, v in tensors.items() if k.startswith('features')}
  alone = table.convert(
      convert.VGG_TABLE, trunk, model.build_vgg({}).abstract()
  )
  jax.tree.map(np.testing.assert_array_equal, alone, params['trunk'])
  assert convert.LPIPS.infer(tensors, {}) == {'slim': 1}
  assert convert.LPIPS.fits(tensors) and convert.VGG.fits(trunk)
  assert not convert.LPIPS.fits(trunk)


def test_two_files_make_one_network(tmp_path):
  built, params = slim()
  tensors = table.invert(convert.TABLE, params)
  trunk = {k: v for k, v in tensors.items() if k.startswith('features')}
  trunk['classifier.6.bias'] = np.zeros(10, np.float32)
  heads = {k: v for k, v in tensors.items() if k.startswith('lin')}
  files = [tmp_path / f'{n}.safetensors' for n in ('vgg16', 'heads')]
  for file, part in zip(files, (trunk, heads), strict=True):
    safetensors.numpy.save_file(part, file)
  work = conversion.plan('lpips', files, given={'remat': 'full'})
  assert work.model.config == model.Config(remat='full', slim=16)
  assert list(work.dropped) == ['classifier.6.bias']
  conversion.write(work, tmp_path / 'lpips', {})
  _, loaded = checkpoint.load(tmp_path / 'lpips')
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert conversion.plan('vgg', files[:1]).model.config.slim == 16
  with pytest.raises(ValueError, match="no tensor 'features.0.weight'"):
    conversion.plan('lpips', files[1:])
  with pytest.raises(ValueError, match='use --family=lpips'):
    conversion.plan('vgg', files)


def test_a_distance():
  built, params = slim()
  distance = jax.jit(built.fns['distance'])
  a, b = images(), images(seed=1)
  np.testing.assert_array_equal(distance(params, a, a), 0)
  assert (distance(params, a, b) > 0.01).all()
  np.testing.assert_allclose(
      distance(params, a, b), distance(params, b, a), rtol=1e-5
  )
  near = distance(params, a, a + 0.01 * b)
  assert (near < 0.2 * distance(params, a, b)).all()


def test_gray_is_three_equal_channels():
  built, params = slim()
  a, b = images(channels=1), images(channels=1, seed=1)
  rgb = [jnp.repeat(x, 3, axis=-1) for x in (a, b)]
  distance = jax.jit(built.apply)
  np.testing.assert_allclose(
      distance(params, a, b), distance(params, *rgb), rtol=1e-6
  )


def test_trunk_is_the_network_alone():
  _, params = slim()
  vgg = model.build_vgg({'slim': 16})
  maps = jax.eval_shape(vgg.fns['features'], params['trunk'], images())
  assert [m.shape for m in maps] == [
      (2, 16, 16, 4), (2, 8, 8, 8), (2, 4, 4, 16), (2, 2, 2, 32),
      (2, 1, 1, 32),
  ]


def test_recomputing_changes_no_gradient():
  a, b = images(), images(seed=1)
  gradients, programs = [], []
  for remat in ('none', 'full'):
    built, params = slim(remat)
    gradient = jax.grad(
        lambda x, f=built.apply, p=params: f(p, x, b).sum()
    )
    gradients.append(jax.jit(gradient)(a))
    programs.append(str(jax.make_jaxpr(gradient)(a)))
  np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-7)
  assert np.abs(gradients[0]).max() > 1e-4
  assert 'remat' not in programs[0] and 'remat' in programs[1]


def test_dead_features_have_a_gradient():
  """A pixel without active features must not make the gradient NaN."""
  built, params = slim()
  dead = jax.tree.map(jnp.zeros_like, params['trunk']['level_2'])
  params = params | {'trunk': params['trunk'] | {'level_2': dead}}
  gradient = jax.jit(
      jax.grad(lambda x: built.apply(params, x, images(seed=1)).sum())
  )
  found = gradient(images())
  assert np.isfinite(found).all() and np.abs(found).max() > 0


def test_bfloat16_stays_near():
  built, params = slim()
  half = model.build({'slim': 16, 'dtype': 'bfloat16'})
  a, b = images(), images(seed=1)
  found = jax.jit(half.apply)(params, a, b)
  full = jax.jit(built.apply)(params, a, b)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, full, rtol=0.05)
  assert not np.array_equal(found, full)


def test_axes_name_every_dimension():
  built, params = slim()
  names = jax.tree.map(
      len, built.axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert names == jax.tree.map(lambda x: x.ndim, params)


def test_flops_are_those_of_vgg():
  # Two images of 64 x 64; VGG16's convolutions take 15.35 billion
  # multiply-adds at 224 x 224.
  expected = 2 * 2 * 15.35e9 * (64 / 224) ** 2
  assert abs(model.build({}).flops() / expected - 1) < 0.01


@pytest.mark.parametrize('shape, message', [
    ((1, 32, 32, 4), '4 channels'), ((1, 8, 32, 3), '8 x 32'),
])
def test_bad_images_are_refused(shape, message):
  built, params = slim()
  with pytest.raises(ValueError, match=message):
    built.apply(params, jnp.zeros(shape), jnp.zeros(shape))


def test_bad_fields_are_refused():
  with pytest.raises(ValueError, match='slim is 3'):
    model.build({'slim': 3})
  with pytest.raises(ValueError, match="'remat' must be one of"):
    model.build({'remat': 'some'})
