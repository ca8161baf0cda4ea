# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What one chip moves in a compiled program, read from its HLO text.

XLA's own count of bytes sees the body of a loop once; here it counts as often
as it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

_SIZES = {
    'pred': 1, 's4': 0.5, 'u4': 0.5, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8,
    'c128': 16, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's8': 1, 'u8': 1,
    's32': 4, 'u32': 4, 'f32': 4,
}
# Of a ring of n: what a chip sends, as a factor of what it gives.
_SENT = {
    'all-gather': lambda n: n - 1.0,
    'all-reduce': lambda n: 2.0 * (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-to-all': lambda n: (n - 1) / n,
    'ragged-all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1.0,
    'collective-broadcast': lambda n: 1.0,
}
_FREE = {
    'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
    'conditional', 'call', 'after-all', 'partition-id', 'iota', 'opt-barrier',
    'add-dependency',
}
_SLICES = {'dynamic-slice', 'slice', 'gather'}
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](\{[^}]*\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a chip moves in one run.

  Attributes:
    collectives: by kind, how often it runs, bytes that a chip gives (of an
      all-gather: its share), and bytes that it sends when chips form a ring.
    hbm_bytes: read from and written to the chip's large memory; operands and
      results of each operation, slices by their own size.
    unknown_loops: loops whose length the text does not tell; they count once.
  """

  collectives: Mapping[str, Mapping[str, float]]
  hbm_bytes: float
  unknown_loops: int

  @property
  def sent_bytes(self) -> float:
    return sum(kind['sent_bytes'] for kind in self.collectives.values())


@dataclasses.dataclass(frozen=True)
class _Op:
  name: str
  shape: str
  kind: str
  operands: tuple[str, ...]
  arguments: str
  rest: str
  is_root: bool


def parse(text: str) -> Traffic:
  """Reads `compiled.as_text()`.

  Raises:
    ValueError: no HLO module.
  """
  computations, entry = _computations(text)
  if entry is None:
    raise ValueError('the text is no HLO module')
  found = re.search(r'num_partitions=(\d+)', text)
  module = _Module(computations, int(found[1]) if found else 1)
  module.visit(entry, 1, counts_bytes=True)
  return Traffic(module.collectives, module.hbm_bytes, module.unknown_loops)


class _Module:
  """Adds up over computations, each as often as it runs."""

  def __init__(
      self, computations: Mapping[str, Mapping[str, _Op]], partitions: int
  ):
    self._computations, self._partitions = computations, partitions
    self.collectives: dict[str, dict[str, float]] = {}
    self.hbm_bytes, self.unknown_loops = 0.0, 0

  def visit(self, name: str, times: int, counts_bytes: bool) -> None:
    ops = self._computations.get(name, {})
    for op in ops.values():
      kind = op.kind.removesuffix('-start')
      if kind in _SENT:
        self._add_collective(kind, op, ops, times)
      if counts_bytes:
        self.hbm_bytes += times * self._moved(op, ops)
      if op.kind == 'while':
        body = _CALLED.search(op.rest)[1]
        self.visit(body, times * self._trips(op), counts_bytes)
        continue
      inner = counts_bytes and op.kind in ('call', 'conditional')
      called = set(_CALLED.findall(op.rest))
      for names in _BRANCHES.findall(op.rest):
        called |= set(re.findall(r'[\w.\-]+', names))
      for other in called:
        self.visit(other, times, inner)

  def _add_collective(
      self, kind: str, op: _Op, ops: Mapping[str, _Op], times: int
  ) -> None:
    size = self._group(op.rest)
    given = sum(_nbytes(ops[n].shape) for n in op.operands if n in ops)
    entry = self.collectives.setdefault(
        kind, {'count': 0, 'bytes': 0.0, 'sent_bytes': 0.0}
    )
    entry['count'] += times
    entry['bytes'] += times * given
    entry['sent_bytes'] += times * given * _SENT[kind](max(size, 1))

  def _group(self, rest: str) -> int:
    """Chips that a collective joins."""
    if m := re.search(r'replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}', rest):
      sides = dict(re.findall(r"'(\w+)'=(\d+)", m[1]))
      named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", m[2])
      return math.prod(int(part or sides[axis]) for axis, part in named)
    if m := re.search(r'replica_groups=\[([\d,]+)\]<=', rest):
      return int(m[1].split(',')[-1])
    if m := re.search(r'replica_groups=\{\{([\d,]+)\}', rest):
      return m[1].count(',') + 1
    return self._partitions

  def _trips(self, op: _Op) -> int:
    if m := _TRIPS.search(op.rest):
      return int(m[1])
    # Loops of known length count from 0 up to a constant of their condition.
    condition = re.search(r'condition=%?([\w.\-]+)', op.rest)[1]
    bounds = [
        int(o.arguments) for o in self._computations[condition].values()
        if o.kind == 'constant' and o.shape.startswith('s32[]')
    ]
    if len(bounds) == 1:
      return bounds[0]
    self.unknown_loops += 1
    return 1

  def _moved(self, op: _Op, ops: Mapping[str, _Op]) -> float:
    if op.kind in _FREE or op.kind.endswith('-done'):
      return 0.0
    inside = _CALLED.search(op.rest)
    body = self._computations.get(inside[1], {}) if inside else {}
    if op.kind in ('fusion', 'async-start') and body:
      return self._moved_by_fusion(op, ops, body)
    return _moved_by(op, ops)

  def _moved_by_fusion(
      self, op: _Op, ops: Mapping[str, _Op], body: Mapping[str, _Op]
  ) -> float:
    total, updated = 0.0, set()
    root = next(o for o in body.values() if o.is_root)
    for name in root.operands if root.kind == 'tuple' else (root.name,):
      result = body[name]
      if result.kind == 'dynamic-update-slice':
        # In place: what is read and written is the update.
        updated.add(_through(result.operands[0], body))
        total += _hbm(result.shape) and _nbytes(body[result.operands[1]].shape)
      else:
        total += _hbm(result.shape)
    parameters = _parameters(body)
    for i, name in enumerate(op.operands):
      inner = parameters.get(i)
      if name in ops and inner is not None and inner not in updated:
        total += min(_hbm(ops[name].shape), self._read(inner, body))
    return total

  def _read(self, name: str, body: Mapping[str, _Op]) -> float:
    """Bytes of a value that a fused computation reads: its slices, or inf."""
    total = 0.0
    for op in body.values():
      for i, operand in enumerate(op.operands):
        if operand != name:
          continue
        if op.kind in _SLICES and not i:
          total += _nbytes(op.shape)
        elif op.kind == 'bitcast':
          total += self._read(op.name, body)
        elif op.kind == 'fusion':
          within = self._computations[_CALLED.search(op.rest)[1]]
          total += self._read(_parameters(within)[i], within)
        else:
          return math.inf
    return total


def _moved_by(op: _Op, ops: Mapping[str, _Op]) -> float:
  if op.kind in _SLICES:
    return 2 * _hbm(op.shape)
  if op.kind == 'dynamic-update-slice':
    return 2 * _hbm(ops[op.operands[1]].shape)
  if op.kind == 'copy-start':  # its result names source and destination
    return _hbm(op.shape)
  given = sum(_hbm(ops[n].shape) for n in op.operands if n in ops)
  if op.kind.endswith('-start'):  # its result names the operands once more
    return 2 * given
  return given + _hbm(op.shape)


def _parameters(body: Mapping[str, _Op]) -> dict[int, str]:
  """Names of a computation's parameters, by number."""
  return {
      int(op.arguments): op.name for op in body.values()
      if op.kind == 'parameter'
  }


def _through(name: str, body: Mapping[str, _Op]) -> str:
  """The parameter behind bitcasts."""
  while body[name].kind in ('bitcast', 'copy') and body[name].operands:
    name = body[name].operands[0]
  return name


def _nbytes(shape: str, hbm_only: bool = False) -> float:
  total = 0.0
  for dtype, dims, layout in _ARRAY.findall(shape):
    # S(1) and above are memories on the chip.
    if hbm_only and re.search(r'S\([1-9]', layout):
      continue
    size = _SIZES.get(dtype, 1 if dtype.startswith('f8') else 0)
    total += size * math.prod(map(int, filter(None, dims.split(','))))
  return total


def _hbm(shape: str) -> float:
  return _nbytes(shape, hbm_only=True)


def _computations(
    text: str
) -> tuple[dict[str, dict[str, _Op]], str | None]:
  """Operations by computation and name, and which computation is run."""
  computations: dict[str, dict[str, _Op]] = {}
  entry = current = None
  for line in text.splitlines():
    if line.endswith('{') and not line.startswith((' ', 'HloModule')):
      head = line.removeprefix('ENTRY ').lstrip('%')
      name = re.match(r'[\w.\-]+', head)[0]
      current = computations.setdefault(name, {})
      if line.startswith('ENTRY '):
        entry = name
    elif line.startswith('}'):
      current = None
    elif current is not None:
      for op in _operations(line):
        current[op.name] = op
  return computations, entry


def _operations(line: str) -> Iterator[_Op]:
  m = _INSTRUCTION.match(line)
  if not m:
    return
  text = m[3]
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  shape, call = text[:end], text[end:].lstrip()
  kind, _, _ = call.partition('(')
  close = _closing(call, len(kind))
  arguments = call[len(kind) + 1:close - 1]
  yield _Op(
      m[2], shape, kind, tuple(_NAME.findall(arguments)), arguments,
      call[close:], bool(m[1]),
  )


def _closing(text: str, start: int) -> int:
  """The place after the bracket that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if not depth:
      return i + 1
  return len(text)
