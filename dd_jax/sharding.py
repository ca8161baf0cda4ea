# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""From logical axis names to shardings: a mesh and one table of rules.

Models name the axes of their parameters ('embed', 'heads', ...). A rule table
maps those names to mesh axes. `jit` does the rest: no collective is written
in models or methods.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import math
import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from dd_jax.kernels import attention
from dd_jax.method import Method
from dd_jax.model import Axes, Params, rows_on
from dd_jax.state import TrainState

AXES = ('data', 'fsdp', 'tensor', 'context')
BATCH = ('data', 'fsdp')  # mesh axes that examples are split over

Rules = Sequence[tuple[str, str | None]]
RULES: Mapping[str, Rules] = {
    'dp': (),
    'fsdp': (('embed', 'fsdp'),),
    'fsdp_tp': (
        ('embed', 'fsdp'), ('mlp', 'tensor'), ('heads', 'tensor'),
        ('kv_heads', 'tensor'), ('vocab', 'tensor'),
    ),
}
# Without a rule, arrays of at least this many bytes go to the largest axis
# that the fsdp mesh axis divides.
FALLBACK_BYTES = 1 << 20


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over all devices with the four fixed axes.

  Args:
    sizes: devices per axis; one of them may be -1 for all that are left.
    devices: default all devices of all hosts.

  Raises:
    ValueError: unknown axis, two -1, or a product that is not the number of
      devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if unknown := set(sizes) - set(AXES):
    raise ValueError(f'mesh has no axis {sorted(unknown)}; axes are {AXES}')
  shape = [int(sizes.get(a, 1)) for a in AXES]
  if shape.count(-1) > 1:
    raise ValueError(f'mesh={dict(sizes)}: only one axis may be -1')
  if -1 in shape:
    rest = -math.prod(shape)
    if rest <= 0 or len(devices) % rest:
      raise ValueError(
          f'mesh={dict(sizes)}: {len(devices)} devices are not a multiple of '
          f'{rest}'
      )
    shape[shape.index(-1)] = len(devices) // rest
  if math.prod(shape) != len(devices):
    raise ValueError(
        f'mesh={dict(sizes)} needs {math.prod(shape)} devices, there are '
        f'{len(devices)}; set one axis to -1'
    )
  try:
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices,
    )
  except NotImplementedError as e:  # a torus that cannot be cut like this
    raise ValueError(
        f'mesh={dict(sizes)}: the chips are wired otherwise ({e}); every axis '
        'must be a product of sides of the slice'
    ) from e


def describe(mesh: Mesh) -> str:
  """'8 x NVIDIA H100, mesh data:4,fsdp:2', for people."""
  sides = ','.join(f'{k}:{v}' for k, v in mesh.shape.items() if v > 1)
  kind = mesh.devices.flat[0].device_kind
  return f'{mesh.devices.size} x {kind}' + f', mesh {sides}' * bool(sides)


def parse_mesh(text: str) -> dict[str, int]:
  """{'data': 2, 'fsdp': 8} of 'data:2,fsdp:8'; see `make_mesh`.

  Raises:
    ValueError: another form.
  """
  sizes: dict[str, int] = {}
  for part in text.split(','):
    if not (m := re.fullmatch(r'(\w+):(-?\d+)', part.strip())):
      raise ValueError(
          f'mesh {text!r}: expected axis:size, as in data:2,fsdp:8'
      )
    if m[1] in sizes:
      raise ValueError(f'mesh {text!r}: {m[1]} twice')
    sizes[m[1]] = int(m[2])
  return sizes


def _spec(
    path: str, axes: tuple[str | None, ...], shape: tuple[int, ...],
    nbytes: int, mesh: Mesh, rules: Rules,
) -> PartitionSpec:
  table, spec, used = dict(rules), [], set()
  for name, size in zip(axes, shape, strict=True):
    axis = table.get(name)
    if axis is None or axis in used or mesh.shape[axis] == 1:
      spec.append(None)
      continue
    if size % mesh.shape[axis]:
      raise ValueError(
          f'{path}: axis {name!r} of size {size} does not divide over mesh '
          f'axis {axis!r} of size {mesh.shape[axis]}; change `mesh` or `rules`'
      )
    spec.append(axis)
    used.add(axis)
  fsdp = mesh.shape['fsdp']
  if rules and not used and fsdp > 1 and nbytes >= FALLBACK_BYTES:
    fits = [i for i, size in enumerate(shape) if size % fsdp == 0]
    if fits:
      spec[max(fits, key=lambda i: shape[i])] = 'fsdp'
  return PartitionSpec(*spec)


def shard_params(axes: Axes, shapes: Params, mesh: Mesh, rules: Rules) -> Any:
  """A `NamedSharding` for each parameter.

  Args:
    axes: logical names, one per dimension; see `Model.axes`.
    shapes: tree of arrays or shape structs of the same structure.
    mesh: from `make_mesh`.
    rules: pairs (logical name, mesh axis); see `RULES`.

  Raises:
    ValueError: naming the path, the dimension and the mesh axis where a size
      does not divide.
  """

  def one(path, leaf, names):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    nbytes = leaf.size * leaf.dtype.itemsize
    return NamedSharding(
        mesh, _spec(where, names, leaf.shape, nbytes, mesh, rules)
    )

  return jax.tree_util.tree_map_with_path(
      one, shapes, axes,
  )


def _masked(x: Any) -> bool:
  """Whether an optimizer keeps nothing here: the parameter is another's."""
  return isinstance(x, optax.MaskedNode)


def shard_state(
    method: Method, abstract: TrainState, mesh: Mesh, rules: Rules
) -> TrainState:
  """Shardings of a whole state, optimizer and averages after their params."""
  whole = NamedSharding(mesh, PartitionSpec())

  def of(name: str) -> Any:
    role = method.roles[name]
    if role.adapter is not None:  # small by construction
      return jax.tree.map(lambda _: whole, abstract.params[name])
    return shard_params(
        role.model.axes(), abstract.params[name], mesh, rules
    )

  params = {n: of(n) for n in abstract.params}
  opt = {
      n: optax.tree_utils.tree_map_params(
          method.roles[n].tx, lambda x, s: x if _masked(x) else s,
          abstract.opt[n], params[n],
          transform_non_params=lambda _: whole, is_leaf=_masked,
      )
      for n in abstract.opt
  }
  rest = jax.tree.map(lambda _: whole, abstract)
  return rest.replace(
      params=params, opt=opt, ema={n: params[n] for n in abstract.ema}
  )


@contextlib.contextmanager
def kernels_on(mesh: Mesh) -> Iterator[None]:
  """Within it, programs are traced for a mesh; a run does this for its own.

  `jit` splits all but kernels by itself, and those as told here. With weights
  split over `fsdp` it is told that examples are, too.
  """
  rows = BATCH if mesh.shape['fsdp'] > 1 else ()
  with (attention.on_mesh(mesh, batch=BATCH, heads='tensor'),
        rows_on(mesh, rows)):
    yield


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Examples over the data and fsdp axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def count_parts(mesh: Mesh) -> int:
  """How many parts of a batch there are."""
  return math.prod(mesh.shape[a] for a in BATCH)


def check_batch(size: int, mesh: Mesh, micro_batches: int = 1) -> None:
  """Raises where a global batch cannot be split evenly.

  Raises:
    ValueError: naming batch_size, the mesh and what would fit.
  """
  parts = count_parts(mesh) * micro_batches
  if micro_batches < 1 or size < 1:
    raise ValueError(
        f'batch_size={size} and micro_batches={micro_batches} must be at '
        'least 1'
    )
  if size % parts:
    raise ValueError(
        f'batch_size={size} does not divide over {parts} = '
        f"mesh data*fsdp ({parts // micro_batches}) * micro_batches "
        f'({micro_batches}); use a multiple of {parts}'
    )


def fit_batch(size: int, mesh: Mesh) -> int:
  """The least size from this one on that a mesh divides.

  Raises:
    ValueError: no size.
  """
  if size < 1:
    raise ValueError(f'batch_size={size} must be at least 1')
  parts = count_parts(mesh)
  return -(-size // parts) * parts


@functools.cache
def batch_share(mesh: Mesh) -> tuple[int, int]:
  """Which part of every batch this process reads, and how many parts there are.

  Processes that have the same examples, since an axis that splits weights goes
  across them, read the same part.

  Raises:
    ValueError: the parts of two processes overlap, or differ in size.
  """
  held = collections.defaultdict(set)
  for (data, fsdp, *_), device in np.ndenumerate(mesh.devices):
    held[device.process_index].add(data * mesh.shape['fsdp'] + fsdp)
  rows = {process: tuple(sorted(part)) for process, part in held.items()}
  parts = sorted(set(rows.values()))
  if sum(map(len, parts)) != len(set().union(*parts)) or len(
      {*map(len, parts)}) > 1:
    raise ValueError(
        f'mesh={dict(mesh.shape)}: its processes do not share the examples '
        'evenly; let data*fsdp, or what is left, be a multiple of the devices '
        'of a process'
    )
  return parts.index(rows[jax.process_index()]), len(parts)


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process's part, see `batch_share`, of global arrays on the mesh."""
  sharding = batch_sharding(mesh)
  _, parts = batch_share(mesh)
  return {
      k: jax.make_array_from_process_local_data(
          sharding, v, (len(v) * parts, *v.shape[1:])
      )
      for k, v in batch.items()
  }


def place_rows(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """As `place_batch`, from rows of the whole batch known on every host."""
  sharding = batch_sharding(mesh)
  return {
      k: jax.make_array_from_callback(v.shape, sharding, lambda i, v=v: v[i])
      for k, v in rows.items()
  }
