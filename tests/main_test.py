# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: whole runs, kills, and everything that can be wrong."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dd_jax import checkpoint, main
from dd_jax.data import sources
from dd_jax.evals import baselines, judge
from tests.command import (
    ROOT,
    check_refused,
    copy_of,
    environment_of,
    record,
    run_main,
    tree_of,
    unfinish,
)

CONFIG = '--config=configs/dd_var.py:tiny'
CHAIN = ('tokenizer', 'teacher', 'trajectories', 'student')


@pytest.fixture(scope='module')
def finished(cache, tmp_path_factory):
  """A complete run of the tiny config."""
  workdir = tmp_path_factory.mktemp('finished')
  result = run_main(cache, CONFIG, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir


def test_all_stages_end_in_a_report(finished):
  report = json.loads((finished / 'report/report.json').read_text())
  names = [row['name'] for row in report['rows']]
  assert names == [
      'teacher', 'teacher_flow', 'student_1', 'student_1_split', 'student_2',
      'involved_causal', 'involved_full', 'skip_1', 'skip_2',
      'onestep_pooled', 'onestep_class', 'mixed_pixels',
  ]
  assert set(report['ratios']) == {
      'student_1', 'student_2', 'onestep_pooled', 'onestep_class'
  }
  for name in ('samples.png', 'interpolation.png', 'curves.png'):
    assert (finished / 'report' / name).read_bytes().startswith(b'\x89PNG')
  assert 'student_1' in (finished / 'report/report.md').read_text()


def test_the_digits_judge_sees_strokes(cache, tmp_path):
  result = run_main(
      cache, '--config=configs/dd_var.py:digits', f'--workdir={tmp_path}',
      '--stage=judge',
  )
  assert result.returncode == 0, result.stderr
  (export,) = tmp_path.glob('judge/export/*')
  model, params = checkpoint.load(export)
  look = lambda images, labels: judge.look(  # noqa: E731
      images, labels, lambda x: model.fns['features'](params, x),
      lambda x: model.fns['forward'](params, x),
  )
  train, heldout = (sources.digits(s).arrays for s in ('train', 'heldout'))
  reference = judge.Reference(
      *(look(s['image'], s['label']) for s in (train, heldout))
  )
  floor = judge.floor(reference)
  assert judge.is_fit(floor)
  labels = np.arange(2000) % 10
  mixed = baselines.mix_pixels(
      np.random.default_rng(0), train['image'], train['label'], labels
  )
  scores = judge.compare(look(mixed, labels), reference)
  # A judge that never saw moved images gives 0.8 to 1.
  assert scores['fd_train'] > 2 * floor['fd_train']


def test_a_second_run_skips_everything(cache, finished):
  before = tree_of(finished)
  result = run_main(cache, CONFIG, f'--workdir={finished}')
  assert result.returncode == 0
  assert result.stdout.count('complete, skipped') == 6
  assert tree_of(finished) == before


@pytest.mark.parametrize('stage', CHAIN)
def test_a_kill_and_a_signal_leave_no_trace(cache, finished, tmp_path, stage):
  workdir = copy_of(finished, tmp_path, (stage,))
  args = (CONFIG, f'--workdir={workdir}', f'--stage={stage}')
  # A program is a step of training, of eight, or one of four shards.
  kill, term = ('3', '1') if stage == 'trajectories' else ('5', '2')
  for signal, programs, status in ('KILL', kill, -9), ('TERM', term, 143):
    stopped = run_main(cache, *args, kill=(signal, programs))
    assert stopped.returncode == status, stopped.stderr
    assert not record(workdir, stage)['complete']
    # Something is there to go on from.
    assert [
        *(workdir / stage).glob('checkpoints/[0-9]*'),
        *(workdir / stage).glob('data/*.array_record'),
    ]
  resumed = run_main(cache, *args)
  assert resumed.returncode == 0, resumed.stderr
  # Parameters and, through them, the order of the data.
  assert record(workdir, stage)['hash'] == record(finished, stage)['hash']
  if stage == 'trajectories':
    assert tree_of(workdir / stage / 'data') == tree_of(
        finished / stage / 'data'
    )


def test_two_processes_go_on_where_one_was_stopped(cache, finished, tmp_path):
  workdir = copy_of(finished, tmp_path, ('evaluate',))
  unfinish(workdir, 'trajectories', 'data/*-0000[13]-of-*')

  def run(*args):
    result = subprocess.run(
        [ROOT / 'launch/cpu_mesh.sh', CONFIG, f'--workdir={workdir}', *args],
        env=environment_of(cache),
        capture_output=True, text=True, check=False, timeout=600,
    )
    assert result.returncode == 0, result.stderr

  run('--stage=trajectories')
  assert tree_of(workdir / 'trajectories/data') == tree_of(
      finished / 'trajectories/data'
  )
  # Examples split over the processes; all of them on both.
  for mesh in (), ('--config.mesh.data=1', '--config.mesh.tensor=8'):
    unfinish(workdir, 'student', 'checkpoints/8', 'export')
    run('--stage=student', *mesh)
    check_close(workdir, finished)


@pytest.mark.parametrize('flags', [
    ('--num_processes=2', '--process_id=1'),
    ('--coordinator=localhost', '--num_processes=1', '--process_id=0'),
])
def test_flags_of_processes_that_do_not_fit(cache, tmp_path, flags):
  check_refused(
      cache, CONFIG, tmp_path, *flags, match='give host:port, how many'
  )


def check_close(workdir, finished):
  """The students of two runs agree to rounding."""
  ours, theirs = (
      checkpoint.load_params(next((path / 'student/export').iterdir()))
      for path in (workdir, finished)
  )
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      ours, theirs,
  )


def test_workdir_of_another_config(cache, finished):
  check_refused(
      cache, CONFIG, finished, '--config.stages.teacher.steps=5',
      match='teacher.steps: 8 -> 5; run with --redo=teacher',
  )


def test_override_of_a_field_that_does_not_exist(cache, finished):
  check_refused(
      cache, CONFIG, finished, '--config.stages.teacher.stepz=5',
      match="teacher: unknown field 'stepz': did you mean 'steps'?",
  )


def test_override_of_a_field_of_the_run_that_does_not_exist(cache, finished):
  check_refused(
      cache, CONFIG, finished, '--config.sed=5',
      match="the config has no field 'sed'; it has ['compilation_cache',",
  )


def test_a_mistake_in_the_last_stage_is_found_before_the_first(
    cache, tmp_path
):
  check_refused(
      cache, CONFIG, tmp_path,
      '--config.stages.student.roles.student.optimizer.lrate=1.0',
      match="roles.student.optimizer: unknown field 'lrate'",
  )


def test_a_field_that_stands_in_no_config_file_can_be_set(cache, tmp_path):
  result = run_main(
      cache, CONFIG, f'--workdir={tmp_path}', '--stage=judge',
      '--config.stages.judge.log_every=2',
      '--config.stages.judge.roles.judge.optimizer.moment_dtype=bfloat16',
  )
  assert not result.returncode, result.stderr
  lines = (tmp_path / 'judge/metrics.jsonl').read_text().splitlines()
  steps = {json.loads(line)['step'] for line in lines}
  assert {2, 4} <= steps
  told = record(tmp_path, 'judge')['config']
  assert told['roles']['judge']['optimizer']['moment_dtype'] == 'bfloat16'


def test_unknown_argument_of_the_config(cache, finished):
  check_refused(
      cache, '--config=configs/dd_var.py:digitz', finished,
      match="expected one of ['tiny', 'digits'",
  )


def test_unknown_stage(cache, finished):
  check_refused(cache, CONFIG, finished, '--stage=studant', match="'studant'")


def test_truncated_export_is_refused_by_the_next_stage(
    cache, finished, tmp_path
):
  workdir = copy_of(finished, tmp_path, ('student', 'evaluate'))
  export = next((workdir / 'tokenizer/export').iterdir()) / 'params'
  files = [p for p in export.rglob('d/*') if p.is_file()]
  assert files
  for file in files:
    file.write_bytes(file.read_bytes()[:-100])
  result = run_main(
      cache, CONFIG, f'--workdir={workdir}', '--stage=student'
  )
  assert result.returncode == 1
  assert 'tokenizer' in result.stderr
  assert 'redo the stage' in result.stderr
  assert not (workdir / 'student/export').exists()


def test_missing_export_names_the_stage_to_redo(cache, finished, tmp_path):
  workdir = copy_of(finished, tmp_path, ('student', 'evaluate'))
  shutil.rmtree(workdir / 'teacher/export')
  result = run_main(
      cache, CONFIG, f'--workdir={workdir}', '--stage=student'
  )
  assert result.returncode == 1
  assert '--redo=teacher' in result.stderr


def test_truncated_shard_names_the_file(cache, finished, tmp_path):
  workdir = copy_of(finished, tmp_path, ('student', 'evaluate'))
  shard = next((workdir / 'trajectories/data').glob('*.array_record'))
  shard.write_bytes(shard.read_bytes()[:-10])
  result = run_main(
      cache, CONFIG, f'--workdir={workdir}', '--stage=student'
  )
  assert result.returncode == 1
  assert shard.name in result.stderr


def test_redo_makes_the_stage_and_its_dependents_again(
    cache, finished, tmp_path
):
  workdir = copy_of(finished, tmp_path, ())
  result = run_main(
      cache, CONFIG, f'--workdir={workdir}', '--redo=student',
      '--config.stages.student.steps=3',
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('complete, skipped') == 4
  assert record(workdir, 'student')['config']['steps'] == 3
  assert record(workdir, 'teacher') == record(finished, 'teacher')


def test_a_full_disk_leaves_the_shards_before_it(cache, finished, tmp_path):
  workdir = copy_of(finished, tmp_path, ('student', 'evaluate'))
  unfinish(workdir, 'trajectories', 'data/*-0000[23]-of-*', 'metrics.jsonl')
  args = (CONFIG, f'--workdir={workdir}', '--stage=trajectories')
  full = run_main(cache, *args, kill=('FULL', '20000'))
  assert full.returncode == 1
  assert 'disk full' in full.stderr
  assert 'Traceback' not in full.stderr
  assert run_main(cache, *args).returncode == 0
  assert tree_of(workdir / 'trajectories/data') == tree_of(
      finished / 'trajectories/data'
  )


def test_a_full_disk_leaves_the_saves_before_it(cache, finished, tmp_path):
  workdir = copy_of(finished, tmp_path, ('student', 'evaluate'))
  before = tree_of(workdir)
  args = (CONFIG, f'--workdir={workdir}', '--stage=student')
  full = run_main(cache, *args, kill=('FULL', '20000'))
  assert full.returncode == 1
  assert 'could not be written' in full.stderr
  after = tree_of(workdir)
  assert {k: after[k] for k in before} == before
  # With space again, the same command goes on.
  resumed = run_main(cache, *args)
  assert resumed.returncode == 0, resumed.stderr
  assert record(workdir, 'student')['hash'] == record(
      finished, 'student')['hash']


def test_a_process_alone_is_never_missed(monkeypatch):
  asked = []

  def initialize(coordinator, *args, **timeouts):
    asked.append((*args, timeouts['heartbeat_timeout_seconds']))

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  main.connect()
  ((processes, number, seconds),) = asked
  assert (processes, number) == (1, 0)
  assert seconds > 365 * 24 * 3600


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='of glibc alone'
)
def test_freed_memory_is_kept():
  code = '''
import resource
import numpy as np
from dd_jax import main

def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(20):
    np.ones(1 << 21)  # 16 MiB, freed at once
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
main._keep_freed_memory()
np.ones(1 << 21)
print(given_back, faults())
'''
  result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True,
      # With large pages there would be few faults to count.
      env=environment_of('.') | {'NUMPY_MADVISE_HUGEPAGE': '0'},
  )
  given_back, kept = map(int, result.stdout.split())
  assert kept < given_back / 10
