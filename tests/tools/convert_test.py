# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The converter's command line: golden files both ways, and what is refused."""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from dd_jax import checkpoint
from dd_jax.convert import readers
from tests import released_files
from tests.convert import torch_files
from tests.golden import golden_cases
from tests.models import critic_test

ROOT = pathlib.Path(__file__).parent.parent.parent
GOLDEN = ROOT / 'tests' / 'golden'
FILES = {
    'var': GOLDEN / 'var_tiny.pth', 'dd_var': GOLDEN / 'dd_var_tiny.pth',
    'llamagen': GOLDEN / 'llamagen_gpt_t2i_tiny.pt',
    'dd_llamagen': GOLDEN / 'dd_llamagen_tiny.pt',
}
# What no tensor tells.
GIVEN = {'llamagen': ('heads=4', 'latent_size=4')}
GIVEN['dd_llamagen'] = GIVEN['llamagen']


def tool(*args, name='convert'):
  environment = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'PYTHONPATH': str(ROOT),
  }
  return subprocess.run(
      [sys.executable, '-m', f'dd_jax.tools.{name}', *map(str, args)],
      env=environment, capture_output=True, text=True, timeout=300,
      check=False,
  )


def succeed(*args, **kwargs):
  result = tool(*args, **kwargs)
  assert result.returncode == 0, result.stderr
  return result.stdout


def fail(*args, **kwargs):
  """The one error that a command ends with."""
  result = tool(*args, **kwargs)
  assert result.returncode == 1, result.stdout + result.stderr
  assert 'Traceback' not in result.stderr
  assert result.stderr.count('error:') == 1
  return result.stderr


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
  """Exports of the golden files, made by the command."""
  folder = tmp_path_factory.mktemp('exports')
  for family, file in FILES.items():
    out = succeed(
        f'--family={family}', f'--input={file}', f'--output={folder / family}',
        *(f'--config={field}' for field in GIVEN.get(family, ())),
    )
    assert 'written:' in out
  return folder


def test_teacher_gives_the_outputs_of_the_original(exports):
  model, params = checkpoint.load(exports / 'var')
  case = golden_cases.load('var_transformer_tiny')
  maps = golden_cases.load('var_vqvae_tiny').arrays['var_input']
  logits = jax.jit(model.apply)(params, case.arrays['label'], maps)
  np.testing.assert_allclose(
      logits, case.arrays['teacher_forced_logits'], rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('family', ['dd_var', 'dd_llamagen'])
def test_student_gives_the_outputs_of_the_original(exports, family):
  model, params = checkpoint.load(exports / family)
  arrays = golden_cases.load(f'{family}_tiny').arrays
  noise = arrays['noise']
  out = jax.jit(model.apply)(
      params, noise, arrays['label'], np.zeros(len(noise), np.int32)
  )
  for field, name in (('logits', 'logits'), ('codes', 'tokens')):
    np.testing.assert_allclose(
        out[field], arrays[f'step0_{name}'], rtol=1e-4, atol=1e-4
    )


def test_teacher_of_captions_gives_the_outputs_of_the_original(exports):
  model, params = checkpoint.load(exports / 'llamagen')
  case = golden_cases.load('llamagen_gpt_t2i_tiny')
  tokens = case.arrays['tokens']
  logits = jax.jit(model.apply)(params, {
      'features': case.arrays['caption'], 'mask': np.ones((2, 120), bool),
  }, tokens[:, :-1])
  np.testing.assert_allclose(
      logits, case.arrays['teacher_forced_logits_no_mask'], rtol=1e-4,
      atol=1e-4,
  )


@pytest.mark.parametrize('family', FILES)
def test_back_to_the_original_file(exports, family, tmp_path):
  def read(path):
    found = readers.select(path, readers.read(path).tree)
    return found.wrapper, {
        k: np.asarray(v) for k, v in found.tensors.items()
        if 'kv_cache' not in k
    }

  wrapper, original = read(FILES[family])
  path = tmp_path / 'back.pth'
  succeed('--reverse', f'--input={exports / family}', f'--output={path}')
  ours_wrapper, ours = read(path)
  assert ours_wrapper == wrapper and list(ours) == list(original)
  for name, value in original.items():
    assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
    assert ours[name].tobytes() == value.tobytes(), name


def test_dry_run_shows_coverage_and_writes_nothing(tmp_path):
  out = succeed(
      '--family=dd_var', f'--input={FILES["dd_var"]}', '--dry_run',
      '--wrapper=trainer/var_wo_ddp', f'--output={tmp_path / "x"}',
      '--config=patch_nums=1,2,3,4',
  )
  for text in (
      'layers/attn/q/kernel', '2x64x64',
      'blocks.0.attn.mat_qkv.weight and 1 more', 'made again from the config',
      '44 tensors -> 32 parameters', 'nothing missing, nothing left over',
      '"patch_nums": [1, 2, 3, 4]',
  ):
    assert text in out
  assert not list(tmp_path.iterdir())


def test_one_side_is_a_list(tmp_path):
  case = golden_cases.load('var_vqvae_tiny')
  file = tmp_path / 'a.pth'
  torch_files.save_zip(file, {
      k: torch_files.tensor(v) for k, v in case.tensors().items()
  })
  command = ('--family=var_vqvae', f'--input={file}', '--dry_run')
  assert 'patch_nums=4: a single side is [4]' in fail(
      *command, '--config=patch_nums=4'
  )
  assert '"patch_nums": [4]' in succeed(*command, '--config=patch_nums=[4]')


def test_sizes_by_hand(tmp_path):
  case = golden_cases.load('dd_var_tiny_saln')
  file = tmp_path / 'a.pth'
  torch_files.save_legacy(file, {
      'args': argparse.Namespace(depth=3), 'trainer': {'ema_parameters': {
          f'module.{k}': torch_files.tensor(v)
          for k, v in case.tensors().items()
      }},
  })
  command = ('--family=dd_var', f'--input={file}', '--dry_run')
  assert '--config=heads=' in fail(*command)
  out = succeed(*command, '--config=heads=3', '--config=patch_nums=[1,2,4]')
  assert '"heads": 3' in out and '"patch_nums": [1, 2, 4]' in out


def test_fields_of_a_network_within(tmp_path):
  _, _, ours, teacher = critic_test.filed(head_dim=16)
  released_files.save(tmp_path / 'a.pth', teacher | ours)
  out = succeed(
      '--family=dmd2_critic', f'--input={tmp_path / "a.pth"}', '--dry_run',
      '--config=denoiser={"head_dim":16,"dtype":"bfloat16"}',
  )
  for text in ('"head_dim": 16', '"dtype": "bfloat16"', '"ch": 64',
               'kept beside the parameters: karras_sigmas', 'left out: real_'):
    assert text in out


def test_code_in_a_file_does_not_run(tmp_path):
  canary = tmp_path / 'canary'
  case = golden_cases.load('var_transformer_tiny')
  tree = {k: torch_files.tensor(v) for k, v in case.tensors().items()}
  for name, save in (
      ('zip', torch_files.save_zip), ('legacy', torch_files.save_legacy),
  ):
    file = tmp_path / f'{name}.pth'
    save(file, {
        'model': tree,
        'args': torch_files.Call('os', 'system', f'touch {canary}'),
    })
    text = fail('--family=var', f'--input={file}', f'--output={tmp_path / "x"}')
    assert "refused: the pickle in it names 'os.system'" in text
    assert str(file) in text.replace('\n', '')
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      'legacy.pth', 'zip.pth'
  ]


def test_broken_files_leave_nothing(tmp_path):
  data = FILES['var'].read_bytes()
  (tmp_path / 'cut.pth').write_bytes(data[: len(data) // 2])
  output = f'--output={tmp_path / "x"}'
  cut = fail('--family=var', f'--input={tmp_path / "cut.pth"}', output)
  assert 'cut short' in cut
  other = fail('--family=var', f'--input={FILES["dd_var"]}', output)
  assert 'use --family=dd_var' in other
  tensors = golden_cases.load('var_transformer_tiny').tensors()
  del tensors['head.bias']
  tensors['stray'] = np.zeros(2, np.float32)
  torch_files.save_zip(
      tmp_path / 'keys.pth',
      {k: torch_files.tensor(v) for k, v in tensors.items()},
  )
  keys = fail('--family=var', f'--input={tmp_path / "keys.pth"}', output)
  assert '2 problem(s)' in keys
  assert "tensor 'stray' matches no row" in keys
  assert "there is no tensor 'head.bias'" in keys
  assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.pth', 'keys.pth']


def test_nothing_is_replaced_by_accident(tmp_path):
  output = tmp_path / 'x'
  output.mkdir()
  (output / 'mine').touch()
  command = (
      '--family=var', f'--input={FILES["var"]}', f'--output={output}',
  )
  assert 'exists; --overwrite replaces it' in fail(*command)
  assert 'not an export' in fail(*command, '--overwrite')
  assert (output / 'mine').exists()
