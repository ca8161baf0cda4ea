# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: both sides agree, figures are complete, errors are clear."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

from dd_jax import build
from dd_jax.methods import dmd2
from dd_jax.tools.bench import (
    jax_dmd2,
    jax_side,
    program,
    runner,
    workloads,
)
from tests.command import COMPILE_FAST
from tests.tools import convert_test

FIGURES = (
    'p50', 'p95', 'cpu', 'gflops', 'cold_start', 'import', 'load', 'compile',
    'peak_rss',
)


def tool(out, *args, model='var'):
  # What is compiled here runs twice: as little optimization as there is.
  environment = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(convert_test.ROOT),
      'XLA_FLAGS': COMPILE_FAST,
  }
  result = subprocess.run(
      [sys.executable, '-m', 'dd_jax.tools.bench', f'--model={model}_smoke',
       '--seconds=0', '--warm_ups=1', f'--out={out}', *args],
      env=environment, capture_output=True, text=True, check=False, timeout=300,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  records = [json.loads(line) for line in out.read_text().splitlines()]
  return result.stdout, {
      kind: [r for r in records if r['record'] == kind]
      for kind in {r['record'] for r in records}
  }


def settings(**fields):
  values = dict(
      model='var_smoke', batches=(1,), frameworks=('jax',),
      rows=('student',), variants=workloads.VARIANTS, rounds=1, seconds=0.0,
      warm_ups=1, threads=1, seed=0,
  )
  return runner.Settings(**values | fields)


def test_figures_of_our_side(tmp_path):
  text, records = tool(
      tmp_path / 'out.jsonl', '--frameworks=jax', '--rows=transformer,ode_50',
      '--variants=scan,jit', '--rounds=2', '--batch=2',
  )
  (machine,) = records['machine']
  assert machine['versions']['jax'] and machine['cpu'] and machine['cores']
  assert machine['flops'].keys() == {'transformer', 'ode_50'}
  # Of each round the same lines, every second one backwards.
  rounds = [(r['row'], r['round']) for r in records['round']]
  assert rounds == [
      ('transformer', 0), ('ode_50', 0), ('ode_50', 1), ('transformer', 1)
  ]
  for s in records['summary']:
    # Of a round that counts, or else of all: load decides.
    assert s['rounds'] == 2 and s['calls'] == (s['accepted'] or 2)
    assert all(s[name] > 0 for name in FIGURES)
    flops = machine['flops'][s['row']] * s['batch']
    assert s['gflops'] == pytest.approx(flops / s['p50'] / 1e9)
    assert s['cold_start'] > s['import'] + s['load'] + s['compile']
    assert s['temporaries'] > 0 and s['arguments'] > 0
  (ratio,) = records['ratio']
  times = {s['row']: s['p50'] for s in records['summary']}
  assert ratio['ratio'] == pytest.approx(times['ode_50'] / times['transformer'])
  assert re.search(r'\d of 4 rounds were rejected: load average above', text)
  for name in ('transformer', 'ode_50', 'jax scan', 'jax jit', 'share of'):
    assert name in text


@pytest.mark.slow
@pytest.mark.parametrize('model, rows', [
    ('var', ['teacher', 'student', 'train', 'transformer']),
    ('llamagen', ['teacher', 'pairs', 'student']),
])
def test_variants_of_our_side_agree(tmp_path, model, rows):
  _, records = tool(
      tmp_path / 'out.jsonl', '--frameworks=jax', '--rounds=1', model=model
  )
  assert [r['row'] for r in records['parity']] == rows
  assert all(r['agrees'] for r in records['parity'])
  assert records['ratio']


def test_torch_agrees(tmp_path):
  pytest.importorskip('torch')
  _, records = tool(
      tmp_path / 'out.jsonl', '--rounds=1', '--variants=scan,jit,eager',
      '--rows=student,decode', '--batch=2',
  )
  assert len(records['parity']) == 2
  for r in records['parity']:
    assert r['agrees'] and r['framework'] == 'torch'
    floats = [v for v in r['differences'].values() if isinstance(v, float)]
    assert floats and max(floats) > 0  # two programs, not one twice
  assert {r['is'] for r in records['ratio']} == {'torch / jax'}


@pytest.mark.slow
@pytest.mark.parametrize('model, rows', [
    ('var', ('teacher', 'student', 'decode', 'train')),
    ('llamagen', ('teacher',)),
])
def test_torch_agrees_in_all_rows(tmp_path, model, rows):
  pytest.importorskip('torch')
  _, records = tool(
      tmp_path / 'out.jsonl', '--rounds=1', '--batch=2',
      f'--rows={",".join(rows)}', '--variants=scan,jit,eager,compile',
      model=model,
  )
  found = {(r['row'], r['variant']) for r in records['parity']}
  assert found == {
      (row, variant) for row in rows for variant in ('eager', 'compile')
  }
  steps = [r for r in records['parity'] if r['row'] == 'train']
  assert all('values of 2 calls' in r['differences'] for r in steps)


def test_torch_agrees_on_updates(tmp_path):
  pytest.importorskip('torch')
  _, records = tool(
      tmp_path / 'out.jsonl', '--rounds=1', '--variants=jit,eager',
      '--batch=3', model='dmd2_mlp',
  )
  assert [r['row'] for r in records['parity']] == ['critic', 'student']
  for r in records['parity']:
    names = {'critic': 'denoising', 'student': 'matching'}
    assert r['agrees'] and r['differences'].keys() == {
        'loss', 'gan', 'grad_norm', names[r['row']], 'values of 2 calls'
    }
    assert sum(r['differences'].values()) > 0
  assert {r['is'] for r in records['ratio']} == {'torch / jax'}


@pytest.mark.slow
@pytest.mark.parametrize('model', ['dmd2', 'dmd2_mlp'])
def test_torch_agrees_on_updates_of_both_networks(tmp_path, model):
  pytest.importorskip('torch')
  _, records = tool(
      tmp_path / 'out.jsonl', '--rounds=1', '--batch=2', model=model
  )
  assert {(r['row'], r['variant']) for r in records['parity']} == {
      (row, variant) for row in ('critic', 'student')
      for variant in ('eager', 'compile')
  }


# Parameters of the released files: teacher, student, tokenizer.
@pytest.mark.parametrize('arg, sizes', [
    ('b', (110_888_448, 98_321_672, 71_883_403)),
    ('l', (342_910_976, 326_155_272, 71_883_403)),
])
def test_networks_of_llamagen_are_those_of_its_configs(arg, sizes):
  path = convert_test.ROOT / 'configs/dd_llamagen.py'
  stages = runpy.run_path(str(path))['get_config'](arg).to_dict()['stages']
  name = f'llamagen_{arg}'
  found = workloads.SIZES[name]
  assert found.split == stages['student']['method']['split']
  assert found.sampling == {
      k: stages['trajectories'][k] for k in ('cfg', 'top_k', 'top_p')
  }
  for network, size in zip(('teacher', 'student', 'vae'), sizes, strict=True):
    shapes = jax_side.build(name, network).abstract()
    assert sum(x.size for x in jax.tree.leaves(shapes)) == size
  # Traced for shapes, with nothing made: the rows that a run would time.
  flops = {row: jax_side.count(row, name) for row in workloads.rows(name)}
  assert min(flops.values()) > 1e9
  # Guided: for each token two rows, where the student has one.
  assert 1.5 < flops['teacher'] / flops['student'] < 2.5


def test_networks_of_dmd2_are_those_of_its_configs():
  path = convert_test.ROOT / 'configs/dmd2_edm.py'
  get_config = runpy.run_path(str(path))['get_config']
  for name in ('digits', 'mnist5k_unet'):
    stage = get_config(name).to_dict()['stages']['student']
    role = stage['roles']['critic']
    denoiser = workloads.SIZES[f'dmd2_{name}'].denoiser
    assert build.build_model(role['model']).config == (
        jax_dmd2.build(f'dmd2_{name}', 'critic').config
    )
    assert role['model']['denoiser'] == denoiser
    method = dict(stage['method'])
    assert method.pop('name') == 'dmd2'
    assert dmd2.Config(**method) == dmd2.Config()
    optimizer = role['optimizer'] | {'lr': jax_dmd2.OPTIMIZER['lr']}
    assert optimizer.pop('clock') == 'step'  # of a constant rate
    assert optimizer == jax_dmd2.OPTIMIZER


def test_draws_are_those_of_the_steps(tmp_path):
  case = program.Case(tmp_path, 'dmd2_mlp_smoke', 3, 'jit', 1, 0, tmp_path)
  drawn = jax_dmd2.draw(case)
  calls = jax_dmd2.GIVEN
  assert drawn['start'].shape == (3, calls, 4, 4, 1)
  assert np.all(drawn['start_sigma'] == 80)
  sigma = drawn['match_sigma']
  assert sigma.min() > 0.003 and sigma.max() < 72.1
  assert len(np.unique(drawn['fit'])) == drawn['fit'].size
  # An example's are its own, whatever the batch.
  one = jax_dmd2.draw(dataclasses.replace(case, batch=1))
  for name in set(drawn) - {'image', 'label', 'index'}:
    np.testing.assert_allclose(one[name], drawn[name][:1], rtol=1e-6)


def test_sides_that_disagree(tmp_path):
  entry = runner.Entry('student', 1, 'jax', 'scan')
  other = dataclasses.replace(entry, framework='torch')

  def add(parity, entry, values=(), **arrays):
    np.savez(tmp_path / 'a.npz', **arrays)
    return parity.add(entry, tmp_path / 'a.npz', values)

  ones = np.ones(3, np.float32)
  for change, agrees in (
      ({}, True), ({'x': 100 * ones + 1e-4}, True),
      ({'x': 100 * ones + 1e-2}, False), ({'x': np.nan * ones}, False),
      ({'i': np.array([1, 3])}, False),
  ):
    parity = runner.Parity(tolerance=1e-5)
    arrays = {'x': 100 * ones, 'i': np.array([1, 2])}
    assert add(parity, entry, **arrays) is None
    found = add(parity, other, **arrays | change)
    assert found['agrees'] == agrees
    assert found['differences']['i'] == ('i' in change)
  parity = runner.Parity(tolerance=1e-5)
  add(parity, entry, [1.0, 2.0, 3.0], x=ones)
  assert add(parity, other, [1.0, 2.0], x=ones)['agrees']
  assert not add(parity, other, [1.0, 2.1], x=ones)['agrees']


def test_a_disagreement_ends_the_benchmark(tmp_path, monkeypatch):
  def job(settings, folder, entry, outputs):
    if entry is None:
      return {'flops': {'student': 1}}
    np.savez(outputs, x=np.float32(entry.variant == 'scan'))
    return {'load': 0.0, 'calls': [1.0], 'values': []}

  monkeypatch.setattr(runner, '_job', job)
  with pytest.raises(runner.Failure, match='jax unrolled does not agree .*1.0'):
    runner.run(settings(), tmp_path, tmp_path / 'out.jsonl')
  lines = (tmp_path / 'out.jsonl').read_text().splitlines()
  assert not json.loads(lines[-1])['agrees']


def test_meshes_do_the_same_work(tmp_path):
  text, records = tool(
      tmp_path / 'out.jsonl', '--rounds=1', '--variants=jit', '--batch=4',
      '--frameworks=jax', '--rows=critic', '--mesh=data:1',
      '--mesh=data:2,fsdp:2', model='dmd2_mlp',
  )
  (parity,) = records['parity']
  assert parity['agrees'] and parity['mesh'] == 'data:2,fsdp:2'
  assert sum(parity['differences'].values()) > 0  # not one program twice
  alone, split = records['summary']
  # A device holds its examples and its half of the larger weights.
  assert split['arguments'] < alone['arguments']
  assert 'jax jit data:2,fsdp:2' in text and 'bytes of one device' in text


def test_meshes_are_ours_alone(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name)
  with pytest.raises(ValueError, match='--mesh: for ours alone'):
    settings(frameworks=('jax', 'torch'), meshes=('data:1',))


def test_rounds_under_load_do_not_count():
  entry = runner.Entry('student', 2, 'jax', 'scan')

  def result(calls, rejected):
    return {
        'calls': calls, 'cpu': calls, 'rejected': rejected,
        'costs': {'compile': 1.0},
        'seconds': {'cold_start': 9.0, 'import': 1.0, 'load': 1.0},
        'peak_rss': 7,
    }

  slow, fast = result([9.0], True), result([1.0, 3.0], False)
  found = runner.summary(entry, [slow, fast], flops=10**9)
  assert (found['p50'], found['calls'], found['gflops']) == (2.0, 2, 1.0)
  assert (found['accepted'], found['rounds']) == (1, 2)
  found = runner.summary(entry, [slow], flops=10**9)
  assert (found['p50'], found['accepted']) == (9.0, 0)


@pytest.mark.parametrize('rejected', [False, True])
def test_ratios(monkeypatch, rejected):
  shown = []
  monkeypatch.setattr(runner.console, 'table', lambda *a: shown.append(a))
  monkeypatch.setattr(runner.console, 'say', lambda text: None)
  summaries = [
      {'row': row, 'batch': 1, 'framework': framework, 'variant': variant,
       'p50': p50, 'p95': p50, 'cpu': p50, 'calls': 1, 'gflops': 1.0,
       'tokens_per_second': None, 'cold_start': 1.0, 'trace': None,
       'compile': 1.0, 'peak_rss': 1,
       'rounds': 1, 'accepted': int(framework == 'jax' or not rejected)}
      for row, framework, variant, p50 in (
          ('student', 'jax', 'scan', 2.0), ('student', 'jax', 'unrolled', 1.0),
          ('student', 'torch', 'eager', 3.0),
          ('student', 'torch', 'compile', 4.0),
          ('transformer', 'jax', 'scan', 10.0), ('ode_50', 'jax', 'jit', 1.0),
      )
  ]
  share, ratio = runner.ratios(summaries)
  assert (share['ratio'], share['is']) == (0.1, 'share of transformer')
  assert (ratio['ratio'], ratio['of']) == (3.0, ['eager', 'unrolled'])
  assert share['accepted'] and ratio['accepted'] != rejected
  runner.show(settings(), summaries, 2.5)
  values = [row[-1] for row in shown[1][2]]
  assert values == [0.1, 'no result' if rejected else 3.0]


@pytest.mark.parametrize(
    'fields, message',
    [
        ({'model': 'var_tine'}, "--model: no 'var_tine'; did you mean 'var_ti"),
        ({'frameworks': ('tf',)}, "--frameworks: no 'tf'"),
        ({'frameworks': ()}, '--frameworks: give at least one'),
        ({'rows': ('decoder',)}, "did you mean 'decode'"),
        ({'variants': ('jitted',)}, '--variants: no'),
        ({'variants': ('eager',)}, 'nothing to run'),
        ({'batches': (0,)}, '--batch: at least 1, not 0'),
        ({'rounds': 0}, '--rounds: at least 1'),
        ({'threads': 10_000}, '--threads=10000: from 1 to'),
        ({'meshes': ('data=2',)}, "mesh 'data=2': expected axis:size"),
        ({'meshes': ('data:2',)}, '--batch=1 does not divide over data:2'),
        ({'meshes': ('data:-1',)}, '--batch=1 does not divide over data:-1'),
    ],
)
def test_settings_that_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    settings(**fields)


def test_errors_of_the_tool():
  assert "'x' is not a number" in convert_test.fail('--batch=x', name='bench')


def test_a_process_that_fails_shows_its_log(tmp_path):
  entry = runner.Entry('decode', 1, 'jax', 'jit')  # without its weights
  with pytest.raises(runner.Failure, match='(?s)ended with 1:.*vae.jax.safet'):
    runner._job(settings(), tmp_path, entry, None)


def test_torch_is_asked_for_by_name(monkeypatch):
  find = runner.importlib.util.find_spec
  monkeypatch.setattr(
      runner.importlib.util, 'find_spec',
      lambda name: None if name == 'torch' else find(name),
  )
  with pytest.raises(ValueError, match='torch is not installed; pip install'):
    settings(frameworks=('jax', 'torch'))


def test_torch_stays_out_of_the_rest():
  """Neither the tool nor our side of it loads torch; its side no jax."""
  code = (
      'import sys\n'
      'from dd_jax.tools.bench import {}\n'
      'assert {!r} not in sys.modules'
  )
  pairs = [
      ('runner, inputs, jax_side, jax_dmd2', 'torch'),
      ('worker, program', 'jax'),
  ]
  if importlib.util.find_spec('torch'):
    pairs.append(('torch_var, torch_llamagen, torch_dmd2', 'jax'))
  for modules, absent in pairs:
    subprocess.run(
        [sys.executable, '-c', code.format(modules, absent)], check=True,
        env=os.environ | {'PYTHONPATH': str(convert_test.ROOT)},
    )


def test_a_case_reads_its_rows(tmp_path):
  case = program.Case(tmp_path, 'var_smoke', 2, 'scan', 1, 0, tmp_path)
  np.savez(tmp_path / 'inputs.npz', labels=np.arange(4))
  assert case.inputs()['labels'].tolist() == [0, 1]
