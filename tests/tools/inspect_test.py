# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the inspector says of exports, of foreign files, and of nonsense."""

from __future__ import annotations

import numpy as np

from dd_jax import checkpoint
from dd_jax.models.judge import model as judge
from tests.convert import torch_files
from tests.tools import convert_test


def succeed(path):
  return convert_test.succeed(path, name='inspect')


def fail(path):
  return convert_test.fail(path, name='inspect')


def test_exports(tmp_path):
  net = judge.build({'image_size': 8, 'image_channels': 1, 'num_classes': 3})
  params = {}
  for name, leaves in net.abstract().items():
    params[name] = {
        k: np.zeros(v.shape, v.dtype) for k, v in leaves.items()
    }
  digest = checkpoint.export(
      tmp_path / 'judge-70', net, params, {'stage': 'judge', 'step': 70}
  )
  out = succeed(tmp_path / 'judge-70')
  count = sum(x.size for leaves in params.values() for x in leaves.values())
  for text in (f'{count:,}', digest, 'step', '70', 'image_size', 'num_classes'):
    assert text in out
  assert '--reverse' not in out  # no family of files has this network
  out = succeed(tmp_path)
  assert 'judge-70' in out and f'{count:,}' in out


def test_a_released_file():
  path = convert_test.FILES['dd_var']
  out = succeed(path)
  for text in (
      'torch zip', 'trainer {var_wo_ddp, ema_parameters}',
      '44 tensors at trainer/ema_parameters', 'blocks.{i}.attn.mat_qkv.weight',
      '192x64', '178,640 values', 'family: dd_var',
      f'python -m dd_jax.tools.convert --family=dd_var --input={path}',
      '48 more tensors at trainer/var_wo_ddp',
  ):
    assert text in out


def test_a_file_of_something_else(tmp_path):
  path = tmp_path / 'other.pth'
  torch_files.save_legacy(path, {'model': {
      f'module.layer.{i}.weight': torch_files.tensor(np.ones((2, 3)))
      for i in range(100)
  }})
  out = succeed(path)
  for text in (
      'torch legacy', "100 tensors at model, names without 'module.'",
      'layer.{i}.weight', 'float64', 'no family of the converter',
  ):
    assert text in out


def test_nonsense(tmp_path):
  path = tmp_path / 'a.pth'
  path.write_bytes(b'hello')
  assert 'neither .safetensors nor made by torch.save' in fail(path)
  canary = tmp_path / 'canary'
  torch_files.save_zip(
      path, torch_files.Call('builtins', 'eval', f'open({str(canary)!r}, "w")')
  )
  assert "'builtins.eval'" in fail(path)
  assert not canary.exists()
  (tmp_path / 'folder').mkdir()
  assert 'not an export' in fail(tmp_path / 'folder')
