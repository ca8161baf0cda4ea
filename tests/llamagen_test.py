# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""LlamaGen by caption at the command line: a whole run, kills, bad input."""

from __future__ import annotations

import json
import shutil

import jax
import pytest

from dd_jax import checkpoint
from tests.command import (
    copy_of,
    environment_of,
    record,
    run_main,
    tree_of,
)
from tests.notebook import check_pictures, start

CONFIG = '--config=configs/dd_llamagen.py:t2i_tiny'


@pytest.fixture(scope='module')
def finished(cache, tmp_path_factory):
  """A complete run."""
  workdir = tmp_path_factory.mktemp('finished')
  result = run_main(cache, CONFIG, f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  return workdir


def test_all_stages_end_in_a_report(finished):
  report = json.loads((finished / 'report/report.json').read_text())
  steps = {row['name']: row['steps'] for row in report['rows']}
  assert steps == {
      'teacher': 16, 'teacher_flow': 16, 'student_1': 1, 'student_1_split': 1,
      'student_2': 2, 'involved_causal': 6, 'skip_1': 15, 'skip_2': 14,
      'onestep_pooled': 1, 'onestep_class': 1, 'mixed_pixels': 0,
  }
  assert all(0 <= row['accuracy'] <= 1 for row in report['rows'])
  manifest = record(finished, 'captions')['outputs']['hashes']['manifest']
  assert report['environment']['pairs_captions'] == manifest
  for name in ('samples.png', 'interpolation.png', 'curves.png'):
    assert (finished / 'report' / name).read_bytes().startswith(b'\x89PNG')


def test_the_notebook(cache, finished, tmp_path):
  # Of a copy, in which it finds every stage complete.
  workdir = copy_of(finished, tmp_path, ())
  result = start(
      environment_of(cache), 'dd_llamagen_digits.ipynb', tmp_path / 'pictures',
      SIZE='t2i_tiny', WORKDIR=workdir,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.count('complete, skipped') == 7
  # Data, reconstructions, teacher, one step, two steps, same noise, curves.
  check_pictures(tmp_path / 'pictures', 7)
  assert 'teacher: 16 calls' in result.stdout
  assert 'student_1' in result.stdout  # the report


@pytest.mark.parametrize('stage, programs', [
    ('captions', '2'), ('trajectories', '3'), ('student', '7'),
])
def test_a_killed_stage_resumes_to_the_same_hashes(
    cache, finished, tmp_path, stage, programs
):
  workdir = copy_of(finished, tmp_path, (stage,))
  args = (CONFIG, f'--workdir={workdir}', f'--stage={stage}')
  killed = run_main(cache, *args, kill=('KILL', programs))
  assert killed.returncode == -9, killed.stderr
  assert not record(workdir, stage)['complete']
  saved = {
      'captions': 'data/captions-00000-of-00002.safetensors',
      'trajectories': 'data/pairs-00000-of-00004.array_record',
      'student': 'checkpoints/4',
  }[stage]
  assert (workdir / stage / saved).exists()
  resumed = run_main(cache, *args)
  assert resumed.returncode == 0, resumed.stderr
  assert record(workdir, stage)['hash'] == record(finished, stage)['hash']
  if stage != 'student':
    assert tree_of(workdir / stage / 'data') == tree_of(
        finished / stage / 'data'
    )


def check_stopped(cache, workdir, stage, *args, match, config=CONFIG):
  """One clear error, a non-zero exit, and other stages as they were."""
  before = tree_of(workdir)
  result = run_main(
      cache, config, f'--workdir={workdir}', f'--stage={stage}', *args
  )
  assert result.returncode == 1
  (line,) = result.stderr.splitlines()
  assert line.startswith('error: ') and match in line
  after = tree_of(workdir)
  assert {k: after[k] for k in before} == before
  assert not record(workdir, stage)['complete']


def test_the_tokenizer_of_another_network(cache, finished, tmp_path):
  # Of the same sizes: nothing but its hash tells.
  folder = next((finished / 'tokenizer/export').iterdir())
  other, params = checkpoint.load(folder)
  params = jax.tree.map(lambda x: 2 * x, params)
  checkpoint.export(tmp_path / 'other', other, params, {})
  check_stopped(
      cache, copy_of(finished, tmp_path, ('trajectories',)), 'trajectories',
      f'--config.stages.trajectories.vae={tmp_path / "other"}',
      match='is not the tokenizer that ',
  )


@pytest.mark.parametrize('line, match', [
    ('seven ' * 13, 'p.txt:2: the caption has 13 tokens, at most 12'),
    ('', 'p.txt:2: the line is empty'),
    ('purple', "p.txt:2: the word 'purple' is not known"),
])
def test_captions_that_are_refused(cache, tmp_path, line, match):
  file = tmp_path / 'config.py'
  file.write_text(
      'import runpy\n'
      'def get_config(path):\n'
      "  make = runpy.run_path('configs/dd_llamagen.py')['get_config']\n"
      "  config = make('t2i_tiny')\n"
      "  config.stages.captions.prompts = dict(source='text', path=path)\n"
      '  return config\n'
  )
  (tmp_path / 'p.txt').write_text(f'seven\n{line}\n')
  (tmp_path / 'run').mkdir()
  check_stopped(
      cache, tmp_path / 'run', 'captions', match=match,
      config=f'--config={file}:{tmp_path / "p.txt"}',
  )


def test_pairs_of_other_captions(cache, finished, tmp_path):
  other = tmp_path / 'other'
  shutil.copytree(finished / 'captions/data', other)
  text = (other / 'manifest.json').read_text()
  (other / 'manifest.json').write_text(
      text.replace('"micro_batch": 40', '"micro_batch": 20')
  )
  check_stopped(
      cache, copy_of(finished, tmp_path, ('student',)), 'student',
      f'--config.stages.student.data.captions={other}',
      match='the pairs were made of captions',
  )
