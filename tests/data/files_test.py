# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what sets of files have in common."""

from __future__ import annotations

import pytest

from dd_jax.data import files


def test_folders():
  assert files.local_folder('a/b', 'it').name == 'b'
  with pytest.raises(ValueError, match='gs://a/b: it needs a local'):
    files.local_folder('gs://a/b', 'it')


def test_publish(tmp_path):
  part, file = tmp_path / 'a.part', tmp_path / 'a'
  file.write_text('old')
  part.write_text('abc')
  files.publish(part, file)
  assert [f.name for f in tmp_path.iterdir()] == ['a']
  assert files.sha256(file).startswith('ba7816bf8f01cfea414140de5dae2223')


def test_files_are_as_recorded(tmp_path):
  file = tmp_path / 'a'
  with pytest.raises(FileNotFoundError, match='a is missing'):
    files.check_file(file, None)
  file.write_text('abc')
  shard = files.Shard(3, files.sha256(file))
  assert files.check_file(file, None) == files.check_file(file, shard) == file
  file.write_text('abd')
  files.check_file(file, shard, verify=False)
  with pytest.raises(ValueError, match='a was changed: its SHA-256 is'):
    files.check_file(file, shard)
  file.write_text('ab')
  with pytest.raises(ValueError, match='has 2 bytes instead of 3'):
    files.check_file(file, shard, verify=False)


def test_differences_are_listed(tmp_path):
  files.check_same(tmp_path, {'a': 1}, {'a': 1}, 'things')
  with pytest.raises(ValueError, match='is of other things: a is 1 there and 2 '
                     'here; b is None there and 3 here. Write to another'):
    files.check_same(tmp_path, {'a': 1}, {'a': 2, 'b': 3}, 'things')
