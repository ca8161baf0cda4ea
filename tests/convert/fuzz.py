# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Mutated weight files, read in a process that watches itself.

    python tests/convert/fuzz.py FOLDER COUNT SEED

Prints one line of JSON: how many files were read, how many refused, the peak
of memory above what was in use before, and what went wrong otherwise.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import pickle
import pickletools
import random
import resource
import struct
import sys
import traceback
import warnings
import zipfile

import numpy as np
from safetensors.numpy import save

from dd_jax.convert import readers
from tests.convert import persistent_files, torch_files
from tests.convert.torch_files import Call, Storage, Tensor, tensor

HEADROOM = 200 << 20
EXTREMES = (0, 1, 7, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31,
            2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
OPCODES = bytes(ord(o.code) for o in pickletools.opcodes)


def weights(rng: random.Random) -> dict[str, np.ndarray]:
  types = (np.float32, np.float16, np.int64, np.uint8, np.bool_)
  return {
      f'layer{i}.weight': np.ones(
          [rng.randint(0, 5) for _ in range(rng.randint(0, 3))],
          rng.choice(types),
      ) for i in range(rng.randint(1, 5))
  }


def wrap(rng: random.Random, tree: object) -> object:
  for key in rng.choice(((), ('model',), ('trainer', 'ema_parameters'))):
    tree = {key: tree, 'epoch': 3}
  return tree


# --- Honest files, as bytes.


def torch_zip(rng: random.Random, tree: object = None, **kwargs) -> bytes:
  file = io.BytesIO()
  if tree is None:
    tree = wrap(rng, {k: tensor(v) for k, v in weights(rng).items()})
  torch_files.save_zip(file, tree, **kwargs)
  return file.getvalue()


def torch_legacy(rng: random.Random, tree: object = None) -> bytes:
  if tree is None:
    tree = wrap(rng, {k: tensor(v) for k, v in weights(rng).items()})
  path = FOLDER / 'legacy'
  torch_files.save_legacy(path, tree)
  return path.read_bytes()


def safetensors(rng: random.Random) -> bytes:
  return save(weights(rng), {'format': 'pt'})


def edm(rng: random.Random) -> bytes:
  path = FOLDER / 'edm'
  network = persistent_files.network(
      {f'model.enc.{k}': v.astype(np.float32) for k, v in weights(rng).items()},
      'raise SystemExit',
  )
  persistent_files.save(path, {'ema': network}, rng.choice((2, 4)))
  return path.read_bytes()


HONEST = {'.pth': torch_zip, '.legacy.pth': torch_legacy,
          '.safetensors': safetensors, '.pkl': edm}


# --- Blind mutations of any of them.


def flip(rng: random.Random, data: bytes) -> bytes:
  out = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
  return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
  return data[:rng.randrange(len(data))]


def lie(rng: random.Random, data: bytes) -> bytes:
  """A number somewhere becomes another one."""
  size = rng.choice((1, 2, 4, 8))
  value = rng.choice(EXTREMES) % (1 << 8 * size)
  at = rng.randrange(max(len(data) - size, 1))
  return data[:at] + value.to_bytes(size, 'little') + data[at + size:]


def splice(rng: random.Random, data: bytes) -> bytes:
  a, b, c = (rng.randrange(len(data)) for _ in range(3))
  return data[:a] + data[min(b, c):max(b, c)] + data[a:]


def scramble(rng: random.Random, data: bytes) -> bytes:
  at = rng.randrange(len(data))
  noise = bytes(rng.choice(OPCODES) for _ in range(rng.randint(1, 20)))
  return data[:at] + noise + data[at + rng.choice((0, len(noise))):]


# --- Mutations that keep the container whole, so that they get deeper.


def inner_pickle(rng: random.Random) -> bytes:
  """A zip archive in order around a pickle that is not."""
  with zipfile.ZipFile(io.BytesIO(torch_zip(rng))) as archive:
    data = archive.read('any/data.pkl')
  blind = rng.choice((flip, truncate, lie, splice, scramble))
  return torch_zip(rng, data=blind(rng, data))


def lying_header(rng: random.Random) -> bytes:
  """Well-formed JSON that promises what is not there."""
  data = safetensors(rng)
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  name = rng.choice([k for k in header if k != '__metadata__'])
  entry = header[name]
  wrong = rng.choice((*EXTREMES, -1, 1.5, '1', None, [], {}))
  match rng.randrange(7):
    case 0:
      entry['shape'] = [wrong] * rng.randint(1, 40)
    case 1:
      entry['dtype'] = rng.choice(('F64', 'F4', 'F8_E4M3', 'C64', 'X', wrong))
    case 2:
      entry['data_offsets'][rng.randrange(2)] = wrong
    case 3:
      header |= {f'{name}{i}': entry for i in range(rng.choice((1, 9999)))}
    case 4:
      header['../' * rng.randint(1, 9999) + 'x'] = entry
    case 5:
      header['__metadata__'] = {'a': wrong}
    case 6:
      del entry[rng.choice(list(entry))]
  text = json.dumps(header).encode()
  if rng.random() < 0.1:
    text = b'[' * 100_000 + text
  claimed = rng.choice((len(text),) * 8 + EXTREMES)
  return (claimed % 2**64).to_bytes(8, 'little') + text + data[8 + size:]


def archive_tricks(rng: random.Random) -> bytes:
  """Names that lead elsewhere, twins, compression, other roots."""
  made, storages = torch_files.pickled(
      {'w': tensor(np.ones(5, np.float32)), 'v': tensor(np.ones(3, np.int64))}
  )
  key = rng.choice(('0', '../../0', '/etc/passwd', '..\\0', '0\0', 'C:0'))
  if key != '0':  # the pickle asks for that name
    old, new = b'X\x01\x00\x00\x000', key.encode()
    made = made.replace(old, b'X' + struct.pack('<I', len(new)) + new)
  root = rng.choice(('any', '..', '/tmp', 'a/b', '', '../any'))
  method = rng.choice((zipfile.ZIP_STORED,) * 4 + (
      zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
  file = io.BytesIO()
  with warnings.catch_warnings(), zipfile.ZipFile(file, 'w', method) as archive:
    warnings.simplefilter('ignore')  # of twins
    archive.writestr(f'{root}/data.pkl', made)
    for number, storage in storages:
      name = key if number == '0' else number
      for _ in range(rng.choice((1, 1, 2))):
        archive.writestr(f'{root}/data/{name}', storage.values.tobytes())
    if rng.random() < 0.3:
      archive.writestr(rng.choice(('other/data.pkl', '../../canary')), made)
  data = file.getvalue()
  return lie(rng, data) if rng.random() < 0.3 else data


def bomb(rng: random.Random) -> bytes:
  """Little that claims, or unpacks to, a lot."""
  one = np.ones(1, np.float32)
  match rng.randrange(5):
    case 0:
      tree = {'w': tensor(np.zeros(rng.choice((10**5, 10**7)), np.uint8))}
      return torch_zip(rng, tree, compression=zipfile.ZIP_DEFLATED)
    case 1:
      shape = tuple(rng.choice(EXTREMES) for _ in range(rng.randint(1, 70)))
      strides = tuple(rng.choice((0, 1, 2**62, 2**70)) for _ in shape)
      tree = {'w': Tensor(Storage(one), shape, strides)}
    case 2:
      tree = {'w': Tensor(Storage(one, claimed=rng.choice(EXTREMES)), (1,))}
    case 3:
      storage = Storage(np.ones(10**4, np.float32))
      tree = {f'w{i}': Tensor(storage, (10**4,)) for i in range(99)}
    case 4:
      tree = {'module.' * 10**5: tensor(one)}
  return rng.choice((torch_zip, torch_legacy))(rng, tree)


def hostile(rng: random.Random) -> bytes:
  """Names that would run something."""
  canary = str(FOLDER / 'canary')
  call = rng.choice((
      Call('os', 'system', f'touch {canary}'),
      Call('posix', 'system', f'touch {canary}'),
      Call('builtins', 'eval', f'open({canary!r}, "w")'),
      Call('builtins', 'exec', f'open({canary!r}, "w")'),
      Call('__builtin__', 'exec', f'open({canary!r}, "w")'),
      Call('builtins', 'open', canary, 'w'),
      Call('subprocess', 'Popen', ['touch', canary]),
      Call('pathlib', 'Path.touch', canary),
      Call('importlib', 'import_module', 'antigravity'),
      Call('numpy', 'load', canary), Call('pickle', 'loads', b'I1\n.'),
      Call('torch', 'load', canary), Call('runpy', 'run_path', canary),
      Call('torch.storage', '_load_from_bytes', b'\x80\x02cos\nsystem\n.'),
      Call('torch._utils', '_import_dotted_name', 'os.system'),
      Call('a\x1b[31mb', 'c', 1), Call('builtins', 'getattr', 'a', 'upper'),
  ))
  tree = {'model': {'w': tensor(np.ones(2, np.float32))}, 'args': call}
  if rng.random() < 0.3:
    tree = {'w': call, call.function.__name__: 1}
  return rng.choice((torch_zip, torch_legacy))(rng, tree)


def pickle_bomb(rng: random.Random) -> bytes:
  """Instructions that nest, repeat or copy."""
  count = rng.choice((10**3, 10**5, 10**6))
  laughs = b']q\x00(K\x01K\x02e' + b''.join(
      b'(' + b'h' + bytes([i]) + b'h' + bytes([i]) + b'lq' + bytes([i + 1])
      for i in range(60)
  )
  many = b'(' + b'K\x01' * 10**4 + b'tq\x01'
  body = rng.choice((
      b')' + b'\x85' * count,  # one in another
      b'}' + b')' + b'\x85' * count + b'K\x01s',  # that as a key
      b')' + b'\x85' * count + b'\x85Q',
      b'(' + b')' + b'\x85' * count + b'\x91',
      b'c__builtin__\nset\n(]' + b')' + b'\x85' * count + b'a' + b'tR',
      b']' * count, b'}' * count, b'\x8f' * count, b'(' * count,
      b'N' + b'2' * count,
      b'\x8f' * (3 * count), laughs + b'(h\x3cNNNNtQ',
      laughs, b'}' + laughs + b'K\x01s', laughs + b'\x85Q',
      b'}X\x04\x00\x00\x00type' + laughs + b's\x85R',
      many + b'c__builtin__\nset\nq\x02' + b'h\x02(h\x01tR' * (count // 10),
      many + b'ctorch\nSize\nq\x02' + b'h\x02(h\x01tR' * (count // 10),
      b'ccollections\nOrderedDict\nq\x02' + b'h\x02)R' * (count // 4),
      b'\x8b' + struct.pack('<I', count) + b'\x7f' * count + b'\x85Q',
      b'\x8a\xff' + b'\x7f' * 255 + b'q\x00' + b'h\x00' * count,
      b'\x8e' + struct.pack('<Q', 1 << 40), b'B' + struct.pack('<I', 2**32 - 1),
      b'X' + struct.pack('<I', 2**31), b'\x96' + struct.pack('<Q', 1 << 50),
      b'I' + b'9' * count + b'\n', b'L' + b'9' * count + b'L\n',
      b'r\xff\xff\xff\xff', b'j\xff\xff\xff\xff',
  ))
  data = b'\x80\x02' + body + b'.'
  if rng.random() < 0.5:
    return torch_zip(rng, data=data)
  head = b''.join(pickle.dumps(v, 2) for v in (
      0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}))
  parts = [head, data, pickle.dumps([], 2)]
  if rng.random() < 0.3:  # in the place of the version, or of the list
    parts = rng.choice((
        [head[:head.index(b'.') + 1], data, data],
        [head, pickle.dumps({}, 2), data],
    ))
  return b''.join(parts) if rng.random() < 0.8 else data


def edm_bomb(rng: random.Random) -> bytes:
  """Networks that hold each other, and blobs that are none."""
  network = persistent_files.network({'a.b.c': np.ones(3, np.float32)})
  states = network.meta['state']['_modules']
  match rng.randrange(4):
    case 0:
      inner = states['a'].meta['state']
      inner['_modules'] = {'x' * rng.choice((1, 10**5)): network}
    case 1:
      for _ in range(30):
        network = persistent_files.Container(
            persistent_files.state((), (), {'a': network, 'b': network})
        )
    case 2:
      states['a'].meta['state']['_parameters'] = rng.choice((
          1, 'x', {1: 2}, {('a',) * 9: 3}, [],
      ))
    case 3:
      blob = persistent_files.Blob(np.ones(9, np.float32))
      blob.data = rng.choice((flip, truncate, lie, splice, scramble))(
          rng, blob.data)
      made = persistent_files.Parameter(np.ones(9, np.float32), True)
      made.blob = blob
      states['a'].meta['state']['_buffers'] = {'x': made}
  path = FOLDER / 'edm'
  persistent_files.save(path, {'ema': network}, rng.choice((2, 4)))
  return path.read_bytes()


BLIND = (flip, truncate, lie, splice, scramble)
CRAFTED = {
    inner_pickle: '.pth', lying_header: '.safetensors', archive_tricks: '.pth',
    bomb: '.pth', hostile: '.pth', pickle_bomb: '.pth', edm_bomb: '.pkl',
}


def make(number: int, seed: int) -> tuple[str, str, bytes]:
  """What was done, the ending, and the bytes of one file."""
  rng = random.Random(f'{seed} {number}')
  if number % 2:
    change = list(CRAFTED)[number // 2 % len(CRAFTED)]
    return change.__name__, CRAFTED[change], change(rng)
  ending = list(HONEST)[number // 2 % len(HONEST)]
  change = BLIND[number // 8 % len(BLIND)]
  return change.__name__, ending, change(rng, HONEST[ending](rng))


# --- The watch.

FORBIDDEN = ('exec', 'compile', 'import', 'os.', 'subprocess.', 'pickle.',
             'shutil.', 'socket.', 'ctypes.', 'code.', 'marshal.', 'pty.')
watching = False
events: list[str] = []


def audit(event: str, arguments: tuple) -> None:
  if not watching:
    return
  if event.startswith(FORBIDDEN):
    events.append(f'{event} {arguments!r}'[:200])
  if event == 'open' and (arguments[1] or 'r').strip('b') not in ('r', ''):
    events.append(f'open {arguments!r}'[:200])


def read(path: pathlib.Path) -> None:
  contents = readers.read(path)
  for value in readers.select(path, contents.tree).tensors.values():
    np.asarray(value)


def write(number: int, seed: int) -> tuple[str, pathlib.Path]:
  change, ending, data = make(number, seed)
  path = FOLDER / f'{number}{ending}'
  path.write_bytes(data)
  return change, path


def peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(count: int, seed: int) -> None:
  global watching
  for ending, honest in HONEST.items():  # and all imports are done
    (FOLDER / f'honest{ending}').write_bytes(honest(random.Random(0)))
    read(FOLDER / f'honest{ending}')
  for codec in ('ascii', 'raw_unicode_escape', 'unicode_escape'):
    'a'.encode(codec)  # Python finds them when they are first used
  for number in range(min(count, 50)):
    try:  # whatever is imported for an error is there afterwards
      read(write(number, seed)[1])
    except Exception:
      traceback.format_exc()
  base = peak()
  sys.addaudithook(audit)
  outcomes: dict[str, collections.Counter] = {}
  wrong = []
  for number in range(count):
    change, path = write(number, seed)
    allowed = 2 * path.stat().st_size + HEADROOM
    used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + allowed, -1))
    before = peak()
    watching = True
    try:
      read(path)
      outcome, text = 'read', ''
    except readers.ReadError as e:
      outcome, text = 'refused', str(e)
      if (str(path) not in text or 'MemoryError' in text or len(text) > 2000
          or not text.isprintable()):
        wrong.append(f'{change} {path.name}: {text[:300]}')
    except BaseException as e:
      outcome = 'failed'
      wrong.append(f'{change} {path.name}: {type(e).__name__}: '
                   f'{str(e)[:200]} at {where(e)}')
    watching = False
    outcomes.setdefault(change, collections.Counter())[outcome] += 1
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if peak() - before > allowed:
      wrong.append(f'{change} {path.name}: {peak() - before} bytes of memory')
    wrong += [f'{change} {path.name}: {e}' for e in events]
    events.clear()
    path.unlink()
  if (FOLDER / 'canary').exists():
    wrong.append('the canary is there')
  sys.stdout.write(json.dumps({
      'outcomes': {k: dict(v) for k, v in sorted(outcomes.items())},
      'memory': peak() - base, 'wrong': wrong,
  }) + '\n')


def where(e: BaseException) -> str:
  last = traceback.extract_tb(e.__traceback__)[-1]
  return f'{last.filename}:{last.lineno}'


if __name__ == '__main__':
  FOLDER = pathlib.Path(sys.argv[1])
  main(int(sys.argv[2]), int(sys.argv[3]))
