# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation do what they say."""

from __future__ import annotations

import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

from PIL import Image
import pytest

from dd_jax import build, stages

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / 'docs/bring_your_data.md').read_text()
CONFIG = 'configs/dd_var.py'


def blocks(language):
  return re.findall(rf'^```{language}\n(.*?)^```', PAGE, re.M | re.S)


def run_page(tmp_path, monkeypatch, change):
  """Runs the rehearsal, as it stands on the page but for `change`."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (code,) = blocks('python')
  exec(code, {})
  environment = os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_backend_optimization_level=0',
  }
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


def test_a_folder_of_images_ends_in_a_student(tmp_path, monkeypatch):
  short = lambda line: line.replace('channels=1', 'channels=1,report=False')  # noqa: E731
  workdir = run_page(tmp_path, monkeypatch, short)
  assert sorted(p.name for p in workdir.iterdir()) == [
      'student', 'teacher', 'tokenizer', 'trajectories'
  ]


@pytest.mark.slow
def test_a_folder_of_images_ends_in_a_report(tmp_path, monkeypatch):
  workdir = run_page(tmp_path, monkeypatch, lambda line: line)
  assert (workdir / 'report/report.md').exists()


def config_of(arg):
  return runpy.run_path(str(ROOT / CONFIG))['get_config'](arg).to_dict()


def test_arguments_on_the_page_give_configs_that_fit():
  args = set(re.findall(rf'{CONFIG}:(\S+)', PAGE))
  args |= {f'own_32,{a}' for a in re.findall(r'^\| `(\S+=\S+)` \|', PAGE, re.M)}
  args |= {f'{a},path=x,classes=2' for a in re.findall(r'^\| `(own_\d+)`', PAGE,
                                                       re.M)}
  assert len(args) == 8
  args.add('own_16,path=x,classes=1,report=False')
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


@pytest.mark.parametrize(
    'arg, message',
    [
        ('own_32', 'own images need classes='),
        ('own_32,path=x', 'own images need classes='),
        ('own_32,path=x,classes=a', 'own images need classes='),
        ('own_32,path=x,classes=2,channels=a', 'own images need classes='),
        ('own_32,flowers', "'flowers' must be name=value"),
        ('own_32,path=', "'path=' must be name=value"),
        ('own_31,path=x', "expected one of .*'own_32'"),
    ],
)
def test_arguments_that_are_refused(arg, message):
  with pytest.raises(ValueError, match=message):
    config_of(arg)


def test_names_that_a_page_shows_exist():
  # Exports are called after the steps of their stage.
  config = config_of('own_32,path=x,classes=2')
  assert f'student-{config["stages"]["student"]["steps"]} ' in PAGE
  config = config_of('tiny')
  assert f'student-{config["stages"]["student"]["steps"]} ' in PAGE
