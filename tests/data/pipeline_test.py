# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the pipeline."""

from __future__ import annotations

import time

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dd_jax.data import pipeline, sources

SIZE = 30


def _source(size=SIZE):
  return sources.ArraySource({'x': 10 * np.arange(size)})


class _Records:
  """The same records, one by one."""

  def __len__(self):
    return SIZE

  def __getitem__(self, i):
    return {'x': np.asarray(10 * i)}


def _iterator(source=None, **kwargs):
  defaults = {'batch_size': 8, 'seed': 3, 'process_index': 0}
  return pipeline.make_iterator(
      _source() if source is None else source,
      **{**defaults, 'process_count': 1, **kwargs},
  )


def _take(iterator, count):
  return [next(iterator) for _ in range(count)]


def _join(batches):
  return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def _assert_same(left, right):
  assert len(left) == len(right) > 0
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def test_every_epoch_has_every_record_once_in_another_order():
  stream = _join(_take(_iterator(batch_size=SIZE // 2), 6))
  first, second, third = stream['x'].reshape(3, SIZE)
  np.testing.assert_array_equal(np.sort(first), 10 * np.arange(SIZE))
  np.testing.assert_array_equal(np.sort(second), 10 * np.arange(SIZE))
  assert (first != second).any() and (second != third).any()
  assert stream['index'].dtype == np.uint32
  np.testing.assert_array_equal(stream['index'], np.arange(3 * SIZE))


def test_an_epoch_may_end_in_a_batch():
  stream = _join(_take(_iterator(batch_size=8), 15))['x']
  for epoch in stream.reshape(4, SIZE):
    np.testing.assert_array_equal(np.sort(epoch), 10 * np.arange(SIZE))


def test_a_batch_may_hold_many_epochs():
  batch = next(_iterator(_source(3), batch_size=9))
  for epoch in batch['x'].reshape(3, 3):
    assert sorted(epoch) == [0, 10, 20]


def test_the_seed_decides_the_order():
  a, b, c = (_take(_iterator(seed=s), 3) for s in (3, 3, 4))
  _assert_same(a, b)
  assert (_join(a)['x'] != _join(c)['x']).any()


def test_no_shuffle_keeps_the_order():
  stream = _join(_take(_iterator(shuffle=False), 8))['x']
  np.testing.assert_array_equal(stream, 10 * (np.arange(64) % SIZE))


@pytest.mark.parametrize('process_count', [2, 4])
def test_the_global_batch_does_not_depend_on_processes(process_count):
  iterators = [
      _iterator(process_index=i, process_count=process_count)
      for i in range(process_count)
  ]
  parts = [_join([next(it) for it in iterators]) for _ in range(9)]
  _assert_same(parts, _take(_iterator(), 9))


def test_records_come_out_the_same_one_by_one():
  _assert_same(_take(_iterator(_Records()), 5), _take(_iterator(), 5))


@pytest.mark.parametrize('threads', [0, 1, 3])
def test_threads_do_not_change_the_stream(threads):
  _assert_same(
      _take(_iterator(num_threads=threads, prefetch=4), 20),
      _take(_iterator(), 20),
  )


def test_transforms_run_in_order_and_see_the_index():
  def double(batch):
    return {**batch, 'y': 2 * batch['x']}

  def add_index(batch):
    return {**batch, 'y': batch['y'] + batch['index']}

  batch = _take(_iterator(transforms=[double, add_index]), 2)[1]
  np.testing.assert_array_equal(batch['y'], 2 * batch['x'] + batch['index'])


@pytest.mark.parametrize('process_index', [0, 1])
def test_orbax_restores_the_next_batches(tmp_path, process_index):
  kwargs = {'process_index': process_index, 'process_count': 2}
  iterator = _iterator(**kwargs)
  _take(iterator, 7)  # in the second epoch
  with ocp.CheckpointManager(tmp_path) as manager:
    save = grain.checkpoint.CheckpointSave(iterator)
    manager.save(7, args=ocp.args.Composite(data=save))
    expected = _take(iterator, 9)
    restored = _iterator(**kwargs)
    _take(restored, 2)  # whatever it did before is forgotten
    manager.wait_until_finished()
    restore = grain.checkpoint.CheckpointRestore(restored)
    manager.restore(7, args=ocp.args.Composite(data=restore))
  _assert_same(_take(restored, 9), expected)


def test_the_state_serves_any_number_of_processes():
  iterator = _iterator(process_index=1, process_count=2)
  _take(iterator, 5)
  single = _iterator()
  single.set_state(iterator.get_state())
  _assert_same([next(single)], [_take(_iterator(), 6)[5]])


def test_the_index_wraps_at_32_bits():
  iterator = _iterator()
  iterator.set_state({'next_index': 2**32 // 8 - 1})
  stream = _join(_take(iterator, 2))
  assert stream['index'][7] == 2**32 - 1
  assert stream['index'][8] == 0


@pytest.mark.parametrize(
    'kwargs, message',
    [
        ({'source': _source(0)}, 'empty'),
        ({'process_count': 3}, 'batch of 8 does not divide among 3 processes'),
        ({'batch_size': 0}, 'batch of 0'),
        ({'process_index': 2, 'process_count': 2}, r'_index=2 .*\[0, 2\)'),
        ({'seed': -1}, 'seed must not be negative, got -1'),
    ],
)
def test_refuses(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _iterator(**kwargs)


def test_refuses_a_source_with_reserved_fields():
  source = sources.ArraySource({'index': np.arange(4)})
  with pytest.raises(ValueError, match=r"\['index'\], which are reserved"):
    next(_iterator(source, num_threads=0))


@pytest.mark.parametrize('process_count', [1, 2])
@pytest.mark.parametrize('batch_size', [4, 10, 64])
def test_epoch_reads_every_record_once(process_count, batch_size):
  passes = [
      list(
          pipeline.epoch(
              _source(),
              batch_size=batch_size,
              process_index=i,
              process_count=process_count,
          )
      )
      for i in range(process_count)
  ]
  batches = [_join(parts) for parts in zip(*passes, strict=True)]
  assert {len(b['x']) for b in batches} == {batch_size}
  stream = _join(batches)
  real = {k: v[stream['mask']] for k, v in stream.items()}
  np.testing.assert_array_equal(real['x'], 10 * np.arange(SIZE))
  np.testing.assert_array_equal(real['index'], np.arange(SIZE))
  filler = stream['x'][~stream['mask']]
  assert len(filler) == -SIZE % batch_size
  assert (filler == 10 * (SIZE - 1)).all()


def test_epoch_transforms():
  batch = next(
      pipeline.epoch(
          _source(), batch_size=4, transforms=[lambda b: {'z': b['x'] + 1}]
      )
  )
  assert batch['z'].tolist() == [1, 11, 21, 31]


def test_epoch_refuses_at_once():
  with pytest.raises(ValueError, match='empty'):
    pipeline.epoch(_source(0), batch_size=4)


def test_is_fast_enough_for_small_networks():
  source = sources.ArraySource({'x': np.zeros((1438, 8, 8, 1), np.float32)})
  iterator = _iterator(source, batch_size=128)
  next(iterator)
  start = time.process_time()
  _take(iterator, 100)
  assert 12_800 / (time.process_time() - start) > 30_000  # about 10**6
