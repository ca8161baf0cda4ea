# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the critic: a denoiser and a discriminator on its encoder."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from dd_jax import build, checkpoint, conversion
from dd_jax.convert import readers, table
from dd_jax.models.critic import convert
from tests import released_files

MLP = dict(name='mlp', shape=[2], width=64, blocks=4)
UNET = dict(
    name='edm_unet', image_size=8, num_classes=3, image_channels=1, ch=16,
    ch_mult=[1, 2], res_blocks=1, attention=[], head_dim=16,
)


def make(denoiser, **fields):
  net = build.build_model(dict(name='critic', denoiser=denoiser, **fields))
  return net, build.build_model(denoiser)


def inputs(denoiser, batch=3):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, *denoiser.config.shape)).astype(np.float32)
  return x, np.array([0.01, 1, 60], np.float32), np.array([0, 1, 2], np.int32)


@pytest.mark.parametrize('config', [MLP, UNET], ids=lambda c: c['name'])
def test_functions(config):
  net, denoiser = make(config)
  params = released_files.random(net, 0)
  given = inputs(denoiser)
  np.testing.assert_array_equal(
      jax.jit(net.apply)(params, *given),
      jax.jit(denoiser.apply)(params['denoiser'], *given),
  )
  run = jax.jit(net.fns['logits'])
  logits = run(params, *given)
  assert logits.shape == (3,) and logits.dtype == np.float32
  features = jax.jit(denoiser.fns['features'])(params['denoiser'], *given)
  other = run(params, *inputs(denoiser)[:2], np.array([2, 1, 0], np.int32))
  assert features.shape[0] == 3
  assert (np.abs(other - logits).max() > 1e-5) == (config is UNET)
  # The decoder has no part in it, and costs nothing.
  slope = jax.jit(jax.grad(lambda p: net.fns['logits'](p, *given).sum()))(
      params
  )
  parts = slope['denoiser']
  late, early = (
      (parts['decoder'], parts['encoder']) if config is UNET
      else (parts['block_2'], parts['block_0'])
  )
  assert not any(np.any(x) for x in jax.tree.leaves(late))
  assert any(np.any(x) for x in jax.tree.leaves(early))
  assert any(np.any(x) for x in jax.tree.leaves(slope['head']))

  def cost(fn):
    compiled = jax.jit(fn).lower(params, *given).compile()
    return compiled.cost_analysis()['flops']

  assert net.flops() > denoiser.flops()
  np.testing.assert_allclose(
      cost(net.fns['logits']) / 3, net.flops() - denoiser.flops(), rtol=0.3
  )
  assert jax.tree.structure(
      jax.tree.map(lambda a: 0, net.axes(), is_leaf=lambda a: type(a) is tuple)
  ) == jax.tree.structure(net.abstract())


def test_it_begins_as_the_teacher():
  net, denoiser = make(MLP)
  teacher = released_files.random(denoiser, 1)
  one, two = (
      net.fns['adopt'](jax.random.key(i), teacher) for i in (0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one['denoiser'], teacher)
  kernels = [p['head']['hidden']['kernel'] for p in (one, two)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0
  # Another critic's denoiser, with a head that knows nothing.
  again = net.fns['adopt'](jax.random.key(1), one)
  jax.tree.map(np.testing.assert_array_equal, again, two)
  small, _ = make(dict(MLP, width=32))
  with pytest.raises(ValueError, match='other weights than the denoiser'):
    small.fns['adopt'](jax.random.key(0), teacher)


def test_without_a_head():
  net, denoiser = make(MLP, head=False)
  assert set(net.fns) == {'forward', 'adopt'}
  assert set(net.abstract()) == set(net.axes()) == {'denoiser'}
  assert net.flops() == denoiser.flops()
  exact = dict(name='mixture', means=[[0.0, 1.0]], std=0.1)
  make(exact, head=False)
  with pytest.raises(ValueError, match="'mixture' has no features"):
    make(exact)
  with pytest.raises(ValueError, match="unknown field 'heads'"):
    make(MLP, heads=True)


def test_an_export_is_rebuilt(tmp_path):
  net, denoiser = make(MLP)
  params = released_files.random(net, 0)
  checkpoint.export(tmp_path / 'critic', net, params, {})
  meta = json.loads((tmp_path / 'critic/model.json').read_text())
  assert meta['config']['denoiser'] == MLP
  loaded, again = checkpoint.load(tmp_path / 'critic')
  given = inputs(denoiser)
  np.testing.assert_array_equal(
      jax.jit(loaded.fns['logits'])(again, *given),
      jax.jit(net.fns['logits'])(params, *given),
  )


# As UNET, with attention and the heads that a file does not tell.
FILED = dict(UNET, ch=64, attention=[4], head_dim=64)


def filed(head=True, **fields):
  """A critic, and what its file holds: the teacher and the levels too."""
  net, _ = make(FILED | fields, head=head)
  params = released_files.random(net, 0)
  rows = convert.CRITIC.rows(net.config)
  ours = table.invert(rows, params) | convert.CRITIC.buffers(net.config)
  ours['karras_sigmas'] = np.linspace(0.002, 80, 1000, dtype=np.float32)
  teacher = {
      k.replace('fake_unet.', 'real_unet.'): v for k, v in ours.items()
      if k.startswith('fake_unet.')
  }
  return net, params, ours, teacher


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(np.asarray(ours[name]), value, name)


def plan(path, tensors, **kwargs):
  released_files.save(path, tensors)
  return conversion.plan('dmd2_critic', [path], **kwargs)


@pytest.mark.parametrize('head', [True, False])
def test_files_there_and_back(head, tmp_path):
  net, params, ours, teacher = filed(head)
  names = {name.split('.')[0] for name in ours}
  assert names == {'fake_unet', 'karras_sigmas'} | (
      {'cls_pred_branch'} if head else set()
  )
  assert conversion.guess(teacher | ours) == 'dmd2_critic'
  work = plan(tmp_path / 'a.pth', teacher | ours)
  assert set(work.dropped) == set(teacher)
  assert set(work.kept) == {'karras_sigmas'}
  conversion.write(work, tmp_path / 'export', {})
  model, loaded = checkpoint.load(tmp_path / 'export')
  assert model.family == 'critic' and model.abstract() == net.abstract()
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'])
  assert_same(readers.read(tmp_path / 'b.pth').tree, ours)
  # The parts of the file are those that its other families read.
  for family, part in (
      ('dmd2_fake_unet', 'denoiser'), ('dmd2_head', 'head')
  )[: 1 + head]:
    other = conversion.plan(family, [tmp_path / 'a.pth'])
    jax.tree.map(
        np.testing.assert_array_equal,
        table.nest(other.model.abstract(), other.leaves), params[part],
    )


def test_what_was_trained_here_is_laid_out_as_released(tmp_path):
  net, params, ours, _ = filed()
  checkpoint.export(tmp_path / 'export', net, params, {})
  conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'])
  del ours['karras_sigmas']
  assert_same(readers.read(tmp_path / 'b.pth').tree, ours)
  other, _ = make(MLP)
  checkpoint.export(
      tmp_path / 'mlp', other, released_files.random(other, 0), {}
  )
  with pytest.raises(ValueError, match="of a critic are .* has a 'mlp'"):
    conversion.restore(tmp_path / 'mlp', [tmp_path / 'c.pth'])


@pytest.mark.parametrize('fields', [
    dict(image_size=64, num_classes=1000), FILED,
])
def test_sizes_are_read_from_the_tensors(fields):
  net, _ = make(dict(name='edm_unet') | fields)
  made = convert.CRITIC.buffers(net.config) | {
      k: jax.ShapeDtypeStruct(shape, group.dtype)
      for group in table.plan_inverse(
          convert.CRITIC.rows(net.config), net.abstract()
      ) for k, shape in group.shapes.items()
  }
  found = convert.CRITIC.infer(made, {})
  again = build.build_model(dict(name='critic', **found))
  assert again.abstract() == net.abstract() and again.config.head


def test_files_that_are_refused(tmp_path):
  _, _, ours, teacher = filed(head_dim=16)
  good = teacher | ours
  file = tmp_path / 'a.pth'
  # Channels of a head change the order in the file: it has to be told.
  given = {'denoiser': {'head_dim': 16}}
  assert plan(file, good, given=given).model.config.denoiser['ch'] == 64
  filters = 'fake_unet.model.enc.4x4_down.conv0.resample_filter'
  kernel = 'fake_unet.model.dec.8x8_block0.conv1.weight'
  lost = {'cls_pred_branch.1.bias', kernel}
  bad = {k: v for k, v in good.items() if k not in lost} | {
      name: np.ones(shape, np.float32) for name, shape in (
          ('fake_unet.stray.weight', 3), ('cls_pred_branch.9.bias', 3),
          ('other.weight', 3), (filters, (1, 1, 2, 2)),
          ('cls_pred_branch.0.weight', (128, 128, 2, 2)),
      )
  }
  with pytest.raises(ValueError) as info:
    plan(file, bad, given=given)
  message = str(info.value)
  assert str(file) in message
  for text in (
      "tensor 'fake_unet.stray.weight' matches no row",
      "tensor 'cls_pred_branch.9.bias' matches no row",
      "tensor 'other.weight' matches no row", "tensor 'cls_pred_branch.1.bias'",
      f"tensor '{kernel}'", "'head/conv_0/kernel' has shape",
      f"buffer '{filters}' is not what the config makes",
  ):
    assert text in message, text
  with pytest.raises(ValueError, match="'haed_dim': did you mean 'head_dim'"):
    plan(file, good, given={'denoiser': {'haed_dim': 16}})
  unet = {k.removeprefix('real_unet.'): v for k, v in teacher.items()}
  with pytest.raises(ValueError, match='use --family=edm_unet'):
    plan(file, unet)
  lost = {k: v for k, v in good.items() if 'map_layer0' not in k}
  with pytest.raises(ValueError, match='map_layer0.weight.*tells the sizes'):
    plan(file, lost)
