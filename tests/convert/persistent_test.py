# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of pickled networks: their tensors, and hostile ones."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest

from dd_jax.convert import pickles, readers
from tests.convert import persistent_files, torch_files
from tests.convert.persistent_files import Container, Network, Parameter
from tests.convert.torch_files import Call

TENSORS = {
    'model.map.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
    'model.map.bias': np.array([1.5], np.float32),
    'model.enc.8x8_down.conv0.weight': np.ones((2, 1, 3, 3), np.float16),
    'model.enc.8x8_down.conv0.resample_filter': np.full((1, 1, 2, 2), 0.25),
    'model.dec.out.weight': np.zeros((0, 3), np.float32),
}


def refusal(path, **kwargs):
  """The one line that a file is refused with; it names the file."""
  with pytest.raises(readers.ReadError) as info:
    readers.select(path, readers.read(path, **kwargs).tree)
  text = str(info.value)
  assert str(path) in text and '\n' not in text
  return text


@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_networks_are_read_and_their_source_is_not(protocol, tmp_path):
  canary = tmp_path / 'canary'
  source = f'open({str(canary)!r}, "w")'
  persistent_files.save(tmp_path / 'f.pkl', {
      'ema': persistent_files.network(TENSORS, source),
      'loss_fn': Network('EDMLoss', {'P_mean': -1.2}, source),
      'augment_pipe': None,
      'dataset_kwargs': persistent_files.Easy(path='x.zip', size=3),
  }, protocol)
  contents = readers.read(tmp_path / 'f.pkl')
  assert contents.format == 'persistent pickle'
  assert contents.tree['dataset_kwargs'] == {'path': 'x.zip', 'size': 3}
  found = readers.select(tmp_path / 'f.pkl', contents.tree)
  assert found.wrapper == ('ema',) and set(found.tensors) == set(TENSORS)
  for name, value in TENSORS.items():
    lazy = found.tensors[name]
    assert (lazy.shape, lazy.dtype) == (value.shape, value.dtype)
    np.testing.assert_array_equal(np.asarray(lazy), value)
  assert not canary.exists()


def test_a_network_alone(tmp_path):
  persistent_files.save(tmp_path / 'f', persistent_files.network(TENSORS))
  found = readers.select(tmp_path / 'f', readers.read(tmp_path / 'f').tree)
  assert found.wrapper == () and set(found.tensors) == set(TENSORS)


def test_arrays_of_numpy_stand_beside_the_weights(tmp_path):
  tree = {
      'ema': persistent_files.network(TENSORS),
      'augment': np.arange(3), 'scale': np.float32(2),
  }
  persistent_files.save(tmp_path / 'f', tree)
  made = readers.read(tmp_path / 'f').tree
  assert isinstance(made['augment'], pickles.Placeholder)
  assert isinstance(made['scale'], pickles.Placeholder)


HOSTILE = {
    'os.system': lambda c: Call('os', 'system', f'touch {c}'),
    'posix.system': lambda c: Call('posix', 'system', f'touch {c}'),
    'builtins.exec': lambda c: Call('builtins', 'exec', f'open({c!r}, "w")'),
    'builtins.getattr': lambda c: Call('builtins', 'getattr', 'a', 'upper'),
    'torch_utils.persistence._module_to_src': lambda c: Call(
        'torch_utils.persistence', '_module_to_src', c
    ),
    'torch_utils.persistence._reconstruct_persistent_obj.__globals__':
        lambda c: Call(
            'torch_utils.persistence',
            '_reconstruct_persistent_obj.__globals__',
        ),
    'torch.load': lambda c: Call('torch', 'load', c),
    'torch.jit.load': lambda c: Call('torch.jit', 'load', c),
    'numpy.load': lambda c: Call('numpy', 'load', c),
}


def save_with(path, tree):
  """As `persistent_files.save`, with names of one's own in it."""
  fakes = torch_files.FAKES | persistent_files._FAKES
  with torch_files.installed(fakes):
    with path.open('wb') as file:
      pickler = torch_files._Pickler(file, False)
      pickler.proto, pickler.bin = 3, True
      pickler.dump(tree)


@pytest.mark.parametrize('place', ['beside', 'state', 'source', 'tensor'])
@pytest.mark.parametrize('name', HOSTILE)
def test_code_is_refused_by_name(name, place, tmp_path):
  canary = tmp_path / 'canary'
  bad = HOSTILE[name](str(canary))
  net = persistent_files.network({'w': np.ones(2, np.float32)})
  tree = {'ema': net}
  if place == 'beside':
    tree['other'] = bad
  elif place == 'state':
    net.meta['state']['x'] = bad
  elif place == 'source':
    net.meta['module_src'] = bad
  else:
    net.meta['state']['_parameters']['w'].blob.data = bad
  save_with(tmp_path / 'f', tree)
  assert f'names {name!r}' in refusal(tmp_path / 'f')
  assert not canary.exists()


def test_code_in_the_file_within_the_file_is_refused(tmp_path):
  canary = tmp_path / 'canary'
  for name, inner in {
      'os.system': Call('os', 'system', f'touch {canary}'),
      # What the outer pickle may name, the inner one may not.
      'torch.storage._load_from_bytes': Call(
          'torch.storage', '_load_from_bytes', b'x'
      ),
      'torch_utils.persistence._reconstruct_persistent_obj': Call(
          'torch_utils.persistence', '_reconstruct_persistent_obj', {}
      ),
  }.items():
    net = persistent_files.network({'w': np.ones(2, np.float32)})
    torch_files.save_legacy(tmp_path / 'inner', inner)
    net.meta['state']['_parameters']['w'].blob.data = (
        tmp_path / 'inner'
    ).read_bytes()
    persistent_files.save(tmp_path / 'f', {'ema': net})
    assert f'names {name!r}' in refusal(tmp_path / 'f')
  assert not canary.exists()


def test_what_is_no_network_is_refused(tmp_path):
  path = tmp_path / 'f'
  one = np.ones(2, np.float32)

  def problem(tree):
    persistent_files.save(path, tree)
    return refusal(path)

  assert 'not one of torch.save, nor one of networks' in problem({'a': 1})
  assert "holds a pickled 'function'" in problem(
      {'ema': Network('f', {}, '', 'function')}
  )
  assert "'w' is a int, neither a tensor nor a module" in problem(
      {'ema': Network('f', persistent_files.state({'w': 3}), '')}
  )
  assert '_modules of' in problem(
      {'ema': Network('f', {'_modules': [1]}, '')}
  )
  assert 'no tensors at' in problem({'ema': Network('f', {}, '')})
  # A tensor whose bytes are another tensor's, or no bytes at all.
  made = Parameter(one)
  made.shape = (3,)
  assert 'needs 3 values, but its storage has 2' in problem(
      {'ema': Network('f', persistent_files.state({'w': made}), '')}
  )
  for data in ('text', b'', b'\x80\x02K\x01.', pickle.dumps({}, 2)):
    made.blob.data = data
    problem({'ema': Network('f', persistent_files.state({'w': made}), '')})


def test_networks_without_end_are_refused(tmp_path):
  circle = persistent_files.state()
  circle['_modules']['again'] = Container(circle)
  persistent_files.save(tmp_path / 'f', {'ema': Network('f', circle, '')})
  assert 'nested without end' in refusal(tmp_path / 'f')
  # A few modules, each twice in the one above.
  net = Container(persistent_files.state())
  for _ in range(25):
    net = Container(persistent_files.state(modules={'a': net, 'b': net}))
  persistent_files.save(
      tmp_path / 'f', {'ema': Network('f', persistent_files.state(
          modules=collections.OrderedDict(m=net)
      ), '')},
  )
  assert 'nested without end' in refusal(tmp_path / 'f')


def test_damage_never_escapes(tmp_path):
  """A changed byte gives a refusal or other numbers, and no other error."""
  rng = np.random.default_rng(0)
  net = persistent_files.network(dict(list(TENSORS.items())[:2]))
  persistent_files.save(tmp_path / 'f', {'ema': net})
  whole = (tmp_path / 'f').read_bytes()
  refused = 0
  for _ in range(400):
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (tmp_path / 'g').write_bytes(data)
    try:
      tree = readers.read(tmp_path / 'g').tree
      for value in readers.select(tmp_path / 'g', tree).tensors.values():
        np.asarray(value)
    except readers.ReadError:
      refused += 1
  assert 100 < refused < 400


@pytest.mark.parametrize('share', [0.1, 0.5, 0.9, 0.999])
def test_cut_short(share, tmp_path):
  persistent_files.save(
      tmp_path / 'f', {'ema': persistent_files.network(TENSORS)}
  )
  data = (tmp_path / 'f').read_bytes()
  (tmp_path / 'f').write_bytes(data[: int(share * len(data))])
  refusal(tmp_path / 'f')
