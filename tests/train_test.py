# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop, shown on a method that it has never seen."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import pathlib
import shutil

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import toy_method

from dd_jax import (
    build,
    checkpoint,
    flops,
    hooks,
    metrics,
    optim,
    sharding,
    stages,
    train,
)
from dd_jax.data import pipeline
from dd_jax.method import host_rng


@pytest.fixture
def teacher(tmp_path, monkeypatch):
  toy_method.register(monkeypatch)
  model = toy_method.build({})
  checkpoint.export(
      tmp_path / 'teacher', model, model.init(jax.random.key(7)), {}
  )
  return tmp_path / 'teacher'


def export_of(workdir, role, steps=12):
  return checkpoint.load_params(workdir / 'run' / f'export/{role}-{steps}')


def losses_by_step(workdir):
  by_step = {}
  for values in records_of(workdir):
    by_step.setdefault(values['step'], {}).update({
        k: v for k, v in values.items()
        if not k.startswith(('time/', 'memory/'))
    })
  return by_step


def records_of(workdir):
  lines = (workdir / 'run/metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


class Killed(Exception):
  """Something that no handler knows."""


ADD = hooks.Throttle.add


def stop_after(monkeypatch, steps):
  """The loop breaks when so many steps have been started."""
  left = [steps]

  def add(self, outputs):
    left[0] -= 1
    if not left[0]:
      raise Killed
    ADD(self, outputs)

  monkeypatch.setattr(hooks.Throttle, 'add', add)


def assert_trees_close(a, b, **tolerance):
  jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b
  )


def make_parts(teacher, **kwargs):
  """Method, programs and a state on one mesh, without the loop around."""
  config = toy_method.make_config(teacher, **kwargs)
  values = {k: v for k, v in config['stages']['run'].items() if k != 'kind'}
  mesh = sharding.make_mesh(config['mesh'])
  method, sources, frozen = build.build_method(
      values['method'], values['roles'], values['frozen'], values['steps'],
      pathlib.Path, mesh, config['rules'],
  )
  _, fresh = train.fresh_state(method, 0, sources, mesh, config['rules'])
  programs = train.Programs(method, values['micro_batches'], mesh)
  return method, programs, fresh(sources), frozen, mesh


def run_steps(parts, first, last):
  method, programs, state, frozen, mesh = parts
  source = toy_method.Numbers(128)
  states = []
  for step in range(first, last):
    rows = [source[(32 * step + i) % 128] for i in range(32)]
    batch = {
        'x': np.stack([r['x'] for r in rows]),
        'index': np.arange(32 * step, 32 * step + 32, dtype=np.uint32),
    }
    state, _ = programs(
        method.updates(step), state, frozen, sharding.place_batch(batch, mesh)
    )
    states.append(jax.device_get(state))
  return states


def test_new_method_runs_through_stages_and_exports(teacher, tmp_path):
  records = stages.run(toy_method.make_config(teacher), tmp_path / 'w')
  assert records['run']['complete']
  lines = (tmp_path / 'w/run/metrics.jsonl').read_text().splitlines()
  values = [json.loads(line) for line in lines]
  critic = [v['critic/loss'] for v in values if 'critic/loss' in v]
  assert len(critic) == 12
  assert critic[-1] < critic[0]
  # A student update at steps 0, 5 and 10, reported one step later.
  assert [v['step'] for v in values if 'student/loss' in v] == [1, 6, 11]
  (events,) = (tmp_path / 'w/run/tensorboard').glob('events*')
  for tag in set().union(*values) - {'step'}:
    assert tag.encode() in events.read_bytes()


def test_each_tuple_of_updates_compiles_once(teacher):
  parts = make_parts(teacher)
  run_steps(parts, 0, 12)
  method, programs = parts[:2]
  # Critic alone, and the student's two sides: three programs for 12 steps.
  assert len(programs.compiled) == 3
  assert method.updates(0) != method.updates(5)
  assert hash(method.updates(0)) == hash(method.updates(10))
  assert {u.role for u in method.updates(0)} == {
      u.role for u in method.updates(5)
  }


def test_ema_and_counts_move_only_with_their_role(teacher):
  states = run_steps(make_parts(teacher), 0, 7)
  counts = [
      (int(s.updates['student']), int(s.updates['critic'])) for s in states
  ]
  assert counts == [(1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (2, 6), (2, 7)]
  ema = [s.ema['student']['up']['kernel'] for s in states]
  for i in range(1, 5):
    np.testing.assert_array_equal(ema[i], ema[0])
  assert np.abs(ema[5] - ema[4]).max() > 0
  assert set(states[0].ema) == {'student'}
  # The average after the second update, from its definition.
  decay = min(0.9, (1 + 2) / (10 + 2))
  new = states[5].params['student']['up']['kernel']
  np.testing.assert_allclose(
      ema[5], decay * ema[4] + (1 - decay) * new, rtol=1e-6, atol=1e-7
  )


def test_schedules_read_their_clock():
  gradient = {'kernel': jnp.ones((2, 2))}
  moved = {}
  for clock in optim.CLOCKS:
    config = optim.OptimizerConfig(
        lr=1.0, weight_decay=0.0, clip=0.0, warmup=0.0, final=0.0, clock=clock
    )
    tx = optim.make_optimizer(config, total=100)
    update, _ = tx.update(
        gradient, tx.init(gradient), gradient,
        clocks={'step': jnp.int32(50), 'updates': jnp.int32(10)},
    )
    moved[clock] = float(update['kernel'][0, 0])
  np.testing.assert_allclose(moved['step'], -0.5, rtol=1e-5)
  np.testing.assert_allclose(moved['updates'], -0.9, rtol=1e-5)


def test_each_role_moves_at_the_rate_of_its_own_clock(teacher):
  parts = make_parts(teacher, lr=0.1, weight_decay=0.0, final=0.0)
  (first,) = run_steps(parts, 0, 1)
  # Steps 0 and 10 are one program, of all roles; as though none moved between.
  between = first.replace(step=np.int32(10))
  (second,) = run_steps((*parts[:2], between, *parts[3:]), 10, 11)
  for role, tick in (('student', 1), ('adapter', 1), ('critic', 10)):
    rate = 0.1 * (1 - tick / 12)
    mean, square = (
        optax.tree.get(second.opt[role], name) for name in ('mu', 'nu')
    )
    # Adam's second step, with decays of 0.9 and 0.95.
    expected = jax.tree.map(
        lambda p, m, s, rate=rate: (
            p - rate * (m / 0.19) / (np.sqrt(s / 0.0975) + 1e-8)
        ), first.params[role], mean, square,
    )
    assert_trees_close(second.params[role], expected, rtol=1e-5, atol=1e-6)


def test_untrainable_parameters_stay_fixed():
  params = {'up': {'kernel': jnp.ones((2, 2))}, 'down': {'kernel': jnp.ones(2)}}
  config = optim.OptimizerConfig(trainable='^up/')
  tx = optim.make_optimizer(config, total=10)
  update, _ = tx.update(
      params, tx.init(params), params,
      clocks={'step': jnp.int32(5), 'updates': jnp.int32(5)},
  )
  assert float(jnp.abs(update['up']['kernel']).min()) > 0
  assert float(jnp.abs(update['down']['kernel']).max()) == 0
  typo = optim.make_optimizer(optim.OptimizerConfig(trainable='^Up/'), total=10)
  with pytest.raises(ValueError, match=r"trainable='\^Up/': .* no parameter"):
    typo.init(params)


@pytest.mark.parametrize('muon', ['', '^up/'])
def test_the_first_moment_may_be_kept_in_bfloat16(muon):
  params = {n: {'kernel': jnp.ones((2, 2))} for n in ('up', 'down')}
  tx = optim.make_optimizer(
      optim.OptimizerConfig(
          moment_dtype='bfloat16', muon=muon, weight_decay=0.0
      ), total=10,
  )
  moves, state = tx.update(
      params, tx.init(params), params,
      clocks={'step': jnp.int32(5), 'updates': jnp.int32(5)},
  )
  kept = [tree for _, tree in optax.tree.get_all_with_path(state, 'mu')]
  assert [x.dtype for x in jax.tree.leaves(kept)] == [jnp.bfloat16] * 2
  for move in jax.tree.leaves(moves):
    assert move.dtype == jnp.float32 and (move < 0).all()


def test_muon_makes_the_steps_of_kernels_orthogonal():
  shapes = {
      'layers': {'fc': {'kernel': (3, 8, 16), 'bias': (3, 16)}},
      'out': {'kernel': (8, 8)},
  }
  gradient = jax.tree.map(
      lambda s: jax.random.normal(jax.random.key(s[-1]), s), shapes,
      is_leaf=lambda s: isinstance(s, tuple),
  )

  def step(gradient, **kwargs):
    config = optim.OptimizerConfig(
        lr=1.0, weight_decay=0.0, clip=0.0, warmup=0.0, **kwargs
    )
    tx = optim.make_optimizer(config, total=10)
    clocks = {'step': jnp.int32(0), 'updates': jnp.int32(0)}
    return tx.update(gradient, tx.init(gradient), gradient, clocks=clocks)[0]

  found, adam = step(gradient, muon='^layers/'), step(gradient)
  kernel = found['layers']['fc']['kernel']
  sizes = jnp.linalg.svd(kernel, compute_uv=False) / (0.2 * 16 ** 0.5)
  assert sizes.min() > 0.5 and sizes.max() < 1.3
  # Downhill, as close to the gradient as such a matrix can be.
  for block, g in zip(
      kernel, gradient['layers']['fc']['kernel'], strict=True
  ):
    u, _, v = jnp.linalg.svd(g, full_matrices=False)
    assert -(block * (u @ v)).sum() > 0.95 * jnp.linalg.norm(block) * 8 ** 0.5
  # Blocks do not know of each other.
  alone = step(
      {'layers': {'kernel': gradient['layers']['fc']['kernel'][1]}},
      muon='^layers/',
  )
  np.testing.assert_allclose(alone['layers']['kernel'], kernel[1], atol=1e-6)
  # What is no kernel, or not named, moves as without Muon, by signs at first.
  for a, b in (
      (found['out']['kernel'], adam['out']['kernel']),
      (found['layers']['fc']['bias'], adam['layers']['fc']['bias']),
  ):
    np.testing.assert_array_equal(jnp.sign(a), jnp.sign(b))
    np.testing.assert_allclose(a / a.ravel()[0], b / b.ravel()[0], rtol=1e-5)
  with pytest.raises(ValueError, match=r"muon='bias': .* of no kernel"):
    step(gradient, muon='bias')


@pytest.mark.parametrize(
    'fields', [{'muon': '^up/'}, {'trainable': '^up/'}], ids=str
)
def test_parameters_of_two_optimizers_are_sharded_too(teacher, fields):
  one = make_parts(teacher, mesh=dict(data=8), **fields)
  many = make_parts(
      teacher, rules='fsdp_tp', mesh=dict(data=2, fsdp=2, tensor=2), **fields
  )
  moment = jax.tree.leaves(many[2].opt['critic'])
  assert any(not m.sharding.is_fully_replicated for m in moment)
  a, b = run_steps(one, 0, 6)[-1], run_steps(many, 0, 6)[-1]
  assert_trees_close(a.params, b.params, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('unroll', [True, False])
def test_micro_batches_match_the_full_batch(teacher, unroll):
  whole = run_steps(make_parts(teacher), 0, 6)[-1]
  parts = make_parts(
      teacher, micro_batches=4, mesh=dict(data=8)
  )
  parts[1]._unroll = unroll
  split = run_steps(parts, 0, 6)[-1]
  assert_trees_close(whole.params, split.params, rtol=2e-5, atol=1e-6)
  assert_trees_close(whole.aux, split.aux, rtol=1e-5, atol=1e-6)


def test_sharded_equals_unsharded(teacher):
  one = make_parts(teacher, mesh=dict(data=8))
  many = make_parts(
      teacher, rules='fsdp_tp', mesh=dict(data=2, fsdp=2, tensor=2)
  )
  kernel = many[2].params['critic']['up']['kernel']
  assert len({str(s.index) for s in kernel.addressable_shards}) == 4
  moment = jax.tree.leaves(many[2].opt['critic'])
  assert any(not m.sharding.is_fully_replicated for m in moment)
  a, b = run_steps(one, 0, 6)[-1], run_steps(many, 0, 6)[-1]
  assert_trees_close(a.params, b.params, rtol=2e-5, atol=1e-6)
  assert_trees_close(a.ema, b.ema, rtol=2e-5, atol=1e-6)


def test_a_stage_may_have_rules_of_its_own(teacher, tmp_path):
  config = toy_method.make_config(teacher, mesh=dict(data=2, fsdp=4))
  (stage,) = stages.parse(config)
  assert stage.rules == 'dp'
  config['stages']['run']['rules'] = 'fsdp'
  (own,) = stages.parse(config)
  # They are no part of what an artefact was made from.
  assert own.rules == 'fsdp' and own.config == stage.config
  config['stages']['run']['rules'] = 'fsd'
  with pytest.raises(ValueError, match="'run': rules='fsd': expected one of"):
    stages.run(config, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()


def test_adapter_trains_only_the_correction(teacher, tmp_path):
  states = run_steps(make_parts(teacher), 0, 6)
  adapter = states[-1].params['adapter']
  assert set(adapter['up']) == {'kernel_a', 'kernel_b'}
  assert adapter['up']['kernel_a'].shape == (4, 2)
  assert np.abs(adapter['up']['kernel_b']).max() > 0
  stages.run(toy_method.make_config(teacher), tmp_path / 'w')
  base = checkpoint.load_params(teacher)
  merged = export_of(tmp_path / 'w', 'adapter')
  assert jax.tree.structure(base) == jax.tree.structure(merged)
  delta = merged['up']['kernel'] - base['up']['kernel']
  assert np.linalg.matrix_rank(delta, tol=1e-6) == 2
  np.testing.assert_array_equal(merged['up']['bias'], base['up']['bias'])


def test_resume_is_bitwise(teacher, tmp_path, monkeypatch):

  def collect(self, params, batch, step):
    """Rewards from outside, of what the student makes of a batch."""
    gain = np.asarray(params['student']['up']['kernel']).mean()
    noise = host_rng(0, step).normal(size=batch['x'].shape)
    return batch | {'x': (batch['x'] * gain + noise).astype(np.float32)}

  monkeypatch.setattr(toy_method.Toy, 'collect', collect)
  straight = toy_method.make_config(teacher, steps=12, save_every=5)
  stages.run(straight, tmp_path / 'a')
  stop_after(monkeypatch, 8)
  with pytest.raises(Killed):
    stages.run(straight, tmp_path / 'b')
  stop_after(monkeypatch, 100)
  stages.run(straight, tmp_path / 'b')
  for role in ('student', 'critic', 'adapter'):
    jax.tree.map(
        np.testing.assert_array_equal,
        export_of(tmp_path / 'a', role), export_of(tmp_path / 'b', role),
    )
  a, b = (losses_by_step(tmp_path / name) for name in 'ab')
  assert {k: v for k, v in a.items() if k > 5} == {
      k: v for k, v in b.items() if k > 5
  }


def test_export_loads_in_one_line_of_orbax(teacher, tmp_path):
  stages.run(toy_method.make_config(teacher), tmp_path / 'w')
  path = tmp_path / 'w/run/export/student-12'
  params = ocp.StandardCheckpointer().restore(path / 'params')
  assert set(params) == {'up', 'down'}
  assert params['up']['kernel'].shape == (4, 8)
  assert json.loads((path / 'model.json').read_text())['family'] == 'mlp'
  model, loaded = checkpoint.load(path)
  assert model.family == 'mlp'
  jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_a_planted_nan_leaves_what_replays_it(teacher, tmp_path):
  config = toy_method.make_config(teacher, bad=4, save_every=2, steps=20)
  for _ in range(2):  # run again, it stops at the same step
    with pytest.raises(hooks.NotFinite, match='is not finite at step') as info:
      stages.run(config, tmp_path / 'w')
    told = json.loads((tmp_path / 'w/run/nan.json').read_text())
    assert f'step {told["step"]};' in str(info.value)
  assert not stages.read_record(tmp_path / 'w/run')['complete']
  # The batch that it names has the planted row, and the batches before not.
  with np.load(tmp_path / 'w/run/nan-0.npz') as arrays:
    batch = dict(arrays)
  step = told['step']
  np.testing.assert_array_equal(
      batch['index'], np.arange(32 * step, 32 * step + 32)
  )
  assert np.isnan(batch['x']).any()
  # The last checkpoint is from before it and good.
  assert (step, told['checkpoint']) == (3, 2)
  parts = make_parts(teacher, steps=20)
  method, programs, state, frozen, mesh = parts
  saver = checkpoint.Checkpointer(
      tmp_path / 'w/run/checkpoints', save_every=2, keep=2
  )
  assert saver.latest_step == told['checkpoint']
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      state,
  )
  batches = pipeline.make_batches(
      toy_method.Numbers(128, bad=4), batch_size=32, seed=0, process_index=0,
      process_count=1,
  )
  iterator = pipeline.make_iterator(
      toy_method.Numbers(128, bad=4), batch_size=32, seed=0, process_index=0,
      process_count=1,
  )
  state = saver.restore(abstract, iterator)
  saver.close()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
  # From there to the step, with its batch from the file: the same metrics.
  for now in range(told['checkpoint'], step + 1):
    updates = method.updates(now)
    rows = batch if now == step else batches[now]
    state, outputs = programs(
        updates, state, frozen, sharding.place_batch(rows, mesh)
    )
    bad = [k for k, v in outputs.items() if not np.isfinite(v.compute())]
    assert bool(bad) == (now == step)
  assert sorted(bad) == sorted(told['metrics'])
  assert told['updates'] == [u.name for u in updates]
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
  assert told['key'] == jax.random.key_data(key).tolist()


def test_every_second_of_a_run_belongs_to_a_part(teacher, tmp_path):
  config = toy_method.make_config(teacher, save_every=4)
  config['stages']['run'] |= dict(
      heldout=dict(source='numbers', count=64), eval_every=6
  )
  records = stages.run(config, tmp_path / 'w')
  sums = dict.fromkeys(metrics.Clock.PARTS, 0.0)
  for values in records_of(tmp_path / 'w'):
    for part in sums:
      sums[part] += values.get(f'time/{part}_seconds', 0.0)
    if 'critic/loss' in values:
      assert 0 < values['memory/host_peak_gib'] < 1000
      assert 'time/mfu' not in values  # the peak of a CPU is not known
  assert min(sums.values()) > 0, sums
  # The rest is the export.
  whole = records['run']['seconds']
  assert 0.5 * whole < sum(sums.values()) < whole + 0.1


def test_a_run_goes_on_with_another_mesh(teacher, tmp_path, monkeypatch):
  seen = []
  place = sharding.place_batch

  def watch(batch, mesh):
    seen.append((dict(mesh.shape), batch['index'].tolist()))
    return place(batch, mesh)

  monkeypatch.setattr(sharding, 'place_batch', watch)
  make_mesh = sharding.make_mesh
  all_devices = jax.devices()

  def run(workdir, steps, mesh, rules='dp'):
    count = math.prod(mesh.values())
    monkeypatch.setattr(
        sharding, 'make_mesh', lambda s: make_mesh(s, all_devices[:count])
    )
    seen.clear()
    config = toy_method.make_config(
        teacher, save_every=4, mesh=mesh, rules=rules
    )
    stop_after(monkeypatch, steps if steps < 12 else 100)
    if steps < 12:
      with pytest.raises(Killed):
        stages.run(config, tmp_path / workdir)
    else:
      stages.run(config, tmp_path / workdir)
    return [index for _, index in seen]

  straight = run('a', 12, dict(data=8))
  assert straight == [list(range(32 * i, 32 * i + 32)) for i in range(12)]
  # One device, then eight with sharded parameters, then four.
  assert run('b', 6, dict(data=1)) == straight[:6]
  assert run('b', 5, dict(data=4, fsdp=2), 'fsdp') == straight[4:9]
  assert run('b', 12, dict(data=2, tensor=2), 'fsdp_tp') == straight[8:]
  for role in ('student', 'critic', 'adapter'):
    assert_trees_close(
        export_of(tmp_path / 'a', role), export_of(tmp_path / 'b', role),
        rtol=2e-5, atol=1e-6,
    )


@pytest.mark.parametrize(
    'first, steps, recorded', [(2, 3, [2, 3, 4]), (6, 9, [6, 7]), (2, 0, [])]
)
def test_a_profile_holds_the_steps_of_its_window(
    tmp_path, monkeypatch, first, steps, recorded
):
  on, seen = [], []
  monkeypatch.setattr(jax.profiler, 'start_trace', on.append)
  monkeypatch.setattr(jax.profiler, 'stop_trace', on.pop)
  profile = hooks.Profile(tmp_path, first, steps)
  for step in range(8):
    profile.before(step)
    seen += [step] * len(on)
    profile.after(step + 1, {})
  profile.close()
  assert seen == recorded and not on


@pytest.mark.parametrize('killed', [False, True])
def test_a_profile_closes_with_the_run(teacher, tmp_path, monkeypatch, killed):
  config = toy_method.make_config(teacher, steps=4)
  config['stages']['run'] |= dict(profile_first=2, profile_steps=9)
  if killed:
    stop_after(monkeypatch, 3)
  with pytest.raises(Killed) if killed else contextlib.nullcontext():
    stages.run(config, tmp_path / 'w')
  assert list((tmp_path / 'w/run/profile').rglob('*.xplane.pb'))


def test_no_more_than_two_steps_are_on_their_way():
  finished = []

  class Metric:

    def __init__(self, step):
      self.block_until_ready = lambda: finished.append(step)

  throttle = hooks.Throttle()
  for step in range(6):
    throttle.add({'critic/loss': Metric(step)})
    assert finished == list(range(step - 1))


def test_utilisation_counts_the_updates_since_the_last_record(
    teacher, tmp_path, monkeypatch
):
  monkeypatch.setitem(flops.PEAK_FLOPS, 'cpu', 1e6)
  config = toy_method.make_config(teacher, steps=7)
  config['stages']['run'] |= dict(log_every=3)
  stages.run(config, tmp_path / 'w')
  done = {
      values['step']: values['time/mfu'] * 8 * 1e6 * sum(
          values[f'time/{part}_seconds'] for part in metrics.Clock.PARTS
      ) for values in records_of(tmp_path / 'w') if 'time/mfu' in values
  }
  # Of 32 examples: 128 FLOPs forward, twice that backward.
  update = 3 * 32 * 128
  # The critic at every step; student and adapter at 0 and 5, too.
  assert done == pytest.approx({3: 5 * update, 6: 5 * update, 7: update})


def test_a_step_sees_what_is_collected_on_the_host(
    teacher, tmp_path, monkeypatch
):
  collected, seen = [], []

  def collect(self, params, batch, step):
    collected.append(jax.device_get((step, params, batch['index'])))
    x = host_rng(7, step).normal(size=batch['x'].shape)
    return batch | {'x': x.astype(np.float32)}

  def watch(self, updates, state, frozen, batch):
    seen.append(jax.device_get((state.params, batch)))
    return call(self, updates, state, frozen, batch)

  call = train.Programs.__call__
  monkeypatch.setattr(toy_method.Toy, 'collect', collect)
  monkeypatch.setattr(train.Programs, '__call__', watch)
  stages.run(toy_method.make_config(teacher, steps=4), tmp_path / 'w')
  assert [step for step, *_ in collected] == [0, 1, 2, 3]
  for (step, params, index), (before, batch) in zip(
      collected, seen, strict=True
  ):
    # All roles as they are before the step, and the examples of the step.
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert params.keys() == {'student', 'critic', 'adapter'}
    np.testing.assert_array_equal(index, np.arange(32 * step, 32 * step + 32))
    np.testing.assert_array_equal(batch['index'], index)
    np.testing.assert_array_equal(
        batch['x'], host_rng(7, step).normal(size=(32, 4)).astype(np.float32)
    )
  kernels = [params['critic']['up']['kernel'] for _, params, _ in collected]
  assert all(np.any(a != b) for a, b in itertools.pairwise(kernels))
  draws = [host_rng(*x).integers(1 << 60) for x in ((7, 0), (7, 1), (8, 0))]
  assert len(set(draws)) == 3


def test_heldout_batches_are_collected_too(teacher, tmp_path, monkeypatch):
  steps = []

  def collect(self, params, batch, step):
    steps.append(step)
    return batch

  monkeypatch.setattr(toy_method.Toy, 'collect', collect)
  config = toy_method.make_config(teacher, steps=2)
  config['stages']['run'] |= dict(
      heldout=dict(source='numbers', count=96), eval_every=2, eval_batches=3
  )
  stages.run(config, tmp_path / 'w')
  assert steps == [0, 0, 0, 0, 1, 2, 2, 2]


def test_heldout_losses_are_told_that_nothing_is_trained(
    teacher, tmp_path, monkeypatch
):
  told, loss = [], toy_method.Toy.student_loss

  def watch(self, params, inputs, **statics):
    told.append(inputs.training)
    return loss(self, params, inputs, **statics)

  monkeypatch.setattr(toy_method.Toy, 'student_loss', watch)
  config = toy_method.make_config(teacher, steps=1)
  stages.run(config, tmp_path / 'trained')
  assert set(told) == {True}
  config['stages']['run'] |= dict(
      heldout=dict(source='numbers', count=32), eval_every=1
  )
  stages.run(config, tmp_path / 'looked_at')
  assert set(told) == {True, False}


def test_a_run_that_goes_on_has_each_record_once(
    teacher, tmp_path, monkeypatch
):
  config = toy_method.make_config(teacher, steps=8, save_every=4)
  config['stages']['run'] |= dict(
      heldout=dict(source='numbers', count=96), eval_every=4
  )
  done = []  # what reached the disk, or a bucket
  flush, save = metrics.JsonlWriter.flush, checkpoint.Checkpointer.save

  def watch_flush(self):
    done.append('records')
    flush(self)

  def watch_save(self, state, *args, **kwargs):
    done.append(int(state.step))
    save(self, state, *args, **kwargs)

  monkeypatch.setattr(metrics.JsonlWriter, 'flush', watch_flush)
  monkeypatch.setattr(checkpoint.Checkpointer, 'save', watch_save)
  for steps in 2, 6:
    stop_after(monkeypatch, steps)
    with pytest.raises(Killed):
      stages.run(config, tmp_path / 'w')
  stop_after(monkeypatch, 100)
  stages.run(config, tmp_path / 'w')
  # Killed once more, when all but the export was there.
  shutil.rmtree(tmp_path / 'w/run/export')
  record = json.loads((tmp_path / 'w/run/stage.json').read_text())
  (tmp_path / 'w/run/stage.json').write_text(
      json.dumps(record | {'complete': False})
  )
  stages.run(config, tmp_path / 'w')
  evaluated = [
      r['step'] for r in records_of(tmp_path / 'w')
      if any(k.startswith('heldout/') for k in r)
  ]
  assert evaluated == [0, 4, 8]
  for step in 4, 8:
    i = done.index(step)
    assert i and done[i - 1] == 'records'


def test_a_signal_is_heard_though_saves_have_numbers_too(
    teacher, tmp_path, monkeypatch
):
  """JAX waits for the number after the last one that anybody asked for."""
  last, point = [100], [None]

  def reached(number):
    last[0] = number
    return number == point[0]

  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
      multihost_utils, 'reached_preemption_sync_point', reached
  )
  monkeypatch.setattr(hooks, '_asked', itertools.count(101))
  save = checkpoint.Checkpointer.save

  def notice(self, state, *args, **kwargs):
    save(self, state, *args, **kwargs)
    point[0] = point[0] or last[0] + 1

  monkeypatch.setattr(checkpoint.Checkpointer, 'save', notice)
  config = toy_method.make_config(teacher, save_every=5)
  with pytest.raises(hooks.Preempted, match='saved at step 6'):
    stages.run(config, tmp_path / 'w')
  stages.run(config, tmp_path / 'w')


@pytest.mark.parametrize('field', ['log_every', 'save_every', 'keep'])
def test_intervals_are_at_least_a_step(teacher, tmp_path, field):
  config = toy_method.make_config(teacher)
  config['stages']['run'][field] = 0
  with pytest.raises(ValueError, match=f'{field}=0 must be at least 1'):
    stages.run(config, tmp_path / 'w')


@pytest.mark.parametrize('where', ['data', 'method'])
def test_an_entry_without_a_name(teacher, tmp_path, where):
  config = toy_method.make_config(teacher)
  key = {'data': 'source', 'method': 'name'}[where]
  del config['stages']['run'][where][key]
  with pytest.raises(ValueError, match=f"{where}=.* lacks '{key}'"):
    stages.run(config, tmp_path / 'w')


def test_batch_that_the_mesh_does_not_divide(teacher, tmp_path):
  config = toy_method.make_config(teacher, micro_batches=3)
  with pytest.raises(ValueError, match='batch_size=32 .*multiple of 24'):
    stages.run(config, tmp_path / 'w')
