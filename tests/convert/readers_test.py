# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the readers: formats, strides, wrappers, and hostile files."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dd_jax.convert import pickles, readers
from tests.convert import torch_files
from tests.convert.torch_files import Call, Storage, Tensor, tensor
from tests.golden import golden_cases

GOLDEN = os.path.dirname(golden_cases.__file__)
SAVERS = {
    'torch zip': torch_files.save_zip, 'torch legacy': torch_files.save_legacy,
}
TYPES = [
    np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32,
    np.int16, np.int8, np.uint8, np.bool_,
]


@pytest.fixture(params=sorted(SAVERS))
def kind(request):
  return request.param


def weights(path, wrapper=None):
  return readers.select(path, readers.read(path).tree, wrapper)


def refusal(path, **kwargs):
  """The one line that a file is refused with; it names the file."""
  with pytest.raises(readers.ReadError) as info:
    readers.select(path, readers.read(path, **kwargs).tree)
  text = str(info.value)
  assert str(path) in text and '\n' not in text
  return text


@pytest.mark.parametrize('file, case, wrapper', [
    ('var_tiny', 'var_transformer_tiny', ()),
    ('dd_var_tiny', 'dd_var_tiny', ('trainer', 'ema_parameters')),
    ('dd_var_tiny', 'dd_var_tiny', ('trainer', 'var_wo_ddp')),
])
def test_files_of_the_original_programs(file, case, wrapper):
  path = f'{GOLDEN}/{file}.pth'
  assert readers.read(path).format == 'torch zip'
  found = weights(path, wrapper or None)
  assert found.wrapper == wrapper and not found.others
  expected = golden_cases.load(case).tensors()
  assert expected.keys() <= found.tensors.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(np.asarray(found.tensors[name]), value)


@pytest.mark.parametrize('dtype', TYPES)
def test_types(dtype, kind, tmp_path):
  value = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype)
  SAVERS[kind](tmp_path / 'f.pt', {'a': tensor(value), 'b': tensor(value[0])})
  contents = readers.read(tmp_path / 'f.pt')
  assert contents.format == kind
  for name, expected in (('a', value), ('b', value[0])):
    lazy = contents.tree[name]
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(np.asarray(lazy), expected)


def test_safetensors(tmp_path):
  values = {t.__name__: np.arange(6).reshape(2, 3).astype(t) for t in TYPES}
  save_file(values, tmp_path / 'a.weights')
  contents = readers.read(tmp_path / 'a.weights')  # told by what is in it
  assert contents.format == 'safetensors'
  for name, value in values.items():
    assert contents.tree[name].dtype == value.dtype
    np.testing.assert_array_equal(np.asarray(contents.tree[name]), value)


def test_views_of_storages(kind, tmp_path):
  flat = np.arange(24, dtype=np.float32)
  storage = Storage(flat)
  tree = {
      'transposed': Tensor(storage, (4, 3), (1, 4), 12),
      'steps': Tensor(storage, (3, 2), (8, 3), 1),
      'expanded': Tensor(storage, (3, 2), (0, 1), 22),
      'scalar': Tensor(storage, (), (), 7),
      'empty': Tensor(storage, (0, 5), (5, 1), 24),
      'parameter': Tensor(storage, (2,), parameter=True),
      'old': Tensor(storage, (2,), rebuild='_rebuild_tensor'),
      'other': tensor(flat[:2] + 100),
  }
  SAVERS[kind](tmp_path / 'f', tree)
  found = {
      k: np.asarray(v) for k, v in weights(tmp_path / 'f').tensors.items()
  }
  expected = {
      'transposed': flat[12:].reshape(3, 4).T,
      'steps': np.array([[1, 4], [9, 12], [17, 20]]),
      'expanded': np.array([[22, 23]] * 3),
      'scalar': np.array(7), 'empty': np.zeros((0, 5)),
      'parameter': flat[:2], 'old': flat[:2], 'other': flat[:2] + 100,
  }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize('keys', readers.WRAPPERS)
@pytest.mark.parametrize('prefix', ['', 'module.', 'module._orig_mod.'])
def test_wrappers_and_prefixes(keys, prefix, tmp_path):
  tree = collections.OrderedDict({
      f'{prefix}a.w': tensor(np.ones(2, np.float32)),
      f'{prefix}b': tensor(np.zeros(3, np.float32)),
  })
  for key in reversed(keys):
    tree = {key: tree, 'epoch': 3}
  torch_files.save_zip(tmp_path / 'f', tree)
  found = weights(tmp_path / 'f')
  assert found.wrapper == keys and found.prefix == prefix
  assert list(found.tensors) == ['a.w', 'b']


def test_averaged_weights_come_first(tmp_path):
  raw, ema = (tensor(np.full(2, x, np.float32)) for x in (1, 2))
  torch_files.save_zip(tmp_path / 'f', {'model': {'w': raw}, 'ema': {'w': ema}})
  assert np.asarray(weights(tmp_path / 'f').tensors['w'])[0] == 2
  chosen = weights(tmp_path / 'f', ('model',))
  assert np.asarray(chosen.tensors['w'])[0] == 1
  with pytest.raises(readers.ReadError, match=r'no tensors at x.*model \{w\}'):
    weights(tmp_path / 'f', ('x',))


def test_a_prefix_of_some_names_stays(tmp_path):
  one = tensor(np.ones(1, np.float32))
  torch_files.save_zip(tmp_path / 'f', {'module.a': one, 'b': one})
  assert list(weights(tmp_path / 'f').tensors) == ['module.a', 'b']


def test_a_namespace_beside_the_weights_loads(kind, tmp_path):
  args = argparse.Namespace(lr=0.1, tags=['a'], inner=argparse.Namespace(x=1))
  SAVERS[kind](tmp_path / 'f', {
      'args': args, 'model': {'w': tensor(np.ones(2, np.float32))},
      'shape': {1, 2},
  })
  contents = readers.read(tmp_path / 'f')
  assert contents.tree['args'] == pickles.Placeholder('argparse.Namespace')
  assert list(weights(tmp_path / 'f').tensors) == ['w']


@pytest.mark.parametrize('core', ['core', '_core'])
def test_arrays_that_were_saved_as_they_are(kind, core, tmp_path):
  rng = np.random.default_rng(0)
  mean, cov = rng.normal(size=7), rng.normal(size=(7, 3))
  tree = {
      'm': mean, 's': cov, 'again': mean, 'columns': np.asfortranarray(cov),
      'labels': np.arange(-3, 900, dtype=np.int16), 'none': np.zeros((0, 2)),
      'right': np.array([True, False]), 'best': np.float64(3.5),
      'w': tensor(np.ones(2, np.float32)),
  }
  SAVERS[kind](tmp_path / 'f', tree)
  data = (tmp_path / 'f').read_bytes()
  old = b'cnumpy._core.multiarray\n'
  assert old in data
  if kind == 'torch legacy':  # where no sizes are kept of what is changed
    (tmp_path / 'f').write_bytes(
        data.replace(old, f'cnumpy.{core}.multiarray\n'.encode())
    )
  got = readers.read(tmp_path / 'f').tree
  for name in tree.keys() - {'w', 'best'}:
    assert got[name].dtype == tree[name].dtype
    np.testing.assert_array_equal(got[name], tree[name], strict=True)
  assert got['again'] is got['m']
  assert isinstance(got['best'], pickles.Placeholder)
  assert list(weights(tmp_path / 'f').tensors) == ['w']


@pytest.mark.parametrize('array, message', [
    (np.array([os.getcwd, 1], object), 'names '),
    (np.array([1, 'a'], object), 'an array of a type that weights do not'),
    (np.array(['ab']), 'an array of a type that weights do not'),
    (np.zeros(2, [('a', 'f4')]), 'an array of a type that weights do not'),
    (np.arange(3, dtype='>f8'), 'big-endian'),
])
def test_other_arrays_are_refused(array, message, kind, tmp_path):
  SAVERS[kind](tmp_path / 'f', {'m': array})
  assert message in refusal(tmp_path / 'f')


def test_lone_values_and_arrays_that_are_read_past(kind, tmp_path):
  tree = {'w': tensor(np.ones(2, np.float32)), 'best': np.str_('ab')}
  SAVERS[kind](tmp_path / 'f', tree)
  assert list(weights(tmp_path / 'f').tensors) == ['w']
  SAVERS[kind](tmp_path / 'f', tree | {'names': np.array(['ab'])})
  name = 'numpy._core.multiarray._reconstruct'
  assert name in refusal(tmp_path / 'f')
  got = readers.read(tmp_path / 'f', inert=[name]).tree
  assert got['names'] == pickles.Placeholder(name)


def array_of(shape, data, times=1):
  """A pickle of arrays, all built from the same bytes."""
  one = (
      b'cnumpy._core.multiarray\n_reconstruct\n'
      b'(cnumpy\nndarray\nK\x00\x85U\x01btR'
      b'(K\x01' + shape + b'cnumpy\ndtype\nU\x02f4\x89\x88\x87R'
      b'(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
      b'\x89c_codecs\nencode\nh\x01U\x06latin1\x86Rtb'
  )
  text = b'X' + struct.pack('<I', len(data)) + data.encode()
  return b'\x80\x02' + text + b'q\x010]' + one.join([b'', *[b'a'] * times]) + (
      b'.'
  )


def test_an_array_has_the_bytes_that_its_shape_needs(tmp_path):
  path = tmp_path / 'f'
  torch_files.save_zip(path, {}, data=array_of(b'K\x02\x85', 'abcdefgh'))
  np.testing.assert_array_equal(
      readers.read(path).tree[0], np.frombuffer(b'abcdefgh', 'f4')
  )
  for shape in (
      b'K\x03\x85', b'K\x01\x85', b'J\xfe\xff\xff\xff\x85',
      b'\x8a\x05\xff\xff\xff\xff\x7f\x85', b'K\x02', b'N\x85',
  ):
    torch_files.save_zip(path, {}, data=array_of(shape, 'abcdefgh'))
    assert 'broken' in refusal(path)


# A memo holds an array of (4, 2) bytes; a call has it for its argument.
ONE = (
    b'cnumpy._core.multiarray\n_reconstruct\n'
    b'(cnumpy\nndarray\nK\x00\x85c_codecs\nencode\nX\x01\x00\x00\x00b'
    b'X\x06\x00\x00\x00latin1\x86RtRq\x07'
)
STATE = (
    b'(K\x01K\x04K\x02\x86cnumpy\ndtype\nX\x02\x00\x00\x00u1\x89\x88\x87R'
    b'\x89c_codecs\nencode\nX\x08\x00\x00\x00abcdefgh'
    b'X\x06\x00\x00\x00latin1\x86Rtb'
)


@pytest.mark.parametrize('body, message', [
    (b'', None),
    (STATE, 'built twice'),
    (b'0ctorch\nSize\nh\x07\x85R', 'ndarray where tuple or'),
    (b'0ccollections\nOrderedDict\nh\x07\x85R', 'ndarray where tuple or'),
    (b'0c__builtin__\nset\nh\x07\x85R', 'ndarray where tuple or'),
    (b'0ctorch\nSize\nX\x01\x00\x00\x00a\x85R', 'str where tuple or'),
    (b'0}h\x07K\x01s', 'a key that is a ndarray'),
])
def test_nothing_is_made_of_the_items_of_arrays(body, message, tmp_path):
  """They would be views of bytes that go, and objects by the million."""
  data = b'\x80\x02' + ONE + STATE + body + b'.'
  torch_files.save_zip(tmp_path / 'f', {}, data=data)
  if message is None:
    assert readers.read(tmp_path / 'f').tree.tobytes() == b'abcdefgh'
  else:
    assert message in refusal(tmp_path / 'f')


DEEP = b')' + b'\x85' * 250_000
LARGE = b'X' + struct.pack('<I', 1 << 20) + b'a' * (1 << 20) + b'q\x05'


@pytest.mark.parametrize('body', [
    # What ends Python when it is hashed, where something else should be.
    b'cnumpy\ndtype\n' + DEEP + b'\x85R',
    b'cdnnlib.util\nEasyDict\n]' + DEEP + b'N\x86a\x85R',
    # Keys that are written down, each a megabyte of text.
    LARGE + b'0}h\x05K\x01s', LARGE + b'0}h\x05K\x01\x86K\x01s',
    # Numbers with the same hash.
    b'}\x8a\x09' + (2**64).to_bytes(9, 'little') + b'K\x01s',
    b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x01K\x02\x86'
    b'X\x03\x00\x00\x00cpuK\x01tQ',
])
def test_what_costs_too_much_to_hash_or_to_write_down(body, kind, tmp_path):
  data = b'\x80\x02' + body + b'.'
  if kind == 'torch zip':
    torch_files.save_zip(tmp_path / 'f', {}, data=data)
  else:
    (tmp_path / 'f').write_bytes(data)
  refusal(tmp_path / 'f')


@pytest.mark.parametrize('body, message', [
    (b'}K\x01K\x02\x86K\x01s', 'a key that is a tuple'),
    (b'\x8f(K\x01K\x02\x86\x90', 'a key that is a tuple'),
    (b'Np%d\n' % (2**61 - 1), 'is no size'),
])
def test_keys_whose_hash_can_be_chosen(body, message, tmp_path):
  torch_files.save_zip(tmp_path / 'f', {}, data=b'\x80\x02' + body + b'.')
  assert message in refusal(tmp_path / 'f')


@pytest.mark.parametrize('code', ['b1', 'f4'])
def test_a_magic_number_that_is_an_array(code, tmp_path):
  (tmp_path / 'f').write_bytes(
      b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x190' + ONE
      + STATE.replace(b'u1', code.encode()).replace(
          b'K\x04K\x02', {'b1': b'K\x04K\x02', 'f4': b'K\x01K\x02'}[code]
      ) + b'.'
  )
  assert 'not one of torch.save' in refusal(tmp_path / 'f')


def test_few_bytes_do_not_make_many_arrays(tmp_path):
  path, count = tmp_path / 'f', 1 << 22
  shape = b'J' + struct.pack('<i', count // 4) + b'\x85'
  torch_files.save_zip(path, {}, data=array_of(shape, 'a' * count))
  assert readers.read(path).tree[0].nbytes == count
  torch_files.save_zip(path, {}, data=array_of(shape, 'a' * count, times=20))
  assert 'does more than weights' in refusal(path)


HOSTILE = {
    'os.system': lambda c: Call('os', 'system', f'touch {c}'),
    'posix.system': lambda c: Call('posix', 'system', f'touch {c}'),
    'builtins.eval': lambda c: Call('builtins', 'eval', f'open({c!r}, "w")'),
    'builtins.exec': lambda c: Call('__builtin__', 'exec', f'open({c!r}, "w")'),
    'builtins.getattr': lambda c: Call('builtins', 'getattr', 'a', 'upper'),
    'subprocess.Popen': lambda c: Call('subprocess', 'Popen', ['touch', c]),
    'torch._utils._rebuild_tensor_v2.__globals__': lambda c: Call(
        'torch._utils', '_rebuild_tensor_v2.__globals__'
    ),
    'torch._utils_._rebuild_tensor_v2': lambda c: Call(
        'torch._utils_', '_rebuild_tensor_v2', c
    ),
    'torch._utils._import_dotted_name': lambda c: Call(
        'torch._utils', '_import_dotted_name', 'os.system'
    ),
    'torch.storage._load_from_bytes': lambda c: Call(
        'torch.storage', '_load_from_bytes', b'x'
    ),
    'numpy.load': lambda c: Call('numpy', 'load', c),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_code_in_a_pickle_is_refused_by_name(name, kind, tmp_path):
  canary = tmp_path / 'canary'
  tree = {
      'model': {'w': tensor(np.ones(2, np.float32))},
      'args': HOSTILE[name](str(canary)),
  }
  SAVERS[kind](tmp_path / 'f', tree)
  text = refusal(tmp_path / 'f')
  assert f'refused: the pickle in it names {name!r}' in text
  assert not canary.exists()


def test_the_same_pickles_would_run_code(tmp_path):
  """That the canary could have died: Python's own unpickler runs it."""
  canary = tmp_path / 'canary'
  data, _ = torch_files.pickled(HOSTILE['os.system'](str(canary)))
  pickle.loads(data)
  assert canary.exists()


def test_a_plain_pickle_is_refused_too(tmp_path):
  canary = tmp_path / 'canary'
  for protocol in (2, 4):
    path = tmp_path / f'{protocol}.pth'
    path.write_bytes(pickle.dumps(collections.Counter, protocol))
    assert "'collections.Counter'" in refusal(path)
  for data in (
      b'\x80\x04(\x8c\x02os\x8c\x06system\x93\x8c\x05touch\x85R.',
      b'\x80\x02(S\'touch\'\nios\nsystem\n.',  # INST
  ):
    (tmp_path / 'raw').write_bytes(data)
    refusal(tmp_path / 'raw')
  (tmp_path / 'text').write_text(f"cos\nsystem\n(S'touch {canary}'\ntR.")
  assert 'nor made by torch.save' in refusal(tmp_path / 'text')
  (tmp_path / 'list').write_bytes(pickle.dumps([1, 2], 2))
  assert 'not one of torch.save' in refusal(tmp_path / 'list')
  assert not canary.exists()


def test_names_that_the_user_allows_are_read_past(tmp_path):
  torch_files.save_zip(tmp_path / 'f', {
      'model': {'w': tensor(np.ones(2, np.float32))},
      'args': Call('my.code', 'Options', 1),
  })
  assert '--inert=my.code.Options' in refusal(tmp_path / 'f')
  tree = readers.read(tmp_path / 'f', inert=['my.code.Options']).tree
  assert tree['args'] == pickles.Placeholder('my.code.Options')


def test_a_tensor_made_of_a_placeholder_is_refused(tmp_path):
  made = tensor(np.ones(2, np.float32))
  made.storage = argparse.Namespace()
  torch_files.save_zip(tmp_path / 'f', {'w': made})
  assert 'Placeholder where Storage should be' in refusal(tmp_path / 'f')


@pytest.mark.parametrize('data', [
    b'\x80\x05\x96' + struct.pack('<Q', 1 << 40) + b'.',  # BYTEARRAY8
    b'\x80\x04\x8e' + struct.pack('<Q', 1 << 40) + b'.',  # BINBYTES8
    b'\x80\x02\x8b' + struct.pack('<i', 1 << 30) + b'.',  # LONG4
    b'\x80\x02Nr\xff\xff\xff\xff.',  # a memo of four billion entries
    b'\x80\x02\x82\x01.',  # EXT1
    b'\x80\x02NNb.', b'\x80\x02R.', b'\x80\x02.', b'\x80\x02t.', b'\x80\x02e.',
    b'\x80\x02}(NNNu.', b'\x80\x02NQ.', b'\x80\x02(K\x01K\x02tQ.',
    b'\x80\x02h\x05.', b'\x80\x02' + b'(' * 5000 + b'l' * 4000 + b'.',
    b'', b'\x80\x02}', b'\xff' * 40,
])
def test_nonsense_instructions(data, tmp_path):
  torch_files.save_zip(tmp_path / 'f', {}, data=data)
  refusal(tmp_path / 'f')


def test_random_damage_never_escapes(tmp_path):
  """A changed byte gives a refusal or other numbers, and no other error."""
  rng = np.random.default_rng(0)
  tree = {
      'a': tensor(np.ones((3, 2), np.float32)), 'n': argparse.Namespace(x=1)
  }
  for kind, save in SAVERS.items():
    save(tmp_path / 'f', tree)
    whole = (tmp_path / 'f').read_bytes()
    refused = 0
    for _ in range(400):
      data = bytearray(whole)
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
      (tmp_path / 'g').write_bytes(data)
      try:
        for value in weights(tmp_path / 'g').tensors.values():
          np.asarray(value)
      except readers.ReadError:
        refused += 1
    assert 100 < refused < 400, kind


@pytest.mark.parametrize('share', [0.0, 0.01, 0.2, 0.6, 0.95, 0.999])
def test_cut_short(share, kind, tmp_path):
  values = {f'w{i}': np.full((50, 7), i, np.float32) for i in range(3)}
  SAVERS[kind](tmp_path / 'f', {k: tensor(v) for k, v in values.items()})
  save_file(values, tmp_path / 'f.safetensors')
  for name in ('f', 'f.safetensors'):
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    refusal(tmp_path / name)


def test_storages_that_are_too_small(kind, tmp_path):
  path, four = tmp_path / 'f', np.ones(4, np.float32)
  SAVERS[kind](path, {'w': Tensor(Storage(four, claimed=20), (4, 5))})
  assert '80 bytes' in refusal(path)
  SAVERS[kind](path, {'w': Tensor(Storage(four), (5,))})
  assert 'shape (5,) needs 5 values, but its storage has 4' in refusal(path)
  SAVERS[kind](path, {'w': Tensor(Storage(four), (2, 2), (3, 1))})
  assert 'needs 5 values' in refusal(path)
  SAVERS[kind](path, {'w': Tensor(Storage(four), (2,), (-1,), 3)})
  assert '-1 is no size' in refusal(path)
  SAVERS[kind](path, {'w': Tensor(Storage(four), (2,), offset=-1)})
  assert '-1 is no size' in refusal(path)


def test_bombs(tmp_path):
  path, one = tmp_path / 'f', np.ones(1, np.float32)
  large = {'w': tensor(np.zeros(10**6, np.float32))}
  torch_files.save_zip(path, large, compression=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 10**5
  assert "'any/data.pkl' is compressed" in refusal(path)
  # A directory that claims more than there is.
  torch_files.save_zip(path, {'w': tensor(one)})
  data = path.read_bytes().replace(
      struct.pack('<II', 4, 4), struct.pack('<II', 1 << 30, 1 << 30)
  )
  path.write_bytes(data)
  assert 'its parts claim 1073' in refusal(path)
  # One value that claims to be many.
  SAVERS['torch zip'](path, {'w': Tensor(Storage(one), (10**5, 10**5), (0, 0))})
  assert 'larger than the file' in refusal(path)
  # Many names for the same values.
  storage = Storage(np.ones(10**4, np.float32))
  tree = {f'w{i}': Tensor(storage, (10**4,)) for i in range(20)}
  SAVERS['torch zip'](path, tree)
  assert 'far more than the file' in refusal(path)


def test_files_of_another_kind(tmp_path):
  path = tmp_path / 'f.pth'
  assert 'No such file' in refusal(path)
  for data, text in (
      (b'', 'neither'), (b'<!DOCTYPE html><html>', 'neither'),
      (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS'),
  ):
    path.write_bytes(data)
    assert text in refusal(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.txt', 'x')
  assert 'not one of torch.save' in refusal(path)
  torch_files.save_zip(path, {'w': tensor(np.ones(1))}, byteorder='big')
  assert 'big-endian' in refusal(path)
  torch_files.save_legacy(path, {'w': tensor(np.ones(1))}, little_endian=False)
  assert 'big-endian' in refusal(path)
  torch_files.save_zip(path, {'w': tensor(np.ones(1))}, without=('0',))
  assert "no data for tensor storage '0'" in refusal(path)
  torch_files.save_zip(path, {'epoch': 3})
  assert 'no tensors at' in refusal(path)
  torch_files.save_zip(path, [tensor(np.ones(1))])
  assert 'there is a list' in refusal(path)


def test_an_index_stands_for_its_files(tmp_path):
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text('{"weight_map": {"a": "2.bin", "b": "1.bin", "c": "2.bin"}}')
  assert readers.expand(['x.pth', index]) == (
      'x.pth', tmp_path / '1.bin', tmp_path / '2.bin'
  )
  # A file beside the index, whatever it says.
  index.write_text('{"weight_map": {"a": "../../etc/1.bin"}}')
  assert readers.expand([str(index)]) == (tmp_path / '1.bin',)
  for text in ('', '[]', '{}', '{"weight_map": {"a": 3}}'):
    index.write_text(text)
    with pytest.raises(readers.ReadError, match='not an index of weight'):
      readers.expand([index])
  index.unlink()
  with pytest.raises(readers.ReadError, match='No such file'):
    readers.expand([index])
