# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs from released files: what is missing, full sizes, and the whole chain.

The chain is that of the config `d16`, with small networks in files of the same
names and layout; those of LlamaGen are in released_llamagen_test.
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
  captions,
  checkpoint,
  evaluate_clip,
  evaluate_fid,
  generate,
  optim,
  programs,
  registry,
  released,
  scoring,
  sharding,
  stages,
  train,
)
from dd_jax import config as config_lib
from dd_jax.method import Inputs, Role
from tests.command import COMPILE_FAST
from tests.golden import golden_cases
from tests.released_files import PATCH_NUMS, write_small

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = 'configs/dd_var.py'
LLAMAGEN = 'configs/dd_llamagen.py'
DMD2 = 'configs/dmd2_edm.py'
KINDS = {
    'convert': released.ConvertConfig, 'generate': generate.GenerateConfig,
    'train': train.TrainConfig, 'fid': evaluate_fid.FidConfig,
    'captions': captions.CaptionsConfig,
    'clip_score': evaluate_clip.ClipScoreConfig,
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
LLAMAGEN_ARGS = {
    'b': ARGS['d16'], 'l': ARGS['d16'], 'b_released': ARGS['d16_released'],
    'l_released': ARGS['d16_released'],
    't2i_xl': {*ARGS['d16'], 'encoder', 'captions', 'heldout', 'clip'}
              - {'inception'},
}
ALL = [(CONFIG, arg, stages) for arg, stages in ARGS.items()] + [
    (LLAMAGEN, arg, stages) for arg, stages in LLAMAGEN_ARGS.items()
]


def config_of(arg, folder='weights', file=CONFIG):
  config = runpy.run_path(str(ROOT / file))['get_config'](arg)
  config.weights = str(folder)
  return config


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


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


def score_by_pixels(monkeypatch):
  """Instead of the network, which takes seconds to compile."""
  monkeypatch.setattr(evaluate_fid, 'on_mesh', lambda *_: lambda pixels: (
      pixels.reshape(len(pixels), -1)[:, :128].astype(np.float32),
  ) * 2)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  folder = tmp_path_factory.mktemp('files') / 'weights'
  write_small(folder)
  return folder


@pytest.fixture(scope='module')
def chain(weights, tmp_path_factory):
  """The finished chain of d16: workdir and records."""
  workdir = tmp_path_factory.mktemp('chain')
  config = shrink(config_of('d16', weights))
  # One network for all scores: compiling is what takes time.
  on_mesh, first = evaluate_fid.on_mesh, []

  def once(*args):
    first.extend([] if first else [on_mesh(*args)])
    return first[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluate_fid, 'on_mesh', once)
    return config, workdir, run_on_one_device(config, workdir)


def run_on_one_device(config, workdir):
  """All stages, which take less time to compile so; their records."""
  make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', make_mesh)
    return stages.run(config, workdir)


@pytest.mark.parametrize(
    'file, arg, names', ALL,
    ids=[f'{pathlib.Path(file).stem}-{arg}' for file, arg, _ in ALL],
)
def test_configs_are_well_formed(file, arg, names):
  config = config_of(arg, '/some/where', file).to_dict()
  config = json.loads(json.dumps(config))
  assert set(config['stages']) == set(names)
  made = {}
  for stage in stages.parse(config):
    values = {k: v for k, v in stage.config.items() if k != 'seed'}
    made[stage.name] = config_lib.make(KINDS[stage.kind], values, stage.name)
  for stage in made.values():
    if isinstance(stage, released.ConvertConfig):
      registry.find('families', stage.family)
      assert all(
          pathlib.Path(p).is_relative_to('/some/where')
          and released.release_of(p) for p in stage.paths
      )
    if isinstance(stage, evaluate_fid.FidConfig):
      assert stage.reference.startswith('/some/where/')
      assert stage.samples == 50_000
    if isinstance(
        stage, (captions.CaptionsConfig, evaluate_clip.ClipScoreConfig)
    ):
      registry.find('tokenizers', stage.tokenizer['name'])
      assert stage.tokenizer['path'].startswith('/some/where/')
      assert released.release_of(stage.tokenizer['path'])
  if 'trajectories' in made:
    trajectories = made['trajectories']
    guidance = {
        'dd_var': (2.0, 900, 0.95), 'dd_llamagen': (2.0, 8000, 1.0),
        'dd_llamagen_t2i_xl': (7.5, 1000, 1.0),
    }
    family = pathlib.Path(file).stem
    settings = guidance.get(f'{family}_{arg}', guidance[family])
    for stage in (trajectories, made['evaluate_teacher']):
      assert (stage.cfg, stage.top_k, stage.top_p) == settings
    assert trajectories.shard_size % trajectories.batch_size == 0


@pytest.mark.parametrize('name, fields', [('d16', 'path=x'), ('d17', '')])
def test_arguments_that_are_refused(name, fields):
  with pytest.raises(ValueError, match='takes no fields|expected one of'):
    config_of(f'{name},{fields}')


@pytest.mark.parametrize('file, arg, count, length, split', [
    (CONFIG, 'd16', 328_165_664, 680, 5), (CONFIG, 'd20', 635_399_088, 680, 4),
    (CONFIG, 'd24', 1_092_478_560, 680, 4),
    (LLAMAGEN, 'b', 98_321_672, 256, 80),
    (LLAMAGEN, 'l', 326_155_272, 256, 130),
    # 756,733,448 and the 120 x 2048 features of no caption.
    (LLAMAGEN, 't2i_xl', 756_979_208, 256, 80),
])
def test_full_size_students(file, arg, count, length, split):
  stage = config_of(arg, file=file).to_dict()['stages']['student']
  model = build.build_model(stage['roles']['student']['model'])
  assert size(model.abstract()) == count
  assert model.config.offsets[-1] == length
  assert (stage['method']['t_set'], stage['method']['split']) == (
      (0, 80 if file == LLAMAGEN else split), split
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
  score_by_pixels(monkeypatch)
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


def test_what_a_run_of_captions_misses(tmp_path):
  folder = tmp_path / 'w'
  config = config_of('t2i_xl', folder, LLAMAGEN).to_dict()

  def message():
    with pytest.raises(FileNotFoundError) as error:
      stages.run(config, tmp_path / 'run')
    return str(error.value)

  text = message()
  assert text.startswith('10 file(s) are missing; no stage was started.')
  for name, release in (
      ('vq_ds16_t2i.pt', 'peizesun/llamagen_t2i'),
      ('t2i_XL_stage1_256.pt', 'peizesun/llamagen_t2i'),
      ('flan-t5-xl/model.safetensors.index.json', 'google/flan-t5-xl'),
      ('flan-t5-xl/tokenizer.json', 'google/flan-t5-xl'),
      ('clip-vit-large-patch14/model.safetensors', 'openai/clip-vit-large'),
      ('clip-vit-large-patch14/tokenizer.json', 'openai/clip-vit-large'),
  ):
    assert f'  {folder}/{name}\n      from {release}' in text
  for name in ('prompts.jsonl', 'heldout_prompts.jsonl'):
    assert f'  {name}\n      from you: a line such as {{"prompt"' in text
  # An index that is there says what else should be.
  (folder / 'flan-t5-xl').mkdir(parents=True)
  (folder / 'flan-t5-xl/model.safetensors.index.json').write_text(json.dumps(
      {'weight_map': {'a': 'one.safetensors', 'b': 'two.safetensors'}}
  ))
  text = message()
  assert text.startswith('11 file(s) are missing')
  assert f'{folder}/flan-t5-xl/two.safetensors\n' in text
  assert 'index.json\n' not in text


def test_images_of_your_own_that_are_not_there(tmp_path):
  config = config_of(f'own_32,path={tmp_path}/flowers,classes=2').to_dict()
  with pytest.raises(FileNotFoundError) as error:
    stages.run(config, tmp_path / 'run')
  text = str(error.value)
  assert text.startswith('1 file(s) are missing; no stage was started.')
  assert f'  {tmp_path}/flowers\n      from you: docs/bring_' in text
  (tmp_path / 'flowers').mkdir()
  with pytest.raises(ValueError, match='flowers has no sub-folders'):
    stages.run(config, tmp_path / 'run', only='tokenizer')


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
  write_small(tmp_path / 'w')
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
      config = config_of(arg, file=file)
      seen.add((file, arg))
      for name, value in flags.items():
        if name.startswith('config.'):
          field = functools.reduce(
              lambda node, part: node[part], name.split('.')[1:], config
          )
          type(field)(value)
    elif words[2] == 'dd_jax.tools.convert':
      registry.find('families', flags['family'])
      assert released.release_of(flags['input'])
  assert seen == {
      *((CONFIG, arg) for arg in ('d16', 'd16_released', 'd30', 'd36')),
      *((LLAMAGEN, arg) for arg in ('b', 'b_released', 't2i_xl')),
      (DMD2, 'imagenet64'),
      (DMD2, 'imagenet64,source=tfds,name=imagenet_resized/64x64'),
  }
  for name in released.RELEASES:
    short = re.sub(r'd(20|24|30|36)', 'd16', name)
    short = re.sub(r'(c2i_|llamagen-)L', r'\1B', short)
    assert f'| `{short}`' in PAGE, name
  for file, arg in ((CONFIG, 'd16'), (LLAMAGEN, 'b'), (LLAMAGEN, 't2i_xl')):
    steps = config_of(arg, file=file).stages.student.steps
    assert f'student-{steps} ' in PAGE


def test_stages_that_the_page_adds():
  added = []
  for code in re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S):
    names = {}
    exec(code, names)
    config = names['get_config']()
    config.weights = 'w'
    config = json.loads(json.dumps(config.to_dict()))
    parsed = {stage.name: stage for stage in stages.parse(config)}
    for name in re.findall(r'config\.stages\.(\w+) =', code):
      stage = parsed[name]
      made = config_lib.make(
          registry.get('configs', stage.kind),
          {k: v for k, v in stage.config.items() if k != 'seed'}, name,
      )
      added.append(stage.kind)
      if stage.kind == 'convert':
        assert made.folder == 'w' and released.release_of(made.paths[0])
        continue
      networks = {}
      for role in ('student', 'teacher'):
        if (ref := getattr(made, role)) is not None:
          source = parsed[ref.removeprefix('stage:')]
          networks[role] = build.build_model(
              source.config['roles']['student']['model']
              if source.kind == 'train' else dict(
                  released.known_fields(released.convert_config(
                      source.config, source.name
                  )), name=source.config['family'],
              )
          )
      scoring.check(
          made, networks['student'], name, sharding.make_mesh({'data': -1}),
          networks.get('teacher'),
      )
  assert sorted(added) == ['adm_npz', *['convert'] * 2, *['fid'] * 3]


@pytest.mark.slow
def test_the_page_draws_images(tmp_path):
  """Its first lines as they stand, but for the sizes of the networks."""
  write_small(tmp_path / 'weights')
  environment = os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': COMPILE_FAST,
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
