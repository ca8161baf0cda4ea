# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Thousands of broken and hostile files; see `fuzz.py`."""

from __future__ import annotations

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize('count, seed', [
    (300, 0), pytest.param(5000, 1, marks=pytest.mark.slow),
])
def test_broken_files_are_refused_and_nothing_else(count, seed, tmp_path):
  result = subprocess.run(
      [sys.executable, 'tests/convert/fuzz.py', tmp_path, str(count),
       str(seed)],
      cwd=ROOT, env=os.environ | {'PYTHONPATH': str(ROOT)}, check=False,
      capture_output=True, text=True, timeout=1200,
  )
  assert result.returncode == 0, result.stderr[-2000:]  # -11: a crash
  told = json.loads(result.stdout)
  logging.info('%s', result.stdout)
  assert not told['wrong'], told['wrong'][:20]
  outcomes = told['outcomes']
  assert sum(sum(v.values()) for v in outcomes.values()) == count
  # Bits of values can change without notice; code never passes.
  assert sum(v.get('refused', 0) for v in outcomes.values()) > 0.6 * count
  assert set(outcomes['hostile']) == {'refused'}
