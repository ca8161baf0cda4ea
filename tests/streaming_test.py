# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of exports that are written and read leaf by leaf."""

from __future__ import annotations

import json
import shutil
import weakref

import jax
import numpy as np
import pytest

from dd_jax import checkpoint, streaming
from dd_jax.convert.lazy import LazyArray
from dd_jax.models.judge import model as judge


@pytest.fixture(scope='module')
def small():
  """A network and values for it."""
  net = judge.build({'image_size': 8, 'image_channels': 1, 'num_classes': 3})
  rng = np.random.default_rng(0)
  return net, jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(x.dtype), net.abstract()
  )


def lazy(value, make=None):
  return LazyArray(value.shape, value.dtype, make or value.copy)


def test_the_same_export_as_from_memory(small, tmp_path):
  net, params = small
  digest = checkpoint.export(tmp_path / 'a', net, params, {'x': 1})
  leaves = jax.tree.map(lazy, params)
  assert streaming.export(tmp_path / 'b', net, leaves, {'x': 1}) == digest
  ours, theirs = (
      json.loads((tmp_path / n / 'model.json').read_text()) for n in 'ba'
  )
  assert ours == theirs and list(ours) == list(theirs)
  readme = [(tmp_path / n / 'README.md').read_text() for n in 'ba']
  assert readme[0] == readme[1]
  model, loaded = checkpoint.load(tmp_path / 'b')
  assert model.config == net.config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_one_leaf_at_a_time(small, tmp_path, monkeypatch):
  monkeypatch.setattr(streaming, 'BATCH_BYTES', 1)
  net, params = small
  alive, most, order = set(), 0, []

  def counted(value):
    def make():
      nonlocal most
      made = value.copy()
      token = object()
      alive.add(token)
      weakref.finalize(made, alive.discard, token)
      most = max(most, len(alive))
      return made

    return lazy(value, make)

  streaming.export(
      tmp_path / 'a', net, jax.tree.map(counted, params), {},
      progress=order.append,
  )
  count = len(jax.tree.leaves(params))
  assert most == 1 and order == list(range(count + 1))


def test_a_failure_leaves_nothing(small, tmp_path):
  net, params = small

  def fail():
    raise ValueError('the file is gone')

  last = {'left': len(jax.tree.leaves(params))}

  def maybe(value):
    last['left'] -= 1
    return lazy(value, None if last['left'] else fail)

  streaming.export(tmp_path / 'a', net, jax.tree.map(lazy, params), {})
  before = (tmp_path / 'a' / 'model.json').read_text()
  with pytest.raises(ValueError, match='the file is gone'):
    streaming.export(tmp_path / 'a', net, jax.tree.map(maybe, params), {'n': 1})
  assert [p.name for p in tmp_path.iterdir()] == ['a']
  assert (tmp_path / 'a' / 'model.json').read_text() == before


def test_batches():
  mega = 1 << 20
  sizes = [('a', mega), ('b', 63 * mega), ('c', 1), ('d', 200 * mega), ('e', 0)]
  assert streaming._batches(sizes) == [['a', 'b'], ['c'], ['d'], ['e']]
  assert streaming._batches([('a', 0)]) == [['a']]


@pytest.mark.parametrize('batch_bytes', [1, 1 << 26])
def test_leaves_are_read_and_checked(
    small, tmp_path, monkeypatch, batch_bytes
):
  monkeypatch.setattr(streaming, 'BATCH_BYTES', batch_bytes)
  net, params = small
  streaming.export(tmp_path / 'a', net, jax.tree.map(lazy, params), {})
  leaves = streaming.open_params(tmp_path / 'a', net.abstract())
  jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(np.asarray(x), y),
      leaves, params,
  )
  file = tmp_path / 'a' / 'model.json'
  meta = json.loads(file.read_text())
  name = next(iter(meta['sha256']))
  meta['sha256'][name] = '0'
  meta['hash'] = checkpoint.fingerprint(net, meta['sha256'])
  file.write_text(json.dumps(meta))
  leaves = streaming.open_params(tmp_path / 'a', net.abstract())
  with pytest.raises(ValueError, match=f'{name} differs from its hash'):
    jax.tree.map(np.asarray, leaves)
  del meta['sha256'][name]
  meta['hash'] = checkpoint.fingerprint(net, meta['sha256'])
  file.write_text(json.dumps(meta))
  with pytest.raises(ValueError, match=f'{name} is not as model.json says'):
    streaming.open_params(tmp_path / 'a', net.abstract())
  shutil.rmtree(tmp_path / 'a' / 'params')
  with pytest.raises(ValueError, match='cannot be read'):
    streaming.open_params(tmp_path / 'a', net.abstract())
  with pytest.raises(FileNotFoundError):
    streaming.open_params(tmp_path / 'b', net.abstract())
