# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Batches from a source: an endless resumable stream, or one padded pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import sys

import grain
import numpy as np

from dd_jax.data import sources

Transform = Callable[[sources.Batch], sources.Batch]


def make_iterator(
    source: sources.Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    shuffle: bool = True,
    transforms: Sequence[Transform] = (),
    num_threads: int = 1,
    prefetch: int = 2,
) -> grain.DatasetIterator:
  """Returns this process's share of one endless stream of global batches.

  The source is repeated for ever, in a new order each epoch; an epoch may end
  in the middle of a batch. Global batch `k` holds positions
  [k * batch_size, (k + 1) * batch_size) of that stream and each process reads
  one contiguous block of it, so that the global batch, its order included, is
  the same whatever `process_count`.

  The state of the iterator is the number of batches taken. It is the same on
  every process, and `grain.checkpoint.CheckpointSave` and `CheckpointRestore`
  carry it through Orbax.

  Args:
    source: records; a `sources.BatchSource` is read a batch at a time.
    batch_size: size of the global batch.
    seed: non-negative; with the epoch it decides the order.
    process_index: which process this is.
    process_count: number of processes that share each global batch.
    shuffle: False keeps the order of the source in every epoch.
    transforms: applied in order to the batch of this process, `index`
      included. A transform treats records independently and takes randomness
      from `index` alone, or results would depend on the number of processes.
    num_threads: threads that read batches ahead; 0 reads in the caller.
    prefetch: batches read ahead.

  Returns:
    A `grain.DatasetIterator` of dicts with a leading axis of
    batch_size / process_count. The fields are those of the source and `index`
    uint32, the position in the stream modulo 2**32: fold it into a key for
    randomness by example.

  Raises:
    ValueError: empty source, negative seed, or a batch that does not divide
      among the processes.
  """
  batches = make_batches(
      source, batch_size=batch_size, seed=seed, process_index=process_index,
      process_count=process_count, shuffle=shuffle, transforms=transforms,
  )
  options = grain.ReadOptions(
      num_threads=num_threads, prefetch_buffer_size=prefetch
  )
  return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def make_batches(
    source: sources.Source,
    *,
    batch_size: int,
    seed: int,
    process_index: int,
    process_count: int,
    shuffle: bool = True,
    transforms: Sequence[Transform] = (),
) -> Sequence[sources.Batch]:
  """The stream of `make_iterator`, which has the arguments, by batch number."""
  if seed < 0:
    raise ValueError(f'seed must not be negative, got {seed}')
  return _Batches(
      source=source,
      batch_size=_local_size(source, batch_size, process_index, process_count),
      process_index=process_index,
      process_count=process_count,
      seed=seed if shuffle else None,
      transforms=tuple(transforms),
  )


def epoch(
    source: sources.Source,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    transforms: Sequence[Transform] = (),
) -> Iterator[sources.Batch]:
  """Returns this process's share of one pass in order, for evaluation.

  Every batch is full and every process gets as many of them: the last record
  fills up the last batch. `mask` is False on the fillers.

  Args:
    source: records.
    batch_size: size of the global batch.
    process_index: which process this is.
    process_count: number of processes that share each global batch.
    transforms: as in `make_iterator`.

  Returns:
    An iterator of dicts with a leading axis of batch_size / process_count:
    the fields of the source, `index` uint32, the row in the source, and
    `mask` bool.

  Raises:
    ValueError: empty source, or a batch that does not divide among the
      processes.
  """
  local = _local_size(source, batch_size, process_index, process_count)
  starts = range(process_index * local, _round_up(len(source), batch_size))
  positions = (s + np.arange(local) for s in starts[::batch_size])
  last = len(source) - 1
  return (
      _read(
          source,
          np.minimum(p, last),
          transforms,
          index=np.minimum(p, last).astype(np.uint32),
          mask=p <= last,
      )
      for p in positions
  )


def _round_up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _local_size(
    source: sources.Source,
    batch_size: int,
    process_index: int,
    process_count: int,
) -> int:
  if not len(source):
    raise ValueError('the source is empty')
  if not 0 <= process_index < process_count:
    raise ValueError(
        f'process_index={process_index} is not in [0, {process_count})'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
        f'a global batch of {batch_size} does not divide among {process_count} '
        'processes: choose a positive multiple'
    )
  return batch_size // process_count


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Batches:
  """The batches of one process by number, as a source for Grain.

  Grain's own shuffle, repeat and batch spend some 50 us of Python on a record,
  half of it on the shuffled index. Small networks train faster than that, so
  the unit here is a whole batch and the order of an epoch is an array.
  """

  source: sources.Source
  batch_size: int  # of this process
  process_index: int
  process_count: int
  seed: int | None  # None keeps the order of the source
  transforms: tuple[Transform, ...]

  def __len__(self) -> int:
    return sys.maxsize // (self.batch_size * self.process_count)

  def __getitem__(self, k: int) -> sources.Batch:
    start = (k * self.process_count + self.process_index) * self.batch_size
    positions = np.arange(start, start + self.batch_size)
    return _read(
        self.source,
        _stream_rows(len(self.source), self.seed, positions),
        self.transforms,
        index=positions.astype(np.uint32),
    )


def _stream_rows(
    size: int, seed: int | None, positions: np.ndarray
) -> np.ndarray:
  """Returns the rows of the source at `positions` of the endless stream."""
  epochs, offsets = np.divmod(positions, size)
  if seed is None:
    return offsets
  rows = np.empty_like(offsets)
  for number in np.unique(epochs):
    here = epochs == number
    rows[here] = _epoch_order(size, seed, int(number))[offsets[here]]
  return rows


# Two streams that both cross the end of an epoch need four.
@functools.lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, number: int) -> np.ndarray:
  return sources.permutation(size, seed, number)


def _read(
    source: sources.Source,
    rows: np.ndarray,
    transforms: Sequence[Transform],
    **fields: np.ndarray,
) -> sources.Batch:
  """Stacks the records at `rows`, adds `fields` and applies `transforms`."""
  if isinstance(source, sources.BatchSource):
    batch = source.take(rows)
  else:
    records = [source[int(row)] for row in rows]
    batch = {k: np.stack([r[k] for r in records]) for k in records[0]}
  if clash := sorted(fields.keys() & batch.keys()):
    raise ValueError(f'the source has fields {clash}, which are reserved')
  batch = {**batch, **fields}
  for transform in transforms:
    batch = transform(batch)
  return batch
