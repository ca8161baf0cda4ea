# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The planner: what it reads, counts and refuses."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest
import toy_method

from dd_jax import (
  aot,
  build,
  checkpoint,
  fit,
  hlo,
  model,
  plan,
  registry,
  released,
  roofline,
  sharding,
  stages,
)
from dd_jax.models import layers
from dd_jax.tools import plan as tool
from tests import command

FILE = pathlib.Path(__file__).parents[2] / 'configs' / 'dd_var.py'


def load(arg):
  spec = importlib.util.spec_from_file_location('dd_var_config', FILE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return json.loads(json.dumps(module.get_config(arg).to_dict()))


def test_parse_topology():
  assert plan.parse_topology('v5e:4x4') == ('v5e', (4, 4))
  assert plan.parse_topology('v5p:2x2x4') == ('v5p', (2, 2, 4))
  assert plan.parse_topology('cpu:8') == ('cpu', (8,))
  for wrong in ('v5e', 'v9:2x2', 'v5e:4x', 'v5e:0x4', '4x4'):
    with pytest.raises(ValueError, match='topology'):
      plan.parse_topology(wrong)


def test_parse_mesh():
  assert sharding.parse_mesh('data:2,fsdp:8') == {'data': 2, 'fsdp': 8}
  assert sharding.parse_mesh('data:-1') == {'data': -1}
  for wrong in ('data', 'data=2', 'data:2,data:4', ''):
    with pytest.raises(ValueError, match='mesh'):
      sharding.parse_mesh(wrong)


def test_roofline():
  chip = roofline.Chip(
      peak_flops=100.0, hbm_bytes=1, hbm_bandwidth=10.0, link_bandwidth=2.0
  )
  guess = roofline.estimate(chip, flops=200, hbm_bytes=50, sent_bytes=1)
  assert (guess.compute, guess.memory, guess.collectives) == (2.0, 5.0, 0.5)
  assert guess.seconds == 5.5 and guess.bound == 'memory'
  assert roofline.utilisation(chip, 1100, guess.seconds, 4) == 0.5


def compiled(fn, *args):
  return hlo.parse(jax.jit(fn).lower(*args).compile().as_text())


def on(mesh, shape, *spec):
  return jax.ShapeDtypeStruct(
      shape, jnp.float32,
      sharding=jax.NamedSharding(mesh, jax.P(*spec)),
  )


def test_collectives_of_a_compiled_program():
  mesh = sharding.make_mesh({'data': 4, 'fsdp': 2})
  # Every chip has an eighth of the sum's operand: one scalar each to add up.
  x = on(mesh, (64, 4), ('data', 'fsdp'))
  found = compiled(jnp.sum, x).collectives
  assert found == {
      'all-reduce': {'count': 1, 'bytes': 4.0, 'sent_bytes': 4 * 2 * 7 / 8}
  }

  # A weight of 64 x 16 is gathered over the two of fsdp, 5 times in a loop.
  def loop(x, w):
    def body(x, _):
      return jnp.tanh(x @ w) @ w.T, None

    return jax.lax.scan(body, x, None, length=5)[0]

  x, w = on(mesh, (32, 64), 'data'), on(mesh, (64, 16), None, 'fsdp')
  found = compiled(loop, x, w)
  assert found.unknown_loops == 0
  assert sum(k['count'] for k in found.collectives.values()) % 5 in (0, 1)
  assert sum(k['count'] for k in found.collectives.values()) >= 5


@pytest.mark.parametrize('layer, shape', [
    (layers.Dense(16), (8, 3, 64)), (layers.Conv2d(16), (8, 4, 4, 64)),
], ids=['dense', 'conv'])
def test_examples_stay_apart_where_weights_are_split(layer, shape):
  mesh = sharding.make_mesh({'data': 1, 'fsdp': 8})
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  params = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x))
  # By their inputs, which the last but one axis counts.
  params = jax.tree.map(lambda p: on(mesh, p.shape, *(
      [None] * (p.ndim - 2) + ['fsdp', None] if p.ndim > 1 else ['fsdp']
  )), params)
  # As from a table that is split by features, like all weights.
  x = on(mesh, shape, *[None] * (len(shape) - 1), 'fsdp')

  def apply(params, x):
    return layer.apply(params, x)

  def rows(fn):
    out = jax.jit(fn).lower(params, x).compile().output_shardings
    return out.shard_shape((*shape[:-1], 16))[0]

  assert rows(lambda *args: apply(*args)) == 8
  with sharding.kernels_on(mesh):
    assert rows(lambda *args: apply(*args)) == 1
    assert 'sharding_constraint' in str(
        jax.make_jaxpr(lambda *args: apply(*args))(params, x)
    )
  # With whole weights nothing is asked for.
  whole = sharding.make_mesh({'data': 8})
  with sharding.kernels_on(whole):
    assert 'sharding_constraint' not in str(jax.make_jaxpr(apply)(params, x))


TEXT = '''HloModule m, is_scheduled=true, num_partitions=8

%fused (p.0: f32[6,128], p.1: s32[]) -> f32[1,128] {
  %p.0 = f32[6,128]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,128]{1,0} dynamic-slice(%p.0, %p.1, %zero)
}

%body (b: (s32[], f32[6,128])) -> (s32[], f32[6,128]) {
  %b = (s32[], f32[6,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = f32[6,128]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %slice = f32[1,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %all = f32[4,128] all-gather(%slice), replica_groups=[2,4]<=[8]
  ROOT %t = (s32[], f32[6,128]{1,0}) tuple(%i, %w)
}

%cond (c: (s32[], f32[6,128])) -> pred[] {
  %c = (s32[], f32[6,128]{1,0}) parameter(0)
  %n = s32[]{:T(128)} constant(6)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: f32[6,128]) -> f32[6,128] {
  %a = f32[6,128]{1,0} parameter(0)
  %start = s32[] constant(0)
  %init = (s32[], f32[6,128]{1,0}) tuple(%start, %a)
  %while = (s32[], f32[6,128]{1,0}) while(%init), condition=%cond, body=%body
  %out = f32[6,128]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
  %sum = (f32[6,128], f32[6,128]) all-reduce-start(%out), GROUPS, to_apply=%add
  ROOT %done = f32[6,128]{1,0} all-reduce-done(%sum)
}
'''.replace(
    'GROUPS', "replica_groups=mesh['axis_0'=4,'axis_1'=2], "
    "device_ids=([8]) {'axis_0'}"
)


def test_loops_slices_and_memories_are_counted_as_they_run():
  found = hlo.parse(TEXT)
  row, whole = 4 * 128, 4 * 6 * 128
  assert found.collectives == {
      'all-gather': {
          'count': 6, 'bytes': 6 * row, 'sent_bytes': 6 * row * 3
      },
      'all-reduce': {
          'count': 1, 'bytes': whole, 'sent_bytes': whole * 2 * 3 / 4
      },
  }
  # Of the fusion a row (and the number of it) in and a row out; of the
  # gathering one in and four out. What is reduced lies on the chip.
  assert found.hbm_bytes == 6 * ((2 * row + 4) + 5 * row)
  with pytest.raises(ValueError, match='no HLO'):
    hlo.parse('nothing')


FUSIONS = '''HloModule m, is_scheduled=true

%row (w: f32[6,128], i: s32[]) -> f32[128] {
  %w = f32[6,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice = f32[1,128]{1,0} dynamic-slice(%w, %i, %i)
  ROOT %flat = f32[128]{0} bitcast(%slice)
}

%product (x: f32[128], v: f32[6,128], j: s32[], big: f32[6,128]) -> TWO {
  %x = f32[128]{0} parameter(0)
  %v = f32[6,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %big = f32[6,128]{1,0} parameter(3)
  %nested = f32[128]{0} fusion(%v, %j), kind=kLoop, calls=%row
  %times = f32[128]{0} multiply(%nested, %x)
  %line = f32[1,128]{1,0} bitcast(%times)
  %put = f32[6,128]{1,0} dynamic-update-slice(%big, %line, %j, %j)
  ROOT %both = TWO tuple(%times, %put)
}

%part (u: f32[6,128]) -> f32[2,128] {
  %u = f32[6,128]{1,0} parameter(0)
  ROOT %two = f32[2,128]{1,0:T(8,128)S(1)} slice(%u), slice={[0:2], [0:128]}
}

ENTRY %main (a: f32[128], b: f32[6,128], n: s32[], c: f32[6,128]) -> TWO {
  %a = f32[128]{0} parameter(0)
  %b = f32[6,128]{1,0} parameter(1)
  %n = s32[] parameter(2)
  %c = f32[6,128]{1,0} parameter(3)
  %out = TWO fusion(%a, %b, %n, %c), kind=kOutput, calls=%product
  %go = ((f32[6,128]{1,0}), f32[2,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
async-start(%b), calls=%part
  %near = f32[2,128]{1,0:T(8,128)S(1)} async-done(%go)
  %far = (f32[2,128]{1,0}, f32[2,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
copy-start(%near)
  ROOT %back = f32[2,128]{1,0} copy-done(%far)
}
'''.replace('\\\n', '').replace('TWO', '(f32[128]{0}, f32[6,128]{1,0})')


def test_of_stacked_weights_what_a_fusion_reads_is_counted():
  row = 4 * 128
  # The product takes a row of b, inside of another fusion, its number and a;
  # it writes a row beside, and in c in place. Two rows of b go to the chip's
  # own memory, and back from it to the large one.
  product, parts = (row + 4 + row) + 2 * row, 2 * row + 2 * row
  assert hlo.parse(FUSIONS).hbm_bytes == product + parts


ASSIGNMENT = '''BufferAssignment:
allocation 0: size 512, thread-local:
 value: <2 add.5 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 4000, parameter 0, shape |f32[10,100]| at ShapeIndex {}:
allocation 2: size 800, parameter 1, shape |f32[200]| at ShapeIndex {}, \
maybe-live-out:
allocation 3: size 70, output shape is |f32[1]|, maybe-live-out:
allocation 4: size 5, constant:
allocation 5: size 16, color 2, preallocated-temp:
allocation 6: size 600, preallocated-temp:
 value: <4 copy.23 @0> (size=300,offset=300): f32[75]{0}
allocation 7: size 9000, color 1, preallocated-temp:
'''.replace('\\\n', '')


def test_sizes_of_a_buffer_assignment():
  assert aot.read_sizes(ASSIGNMENT) == {
      'arguments': 4800, 'results': 70, 'temporaries': 605
  }
  with pytest.raises(ValueError, match='no buffer assignment'):
    aot.read_sizes('nothing')


def test_a_placed_program_holds_a_reserve(monkeypatch):
  mesh = sharding.make_mesh({'data': -1})
  x = jax.ShapeDtypeStruct(
      (8, 4), jnp.float32, sharding=sharding.replicated(mesh)
  )
  program = plan.Program(
      's', 'p', lambda: jax.jit(lambda x: x + 1).trace(x), {'held': x}, (), 0,
      1, (),
  )
  monkeypatch.setattr(fit, '_figures', lambda *_: {
      'argument_bytes': 128, 'result_bytes': 10, 'temporary_bytes': 1000,
      'code_bytes': None, 'collectives': {}, 'sent_bytes': 0.0,
      'hbm_traffic_bytes': 0.0, 'unknown_loops': 0, 'seconds': 0.0,
  })
  target = plan.make_target('cpu:8', hbm_gb=1337 / 1e9)
  row = fit.compile_program(program, target)
  assert row['total_bytes'] == 128 + 10 + 1000 + 200
  assert row['consumers']['reserve'] == 200
  assert row['fits'] is False
  target = plan.make_target('cpu:8', hbm_gb=1338 / 1e9)
  assert fit.compile_program(program, target)['fits']


def test_passes_of_precise_products():
  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

  def products(x):
    y = jnp.matmul(x, x, precision='highest')
    return jnp.matmul(y, y) + jnp.matmul(y, x, precision='high')

  jaxpr = jax.make_jaxpr(products)(x).jaxpr
  assert layers.count_jaxpr(jaxpr) == 3 * 2 * 4**3
  assert layers.count_jaxpr(jaxpr, passes=True) == (6 + 1 + 3) * 2 * 4**3


def test_networks_of_released_files_are_known_without_them():
  def sizes(family, file, **config):
    found = released.known_fields(released.convert_config(
        {'family': family, 'input': (file,), 'config': config}, 'x'
    ))
    return registry.get(
        'models', registry.get('families', family).model)(found)

  teacher = sizes('var', 'var_d24.pth')
  assert (teacher.config.depth, teacher.config.width) == (24, 1536)
  assert sizes('var_vqvae', 'vae_ch160v4096z32.pth').config.image_size == 256
  # The config comes before what is known of a file.
  large = sizes('var_vqvae', 'vae_ch160v4096z32.pth', patch_nums=(1, 32))
  assert large.config.image_size == 512
  assert released.known_fields(released.convert_config(
      {'family': 'var', 'input': ('mine.pth',)}, 'x'
  )) is None


def test_programs_need_no_files_and_make_nothing_large():
  config = load('d24')
  config['mesh'] = {'data': 1, 'fsdp': 8}
  target = plan.make_target('cpu:8')
  found = plan.programs(config, target)
  names = {(p.stage, p.name) for p in found}
  assert {
      ('trajectories', 'pairs'), ('student', 'initial state'),
      ('student', 'step student'), ('evaluate_1', 'samples'),
      ('evaluate_2', 'features'),
  } <= names
  step = next(p for p in found if p.name == 'step student')
  assert step.calls == config['stages']['student']['steps']
  assert all(
      isinstance(x, jax.ShapeDtypeStruct)
      for x in jax.tree.leaves(dict(step.held))
  )
  # A billion parameters and two moments of them, spread over eight.
  held = {k: fit.chip_bytes(v) for k, v in step.held.items()}
  whole = 4 * sum(x.size for x in jax.tree.leaves(step.held['student weights']))
  assert whole > 4e9
  assert held['student weights'] < whole / 7
  assert held['student optimizer'] < 2 * whole / 7


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """The config of a run of three programs over an export that is there."""
  toy_method.register(monkeypatch)
  network = toy_method.build({})
  checkpoint.export(
      tmp_path / 'teacher', network, network.init(jax.random.key(7)), {}
  )
  return toy_method.make_config(tmp_path / 'teacher')


def test_what_runs_is_what_is_planned(toy, tmp_path, monkeypatch):
  ran = []
  trace = plan.train.Programs.trace

  def spy(self, updates, *args):
    traced = trace(self, updates, *args)
    ran.append(str(traced.jaxpr))
    return traced

  monkeypatch.setattr(plan.train.Programs, 'trace', spy)
  stages.run(toy, tmp_path / 'w')
  done, ran[:] = list(ran), []
  for program in plan.programs(toy, plan.make_target('cpu:8')):
    if program.name.startswith('step'):
      program.trace()
  assert len(done) > 1 and sorted(done) == sorted(ran)


def test_programs_are_traced_for_the_target():
  here = model.platform()
  with model.for_platform('tpu'):
    assert model.platform() == 'tpu'
  assert model.platform() == here


def test_exit_codes_and_json(toy, tmp_path, capsys):
  out, note = tmp_path / 'plan.json', tmp_path / 'plan.md'
  given = {'out': str(out), 'markdown': str(note)}
  assert tool.run(toy, 'cpu:8', hbm_gb=1.0, **given) == 0
  found = json.loads(out.read_text())
  assert found['hbm_bytes'] == 1e9 and found['chips'] == 8
  rows = {r['program']: r for r in found['programs']}
  assert len(rows) == 4
  assert {name: r['calls'] for name, r in rows.items()} == {
      'initial state': 1, 'step critic': 9,
      'step student side=0+critic+adapter': 2,
      'step student side=1+critic+adapter': 1,
  }
  for row in rows.values():
    assert row['fits']
    total = sum(row['consumers'].values())
    assert total == pytest.approx(row['total_bytes'])
  step = rows['step critic']
  assert step['collectives']['all-reduce']['count'] >= 1
  # A critic's forward and backward of each of 32 examples.
  assert step['model_flops'] == 32 * 3 * 16 * 8
  assert '| run: step critic |' in note.read_text()
  capsys.readouterr()

  assert tool.run(toy, 'cpu:8', hbm_gb=1e-6) == 1
  text = capsys.readouterr().out
  line = next(
      x for x in text.splitlines() if 'does not fit: run, step critic' in x
  )
  assert len(line.split('largest are ')[1].split(';')[0].split(', ')) == 3
  assert 'micro_batches' in line or 'mesh.fsdp' in line


def test_nothing_is_compiled_twice(toy, tmp_path, monkeypatch):
  out, memo = tmp_path / 'plan.json', tmp_path / 'memo'
  finish, calls = fit._finish, []

  def killed(lowered):
    calls.append(lowered)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return finish(lowered)

  monkeypatch.setattr(fit, '_finish', killed)
  with pytest.raises(KeyboardInterrupt):
    tool.run(toy, 'cpu:8', memo=str(memo))
  assert tool.run(toy, 'cpu:8', memo=str(memo), out=str(out)) == 0
  rows = json.loads(out.read_text())['programs']
  # Two were done before; the third was cut off.
  assert len(rows) == 4 and len(calls) == 5
  assert tool.run(toy, 'cpu:8', memo=str(memo), out=str(out)) == 0
  assert len(calls) == 5
  assert json.loads(out.read_text())['programs'][0]['total_bytes'] == (
      rows[0]['total_bytes']
  )


def test_errors_have_a_code_of_their_own(toy, capsys):
  assert tool.run(toy, 'cpu:8', stages=['nothing']) == 2
  assert tool.run(toy, 'v5e:x') == 2
  assert tool.run(toy, 'cpu:8', mesh='data:3') == 2
  assert 'needs 3 devices' in capsys.readouterr().err


def test_a_compiler_that_fails(toy, monkeypatch, capsys):
  def fail(lowered):
    raise RuntimeError('the compiler wrote nothing')

  monkeypatch.setattr(fit, '_finish', fail)
  assert tool.run(toy, 'cpu:8') == 2
  assert 'wrote nothing' in capsys.readouterr().err


def test_search(toy, capsys):
  assert tool.run(toy, 'cpu:2', search='run', hbm_gb=1.0) == 0
  text = capsys.readouterr().out
  assert 'mesh data:1,fsdp:2 rules fsdp micro_batches 1: fits' in text
  assert 'best: mesh data:2 rules dp micro_batches 1' in text
  assert tool.run(toy, 'cpu:2', search='run', hbm_gb=1e-9) == 1
  # Rules of the stage itself do not stand before those that are tried.
  toy['stages']['run']['rules'] = 'fsdp'
  tried = []
  target = plan.make_target('cpu:2')
  fit.search(toy, target, 'run', tried.append, lambda p: {
      'fits': True, 'total_bytes': fit.chip_bytes(dict(p.held)), 'calls': 1,
  })
  assert [t['rules'] for t in tried] == ['dp', 'fsdp']
  assert tried[0]['total_bytes'] > tried[1]['total_bytes']
  assert 'nothing fits' in capsys.readouterr().out


def test_abstract_exports_are_cast_like_those_that_are_there(tmp_path):
  network = toy_method.build({})
  _, frozen = build.load_frozen(
      {'teacher': {'path': 'x', 'dtype': 'bfloat16'}}, lambda _: network,
      sharding.make_mesh({'data': -1}), 'dp',
  )
  leaves = jax.tree.leaves(frozen)
  assert leaves and all(x.dtype == jnp.bfloat16 for x in leaves)
  assert all(x.sharding is not None for x in leaves)


@pytest.mark.slow
def test_libtpu_compiles_the_tiny_run(tmp_path):
  pytest.importorskip('libtpu')

  def rows(**kwargs):
    out = tmp_path / 'plan.json'
    assert tool.run(
        load('tiny'), 'v5e:2x4', out=str(out), stages=['student'], **kwargs
    ) == 0
    return {
        r['program']: r for r in json.loads(out.read_text())['programs']
    }

  placed, full = rows(), rows(full=True)
  step = placed['step student']
  assert 0 < step['total_bytes'] < 1e9
  assert 0 < step['estimate']['seconds'] < 1
  assert 0 < step['estimate']['mfu'] < 1
  assert step['collectives']['all-reduce']['count'] >= 1
  # What is known before the compiler is done stays like that.
  for name, row in full.items():
    assert row['argument_bytes'] == placed[name]['argument_bytes']
    assert row['collectives'] == placed[name]['collectives']
    assert row['hbm_traffic_bytes'] == placed[name]['hbm_traffic_bytes']
    assert row['consumers']['code'] and 'code' not in placed[name]['consumers']


@pytest.mark.parametrize('flags, message', [
    (('--config=configs/dd_var.py:d17',), 'expected one of'),
    (('--config=configs/dd_var.py', '--config.stages.studnt.x=5'), 'studnt'),
])
def test_a_config_that_is_refused_is_one_line(flags, message):
  result = subprocess.run(
      [sys.executable, '-m', 'dd_jax.tools.plan', '--topology=v5e:2x2', *flags],
      cwd=FILE.parents[1], env=command.environment_of(''), text=True,
      capture_output=True, timeout=300, check=False,
  )
  assert result.returncode == 2
  assert message in result.stderr and 'Traceback' not in result.stderr
