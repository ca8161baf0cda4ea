# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Many stops at random moments, and what the end of one process does.

    python -m pytest -q -n 0 -m slow tests/drills_test.py --log-cli-level=INFO

The ordinary suite has a few of them in `main_test.py`.
"""

from __future__ import annotations

import collections
import logging
import signal
import time

import numpy as np
import pytest

from tests.command import (
    UNHARMED,
    record,
    run_main,
    start_main,
    start_pair,
    tree_of,
)

pytestmark = pytest.mark.slow

# Long enough that most stops find a stage at work.
ARGS = (
    '--config=configs/dd_var.py:tiny',
    '--config.stages.tokenizer.steps=40', '--config.stages.teacher.steps=40',
    '--config.stages.trajectories.pairs=256',
    '--config.stages.student.steps=40',
)
STAGES = ('tokenizer', 'teacher', 'trajectories', 'student')
SECONDS = 60  # that a process may take to end after another one has


def start(cache, workdir, stage, processes, kills=(UNHARMED, UNHARMED)):
  """All processes of one stage."""
  args = (*ARGS, f'--workdir={workdir}', f'--stage={stage}')
  log = workdir.with_suffix('.log')
  if processes == 1:
    return [start_main(cache, log, *args)]
  return start_pair(cache, log, *args, kills=kills)


def wait(started, seconds=300):
  """The statuses; nobody is left behind."""
  try:
    end = time.monotonic() + seconds
    return [p.wait(max(end - time.monotonic(), 0.1)) for p in started]
  finally:
    for p in started:
      p.kill()


def begin(workdir, stage, started, before):
  """Waits until a stage is at work: it says so once all are connected."""
  file = workdir / stage / 'stage.json'
  while all(p.poll() is None for p in started):
    if file.exists() and file.stat().st_mtime_ns != before:
      return
    time.sleep(0.02)


def stamp(workdir, stage):
  file = workdir / stage / 'stage.json'
  return file.stat().st_mtime_ns if file.exists() else 0


@pytest.fixture(scope='module', params=[1, 2], ids=['alone', 'pair'])
def undisturbed(cache, tmp_path_factory, request):
  """How many processes, and a run of them that nothing stops."""
  workdir = tmp_path_factory.mktemp(f'undisturbed{request.param}') / 'w'
  for stage in STAGES:
    assert not any(wait(start(cache, workdir, stage, request.param)))
  # With programs that were found compiled: that is how long a stage takes.
  again = workdir.with_name('again')
  for stage in STAGES:
    assert not any(wait(start(cache, again, stage, request.param)))
    assert record(again, stage)['hash'] == record(workdir, stage)['hash']
  return request.param, again


SIGNALS = {1: ['KILL'] * 40 + ['TERM'] * 15, 2: ['KILL'] * 10 + ['TERM'] * 5}


def test_stopped_at_random_moments(cache, undisturbed, tmp_path):
  processes, straight = undisturbed
  rng = np.random.default_rng(processes)
  signals = rng.permutation(SIGNALS[processes]).tolist()
  said, runs, slowest = collections.Counter(), 0, 0.0
  while signals:
    runs += 1
    workdir = tmp_path / f'run{runs}'
    for stage in STAGES:
      moments = record(straight, stage)['seconds']
      while True:
        before = stamp(workdir, stage)
        started = start(cache, workdir, stage, processes)
        begin(workdir, stage, started, before)
        if not signals:
          assert not any(wait(started)), workdir.with_suffix('.log')
          break
        time.sleep(rng.uniform(0, moments))
        victim = started[rng.integers(processes)]
        if victim.poll() is not None:
          assert not any(wait(started))
          break  # the stage is done: the signal is for the next one
        name = signals.pop()
        victim.send_signal(getattr(signal, f'SIG{name}'))
        began = time.monotonic()
        statuses = wait(started, SECONDS)
        slowest = max(slowest, time.monotonic() - began)
        said[f'{name} in {stage}'] += 1
        if not any(statuses):
          assert name == 'TERM'  # too late to be heard
          break
        if name == 'TERM':
          assert set(statuses) == {143}, statuses
        else:
          assert all(statuses), statuses
      assert record(workdir, stage)['hash'] == record(straight, stage)['hash']
    assert tree_of(workdir / 'trajectories/data') == tree_of(
        straight / 'trajectories/data'
    )
  logging.info('%d processes, %d runs: %s; slowest end %.1f s', processes, runs,
               dict(sorted(said.items())), slowest)
  assert sum(said.values()) == len(SIGNALS[processes])


@pytest.mark.parametrize('victim', [0, 1])
@pytest.mark.parametrize('kind', ['KILL', 'FAIL', 'STOP'])
def test_the_end_of_a_process_ends_the_other(cache, tmp_path, kind, victim):
  """Killed, failed by itself, or silent without an end."""
  kills = [UNHARMED, UNHARMED]
  kills[victim] = (kind, '6')
  started = start(cache, tmp_path / 'w', 'tokenizer', 2, kills)
  other = started[1 - victim]
  try:
    if kind == 'STOP':
      log = tmp_path / f'w.{victim}'
      while 'SIGSTOP now' not in (log.read_text() if log.exists() else ''):
        assert other.poll() is None
        time.sleep(0.05)
    else:
      assert started[victim].wait(300) == {'KILL': -9, 'FAIL': 1}[kind]
    began = time.monotonic()
    status = other.wait(SECONDS)
    seconds = time.monotonic() - began
  finally:
    for p in started:
      p.kill()
  text = (tmp_path / f'w.{1 - victim}').read_text()
  logging.info('%s of %d: status %d after %.1f s', kind, victim, status,
               seconds)
  assert status not in (0, 1)  # worth another try
  assert 'another' in text
  resumed = wait(start(cache, tmp_path / 'w', 'tokenizer', 2))
  assert resumed == [0, 0], text


def test_a_run_goes_on_with_fewer_processes(cache, tmp_path):
  """Two processes, then one; pairs, and steps after the last save."""
  workdir = tmp_path / 'w'
  for stage in STAGES[:2]:
    assert not any(wait(start(cache, workdir, stage, 2)))
  statuses = wait(start(
      cache, workdir, 'trajectories', 2, (('TERM', '4'), UNHARMED)
  ))
  assert statuses == [143, 143]
  made = tree_of(workdir / 'trajectories/data')
  result = run_main(
      cache, *ARGS, f'--workdir={workdir}', '--stage=trajectories'
  )
  assert result.returncode == 0, result.stderr
  after = tree_of(workdir / 'trajectories/data')
  made.pop('manifest.json')
  assert made and len(after) == 16 + 1
  assert {k: after[k] for k in made} == made
