# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The notebooks, run from top to bottom at the smallest size."""

from __future__ import annotations

import ast
import json
import sys

import pytest

from tests.command import environment_of
from tests.notebook import COLABS, check_pictures, start

DIGITS, LOAD = 'dd_var_digits.ipynb', 'load_our_checkpoint.ipynb'


def read(name):
  return json.loads((COLABS / name).read_text())


@pytest.fixture(scope='module')
def digits(cache, tmp_path_factory):
  """The first notebook: where its run and its pictures are, and its result."""
  root = tmp_path_factory.mktemp('colab')
  result = start(
      environment_of(cache), DIGITS, root / 'pictures', SIZE='tiny',
      WORKDIR=root / 'run',
  )
  return root, result


def test_digits(digits):
  root, result = digits
  assert result.returncode == 0, result.stderr
  assert (root / 'run/report/report.md').exists()
  # Data, reconstructions, teacher, one step, two steps, same noise, curves.
  check_pictures(root / 'pictures', 7)
  assert 'student_1' in result.stdout  # the report


def test_load(cache, digits, tmp_path):
  root, _ = digits
  result = start(
      environment_of(cache), LOAD, tmp_path / 'pictures', WORKDIR=root / 'run'
  )
  assert result.returncode == 0, result.stderr
  check_pictures(tmp_path / 'pictures', 2)
  assert 'layers/attn/q/kernel' in result.stdout
  assert 'same arrays: True' in result.stdout


def test_load_without_a_run(cache, tmp_path):
  result = start(
      environment_of(cache), LOAD, tmp_path / 'pictures',
      WORKDIR=tmp_path / 'none',
  )
  assert result.returncode == 1
  assert 'set WORKDIR to a run' in result.stderr


def test_the_first_half_of_load_needs_no_dd_jax():
  cells = read(LOAD)['cells']
  half = next(
      i for i, cell in enumerate(cells)
      if ''.join(cell['source']).startswith('## With dd_jax')
  )
  imported = set()
  for cell in cells[:half]:
    if cell['cell_type'] == 'code':
      for node in ast.walk(ast.parse(''.join(cell['source']))):
        if isinstance(node, ast.Import):
          imported |= {a.name.split('.')[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
          imported.add(node.module.split('.')[0])
  assert imported - sys.stdlib_module_names == {'numpy', 'orbax', 'PIL'}


@pytest.mark.parametrize('file', sorted(p.name for p in COLABS.glob('*')))
def test_files_are_notebooks_without_outputs(file):
  notebook = read(file)
  assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
  assert set(notebook) == {'cells', 'metadata', 'nbformat', 'nbformat_minor'}
  cells = notebook['cells']
  assert len({cell['id'] for cell in cells}) == len(cells)
  for before, cell in zip([None, *cells], cells, strict=False):
    assert all(isinstance(line, str) for line in cell['source'])
    fields = {'cell_type', 'id', 'metadata', 'source'}
    if cell['cell_type'] == 'code':
      # Each piece of code is explained.
      assert before['cell_type'] == 'markdown'
      fields |= {'execution_count', 'outputs'}
      assert cell['execution_count'] is None and cell['outputs'] == []
    assert set(cell) == fields
