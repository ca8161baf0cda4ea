# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of pairs on disk."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle
import signal
import subprocess
import sys

from array_record.python import array_record_module
from etils import epath
import grain
import numpy as np
import pytest

from dd_jax.data import pairs, pipeline, sources

MANIFEST = pairs.Manifest(
    pairs=25,
    shard_size=10,
    length=5,
    vocab_size=4096,
    num_classes=10,
    provenance={'teacher': 'abc', 'cfg': 2.0, 'top_k': 900, 'steps': [1, 2]},
)

# Writes shard 0 and is killed while it makes shard 1.
KILLED = """
import os, signal, sys
from dd_jax.data import pairs
from tests.data import pairs_test

def die(*args):
  os.kill(os.getpid(), signal.SIGKILL)

path, where = sys.argv[1:]
pairs_test.write(path, 0)
if where == 'publish':
  pairs.files.publish = die
else:
  writer = pairs_test.dying_writer(die)
  pairs.array_record_module.ArrayRecordWriter = writer
pairs_test.write(path, 1)
"""


def contents(shard):
  """Seed, labels and indices of one shard."""
  ids = np.asarray(MANIFEST.shard_ids(shard))
  return {
      'seed': 7,
      'label': ids % 10,
      'indices': 100 * ids[:, None] + np.arange(5),
  }


def write(path, *shards):
  writer = pairs.PairWriter(path, MANIFEST)
  for shard in shards:
    writer.write(shard, **contents(shard))
  return writer


def dying_writer(die):
  """Returns an ArrayRecordWriter that dies at its fifth record."""

  class Writer(array_record_module.ArrayRecordWriter):
    written = 0

    def write(self, record):
      super().write(record)
      self.written += 1
      if self.written == 5:
        die()

  return Writer


@pytest.fixture
def path(tmp_path):
  """A finished set."""
  write(tmp_path, 0, 1, 2).finalize()
  return tmp_path


def _hashes(path):
  return {f.name: pairs.files.sha256(f) for f in path.glob('*.array_record')}


def _edit_manifest(path, **fields):
  file = path / 'manifest.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize('in_memory', [None, True, False])
def test_reads_what_was_written(path, in_memory):
  source = pairs.PairSource(path, in_memory=in_memory)
  assert isinstance(source, sources.BatchSource)
  assert len(source) == 25
  written = [contents(shard) for shard in range(3)]
  rows = np.array([24, 3, 10, 3])
  batch = source.take(rows)
  np.testing.assert_array_equal(batch['pair_id'], rows)
  np.testing.assert_array_equal(batch['seed'], [7] * 4)
  for name in ('label', 'indices'):
    expected = np.concatenate([w[name] for w in written])
    np.testing.assert_array_equal(batch[name], expected[rows])
  assert {k: v.dtype.name for k, v in batch.items()} == {
      'pair_id': 'uint32',
      'seed': 'uint32',
      'label': 'int32',
      'indices': 'int32',
  }
  record = source[24]
  assert record['indices'].shape == (5,)
  np.testing.assert_array_equal(record['indices'], written[2]['indices'][4])
  for i in (-1, 25):
    with pytest.raises(IndexError, match=f'no pair {i} of 25'):
      source[i]
  copy = pickle.loads(pickle.dumps(source))
  np.testing.assert_array_equal(copy.take(rows)['indices'], batch['indices'])


def test_feeds_the_pipeline(path):
  streams = [
      pipeline.make_iterator(
          pairs.PairSource(path, in_memory=in_memory),
          batch_size=5,
          seed=0,
          process_index=0,
          process_count=1,
      )
      for in_memory in (True, False)
  ]
  seen = []
  for _ in range(5):
    left, right = map(next, streams)
    np.testing.assert_array_equal(left['indices'], right['indices'])
    seen += left['pair_id'].tolist()
  assert sorted(seen) == list(range(25))


def test_layout(path):
  names = [f'pairs-0000{k}-of-00003.array_record' for k in range(3)]
  assert sorted(f.name for f in path.iterdir()) == ['manifest.json', *names]
  manifest = json.loads((path / 'manifest.json').read_text())
  assert manifest['format_version'] == 1
  assert manifest['provenance'] == MANIFEST.provenance
  assert [s['sha256'] for s in manifest['shards']] == [
      _hashes(path)[name] for name in names
  ]
  raw = grain.sources.ArrayRecordDataSource([str(path / names[1])])[2]
  assert len(raw) == 8 + 4 + 4 + 2 * 5
  assert raw[:16].hex() == '0c0000000000000007000000' + raw[12:16].hex()


def test_pending_lists_what_is_left(tmp_path):
  writer = write(tmp_path)
  assert writer.pending() == [0, 1, 2]
  writer.write(1, **contents(1))
  assert write(tmp_path).pending() == [0, 2]
  with pytest.raises(FileNotFoundError, match='pairs-00000-of-00003'):
    writer.finalize()
  write(tmp_path, 2, 0)
  assert writer.pending() == []
  assert writer.finalize().shards == pairs.read_manifest(tmp_path).shards
  assert writer.pending() == []


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('harm', ['truncate', 'flip', 'empty', 'swap'])
def test_pending_finds_damage_and_writing_again_mends_it(
    tmp_path, finished, harm
):
  writer = write(tmp_path, 0, 1, 2)
  if finished:
    writer.finalize()
  before = _hashes(tmp_path)
  file = tmp_path / MANIFEST.shard_name(1)
  content = file.read_bytes()
  middle = content.index((12).to_bytes(8, 'little'))
  file.write_bytes(
      {
          'truncate': content[:-100],
          'flip': content[:middle] + b'\xff' + content[middle + 1 :],
          'empty': b'',
          'swap': (tmp_path / MANIFEST.shard_name(0)).read_bytes(),
      }[harm]
  )
  assert writer.pending() == [1]
  if not finished:
    with pytest.raises(ValueError, match='pairs-00001-of-00003'):
      writer.finalize()
  write(tmp_path, 1)
  assert writer.pending() == []
  assert _hashes(tmp_path) == before


@pytest.mark.parametrize('where', ['write', 'publish'])
def test_a_kill_loses_one_shard_and_leaves_no_trace(tmp_path, where):
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  write(whole, 0, 1, 2).finalize()
  process = subprocess.run(
      [sys.executable, '-c', KILLED, str(killed), where],
      cwd=pathlib.Path(__file__).parents[2],
      check=False,
  )
  assert process.returncode == -signal.SIGKILL
  assert (killed / f'{MANIFEST.shard_name(1)}.part').exists()
  writer = pairs.PairWriter(killed, MANIFEST)
  assert writer.pending() == [1, 2]
  write(killed, 1, 2).finalize()
  assert sorted(f.name for f in killed.iterdir()) == sorted(
      f.name for f in whole.iterdir()
  )
  for file in whole.iterdir():
    assert (killed / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    'change, message',
    [
        ({'label': np.full(10, 10)}, r'pair 10 has label 10 .*\[0, 10\)'),
        ({'label': np.full(10, -1)}, 'pair 10 has label -1'),
        (
            {'indices': np.arange(50).reshape(10, 5) * 100},
            r'pairs-00001-of-00003.*pair 18 has code 4100 outside \[0, 4096\)',
        ),
        ({'label': np.zeros(9, int)}, r'label must .* \[10\], got int64\[9\]'),
        ({'indices': np.zeros((10, 5))}, r'indices .* got float64\[10, 5\]'),
        ({'indices': np.zeros((10, 4), int)}, r'\[10, 5\], got int64\[10, 4\]'),
        ({'seed': 2**32}, 'seed must lie in'),
    ],
)
def test_write_refuses(tmp_path, change, message):
  writer = write(tmp_path)
  with pytest.raises(ValueError, match=message):
    writer.write(1, **contents(1) | change)
  assert [f.name for f in tmp_path.iterdir()] == ['manifest.json']


@pytest.mark.parametrize('shard', [-1, 3])
def test_write_refuses_a_shard_that_is_not_there(tmp_path, shard):
  with pytest.raises(ValueError, match=f'no shard {shard} of 3'):
    write(tmp_path).write(shard, **contents(0))


@pytest.mark.parametrize('in_memory', [True, False])
def test_reading_names_the_damaged_file(path, in_memory):
  file = path / MANIFEST.shard_name(2)
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  with pytest.raises(ValueError, match=f'{file.name} .* is truncated'):
    pairs.PairSource(path, in_memory=in_memory)
  file.write_bytes(content[:-1] + b'\xff')
  with pytest.raises(ValueError, match=f'{file.name} was changed'):
    pairs.PairSource(path, in_memory=in_memory)
  file.unlink()
  with pytest.raises(FileNotFoundError, match=f'{file.name} is missing'):
    pairs.PairSource(path, in_memory=in_memory)


@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize(
    'fields, message',
    [
        ({'vocab_size': 2000}, r'pair 20 has code 2000 outside \[0, 2000\)'),
        ({'num_classes': 9}, r'pair 9 has label 9 outside \[0, 9\)'),
        ({'length': 4}, 'pair 0 has 26 bytes instead of 24'),
    ],
)
def test_reading_checks_the_values(path, in_memory, fields, message):
  _edit_manifest(path, **fields)
  with pytest.raises(ValueError, match=f'pairs-0000.*{message}'):
    pairs.PairSource(path, in_memory=in_memory).take(np.arange(25))


@pytest.mark.parametrize('in_memory', [True, False])
def test_reading_checks_the_order(path, in_memory):
  first, second = (path / MANIFEST.shard_name(s) for s in (0, 1))
  shards = json.loads((path / 'manifest.json').read_text())['shards']
  content = first.read_bytes()
  first.write_bytes(second.read_bytes())
  second.write_bytes(content)
  _edit_manifest(path, shards=[shards[1], shards[0], shards[2]])
  with pytest.raises(ValueError, match='00000-of.*pair 0 says .* pair 10'):
    pairs.PairSource(path, in_memory=in_memory).take(np.arange(25))


def test_verify_may_be_left_out(path):
  _edit_manifest(
      path,
      shards=[
          dataclasses.asdict(s) | {'sha256': 'other'}
          for s in pairs.read_manifest(path).shards
      ],
  )
  with pytest.raises(ValueError, match='the manifest says other'):
    pairs.PairSource(path)
  assert len(pairs.PairSource(path, verify=False)) == 25


def test_reading_needs_a_finished_set(tmp_path):
  with pytest.raises(FileNotFoundError, match='manifest.json is missing'):
    pairs.PairSource(tmp_path)
  write(tmp_path, 0, 1, 2)
  with pytest.raises(ValueError, match='manifest.json is of an unfinished set'):
    pairs.PairSource(tmp_path)


@pytest.mark.parametrize(
    'text, message',
    [
        ('{', 'is damaged'),
        ('[]', 'is damaged'),
        ('{"pairs": 3}', "is damaged: KeyError.'format_version'"),
        ('{"format_version": 2}', 'format 2, newer than format 1 .* upgrade'),
        ('{"format_version": 1, "shards": []}', 'is damaged: TypeError'),
    ],
)
def test_manifest_that_cannot_be_read(tmp_path, text, message):
  (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(ValueError, match=f'manifest.json .*{message}'):
    pairs.read_manifest(tmp_path)


def test_remote_folders_are_refused():
  # pathlib would make a local folder 'gs:'.
  with pytest.raises(ValueError, match='gs://bucket/data: .* mounted'):
    pairs.PairWriter('gs://bucket/data', MANIFEST)
  with pytest.raises(ValueError, match='gs://bucket/data: .* mounted'):
    pairs.PairSource(epath.Path('gs://bucket/data'))


def test_manifest_with_a_shard_too_few(path):
  shards = json.loads((path / 'manifest.json').read_text())['shards']
  _edit_manifest(path, shards=shards[:2])
  with pytest.raises(ValueError, match='manifest.json .*2 shards .* of 3'):
    pairs.PairSource(path)


def test_pairs_of_other_networks_are_told():
  made = dataclasses.replace(MANIFEST, provenance={'vae': 'a' * 64})
  pairs.check_origin('p', made, vae='a' * 64, teacher='b' * 64)
  with pytest.raises(ValueError, match='with the vae aaaaaaaaaaaa, this stage'):
    pairs.check_origin('p', made, vae='b' * 64)


def test_other_pairs_do_not_mix(path):
  provenance = {**MANIFEST.provenance, 'cfg': 1.5, 'solver': 'heun'}
  other = dataclasses.replace(MANIFEST, pairs=26, provenance=provenance)
  with pytest.raises(ValueError) as e:
    pairs.PairWriter(path, other)
  for part in (
      'pairs is 25 there and 26 here',
      'provenance.cfg is 2.0 there and 1.5 here',
      "provenance.solver is None there and 'heun' here",
  ):
    assert part in str(e.value)
  # What JSON does not tell apart is the same.
  provenance = {**MANIFEST.provenance, 'steps': (1, 2)}
  pairs.PairWriter(path, dataclasses.replace(MANIFEST, provenance=provenance))
  assert len(pairs.PairSource(path)) == 25


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'pairs': 0}, 'pairs must lie'),
        ({'pairs': 2**32 + 1}, 'pairs must lie'),
        ({'vocab_size': 2**16 + 1}, 'vocab_size must lie'),
        ({'shard_size': 0}, 'shard_size must be positive'),
    ],
)
def test_manifest_refuses(fields, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(MANIFEST, **fields)
