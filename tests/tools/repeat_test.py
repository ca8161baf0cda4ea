# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Chains of several seeds end in one table, or say which one did not end."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

from dd_jax.evals import report
from tests.evals import report_test

ROOT = pathlib.Path(__file__).parent.parent.parent
STAGE = dict(
    method=dict(name='classifier'), roles={}, data={}, batch_size=1, steps=1,
)
CONFIG = f'''
from ml_collections import ConfigDict

def get_config(arg):
  return ConfigDict(dict(
      name=arg, seed=0, mesh=dict(data=-1), rules='dp', compilation_cache='',
      stages=dict(student=dict({STAGE}, kind='train')),
  ))
'''


def finish(workdir, seed, teacher, student, steps=5):
  """Leaves what a chain of one seed leaves that has come to its end."""
  rows = [
      report_test.row('teacher', seed, teacher),
      report_test.row('student_1', seed, student, steps=1),
  ]
  here = workdir / f'seed_{seed}'
  report.write(
      here / 'report', report.make(rows, report_test.FLOOR, {}), {}
  )
  (here / 'student').mkdir(exist_ok=True)
  (here / 'student/stage.json').write_text(json.dumps(dict(
      format_version=1, config=dict(STAGE, steps=steps, seed=seed),
      complete=True, hash='',
  )))


def repeat(folder, *args):
  return subprocess.run(
      [sys.executable, '-m', 'dd_jax.tools.repeat', '--config=chain.py:short',
       '--config.stages.student.steps=5', *args],
      cwd=folder, capture_output=True, text=True, check=False, timeout=300,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
  )


def cells(text, name):
  """The last line of a sampler in the tables of a terminal."""
  lines = [x for x in text.splitlines() if x.startswith(f'│ {name} ')]
  return [x.strip() for x in lines[-1].strip('│').split('│')]


def test_a_seed_that_fails_stops_the_others_and_the_same_command_goes_on(
    tmp_path
):
  (tmp_path / 'chain.py').write_text(CONFIG)
  workdir = tmp_path / 'runs/chain_short-seeds'
  finish(workdir, 0, 1.0, 3.0, steps=6)  # not what the command asks for
  finish(workdir, 1, 4.0, 4.0)
  failed = repeat(tmp_path, '--seeds=0,1')
  assert failed.returncode == 1
  assert failed.stderr.splitlines()[-1] == (
      'error: seed 0 ended with 1; the same command goes on'
  )
  assert 'student.steps: 6 -> 5' in failed.stderr  # of the seed itself
  assert 'seed 1: ' not in failed.stdout
  assert not (workdir / 'report').exists()

  finish(workdir, 0, 1.0, 3.0)
  result = repeat(tmp_path, '--seeds=0,1')
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('complete, skipped') == 2
  merged = report.read(workdir / 'report')
  assert [(x['name'], x['seed'], x['fd_train']) for x in merged['rows']] == [
      ('teacher', 0, 1.0), ('student_1', 0, 3.0),
      ('teacher', 1, 4.0), ('student_1', 1, 4.0),
  ]
  # 3 and 1 times the teacher of the same seed.
  assert merged['ratios']['student_1'] == 2
  assert cells(result.stdout, 'student_1') == ['student_1', '2']
  table = result.stdout.partition("over the teacher's")[0]
  line = cells(table, 'student_1')
  assert line[:4] == ['student_1', '1', 'median', '3.5'] and line[-1] == '2'
  assert cells(table, 'teacher')[:4] == ['teacher', '4', 'median', '2.5']
  text = (workdir / 'report/report.md').read_text()
  assert '| student_1 | 1 | median | 3.5 |' in text
  assert f'report: {workdir.relative_to(tmp_path)}/report' in result.stdout


def test_a_chain_without_a_report_is_an_error(tmp_path):
  (tmp_path / 'chain.py').write_text(CONFIG)
  workdir = tmp_path / 'runs/chain_short-seeds'
  finish(workdir, 0, 1.0, 3.0)
  shutil.rmtree(workdir / 'seed_0/report')
  result = repeat(tmp_path)
  assert result.returncode == 1
  assert result.stderr.splitlines()[-1].startswith(
      'error: chain.py:short ends without a report to compare: '
  )
  assert 'Traceback' not in result.stderr
