# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the judge: shapes, axes, errors, and that it learns digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dd_jax.models.judge import model as judge

DIGITS = {'image_size': 8, 'image_channels': 1, 'num_classes': 10}


@pytest.mark.parametrize('size', [8, 16, 32])
@pytest.mark.parametrize('channels', [1, 3])
def test_shapes(size, channels):
  net = judge.build(
      {'image_size': size, 'image_channels': channels, 'num_classes': 7}
  )
  params = net.init(jax.random.key(0))
  image = jnp.ones((2, size, size, channels))
  assert net.apply(params, image).shape == (2, 7)
  assert net.fns['features'](params, image).shape == (2, judge.FEATURES)


def test_logits_are_linear_in_the_features():
  net = judge.build(DIGITS)
  params = net.init(jax.random.key(0))
  image = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
  head = params['head']
  features = net.fns['features'](params, image)
  np.testing.assert_allclose(
      net.apply(params, image),
      features @ head['kernel'] + head['bias'][None], rtol=1e-5, atol=1e-5,
  )


def test_axes_name_every_dimension():
  net = judge.build(DIGITS)
  ranks = jax.tree.map(lambda x: x.ndim, net.abstract())
  names = jax.tree.map(len, net.axes(), is_leaf=lambda x: isinstance(x, tuple))
  assert names == ranks
  assert net.axes()['neck']['kernel'] == ('embed', 'mlp')


def test_flops():
  # Two per multiply-add: stem at 8x8, one stage at 4x4, neck, head.
  expected = 2 * (
      64 * 9 * 32 + 16 * 9 * 32 * 64 + 16 * 64 * 64 + 64 * 10
  )
  assert judge.build(DIGITS).flops() == expected


@pytest.mark.parametrize('change, message', [
    ({'image_size': 28}, 'image_size is 28.*8, 16 or 32'),
    ({'image_channels': 4}, 'image_channels is 4'),
    ({'num_classes': 1}, 'num_classes is 1'),
    ({'width': 64}, "unknown field 'width'"),
])
def test_bad_fields_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    judge.build(DIGITS | change)


def test_learns_digits_well_enough_to_judge():
  datasets = pytest.importorskip('sklearn.datasets')
  data = datasets.load_digits()
  order = np.random.default_rng(0).permutation(len(data.target))
  images = (data.images / 8 - 1).astype(np.float32)[order, ..., None]
  labels = data.target[order]
  train = 1437
  net = judge.build(DIGITS)
  tx = optax.adam(2e-3)

  def loss(params, image, label):
    logits = net.apply(params, image)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, label
    ).mean()

  @jax.jit
  def step(params, opt, image, label):
    updates, opt = tx.update(jax.grad(loss)(params, image, label), opt)
    return optax.apply_updates(params, updates), opt

  params = net.init(jax.random.key(0))
  opt = tx.init(params)
  for i in range(300):
    rows = np.random.default_rng(i).integers(train, size=128)
    params, opt = step(params, opt, images[rows], labels[rows])
  predicted = net.apply(params, images[train:]).argmax(-1)
  assert (predicted == labels[train:]).mean() >= 0.97
