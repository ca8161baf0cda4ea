# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The chains of configs/dmd2_edm.py, and what can happen to them."""

from __future__ import annotations

import json
import pathlib
import runpy
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from dd_jax import (
  build,
  checkpoint,
  evaluate_fid,
  hooks,
  plan,
  released,
  sharding,
  stages,
  train,
)
from dd_jax import config as config_lib
from dd_jax.data import toys
from tests.command import run_main

ROOT = pathlib.Path(__file__).parent.parent
FILE = 'configs/dmd2_edm.py'


def config_of(arg):
  config = runpy.run_path(str(ROOT / FILE))['get_config'](arg)
  return json.loads(json.dumps(config.to_dict()))


def toy(steps, **fields):
  """A short run in the plane with small networks."""
  config = config_of('toy2d')
  by_name = config['stages']
  by_name['teacher'] |= dict(steps=2, batch_size=32)
  by_name['student'] |= dict(
      steps=steps, batch_size=32, log_every=1, **fields
  )
  for role in by_name['student']['roles'].values():
    net = role['model'].get('denoiser', role['model'])
    net |= dict(width=16, blocks=2)
  by_name['teacher']['roles']['teacher']['model'] |= dict(width=16, blocks=2)
  by_name['evaluate'] |= dict(samples=200)
  return config


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Compiling for several is what takes time."""
  make = sharding.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda sizes, devices=None: make(
        sizes, devices or jax.devices()[:1]
    ))
    yield


@pytest.fixture(scope='module')
def images(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('images')
  return workdir, stages.run(config_of('tiny'), workdir)


def test_all_stages_end_in_a_report(images):
  workdir, records = images
  assert set(records) == {'judge', 'teacher', 'student', 'evaluate'}
  report = json.loads((workdir / 'report/report.json').read_text())
  rows = {row['name']: row['steps'] for row in report['rows']}
  assert rows == {
      'teacher': 35, 'student_1': 1, 'teacher_1': 1, 'mixed_pixels': 0
  }
  assert set(report['ratios']) == {'student_1', 'teacher_1', 'mixed_pixels'}
  for name in ('samples.png', 'interpolation.png', 'curves.png', 'rows.png'):
    assert (workdir / 'report' / name).read_bytes().startswith(b'\x89PNG')
  assert report['environment']['student_1_levels'] == [999]
  text = (workdir / 'report/report.md').read_text()
  assert 'student_1' in text and 'onestep' not in text
  exports = sorted(p.name for p in (workdir / 'student/export').iterdir())
  assert exports == ['critic-8', 'student-8']
  model, params = checkpoint.load(workdir / 'student/export/critic-8')
  assert set(params) == {'denoiser', 'head'} and 'logits' in model.fns


def test_the_planner_knows_the_programs():
  found = [(p.stage, p.name, p.calls) for p in plan.programs(
      config_of('tiny'), plan.make_target('cpu:8')
  ) if p.stage in ('student', 'evaluate')]
  assert found == [
      ('student', 'initial state', 1), ('student', 'step student+critic', 2),
      ('student', 'step critic', 6), ('evaluate', 'teacher', 1),
      ('evaluate', 'student_1', 1), ('evaluate', 'teacher_1', 1),
  ]


@pytest.fixture(scope='module')
def points(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('points')
  return workdir, stages.run(toy(11, save_every=3, keep=10), workdir)


def test_points_end_in_a_curve(points):
  workdir, _ = points
  result = json.loads((workdir / 'report/toy.json').read_text())
  assert [row['name'] for row in result['rows']] == [
      'real', 'exact', 'teacher', 'teacher_1', 'student'
  ]
  by_name = {row['name']: row for row in result['rows']}
  assert by_name['exact']['modes'] == by_name['real']['modes'] == 8
  # Saves are of steps; the student moves at 0, 5 and 10.
  assert [(c['step'], c['updates']) for c in result['curve']] == [
      (0, 0), (3, 1), (6, 2), (9, 2), (11, 3)
  ]
  first, last = result['curve'][0], result['curve'][-1]
  assert first['sliced_w1'] == by_name['teacher_1']['sliced_w1']
  assert last['sliced_w1'] == by_name['student']['sliced_w1']
  for name in ('points', 'curve'):
    with Image.open(workdir / f'report/{name}.png') as picture:
      assert picture.size[0] > 500
  meta = checkpoint.describe(workdir / 'student/export/student-11')
  assert meta['source']['frozen'] == {}  # its teacher has no files


def test_resume_within_a_cycle_is_bitwise(points, tmp_path, monkeypatch):
  workdir, records = points
  config = toy(11, save_every=3, keep=10)
  shutil.copytree(workdir / 'teacher', tmp_path / 'teacher')

  class Killed(Exception):
    pass

  add, calls = hooks.Throttle.add, []

  def killing(self, outputs):
    calls.append(1)
    if len(calls) == 8:
      raise Killed
    add(self, outputs)

  monkeypatch.setattr(hooks.Throttle, 'add', killing)
  with pytest.raises(Killed):
    stages.run(config, tmp_path)
  saved = sorted(p.name for p in (tmp_path / 'student/checkpoints').iterdir()
                 if p.name.isdigit())
  assert saved[-1] == '6'  # after one critic's update of five
  monkeypatch.setattr(hooks.Throttle, 'add', add)
  stages.run(config, tmp_path, only='student')
  for role in ('student', 'critic'):
    jax.tree.map(np.testing.assert_array_equal, *(
        checkpoint.load_params(d / f'student/export/{role}-11')
        for d in (workdir, tmp_path)
    ))
  assert json.loads((tmp_path / 'student/stage.json').read_text())['hash'] == (
      records['student']['hash']
  )


@pytest.mark.slow
def test_a_run_that_diverges_stops(points, tmp_path):
  shutil.copytree(points[0] / 'teacher', tmp_path / 'teacher')
  config = toy(6)
  config['stages']['student']['roles']['critic']['optimizer']['lr'] = 1e30
  with pytest.raises(hooks.NotFinite, match='is not finite at'):
    stages.run(config, tmp_path)


def test_networks_that_do_not_fit(points, tmp_path):
  shutil.copytree(points[0] / 'teacher', tmp_path / 'teacher')
  config = toy(6)
  config['stages']['student']['frozen'] = {'teacher': {}}
  with pytest.raises(ValueError, match='frozen.teacher needs a path or a mod'):
    stages.run(config, tmp_path)
  config = toy(6)
  config['stages']['student']['frozen'] = {}
  with pytest.raises(ValueError, match="frozen network 'teacher'"):
    stages.run(config, tmp_path, redo=['student'])


@pytest.mark.parametrize(
    'arg', ['imagenet64', 'imagenet64_nogan', 'imagenet64,source=tfds,name=x']
)
def test_configs_from_released_files(arg, tmp_path):
  config = config_of(arg)
  kinds = {'convert': released.ConvertConfig, 'train': train.TrainConfig,
           'fid': evaluate_fid.FidConfig}
  parsed = stages.parse(config)
  for stage in parsed:
    fields = {k: v for k, v in stage.config.items() if k != 'seed'}
    config_lib.make(kinds[stage.kind], fields, stage.name)
  student = config['stages']['student']
  nets = {
      name: build.build_model(role['model'])
      for name, role in student['roles'].items()
  }
  teacher = build.build_model(dict(
      name='edm_unet', **released.known_fields(released.convert_config(
          {k: v for k, v in config['stages']['teacher'].items()
           if k != 'kind'}, 'teacher'
      ))
  ))
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)  # noqa: E731
  want = teacher.abstract()
  assert sum(x.size for x in jax.tree.leaves(want)) == 295_899_267
  assert shapes(nets['student'].abstract()) == shapes(want)
  critic = nets['critic'].abstract()
  assert shapes(critic.pop('denoiser')) == shapes(want)
  head = sum(x.size for x in jax.tree.leaves(critic))
  # The count of the paper's discriminator.
  assert head == (0 if arg.endswith('nogan') else 18_879_745)
  warmup = student['roles']['student']['optimizer']['warmup']
  assert int(warmup * student['steps']) == 71
  with pytest.raises(FileNotFoundError) as info:
    stages.run(config, tmp_path)
  message = str(info.value)
  for text in ('edm-imagenet-64x64-cond-adm.pkl', 'NVlabs/edm', 'fid-refs',
               '--family=edm_unet', 'pt_inception-2015-12-05'):
    assert text in message
  assert ('  imagenet/train\n' in message) == ('tfds' not in arg)


def test_the_toys_network_is_that_of_the_data():
  frozen = config_of('toy2d')['stages']['student']['frozen']['teacher']['model']
  board = toys.checkerboard(frozen['std'])
  np.testing.assert_allclose(sorted(frozen['means']), sorted(
      board.means.tolist()
  ), atol=1e-12)
  np.testing.assert_allclose(frozen['sigma_data'], board.sigma_data)


def test_arguments_that_are_refused():
  for arg, message in (
      ('digitz', "expected one of .*'digits'"),
      ('digits,path=x', 'digits takes no fields'),
      ('imagenet64,path=x', 'expected source='),
  ):
    with pytest.raises(ValueError, match=message):
      config_of(arg)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1, 2])
def test_the_student_nears_the_data(tmp_path, seed):
  result = run_main(
      tmp_path / 'cache', f'--config={FILE}:toy2d', f'--workdir={tmp_path}/w',
      f'--config.seed={seed}', '--config.stages.student.steps=2500',
  )
  assert result.returncode == 0, result.stderr
  found = json.loads((tmp_path / 'w/report/toy.json').read_text())
  assert found['curve'][-1]['updates'] == 500
  assert found['over_initial'] < 0.4
