# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of features of captions on disk."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy

from dd_jax.data import captions, files, sources

LENGTHS = (3, 1, 5, 2, 4, 5, 1)
MANIFEST = captions.Manifest(
    captions=7, shard_size=3, width=4, caption_length=5, dtype='float16',
    num_classes=3, provenance={'encoder': 'abc'},
)
NAMES = [f'captions-0000{i}-of-00003.safetensors' for i in range(3)]


def contents(shard, manifest=MANIFEST):
  ids = manifest.shard_ids(shard)
  rng = [np.random.default_rng(i) for i in ids]
  return {
      'features': [
          r.normal(size=(LENGTHS[i], 4)).astype(np.float32)
          for i, r in zip(ids, rng, strict=True)
      ],
      'texts': [f'caption ü {i}' for i in ids],
      'labels': None if manifest.num_classes is None else [i % 3 for i in ids],
  }


def write(path, *shards, manifest=MANIFEST):
  writer = captions.CaptionWriter(path, manifest)
  for shard in shards:
    writer.write(shard, **contents(shard, manifest))
  return writer


@pytest.fixture
def path(tmp_path):
  """A finished set."""
  write(tmp_path, 0, 1, 2).finalize()
  return tmp_path


def edit_manifest(path, **fields):
  file = path / 'manifest.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_reads_what_was_written(path):
  source = captions.CaptionSource(path)
  assert isinstance(source, sources.BatchSource)
  assert len(source) == 7 and source.num_classes == 3
  rows = np.array([6, 2, 2, 3])
  for reader in (source, pickle.loads(pickle.dumps(source))):
    batch = reader.take(rows)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'prompt_id': ((4,), 'uint32'), 'features': ((4, 5, 4), 'float32'),
        'mask': ((4, 5), 'bool'), 'label': ((4,), 'int32'),
    }
    np.testing.assert_array_equal(batch['prompt_id'], rows)
    np.testing.assert_array_equal(batch['label'], rows % 3)
    for k, row in enumerate(rows):
      shard, i = divmod(int(row), 3)
      want = contents(shard)['features'][i].astype(np.float16)
      count = LENGTHS[row]
      np.testing.assert_array_equal(batch['features'][k, 5 - count:], want)
      assert not batch['features'][k, :5 - count].any()
      np.testing.assert_array_equal(batch['mask'][k], np.arange(5) >= 5 - count)
  np.testing.assert_array_equal(source[4]['mask'], [0, 1, 1, 1, 1])
  assert source[4]['prompt_id'] == 4
  assert source.text(5) == 'caption ü 5'
  wide = captions.CaptionSource(path, caption_length=8)[4]
  assert wide['features'].shape == (8, 4) and wide['mask'].sum() == 4
  with pytest.raises(IndexError, match='no caption 7 of 7'):
    source[7]


def test_padding_is_not_stored(path):
  tensors = safetensors.numpy.load_file(path / NAMES[0])
  assert tensors['features'].shape == (9, 4)
  assert tensors['features'].dtype == np.float16
  np.testing.assert_array_equal(tensors['offsets'], [0, 3, 4, 9])


def test_bfloat16_and_no_labels(tmp_path):
  manifest = captions.Manifest(
      captions=3, shard_size=4, width=4, caption_length=5, dtype='bfloat16',
      num_classes=None, provenance={},
  )
  write(tmp_path, 0, manifest=manifest).finalize()
  record = captions.CaptionSource(tmp_path)[0]
  assert sorted(record) == ['features', 'mask', 'prompt_id']
  want = contents(0)['features'][0].astype(captions.DTYPES['bfloat16'])
  np.testing.assert_array_equal(record['features'][2:], want)


def test_shards_are_the_same_bytes_in_any_order(path, tmp_path_factory):
  other = tmp_path_factory.mktemp('other')
  write(other, 2)
  assert write(other).pending() == [0, 1]
  write(other, 1, 0).finalize()
  for name in (*NAMES, 'manifest.json'):
    assert (path / name).read_bytes() == (other / name).read_bytes()


def test_a_killed_write_leaves_no_shard(tmp_path, monkeypatch):
  writer = write(tmp_path, 0)
  with monkeypatch.context() as patch:
    patch.setattr(files, 'publish', lambda *args: 1 / 0)
    with pytest.raises(OSError, match=f'{NAMES[1]} could not be written'):
      write(tmp_path, 1)
  assert (tmp_path / f'{NAMES[1]}.part').exists()
  assert writer.pending() == [1, 2]
  with pytest.raises(FileNotFoundError, match='00001-of-00003'):
    writer.finalize()
  with pytest.raises(ValueError, match='unfinished set'):
    captions.CaptionSource(tmp_path)
  write(tmp_path, 1, 2).finalize()
  assert sorted(p.name for p in tmp_path.iterdir()) == [*NAMES, 'manifest.json']


def test_damage_is_found(path):
  file = path / NAMES[1]
  whole = file.read_bytes()
  file.write_bytes(whole[:-8])
  for verify in (True, False):
    with pytest.raises(ValueError, match=f'{NAMES[1]} has .* truncated'):
      captions.CaptionSource(path, verify=verify)
  assert write(path).pending() == [1]
  file.write_bytes(whole[:-8] + bytes(8))
  with pytest.raises(ValueError, match=f'{NAMES[1]} was changed: its SHA-256'):
    captions.CaptionSource(path)
  assert write(path).pending() == [1]
  file.unlink()
  with pytest.raises(FileNotFoundError, match=NAMES[1]):
    captions.CaptionSource(path)
  write(path, 1).finalize()
  assert file.read_bytes() == whole
  assert write(path).pending() == []


@pytest.mark.parametrize('changes', [
    {'features': np.zeros((9, 3), np.float16)},
    {'features': np.zeros((9, 4), np.float32)},
    {'features': np.zeros((8, 4), np.float16)},
    {'offsets': np.array([0, 3, 9])},
    {'offsets': np.array([0, 3, 3, 9])},
    {'offsets': np.array([0, 1, 3, 9])},
    {'labels': np.array([0, 1, 3], np.int32)},
    {'text_offsets': np.array([0, 12, 5, 36])},
    {'more': np.zeros(1, np.uint8)},
])
def test_shards_that_do_not_fit_are_written_again(tmp_path, changes):
  write(tmp_path, 0, 1, 2)
  tensors = safetensors.numpy.load_file(tmp_path / NAMES[0]) | changes
  safetensors.numpy.save_file(tensors, tmp_path / NAMES[0])
  assert write(tmp_path).pending() == [0]
  with pytest.raises(ValueError, match=NAMES[0]):
    write(tmp_path).finalize()


@pytest.mark.parametrize('junk', [b'', b'abc', bytes(range(100))])
def test_files_of_other_kinds(tmp_path, junk):
  write(tmp_path, 0, 1, 2)
  (tmp_path / NAMES[2]).write_bytes(junk)
  assert write(tmp_path).pending() == [2]


@pytest.mark.parametrize('changes, message', [
    ({'features': [np.ones((1, 4))] * 2}, '2 features for 3 captions'),
    ({'texts': ['a']}, '1 texts for 3 captions'),
    ({'features': [np.ones((1, 4)), np.ones((6, 4)), np.ones((1, 4))]},
     r'caption 1: features \[6, 4\] must be \(1 to 5 tokens, 4\)'),
    ({'features': [np.ones((0, 4))] * 3}, 'caption 0: features'),
    ({'features': [np.ones((1, 3))] * 3}, 'caption 0: features'),
    ({'features': [np.ones((1, 4)), np.full((1, 4), 7e4), np.ones((1, 4))]},
     'caption 1: .*too large for float16'),
    ({'features': [np.full((1, 4), np.nan)] * 3}, 'caption 0: .*NaN'),
    ({'labels': [0, 1, 3]}, r'integers in \[0, 3\)'),
    ({'labels': [0, 1]}, '2 labels for 3 captions'),
    ({'labels': None}, 'labels and num_classes go together'),
])
def test_bad_contents_are_refused(tmp_path, changes, message):
  writer = captions.CaptionWriter(tmp_path, MANIFEST)
  with pytest.raises(ValueError, match=message):
    writer.write(0, **contents(0) | changes)
  assert [p.name for p in tmp_path.iterdir()] == ['manifest.json']


@pytest.mark.parametrize('fields, message', [
    ({'captions': 0}, r'captions must lie in \[1, 2\*\*32\]'),
    ({'width': 0}, 'width must be positive'),
    ({'dtype': 'float32'}, "dtype must be one of .*: 'float32'"),
])
def test_bad_manifests(fields, message):
  with pytest.raises(ValueError, match=message):
    captions.Manifest(**{**MANIFEST.__dict__, **fields})


def test_a_set_of_other_captions(path):
  other = captions.Manifest(**MANIFEST.__dict__ | {
      'dtype': 'bfloat16', 'provenance': {'encoder': 'x'}, 'shards': ()
  })
  with pytest.raises(ValueError, match="dtype is 'float16' there and 'bfloat16'"
                     " here; provenance.encoder is 'abc' there and 'x' here"):
    captions.CaptionWriter(path, other)
  with pytest.raises(ValueError, match='do not fit in caption_length=4'):
    captions.CaptionSource(path, caption_length=4)


def test_damaged_manifests(path, tmp_path_factory):
  with pytest.raises(FileNotFoundError, match='this is no set of captions'):
    captions.read_manifest(tmp_path_factory.mktemp('empty'))
  with pytest.raises(ValueError, match='needs a local or mounted'):
    captions.read_manifest('gs://a')
  edit_manifest(path, format_version=2)
  with pytest.raises(ValueError, match='newer than format 1'):
    captions.read_manifest(path)
  edit_manifest(path, format_version=1, width='x')
  with pytest.raises(ValueError, match='is damaged'):
    captions.read_manifest(path)
