# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Files of ours that PyTorch opens, and files of PyTorch that we read.

Needs torch, which nothing else does: without it these tests are skipped.
"""

from __future__ import annotations

import argparse
import collections

import numpy as np
import pytest

from dd_jax import conversion
from dd_jax.convert import pickles, readers
from tests.tools.convert_test import FILES

torch = pytest.importorskip('torch')
load_file = pytest.importorskip('safetensors.torch').load_file

WRAPPERS = {
    'var': [()],
    'dd_var': [('trainer', 'ema_parameters'), ('trainer', 'var_wo_ddp')],
}


def content(tensor):
  """The bytes of a tensor, row by row."""
  flat = tensor.detach().contiguous().reshape(-1)
  return flat.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('family, wrapper', [
    (family, keys) for family, options in WRAPPERS.items() for keys in options
])
def test_torch_opens_what_we_write(family, wrapper, suffix, tmp_path):
  export, path = tmp_path / 'export', tmp_path / f'back{suffix}'
  conversion.write(
      conversion.plan(family, [FILES[family]], wrapper=wrapper), export, {}
  )
  conversion.restore(export, [path])  # what the command --reverse does
  original = torch.load(FILES[family], weights_only=True)
  for key in wrapper:
    original = original[key]
  if suffix == '.safetensors':
    opened = [load_file(path)]
    assert opened[0].keys() == original.keys()
  else:
    opened = [torch.load(path, weights_only=True, mmap=m) for m in (0, 1)]
    for key in wrapper:
      assert [list(tree) for tree in opened] == [[key]] * 2
      opened = [tree[key] for tree in opened]
    assert [list(tree) for tree in opened] == [list(original)] * 2
  for tree in opened:
    for name, value in original.items():
      assert (tree[name].dtype, tree[name].shape, tree[name].stride()) == (
          value.dtype, value.shape, value.contiguous().stride()
      ), name
      assert content(tree[name]) == content(value), name


def checkpoint():
  """What a program may save: many types, views, and things beside weights."""
  torch.manual_seed(0)
  flat, table = torch.randn(24), torch.randn(4, 6)
  net = torch.nn.Sequential(
      torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
  )
  optimizer = torch.optim.AdamW(net.parameters())
  net(torch.randn(2, 3, 5, 5)).sum().backward()
  optimizer.step()
  return {
      'args': argparse.Namespace(depth=16, inner=argparse.Namespace(lr=1e-4)),
      'epoch': 3,
      'statistics': {'m': np.arange(3.0), 's': np.eye(3) - 0.5},
      'model': net.state_dict(),
      'parameters': dict(net.named_parameters()),
      'optimizer': optimizer.state_dict(),
      'types': {
          str(dtype): (10 * table).to(dtype) for dtype in (
              torch.float64, torch.float32, torch.bfloat16, torch.float16,
              torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
              torch.bool,
          )
      },
      'views': collections.OrderedDict({
          'transposed': table.T, 'column': table[:, 2], 'steps': flat[3::4],
          'half': table.bfloat16()[1:, ::2], 'small': table.half().T[2:5],
          'expanded': flat[:3].expand(5, 3), 'scalar': flat[7],
          'empty': flat[:0].reshape(0, 3), 'channels last': torch.randn(
              2, 3, 4, 5
          ).to(memory_format=torch.channels_last),
      }),
      'shared': {'all': flat, 'square': flat.view(4, 6), 'tail': flat[20:],
                 'again': flat},
  }


def compare(ours, theirs):
  """Counts the tensors of both, which must be the same."""
  if isinstance(theirs, torch.Tensor):
    assert ours.dtype.name == str(theirs.dtype).removeprefix('torch.')
    assert ours.shape == tuple(theirs.shape)
    assert np.asarray(ours).tobytes() == content(theirs)
    return 1
  if isinstance(theirs, argparse.Namespace):
    assert ours == pickles.Placeholder('argparse.Namespace')
  elif isinstance(theirs, dict):
    assert list(ours) == list(theirs)
    return sum(compare(ours[k], theirs[k]) for k in theirs)
  elif isinstance(theirs, (list, tuple)):
    assert len(ours) == len(theirs)
    return sum(map(compare, ours, theirs))
  elif isinstance(theirs, np.ndarray):
    np.testing.assert_array_equal(ours, theirs, strict=True)
  else:
    assert ours == theirs
  return 0


@pytest.mark.parametrize('new', [True, False])
def test_we_read_what_torch_writes(new, tmp_path):
  tree = checkpoint()
  torch.save(tree, tmp_path / 'f.pth', _use_new_zipfile_serialization=new)
  contents = readers.read(tmp_path / 'f.pth')
  assert contents.format == ('torch zip' if new else 'torch legacy')
  assert compare(contents.tree, tree) == 46
  found = readers.select(tmp_path / 'f.pth', contents.tree)
  assert found.wrapper == ('model',)
  assert list(found.tensors) == list(tree['model'])
