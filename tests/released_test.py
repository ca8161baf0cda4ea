# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs from released files: what is missing, full sizes, and the whole chain.

The chain is that of the config `d16`, with small networks in files of the same
names and layout.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from dd_jax import (
  build,
  checkpoint,
  evaluate_fid,
  generate,
  optim,
  programs,
  registry,
  released,
  sharding,
  stages,
  train,
)
from dd_jax import config as config_lib
from dd_jax.convert import table, writers
from dd_jax.method import Inputs, Role
from tests.golden import golden_cases

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = 'configs/dd_var.py'
KINDS = {
    'convert': released.ConvertConfig, 'generate': generate.GenerateConfig,
    'train': train.TrainConfig, 'fid': evaluate_fid.FidConfig,
}
ARGS = {
    'd16': ['teacher', 'vae', 'inception', 'lpips', 'trajectories', 'student',
            'evaluate_teacher', 'evaluate_1', 'evaluate_2'],
    'd30': ['teacher', 'vae', 'inception', 'evaluate'],
    'd16_released': ['student', 'vae', 'inception', 'evaluate_1',
                     'evaluate_2'],
}
ARGS |= {'d20': ARGS['d16'], 'd24': ARGS['d16'], 'd36': ARGS['d30']}
ARGS |= {f'd{n}_released': ARGS['d16_released'] for n in (20, 24)}
PATCH_NUMS = (1, 2, 3, 4)  # of the golden networks


def config_of(arg, folder='weights'):
  config = runpy.run_path(str(ROOT / CONFIG))['get_config'](arg)
  config.weights = str(folder)
  return config


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def random(model, seed):
  """Weights of ordinary size without the time that `init` compiles."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      values /= np.sqrt(np.prod(leaf.shape[:-1]) / 2)
    elif path[-1].key in ('var', 'scale') or path[-1].key[:4] == 'head':
      values = 1 + 0.1 * np.abs(values)
    else:
      values *= 0.1
    return values.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, model.abstract())


def save(path, tensors):
  specs = {k: (v.shape, v.dtype) for k, v in tensors.items()}
  writers.write(path, specs, tensors.items())


def laid_out(family, seed, **fields):
  """Random weights under the names and shapes of a released file."""
  entry = registry.get('families', family)
  model = registry.get('models', entry.model)(fields)
  return table.invert(entry.rows(model.config), random(model, seed))


def write_weights(folder):
  """Small networks under the names of released files."""
  folder.mkdir()
  golden = ROOT / 'tests/golden'
  shutil.copy(golden / 'var_tiny.pth', folder / 'var_d16.pth')
  shutil.copy(golden / 'dd_var_tiny.pth', folder / 'var-d16.pth')
  save(folder / 'vae_ch160v4096z32.pth', laid_out(
      'var_vqvae', 3, image_size=16, ch=8, ch_mult=(1, 1, 2), res_blocks=1,
      z_channels=8, vocab_size=64, patch_nums=PATCH_NUMS,
  ) | {'quantize.ema_vocab_hit_SV': np.zeros((4, 64), np.float32)})
  save(folder / 'pt_inception-2015-12-05-6726825d.pth',
       laid_out('inception', 0, slim=16))
  lpips = laid_out('lpips', 1, slim=64)
  heads = {k: v for k, v in lpips.items() if k.startswith('lin')}
  save(folder / 'vgg.pth', heads)
  save(folder / 'vgg16-397923af.pth', {
      **{k: v for k, v in lpips.items() if k not in heads},
      'classifier.6.bias': np.zeros(3, np.float32),
  })
  features = np.random.default_rng(2).normal(size=(200, 2048 // 16))
  save(folder / 'statistic.pth', {
      'm': features.mean(0), 's': np.cov(features, rowvar=False),
  })


def shrink(config):
  """Sizes of the small networks; stages and settings stay those of d16."""
  values = config.to_dict()
  by_name = values['stages']
  by_name['vae']['config']['patch_nums'] = PATCH_NUMS
  by_name['inception']['config']['image_size'] = 75
  for name, stage in by_name.items():
    if stage['kind'] == 'fid':
      stage |= dict(samples=12, batch_size=8)
      if 'split' in stage:
        stage |= dict(split=2, t_list=(0, 2)[:len(stage['t_list'])])
    assert stage['kind'] in KINDS, name
  if 'trajectories' in by_name:
    by_name['trajectories'] |= dict(pairs=24, shard_size=16, batch_size=8)
    student = by_name['student']
    student['method'] |= dict(t_set=(0, 2), split=2, perceptual_batch=8)
    student['roles']['student']['model'] |= dict(
        num_classes=10, depth=2, width=64, heads=4, patch_nums=PATCH_NUMS,
        vocab_size=64, code_dim=8,
    )
    student |= dict(batch_size=8, steps=2)
  return values


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp('files') / 'weights'
  write_weights(folder)
  return folder


@pytest.fixture(scope='module')
def chain(weights, tmp_path_factory):
  """The finished chain of d16: workdir and records."""
  workdir = tmp_path_factory.mktemp('chain')
  config = shrink(config_of('d16', weights))
  # One device, and one network for all scores: compiling is what takes time.
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  on_mesh, first = evaluate_fid.on_mesh, []

  def once(*args):
    first.extend([] if first else [on_mesh(*args)])
    return first[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate_fid, 'on_mesh', once)
    patch.setattr(sharding, 'make_mesh', make_mesh)
    return config, workdir, stages.run(config, workdir)


@pytest.mark.parametrize('arg', ARGS)
def test_configs_are_well_formed(arg):
  config = json.loads(json.dumps(config_of(arg, '/some/where').to_dict()))
  assert set(config['stages']) == set(ARGS[arg])
  made = {}
  for stage in stages.parse(config):
    values = {k: v for k, v in stage.config.items() if k != 'seed'}
    made[stage.name] = config_lib.make(KINDS[stage.kind], values, stage.name)
  for stage in made.values():
    if isinstance(stage, released.ConvertConfig):
      registry.find('families', stage.family)
      assert all(
          pathlib.Path(p).parent == pathlib.Path('/some/where')
          and pathlib.Path(p).name in released.RELEASES for p in stage.paths
      )
    if isinstance(stage, evaluate_fid.FidConfig):
      assert stage.reference.startswith('/some/where/')
      assert stage.samples == 50_000
  if 'trajectories' in made:
    pairs = made['trajectories']
    assert (pairs.cfg, pairs.top_k, pairs.top_p) == (2.0, 900, 0.95)
    assert pairs.shard_size % pairs.batch_size == 0


@pytest.mark.parametrize('name, fields', [('d16', 'path=x'), ('d17', '')])
def test_arguments_that_are_refused(name, fields):
  with pytest.raises(ValueError, match='takes no fields|expected one of'):
    config_of(f'{name},{fields}')


@pytest.mark.parametrize('depth, count, split', [
    (16, 328_165_664, 5), (20, 635_399_088, 4), (24, 1_092_478_560, 4),
])
def test_full_size_students(depth, count, split):
  stage = config_of(f'd{depth}').to_dict()['stages']['student']
  model = build.build_model(stage['roles']['student']['model'])
  assert size(model.abstract()) == count
  assert model.config.offsets[-1] == 680
  assert (stage['method']['t_set'], stage['method']['split']) == (
      (0, split), split
  )


def full_size(depth, **fields):
  return build.build_model(dict(
      name='var', num_classes=1000, depth=depth, width=64 * depth, heads=depth,
      patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), vocab_size=4096,
      code_dim=32, unroll=False,
  ) | fields)


def full_vae(**fields):
  return build.build_model(dict(
      name='vqvae', image_size=256, ch=160, ch_mult=(1, 1, 2, 2, 4),
      z_channels=32, vocab_size=4096,
      patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
  ) | fields)


@pytest.mark.parametrize('arg, side', [('d30', 256), ('d36', 512)])
def test_full_size_teachers_make_images(arg, side):
  config = config_of(arg).to_dict()['stages']
  fields = config['vae']['config']
  vae = full_vae(image_size=side, **fields)
  depth = int(arg[1:])
  teacher = full_size(depth, shared_aln=arg == 'd36', **fields)
  # The figures of VAR's README, which cuts digits off.
  published = {30: 2.0e9, 36: 2.3e9}[depth]
  assert size(teacher.abstract()) == pytest.approx(published, rel=0.03)
  assert size(vae.abstract()) == 108_948_355
  evaluation = config['evaluate']
  settings = {k: evaluation[k] for k in ('cfg', 'top_k', 'top_p')}
  assert settings == dict(cfg=1.5, top_k=900, top_p=0.96)
  images = jax.eval_shape(
      lambda teacher_params, vae_params, labels: programs.teacher_images(
          teacher, vae, teacher_params, vae_params, labels,
          registry.get('samplers', 'var').greedy, settings,
      ),
      teacher.abstract(), vae.abstract(),
      jax.ShapeDtypeStruct((2,), jnp.int32),
  )
  assert images.shape == (2, side, side, 3)


def test_the_full_size_student_learns():
  stage = config_of('d16').to_dict()['stages']['student']
  values = stage['roles']['student']
  model = build.build_model(dict(values['model'], unroll=False))
  frozen = {
      'vae': full_vae(remat='full'),
      'perceptual': build.build_model(dict(name='lpips', remat='full')),
  }
  tx = optim.make_optimizer(config_lib.make(
      optim.OptimizerConfig, values['optimizer'], 'optimizer'
  ), stage['steps'])
  fields = dict(stage['method'], perceptual_batch=1)
  cls = registry.get('methods', fields.pop('name'))
  method = cls(
      config_lib.make(cls.Config, fields, 'method'),
      {'student': Role(model, tx, lambda key, _: model.init(key))}, frozen,
  )
  # What the student starts from has the teacher's parameters.
  params = jax.eval_shape(
      model.fns['adopt'], jax.random.key(0), full_size(16).abstract()
  )
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
      lambda x: x.shape, model.abstract()
  )

  def one(shape, dtype):
    return jax.ShapeDtypeStruct((2, *shape), dtype)

  def loss(params, frozen, batch):
    key = jax.random.key(0)
    inputs = Inputs(
        params={'student': params}, frozen=frozen, aux={}, batch=batch,
        key=key, keys=jax.random.split(key, 2), clocks={}, shared={},
    )
    inputs = inputs._replace(shared=method.prepare(inputs))
    return method.loss(params, inputs).loss

  gradient = jax.eval_shape(
      jax.grad(loss), params,
      {name: model.abstract() for name, model in frozen.items()},
      {'indices': one((680,), jnp.int32), 'label': one((), jnp.int32),
       'seed': one((), jnp.uint32), 'pair_id': one((), jnp.uint32)},
  )
  assert size(gradient) == 328_165_664


def test_the_chain_ends_in_figures(chain):
  _, workdir, records = chain
  assert set(records) == set(ARGS['d16'])
  rows = {
      name: json.loads((workdir / name / 'report/fid.json').read_text())
      for name in ('evaluate_teacher', 'evaluate_1', 'evaluate_2')
  }
  assert all(np.isfinite(row['fid']) for row in rows.values())
  assert len({row['hashes']['samples'] for row in rows.values()}) == 3
  assert rows['evaluate_1']['settings']['t_list'] == [0]
  assert rows['evaluate_2']['settings']['t_list'] == [0, 2]
  assert rows['evaluate_teacher']['settings']['cfg'] == 2.0
  student = records['student']['outputs']['exports']['student']
  source = checkpoint.describe(workdir / 'student' / student)['source']
  assert source['frozen']['vae'] == records['vae']['outputs']['hashes']['vqvae']


def test_an_export_is_the_released_network(chain, weights):
  _, workdir, records = chain
  outputs = records['teacher']['outputs']
  file = weights / 'var_d16.pth'
  assert outputs['files'] == {
      'var_d16.pth': hashlib.sha256(file.read_bytes()).hexdigest()
  }
  model, params = checkpoint.load(workdir / 'teacher/export/var')
  assert checkpoint.describe(workdir / 'teacher/export/var')['hash'] == (
      outputs['hashes']['var']
  )
  case = golden_cases.load('var_transformer_tiny')
  maps = golden_cases.load('var_vqvae_tiny').arrays['var_input']
  logits = jax.jit(model.apply)(params, case.arrays['label'], maps)
  np.testing.assert_allclose(
      logits, case.arrays['teacher_forced_logits'], rtol=1e-4, atol=1e-4
  )
  vae = checkpoint.describe(workdir / 'vae/export/vqvae')
  assert vae['config']['remat'] == 'full'
  assert vae['config']['image_size'] == 16
  assert set(records['lpips']['outputs']['files']) == {
      'vgg16-397923af.pth', 'vgg.pth'
  }


def test_a_released_student_is_scored(weights, tmp_path, monkeypatch):
  # Some pixels instead of the network, which takes seconds to compile.
  monkeypatch.setattr(evaluate_fid, 'on_mesh', lambda *_: lambda pixels: (
      pixels.reshape(len(pixels), -1)[:, :128].astype(np.float32),
  ) * 2)
  config = shrink(config_of('d16_released', weights))
  for stage in ('student', 'vae', 'inception', 'evaluate_2'):
    stages.run(config, tmp_path, only=stage)
  row = json.loads((tmp_path / 'evaluate_2/report/fid.json').read_text())
  assert row['fid'] > 0 and row['settings']['t_list'] == [0, 2]
  config['stages']['student']['wrapper'] = 'trainer/nothing'
  with pytest.raises(ValueError, match='nothing'):
    stages.run(config, tmp_path / 'other', only='student')


def test_files_are_not_needed_twice(chain, tmp_path):
  config, workdir, _ = chain
  shutil.copytree(workdir, tmp_path / 'copy')
  elsewhere = json.loads(json.dumps(config))
  for stage in elsewhere['stages'].values():
    if stage['kind'] == 'convert':
      stage['folder'] = 'gone'
  with pytest.raises(ValueError, match=r"\.folder: '.*' -> 'gone'"):
    stages.run(elsewhere, tmp_path / 'copy')
  with pytest.raises(FileNotFoundError, match='gone/var_d16.pth') as error:
    stages.run(elsewhere, tmp_path / 'other', only='teacher')
  assert '1 file(s) are missing' in str(error.value)
  assert 'vgg' not in str(error.value)


def test_one_message_names_everything_that_is_missing(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    stages.run(config_of('d16', 'w').to_dict(), tmp_path)
  text = str(error.value)
  assert text.startswith('6 file(s) are missing; no stage was started.')
  lines = text.splitlines()
  for name, release in (
      ('var_d16.pth', 'FoundationVision/var'),
      ('vae_ch160v4096z32.pth', 'FoundationVision/var'),
      ('pt_inception-2015-12-05-6726825d.pth', 'release fid_weights'),
      ('vgg16-397923af.pth', 'torchvision'),
      ('vgg.pth', 'richzhang/PerceptualSimilarity'),
      ('statistic.pth', 'folder ImageNet-256_FID_Statistic'),
  ):
    where = lines.index(f'  w/{name}')
    assert f'from {release}' in lines[where + 1] or release in lines[where + 1]
  assert set(lines[-4:]) == {f'  python -m dd_jax.tools.convert {x}' for x in (
      '--family=var --input=w/var_d16.pth --output=w/var_d16',
      '--family=var_vqvae --input=w/vae_ch160v4096z32.pth '
      '--output=w/vae_ch160v4096z32 --config=remat=full',
      '--family=inception --input=w/pt_inception-2015-12-05-6726825d.pth '
      '--output=w/pt_inception-2015-12-05-6726825d',
      '--family=lpips --input=w/vgg16-397923af.pth,w/vgg.pth '
      '--output=w/vgg16-397923af --config=remat=full',
  )}
  assert not list(tmp_path.iterdir())


def test_statistics_that_nobody_released(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    stages.run(config_of('d36', 'w').to_dict(), tmp_path)
  assert 'reference_stats --output=w/imagenet_512.npz' in str(error.value)
  assert '--config=patch_nums=1,2,3,4,6,9,13,18,24,32' in str(error.value)


def test_to_redo_without_the_file_touches_nothing(weights, tmp_path):
  folder = tmp_path / 'w'
  shutil.copytree(weights, folder)
  config = shrink(config_of('d16', folder))
  run = functools.partial(stages.run, config, tmp_path / 'run', only='teacher')
  run()
  (folder / 'var_d16.pth').unlink()
  run()  # complete: the file is needed no more
  with pytest.raises(FileNotFoundError, match='var_d16.pth'):
    run(redo=['teacher'])
  checkpoint.load(tmp_path / 'run/teacher/export/var')


def test_a_broken_file_stops_its_stage(tmp_path):
  write_weights(tmp_path / 'w')
  (tmp_path / 'w/vae_ch160v4096z32.pth').write_bytes(b'no weights')
  config = shrink(config_of('d16_released', tmp_path / 'w'))
  with pytest.raises(ValueError, match='vae_ch160v4096z32.pth'):
    stages.run(config, tmp_path / 'run', only='vae')
  assert not (tmp_path / 'run/vae/export').exists()


PAGE = (ROOT / 'docs/released_weights.md').read_text()
LINES = [
    shlex.split(line) for block in
    re.findall(r'^```bash\n(.*?)^```', PAGE, re.M | re.S)
    for line in block.splitlines()
]


def test_the_page_names_what_there_is():
  seen = set()
  for words in LINES:
    flags = dict(w[2:].split('=', 1) for w in words[3:] if '=' in w)
    if words[2] == 'dd_jax.main':
      file, _, arg = flags['config'].partition(':')
      assert file == CONFIG
      config = config_of(arg)
      seen.add(arg)
      for name, value in flags.items():
        if name.startswith('config.'):
          field = functools.reduce(
              lambda node, part: node[part], name.split('.')[1:], config
          )
          type(field)(value)
    elif words[2] == 'dd_jax.tools.convert':
      registry.find('families', flags['family'])
      assert pathlib.Path(flags['input']).name in released.RELEASES
  assert seen == {'d16', 'd16_released', 'd30', 'd36'}
  for name in released.RELEASES:
    short = re.sub(r'd(20|24|30|36)', 'd16', name)
    assert f'| `{short}`' in PAGE, name
  steps = config_of('d16').stages.student.steps
  assert f'student-{steps} ' in PAGE


@pytest.mark.slow
def test_the_page_draws_images(tmp_path):
  """Its first lines as they stand, but for the sizes of the networks."""
  write_weights(tmp_path / 'weights')
  environment = os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
  for words in LINES[:4]:
    words = [w.replace('=0,5', '=0,2').replace('split=5', 'split=2')
             .replace('207,360', '3,7') for w in words[1:]]
    if '--family=var_vqvae' in words:
      words.append('--config=patch_nums=1,2,3,4')
    result = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False, timeout=300,
    )
    assert result.returncode == 0, result.stderr
  for name in ('one_step.png', 'two_steps.png'):
    assert len(Image.open(tmp_path / name).getcolors(1 << 20)) > 10


def test_the_line_of_the_message_converts(weights, tmp_path):
  config = shrink(config_of('d16', weights))['stages']['vae']
  words = shlex.split(released.command(released.convert_config(
      {k: v for k, v in config.items() if k != 'kind'}, 'vae'
  )))
  words.append(f'--output={tmp_path / "vae"}')  # the last one counts
  result = subprocess.run(
      [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}, check=False,
  )
  assert result.returncode == 0, result.stderr
  fields = checkpoint.describe(tmp_path / 'vae')['config']
  assert (fields['patch_nums'], fields['remat']) == ([1, 2, 3, 4], 'full')
