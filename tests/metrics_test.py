# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the time goes, and records on disks and in buckets."""

from __future__ import annotations

import json
import subprocess
import sys
import types

from etils import epath
from etils.epath import backend
import fsspec
import numpy as np
import pytest

from dd_jax import checkpoint, flops, metrics, paths
from tests.command import ROOT, environment_of


def test_clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  clock = metrics.Clock()

  def work(seconds):
    now[0] += seconds

  work(1)
  with clock.spend('compile'):
    work(2)
  clock.turn('step')
  work(3)
  with clock.spend('eval'):
    work(4)
    with clock.spend('save'):
      work(5)
    work(6)
  with pytest.raises(ValueError), clock.spend('data'):
    work(7)
    raise ValueError
  work(8)
  assert clock.take() == {
      'time/init_seconds': 1, 'time/compile_seconds': 2,
      'time/data_seconds': 7, 'time/step_seconds': 11,
      'time/save_seconds': 5, 'time/eval_seconds': 10,
  }
  work(1)
  assert sum(clock.take().values()) == 1
  assert set(clock.take().values()) == {0}


@pytest.fixture
def bucket(monkeypatch):
  """Addresses lead to memory; like a bucket, it takes whole objects only."""
  memory = fsspec.filesystem('memory')
  monkeypatch.setattr(
      backend._FileSystemSpecBackend, 'fs', lambda self, path: memory
  )
  opened = memory.open

  def refuse(path, mode='rb', **kwargs):
    if 'a' in mode:
      raise ValueError('a bucket does not append')
    return opened(path, mode, **kwargs)

  monkeypatch.setattr(memory, 'open', refuse)
  return epath.Path(f'gs://bucket/{id(memory)}')


@pytest.mark.parametrize('where', ['disk', 'bucket'])
def test_records_of_later_steps_come_again(where, tmp_path, request):
  folder = epath.Path(tmp_path)
  if where == 'bucket':
    folder = request.getfixturevalue('bucket')
    folder.mkdir(parents=True, exist_ok=True)
  file = folder / f'{where}.jsonl'
  writer = metrics.JsonlWriter(file, resume_at=0)
  for step in (1, 2, 3):
    writer.write_scalars(step, {'loss': step / 2})
  writer.close()
  file.write_text(file.read_text() + '{"step": 4, "lo')  # killed while writing
  writer = metrics.JsonlWriter(file, resume_at=2)
  writer.write_scalars(3, {'loss': 9})
  writer.flush()
  assert [json.loads(line) for line in file.read_text().splitlines()] == [
      {'step': 1, 'loss': 0.5}, {'step': 2, 'loss': 1.0},
      {'step': 3, 'loss': 9.0},
  ]


def test_tensorboard_finds_values_and_images_under_their_tags(tmp_path):
  writer = metrics.make_writer(tmp_path, resume_at=0)
  writer.write_scalars(10, {'critic/loss': 2.5, 'time/mfu': 0.25})
  writer.write_scalars(20, {'critic/loss': 1.5})
  writer.write_images(20, {'samples': np.zeros((1, 3, 5, 3), np.uint8)})
  writer.close()
  # Late, for it imports torch where that is installed.
  from tensorboardX.proto import event_pb2

  (file,) = (tmp_path / 'tensorboard').glob('events*')
  data, found = file.read_bytes(), {}
  while data:  # a length, its checksum, an event and the event's checksum
    end = 12 + int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12:end])
    data = data[end + 4 :]
    for value in event.summary.value:
      size = value.image.height, value.image.width
      found[event.step, value.tag] = (
          size if value.HasField('image') else value.simple_value
      )
  assert found == {
      (10, 'critic/loss'): 2.5, (10, 'time/mfu'): 0.25,
      (20, 'critic/loss'): 1.5, (20, 'samples'): (3, 5),
  }


def test_a_bucket_is_written_now_and_then(bucket, monkeypatch):
  bucket.mkdir(parents=True, exist_ok=True)
  now = [100.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  file = bucket / 'rare.jsonl'
  writer = metrics.JsonlWriter(file, resume_at=0)
  for step in range(100):
    now[0] += 1
    writer.write_scalars(step, {})
  assert file.read_text().count('\n') == 61


def test_addresses_stay_and_paths_become_whole(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(paths.absolute('gs://bucket/run')) == 'gs://bucket/run'
  assert str(paths.absolute('run')) == str(tmp_path / 'run')
  bucket.mkdir(parents=True, exist_ok=True)
  with pytest.raises(FileNotFoundError, match='gs://bucket'):
    checkpoint.describe(bucket / 'export')


@pytest.mark.parametrize('kind, peak', [
    ('TPU v4', 275e12), ('TPU v5 lite', 197e12), ('TPU v5', 459e12),
    ('TPU v5p', 459e12), ('TPU v6 lite', 918e12),
    ('NVIDIA H100 80GB HBM3', 989e12), ('cpu', None), ('TPU v99', None),
])
def test_utilisation_is_the_share_of_the_peak_of_all_devices(kind, peak):
  devices = [types.SimpleNamespace(device_kind=kind)] * 4
  # In two seconds, four devices could have done eight times a second's peak.
  share = flops.utilisation(2 * (peak or 1.0), 2.0, devices)
  assert share == (peak and 0.25)


def test_programs_of_a_run_are_found_by_the_next(tmp_path):
  environment = environment_of('unused') | {
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'
  }
  del environment['JAX_COMPILATION_CACHE_DIR']

  def compiled(name):
    """What is in the folder after a run with a workdir of its own."""
    subprocess.run(
        [sys.executable, '-m', 'dd_jax.main', '--stage=judge',
         '--config=configs/dd_var.py:tiny', f'--workdir={tmp_path / name}',
         f'--config.compilation_cache={tmp_path / "cache"}'],
        cwd=ROOT, env=environment, check=True, timeout=600,
    )
    return {p.name: p.stat().st_mtime_ns
            for p in (tmp_path / 'cache').glob('*-cache')}

  first = compiled('a')
  assert any('train_step' in name for name in first)
  assert compiled('b') == first
