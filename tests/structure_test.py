# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and that no config field is dead."""

from __future__ import annotations

import ast
import pathlib
import re
import sys

import pytest

from dd_jax import registry

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'dd_jax'

# Folder -> what modules in it may import; everything else is refused.
ALLOWED = {
    'ops': {'jax', 'numpy'},
    'kernels': {'jax', 'numpy', 'dd_jax.model', 'dd_jax.kernels'},
    'flow': {'jax', 'numpy', 'dd_jax.flow'},
    'convert': {'numpy', 'ml_dtypes', 'safetensors', 'dd_jax.convert'},
    'models': {'jax', 'numpy', 'flax', 'dd_jax.ops', 'dd_jax.model',
               'dd_jax.kernels', 'dd_jax.models', 'dd_jax.config',
               'dd_jax.convert'},
    'methods': {'jax', 'numpy', 'optax', 'dd_jax.flow', 'dd_jax.ops',
                'dd_jax.method', 'dd_jax.methods', 'dd_jax.model'},
    'data': {'numpy', 'grain', 'array_record', 'etils', 'sklearn', 'mlxtend',
             'PIL', 'ml_dtypes', 'safetensors', 'tensorflow_datasets', 'absl',
             'dd_jax.data'},
    'sampling': {'jax', 'numpy', 'dd_jax.flow', 'dd_jax.ops', 'dd_jax.model',
                 'dd_jax.sampling'},
    'evals': {'numpy', 'scipy', 'PIL', 'matplotlib', 'etils', 'jax',
              'dd_jax.evals', 'dd_jax.flow', 'dd_jax.ops'},
}
def imports_of(file):
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      yield from (a.name for a in node.names)
    elif isinstance(node, ast.ImportFrom):
      for a in node.names:
        yield f'{node.module}.{a.name}'


@pytest.mark.parametrize('folder', sorted(ALLOWED))
def test_imports_point_one_way(folder):
  allowed = ALLOWED[folder] | sys.stdlib_module_names
  files = sorted((PACKAGE / folder).rglob('*.py'))
  assert files
  wrong = [
      f'{file.relative_to(ROOT)} imports {name}'
      for file in files for name in imports_of(file)
      if not any(name == a or name.startswith(f'{a}.') for a in allowed)
  ]
  assert not wrong


def test_configs_import_only_ml_collections():
  for file in (ROOT / 'configs').glob('*.py'):
    assert {n.split('.')[0] for n in imports_of(file)} <= {
        'ml_collections', '__future__'
    }


def test_loop_knows_no_method():
  for name in ('train.py', 'step.py', 'state.py', 'checkpoint.py'):
    imported = set(imports_of(PACKAGE / name))
    assert not [i for i in imported
                if i.startswith(('dd_jax.methods', 'dd_jax.models'))]
    assert not re.search(r'if .*method.*==', (PACKAGE / name).read_text())


def test_partitioning_by_hand_lives_in_kernels_only():
  for file in PACKAGE.rglob('*.py'):
    by_hand = re.search(r'\bshard_map\(', file.read_text())
    assert not by_hand or file.parent.name == 'kernels', file


def test_print_lives_in_the_console_only():
  for file in PACKAGE.rglob('*.py'):
    calls = [
        n for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'print'
    ]
    assert not calls or file.name == 'console.py', file


@pytest.mark.parametrize('table', sorted(registry.TABLES))
def test_every_registry_entry_exists(table):
  for name in registry.TABLES[table]:
    assert registry.get(table, name) is not None


def config_classes():
  for file in sorted(PACKAGE.rglob('*.py')):
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.ClassDef) and node.name.endswith('Config'):
        yield file, node


@pytest.mark.parametrize(
    'file,node', [(f, n) for f, n in config_classes()],
    ids=lambda x: getattr(x, 'name', None) or str(x),
)
def test_every_config_field_is_read(file, node):
  fields = [
      n.target.id for n in node.body if isinstance(n, ast.AnnAssign)
  ]
  # A field is read as an attribute anywhere but in its declaration.
  text = '\n'.join(f.read_text() for f in PACKAGE.rglob('*.py'))
  unread = [f for f in fields if not re.search(rf'\.{f}\b', text)]
  assert not unread, f'{file.name}: {node.name}'
