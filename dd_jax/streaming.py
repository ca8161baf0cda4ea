# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Exports that are written and read leaf by leaf, for large networks.

The same layout as `checkpoint.export` makes; memory holds one leaf at a time,
or a few small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import math
from typing import Any, TypeVar

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from dd_jax import checkpoint, paths
from dd_jax.convert.lazy import LazyArray
from dd_jax.convert.table import flatten
from dd_jax.model import Model

T = TypeVar('T')

# Small leaves go together: a transaction each takes far longer than its bytes.
BATCH_BYTES = 1 << 26


def _batches(leaves: Iterable[tuple[T, int]]) -> list[list[T]]:
  """What is named, in runs of at most `BATCH_BYTES`, or of one larger leaf."""
  batches, room = [], 0
  for name, nbytes in leaves:
    if not batches or nbytes > room:
      batches.append([])
      room = BATCH_BYTES
    batches[-1].append(name)
    room -= nbytes
  return batches


class _InBatches(ocp.type_handlers.NumpyHandler):
  """Makes a few leaves, writes them, forgets them, and goes on."""

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    numbered = ((i, value.nbytes) for i, value in enumerate(values))
    for batch in _batches(numbered):
      made = [np.asarray(values[i]) for i in batch]
      for future in await super().serialize(
          made, [infos[i] for i in batch], [args[i] for i in batch]
      ):
        future.result()
      del made, future  # both hold the values
    return []


def export(
    path: epath.PathLike, model: Model, params: Mapping[str, Any],
    source: Mapping[str, Any], *,
    finish: Callable[[epath.Path], None] = lambda folder: None,
    progress: Callable[[int], None] = lambda leaves: None,
) -> str:
  """Writes a network for everybody; complete or not there at all.

  Args:
    path: folder to make; an older export there is replaced.
    model: family and config go into `model.json`.
    params: nested dict of `LazyArray`s, each of which is asked for once.
    source: JSON-able description of where they come from.
    finish: adds to the folder before it gets its name.
    progress: called with the number of leaves that are written.

  Returns:
    The hash that `checkpoint.export` would give.
  """
  path = paths.absolute(path)
  hashes: dict[str, str] = {}

  def hashed(name: str, leaf: LazyArray) -> LazyArray:
    def make() -> np.ndarray:
      value = np.ascontiguousarray(leaf)
      progress(len(hashes))
      hashes[name] = _sha256(value)
      return value.reshape(leaf.shape)

    return dataclasses.replace(leaf, make=make)

  flat = {name: hashed(name, leaf) for name, leaf in flatten(params)}
  temporary = path.parent / f'{path.name}.tmp'
  if temporary.exists():
    temporary.rmtree()
  temporary.mkdir(parents=True)
  try:
    _save(temporary / 'params', _unflatten(flat))
    progress(len(hashes))
    hashes = {name: hashes[name] for name in flat}
    checkpoint.write_description(
        temporary, model, hashes, sum(leaf.size for leaf in flat.values()),
        source,
    )
    finish(temporary)
  except BaseException:
    temporary.rmtree()
    raise
  if path.exists():
    path.rmtree()
  temporary.rename(path)
  return checkpoint.fingerprint(model, hashes)


def _save(path: epath.Path, params: Mapping[str, Any]) -> None:
  registry = ocp.type_handlers.create_type_handler_registry(
      (LazyArray, _InBatches(deepcopy_host_arrays=False)),
      (jax.Array, ocp.type_handlers.ArrayHandler()),  # or Orbax warns
  )
  # One host writes, and none waits for the others.
  alone = ocp.options.MultiprocessingOptions(
      primary_host=0, active_processes={0}, barrier_sync_key_prefix='export',
  ) if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
  handler = ocp.PyTreeCheckpointHandler(
      type_handler_registry=registry, multiprocessing_options=alone
  )
  with ocp.Checkpointer(
      handler, multiprocessing_options=alone
  ) as checkpointer:
    checkpointer.save(path, args=ocp.args.PyTreeSave(params))


def open_params(
    path: epath.PathLike, shapes: Mapping[str, Any]
) -> dict[str, Any]:
  """The parameters of an export, read and checked when they are asked for.

  Args:
    path: export folder.
    shapes: nested dict whose leaves have the `shape` that is expected, such as
      `Model.abstract()` returns.

  Returns:
    Nested dict of `LazyArray`s. To ask for one raises ValueError where the
    file cannot be read or differs from its hash.

  Raises:
    FileNotFoundError: no export there.
    ValueError: unreadable, or parameters other than those expected.
  """
  path = epath.Path(path)
  hashes = checkpoint.describe(path)['sha256']
  folder = paths.absolute(path) / 'params'
  checkpointer = ocp.PyTreeCheckpointer()
  try:
    tree = checkpointer.metadata(folder).item_metadata.tree
  except Exception as e:
    raise ValueError(f'{folder} cannot be read ({e})') from e
  found = {k: (tuple(v.shape), np.dtype(v.dtype)) for k, v in flatten(tree)}
  wanted = {k: tuple(v.shape) for k, v in flatten(shapes)}
  for name in sorted(found.keys() | wanted.keys() | hashes.keys()):
    if name not in hashes or found.get(name, (None,))[0] != wanted.get(name):
      raise ValueError(f'{folder}: {name} is not as model.json says')

  batches = _batches(
      (k, math.prod(shape) * dtype.itemsize)
      for k, (shape, dtype) in found.items()
  )
  batch_of = {name: batch for batch in batches for name in batch}
  ready: dict[str, np.ndarray] = {}  # read with another, not yet asked for

  def lazy(name: str) -> LazyArray:
    def make() -> np.ndarray:
      if name not in ready:
        ready.clear()
        ready.update(_restore(checkpointer, folder, batch_of[name]))
      value = np.asarray(ready.pop(name), order='C')
      if _sha256(value) != hashes[name]:
        raise ValueError(
            f'{folder}: {name} differs from its hash in model.json'
        )
      return value

    return LazyArray(*found[name], make)

  return _unflatten({name: lazy(name) for name in wanted})


def _restore(
    checkpointer: ocp.PyTreeCheckpointer, folder: epath.Path,
    names: list[str],
) -> dict[str, np.ndarray]:
  args = ocp.args.PyTreeRestore(
      item=_unflatten({n: np.zeros(()) for n in names}),
      restore_args=_unflatten(
          {n: ocp.RestoreArgs(restore_type=np.ndarray) for n in names}
      ),
      partial_restore=True,
  )
  try:
    return dict(flatten(checkpointer.restore(folder, args=args)))
  except Exception as e:
    raise ValueError(f'{folder}: {names[0]} cannot be read ({e})') from e


def _sha256(value: np.ndarray) -> str:
  # By bytes: Python's buffers do not know all types.
  data = value.reshape(-1).view(np.uint8).data if value.size else b''
  return hashlib.sha256(data).hexdigest()


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *folders, name = path.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = leaf
  return tree
