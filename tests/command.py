# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line in processes of their own, and what they leave."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run_main(cache, *args, kill=('NONE', '0'), flags=''):
  """Runs dd_jax.main as `tests/killable.py` says; programs go to `cache`."""
  environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
      'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
  }
  return subprocess.run(
      [sys.executable, 'tests/killable.py', *kill, *args], cwd=ROOT,
      env=environment, capture_output=True, text=True, timeout=600,
      check=False,
  )


def record(workdir, stage):
  """What a stage says of itself."""
  return json.loads((workdir / stage / 'stage.json').read_text())


def tree_of(folder):
  """Every file with its bytes, to show that nothing was touched."""
  return {
      str(p.relative_to(folder)): p.read_bytes()
      for p in sorted(folder.rglob('*')) if p.is_file()
  }


def copy_of(finished, tmp_path, without):
  """The finished run with some stages taken away."""
  workdir = tmp_path / 'copy'
  shutil.copytree(finished, workdir)
  for stage in without:
    shutil.rmtree(workdir / stage)
  return workdir


def check_refused(cache, config, workdir, *args, match):
  """One clear error, a non-zero exit, and finished artefacts as they were."""
  before = tree_of(workdir)
  result = run_main(cache, config, f'--workdir={workdir}', *args)
  assert result.returncode != 0
  assert match in result.stdout + result.stderr, result.stderr
  assert 'Traceback' not in result.stderr
  assert tree_of(workdir) == before
