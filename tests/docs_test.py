# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation do what they say."""

from __future__ import annotations

import ast
import collections
from importlib import metadata
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from packaging import requirements, utils
from PIL import Image
import pytest

from dd_jax import build, checkpoint, method, metrics, stages
from tests.command import COMPILE_FAST, environment_of

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs/bring_your_data.md').read_text()
CONFIG = 'configs/dd_var.py'


def blocks(language, page=PAGE):
  return re.findall(rf'^```{language}\n(.*?)^```', page, re.M | re.S)


def run_page(cache, tmp_path, monkeypatch, change):
  """Runs the rehearsal, as it stands on the page but for `change`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (code,) = blocks('python')
  exec(code, {})
  environment = environment_of(cache)
  for line in blocks('bash')[0].splitlines():
    program, *args = shlex.split(change(line))
    assert program == 'python'
    result = subprocess.run(
        [sys.executable, *args], env=environment, capture_output=True,
        text=True, check=False, timeout=600,
    )
    assert result.returncode == 0, result.stderr
  record = json.loads(
      (tmp_path / 'runs/rehearsal/student/stage.json').read_text()
  )
  assert record['complete']
  picture = Image.open(tmp_path / 'runs/rehearsal.png')
  assert len(picture.getcolors(1 << 16)) > 10
  return tmp_path / 'runs/rehearsal'


def test_a_folder_of_images_ends_in_a_student(
    cache, tmp_path, monkeypatch
):
  def change(line):
    return line.replace(
        'channels=1', 'channels=1,report=False,discriminator=True'
    )

  workdir = run_page(cache, tmp_path, monkeypatch, change)
  assert sorted(p.name for p in workdir.iterdir()) == [
      'student', 'teacher', 'tokenizer', 'trajectories'
  ]
  lines = (workdir / 'tokenizer/metrics.jsonl').read_text().splitlines()
  seen = {name for line in lines for name in json.loads(line)}
  assert {'discriminator/loss', 'heldout/discriminator/loss',
          'tokenizer/adversarial_weight'} <= seen


@pytest.mark.slow
def test_a_folder_of_images_ends_in_a_report(
    cache, tmp_path, monkeypatch
):
  workdir = run_page(cache, tmp_path, monkeypatch, lambda line: line)
  assert (workdir / 'report/report.md').exists()


def config_of(arg):
  return runpy.run_path(str(ROOT / CONFIG))['get_config'](arg).to_dict()


def test_arguments_on_the_page_give_configs_that_fit():
  args = set(re.findall(rf'{CONFIG}:(\S+)', PAGE))
  args |= {f'own_32,{a}' for a in re.findall(r'^\| `(\S+=\S+)` \|', PAGE, re.M)}
  args |= {f'{a},path=x,classes=2' for a in re.findall(r'^\| `(own_\d+)`', PAGE,
                                                       re.M)}
  assert len(args) == 8
  args.add('own_16,path=x,classes=1,report=False,discriminator=True')
  for arg in args:
    config = config_of(arg)
    stages.parse(config)
    pixels = config['stages']['tokenizer']['data']['size']
    classes = config['stages']['tokenizer']['data']['num_classes']
    for stage in config['stages'].values():
      for role in stage.get('roles', {}).values():
        model = build.build_model(role['model'])
        assert getattr(model.config, 'image_size', pixels) == pixels
        assert getattr(model.config, 'num_classes', classes) == classes


def test_a_tokenizers_schedule_follows_its_steps():
  get_config = runpy.run_path(str(ROOT / CONFIG))['get_config']
  config = get_config('mnist5k,discriminator=True')
  assert config.stages.tokenizer.data.source == 'mnist5k'
  config.stages.tokenizer.steps = 30
  stage = config.to_dict()['stages']['tokenizer']
  assert stage['method']['revive_until'] == 20
  assert stage['method']['adversarial_from'] == 10
  assert stage['roles']['discriminator']['optimizer']['total'] == 20


@pytest.mark.parametrize(
    'arg, message',
    [
        ('own_32', 'own images need classes='),
        ('own_32,path=x', 'own images need classes='),
        ('own_32,path=x,classes=a', 'own images need classes='),
        ('own_32,path=x,classes=2,channels=a', 'own images need classes='),
        ('own_32,flowers', "'flowers' must be name=value"),
        ('own_32,path=x,classes=2,report=0', 'report=0: expected True or Fal'),
        ('own_64,path=x,classes=2,discriminator=1', 'discriminator=1: expect'),
        ('own_32,path=', "'path=' must be name=value"),
        ('own_31,path=x', "expected one of .*'own_32'"),
    ],
)
def test_arguments_that_are_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    config_of(arg)


@pytest.mark.parametrize('value', ['False', 'false'])
def test_own_images_without_a_judge(value):
  stages = config_of(f'own_32,path=x,classes=2,report={value}')['stages']
  assert not {'judge', 'evaluate'} & set(stages)


def test_names_that_a_page_shows_exist():
  # Exports are called after the steps of their stage.
  config = config_of('own_32,path=x,classes=2')
  assert f'student-{config["stages"]["student"]["steps"]} ' in PAGE
  config = config_of('tiny')
  assert f'student-{config["stages"]["student"]["steps"]} ' in PAGE


# Pages whose commands need machines that a test has not. There, programs in
# `ELSEWHERE` are replaced by stand-ins that write down what they are asked.
PAGES = (
    'attention', 'gke', 'metrics', 'resume', 'shard_your_model', 'slurm',
    'tpu_vm',
)
ELSEWHERE = ('docker', 'gcloud', 'kubectl', 'pip', 'sbatch', 'squeue',
             'tensorboard')


def page_of(name):
  return (ROOT / f'docs/{name}.md').read_text()


def run_commands(name, tmp_path, stand_ins, **variables):
  """All commands of a page, as they stand there; what the stand-ins got."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for program in stand_ins:
    file = folder / program
    file.write_text(
        '#!/usr/bin/env bash\n'
        f'{{ printf "%q " {program} "$@"; echo; }} >> {tmp_path}/calls\n'
        'if [[ " $* " == *" - "* ]]; then cat > /dev/null; fi\n'
    )
    file.chmod(0o755)
  if 'python' not in stand_ins:
    # By a link, Python would not find the packages of its environment.
    (folder / 'python').write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
    )
    (folder / 'python').chmod(0o755)
  for part in ('configs', 'launch', 'dd_jax'):
    (tmp_path / part).symlink_to(ROOT / part)
  # A page may name a script of the reader's own.
  (tmp_path / 'make_digits.sh').touch()
  result = subprocess.run(
      ['bash', '-euo', 'pipefail', '-c',
       ''.join(blocks('bash', page_of(name)))],
      cwd=tmp_path, text=True, capture_output=True, check=False, timeout=900,
      env=os.environ | {
          'PATH': f'{folder}:{os.environ["PATH"]}', 'RETRY_SECONDS': '0',
          'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', **variables,
      },
  )
  assert result.returncode == 0, result.stderr
  calls = tmp_path / 'calls'
  lines = calls.read_text().splitlines() if calls.exists() else []
  return [shlex.split(line) for line in lines]


def check_python(args):
  """A module, flags that it has, a config that exists and fields of it.

  Returns the flags by name.
  """
  assert args[0] == '-m'
  path = ROOT / args[1].replace('.', '/')
  module = path / '__main__.py' if path.is_dir() else path.with_suffix('.py')
  code = module.read_text()
  known = set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", code))
  runs_config = 'config_lib.define_flag()' in code
  if runs_config:
    known.add('config')
  flags = {}
  for arg in args[2:]:
    name, _, value = arg.removeprefix('--').partition('=')
    assert arg.startswith('--') and name.split('.')[0] in known, arg
    flags[name] = value
  file, _, arg = flags.get('config', '').partition(':')
  if not file.endswith('.py'):  # a tool without, or one with another --config
    assert not runs_config
    return flags
  config = runpy.run_path(str(ROOT / file))['get_config'](arg).to_dict()
  stages.parse(config)
  for name, value in flags.items():
    field = config
    for part in name.split('.')[1:]:
      field = field[part]
    assert name not in ('stage', 'redo') or value in config['stages']
  return flags


@pytest.mark.parametrize('name', PAGES)
def test_commands_with_stand_ins(name, tmp_path):
  calls = run_commands(name, tmp_path, (*ELSEWHERE, 'python', 'tail'))
  called = collections.Counter(call[0] for call in calls)
  for program, *args in calls:
    if program == 'python':
      check_python(args)
    if program == 'sbatch':
      script = next(i for i, a in enumerate(args) if a.startswith('launch/'))
      assert (ROOT / args[script]).exists()
      check_python(['-m', 'dd_jax.main', *args[script + 1:]])
    if program == 'gcloud' and 'dd_jax.main' in args[-1]:
      command = shlex.split(re.search(r'&& (.*) 2>&1', args[-1])[1])
      check_python(command[command.index('-m'):])
  assert called == {
      'attention': {'python': 3},
      'gke': {'kubectl': 4, 'docker': 2},
      'metrics': {'pip': 1, 'python': 1, 'tail': 1, 'tensorboard': 1},
      'resume': {'python': 6},
      'shard_your_model': {'python': 2},
      'slurm': {'pip': 1, 'sbatch': 2, 'squeue': 1},
      'tpu_vm': {'python': 1, 'gcloud': 6},
  }[name]


def commands_of_docstrings():
  """Those of the command line's modules, which --help shows."""
  docstrings = [
      ast.get_docstring(ast.parse(file.read_text())) or ''
      for module in ('main.py', 'tools/*.py', 'tools/bench/__main__.py')
      for file in sorted((ROOT / 'dd_jax').glob(module))
  ]
  return [
      command for text in docstrings for command in re.findall(
          r'^ *python (-m .*)$', re.sub(r'\\\n *', '', text), re.M
      )
  ]


@pytest.mark.parametrize('command', commands_of_docstrings())
def test_commands_of_docstrings(command):
  args = shlex.split(command)
  if args[1] == 'dd_jax.tools.inspect':
    assert args[2:] == ['PATH']
    return
  flags = check_python(args)
  if export := flags.get('export'):
    # runs/<config>/<stage>/export/<role>-<steps>
    run, stage, _, name = pathlib.Path(export).parts[1:]
    role, _, steps = name.rpartition('-')
    (file,) = (f for f in (ROOT / 'configs').glob('*.py')
               if run.startswith(f'{f.stem}_'))
    arg = run.removeprefix(f'{file.stem}_')
    config = runpy.run_path(str(file))['get_config'](arg).to_dict()
    values = config['stages'][stage]
    assert int(steps) == values['steps']
    classes = values['roles'][role]['model']['num_classes']
    labels = [int(n) for n in flags.get('labels', '').split(',') if n]
    assert bool(labels) == bool(classes)
    assert all(label < classes for label in labels)


def test_the_program_of_the_page_is_traced():
  names = {}
  (code,) = blocks('python', page_of('attention'))
  exec(code, names)
  assert names['traced'].out_info.shape == (8, 256, 16384)


def test_the_model_of_the_page_is_sharded(capsys):
  names = {'__name__': '__main__'}  # where a dataclass looks
  first, second = blocks('python', page_of('shard_your_model'))
  exec(first, names)
  exec(second, names)
  expected = re.search(r'# (\(.*\))', second)[1]
  assert capsys.readouterr().out.strip() == expected
  kernel = names['params']['up']['kernel']
  assert kernel.addressable_shards[0].data.shape == (32, 128)


def test_seconds_of_the_page_add_up(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  file = tmp_path / 'runs/metrics/tokenizer/metrics.jsonl'
  file.parent.mkdir(parents=True)
  file.write_text(
      '{"step": 1, "time/step_seconds": 2, "time/init_seconds": 1}\n'
      '{"step": 2, "time/step_seconds": 4, "time/save_seconds": 1}\n'
  )
  (code,) = blocks('python', page_of('metrics'))
  exec(code, {})
  assert 'goodput 75%' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('name', ['metrics', 'resume', 'shard_your_model'])
def test_commands_for_any_machine(name, tmp_path, monkeypatch, capsys):
  run_commands(
      name, tmp_path, ELSEWHERE, XLA_FLAGS=COMPILE_FAST
  )
  runs = tmp_path / 'runs'
  if name == 'resume':
    assert (runs / 'resume/report/report.md').exists()
    assert (runs / 'two_processes/report/report.md').exists()
  if name == 'metrics':
    monkeypatch.chdir(tmp_path)
    (code,) = blocks('python', page_of(name))
    exec(code, {})
    assert 'goodput' in capsys.readouterr().out


def test_keys_of_the_page_are_those_that_are_written():
  table = set(re.findall(r'`((?:time|memory)/\w+)`', page_of('metrics')))
  text = ''.join(
      (ROOT / f'dd_jax/{name}.py').read_text()
      for name in ('generate', 'metrics', 'train')
  )
  written = set(re.findall(r"'(time/\w+)'", text))
  written |= {f'time/{part}_seconds' for part in metrics.Clock.PARTS}
  written |= {f'memory/{k}_peak_gib' for k in ('host', 'device')}
  assert table == written


def test_plans_are_of_the_configs_as_they_are():
  page = page_of('tpu_plans')
  titles = re.findall(
      r'^## (dd_var|dd_llamagen|dmd2_edm)_(\S+) on (\S+) \((\d+) chips.*?\), '
      r'mesh (\S+), rules (.+)$', page, re.M,
  )
  slices = collections.defaultdict(set)
  for file, name, slice_, chips, mesh, rules in titles:
    config = runpy.run_path(
        str(ROOT / f'configs/{file}.py')
    )['get_config'](name).to_dict()
    parsed = stages.parse(config)
    own = [
        f'{s.name} {s.rules}' for s in parsed if s.rules != config['rules']
    ]
    assert rules == config['rules'] + (f' ({", ".join(own)})' if own else '')
    axis = 'fsdp' if config['mesh']['fsdp'] == -1 else 'data'
    assert mesh == f'{axis}:{chips}'
    slices[f'{file}_{name}'].add(slice_.partition(':')[0])
  for name in ('dd_var_d16', 'dd_var_d20', 'dd_var_d24', 'dd_var_d30',
               'dd_llamagen_b', 'dd_llamagen_l', 'dd_llamagen_t2i_xl'):
    assert slices[name] == {'v5e', 'v5p', 'v6e'}
  assert slices['dmd2_edm_imagenet64'] == {'v5e', 'v5p'}
  assert '256' in {chips for *_, chips, _, _ in titles}
  rows = re.findall(r'^\| (\w+: .+) \|$', page, re.M)
  assert len(rows) > 5 * len(titles)
  assert {row.split(' | ')[5] for row in rows} == {'yes'}


README = (ROOT / 'README.md').read_text()


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A folder with the runs whose exports the README opens, but untrained."""
  root = tmp_path_factory.mktemp('readme')
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(size=x.shape).astype(x.dtype) / 10  # noqa: E731
  for file, arg in set(re.findall(
      r'runs/(dd_var|dd_llamagen|dmd2_edm)_(\w+)/\w+/export/', README
  )):
    config = runpy.run_path(str(ROOT / f'configs/{file}.py'))['get_config'](arg)
    hashes = {}
    for stage in stages.parse(config.to_dict()):
      for role, values in stage.config.get('roles', {}).items():
        model = build.build_model(values['model'])
        name = f'{stage.name}/export/{role}-{stage.config["steps"]}'
        hashes[f'stage:{stage.name}'] = checkpoint.export(
            root / 'runs' / config.name / name, model,
            jax.tree.map(draw, model.abstract()), {
                'method': stage.config['method'],
                'frozen': {k: hashes[v] for k, v in stage.config.get(
                    'frozen', {}
                ).items()},
            },
        )
  return root


def opening():
  """Snippets of the README that open an export of a run."""
  return [code for code in blocks('python', README) if 'runs/' in code]


def test_exports_that_the_readme_names_are_those_of_the_configs(runs):
  paths = re.findall(r'runs/\S+/export/[\w-]+', README)
  assert paths
  for path in paths:
    assert (runs / path / 'model.json').exists(), path


@pytest.mark.parametrize('number', range(len(opening())))
def test_snippets_of_the_readme_make_images(number, runs, monkeypatch):
  monkeypatch.chdir(runs)
  code, names = opening()[number], {}
  exec(code, names)
  shape, low, high = re.search(
      r'images = .*# (\(.*\)) in \[(\S+), (\S+)\]', code
  ).groups()
  images = np.asarray(names['images'])
  assert str(images.shape) == shape
  assert float(low) <= images.min() < images.max() <= float(high)
  if "save('grid.png')" in code:
    assert len(Image.open('grid.png').getcolors(1 << 16)) > 10


def modules_beside(*packages):
  """Installed modules of neither packages nor what they require in turn."""
  todo, seen = [(name, '') for name in packages], set()
  while todo:
    name, extra = at = todo.pop()
    if at in seen:
      continue
    seen.add(at)
    for line in metadata.requires(name) or ():
      other = requirements.Requirement(line)
      if not other.marker or other.marker.evaluate({'extra': extra}):
        todo += [(other.name, e) for e in ('', *other.extras)]
  names = {utils.canonicalize_name(name) for name, _ in seen}
  return {
      module for module, owners in metadata.packages_distributions().items()
      if not names & set(map(utils.canonicalize_name, owners))
  }


def test_weights_are_read_with_orbax_and_numpy_alone(runs, tmp_path):
  (code,) = [c for c in blocks('python', README) if '/absolute/path/' in c]
  name = re.search(r'/absolute/path/to/export/([\w-]+)/params', code)[1]
  (export,) = runs.glob(f'runs/*/*/export/{name}')
  others = modules_beside('orbax-checkpoint', 'numpy')
  refuse = f'''
import sys

class Refuse:
  def find_spec(name, path=None, target=None):
    if name.partition('.')[0] in {others}:
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse)
for name in 'dd_jax', 'flax':
  try:
    __import__(name)
  except ModuleNotFoundError:
    print('no', name)
'''
  result = subprocess.run(
      [sys.executable, '-I', '-c', refuse + code.replace(
          '/absolute/path/to/export', str(export.parent)
      )],
      cwd=tmp_path, env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      capture_output=True, text=True, check=False, timeout=300,
  )
  assert result.returncode == 0, result.stderr
  kernel = checkpoint.load_params(export)['layers']['attn']['q']['kernel']
  assert result.stdout.splitlines() == [
      'no dd_jax', 'no flax', str(kernel.shape)
  ]


def test_the_method_of_the_readme_moves_its_student():
  (code,) = [c for c in blocks('python', README) if 'class MyMethod' in c]
  names = {'jnp': jnp} | {
      n: getattr(method, n) for n in ('Method', 'Update', 'Output')
  }
  exec(code, names)
  student = types.SimpleNamespace(
      model=types.SimpleNamespace(apply=lambda params, x: params * x)
  )
  (update,) = names['MyMethod'](None, {'student': student}, {}).updates(0)
  inputs = types.SimpleNamespace(
      batch={'x': jnp.array([1.0, 2.0])}, shared={'y': jnp.array([2.0, 2.0])}
  )
  assert update.role == 'student'
  assert update.loss(2.0, inputs).loss == 2.0
