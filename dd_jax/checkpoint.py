# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The two artefacts on disk: resume checkpoints and exports.

    <stage>/checkpoints/<step>/   sharded: params, ema, opt; meta: data position
    <stage>/export/<role>-<step>/ params/ (plain nested dict), model.json,
                                  README.md

A resume checkpoint belongs to this library. An export is for everybody: any
Orbax reads it in one line on any topology.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from dd_jax import paths, registry
from dd_jax.config import canonical_json
from dd_jax.model import Model, Params
from dd_jax.state import TrainState

FORMAT_VERSION = 1

_DESCRIBED = frozenset({
    'family', 'config', 'parameters', 'hash', 'sha256', 'source'
})
_README = """# {family} exported by dd_jax

    import orbax.checkpoint as ocp
    params = ocp.StandardCheckpointer().restore('/absolute/path/to/params')

`params` is a nested dict of NumPy arrays; `model.json` describes the network.
"""


class _Manager(ocp.CheckpointManager):

  def reached_preemption(self, step: int) -> bool:
    # The loop asks, with numbers of its own; see `hooks.preempted`.
    del step
    return False


class Checkpointer:
  """Saves and restores a run: state, data iterator, description."""

  def __init__(
      self, directory: epath.Path, *, save_every: int, keep: int
  ):
    self._manager = _Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, save_interval_steps=save_every, create=True,
        ),
    )
    self._save_every = save_every

  @property
  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def should_save(self, step: int) -> bool:
    return step % self._save_every == 0

  def save(
      self, state: TrainState, iterator: Any, meta: Mapping[str, Any], *,
      force: bool = False,
  ) -> None:
    """Starts an asynchronous, atomic save under the state's own step."""
    items = {
        'params': ocp.args.StandardSave(state.params),
        'opt': ocp.args.StandardSave(_rest(state)),
        # The state of the data is a count of batches, the same on all hosts:
        # kept here, a run can go on with another number of hosts.
        'meta': ocp.args.JsonSave({
            'format_version': FORMAT_VERSION, 'data': iterator.get_state(),
            **meta,
        }),
    }
    if state.ema:
      items['ema'] = ocp.args.StandardSave(state.ema)
    with self._explained():
      self._manager.save(
          int(state.step), args=ocp.args.Composite(**items), force=force
      )

  def restore(
      self, abstract: TrainState, iterator: Any
  ) -> TrainState:
    """The latest save, laid out as `abstract` says.

    Args:
      abstract: shape structs with shardings; any mesh.
      iterator: a fresh iterator of the same data, moved to where it was.

    Raises:
      ValueError: when the files cannot be read or do not fit, naming them.
    """
    step = self._manager.latest_step()
    items = {
        'params': ocp.args.StandardRestore(abstract.params),
        'opt': ocp.args.StandardRestore(_rest(abstract)),
        'meta': ocp.args.JsonRestore(),
    }
    if abstract.ema:
      items['ema'] = ocp.args.StandardRestore(abstract.ema)
    try:
      out = self._manager.restore(step, args=ocp.args.Composite(**items))
    except jax.errors.JaxRuntimeError:  # of another process, not of the disk
      raise
    except Exception as e:
      where = epath.Path(self._manager.directory) / str(step)
      raise ValueError(
          f'{where}: cannot be restored ({_first_line(e)}); remove that folder '
          'to resume from the save before it, or redo the stage'
      ) from e
    if (version := out['meta']['format_version']) > FORMAT_VERSION:
      raise ValueError(
          f'{self._manager.directory}/{step}: format_version {version} is '
          f'newer than {FORMAT_VERSION}; update dd_jax'
      )
    opt = dict(out['opt'])
    state = TrainState(
        params=out['params'], ema=out.get('ema') or {}, opt=opt.pop('opt'),
        aux=opt.pop('aux', {}), **opt,
    )
    iterator.set_state(out['meta']['data'])
    return state

  def wait(self) -> None:
    """Blocks until the last save is complete, and raises where it failed."""
    with self._explained():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    """Says what a failed write means, whatever library it failed in."""
    try:
      yield
    except jax.errors.JaxRuntimeError:  # of another process, not of the disk
      raise
    except Exception as e:
      raise OSError(
          f'{self._manager.directory}: a checkpoint could not be written '
          f'({_first_line(e)}); is the disk full? The saves before it are '
          'whole: free space and run the same command again'
      ) from e

  def close(self) -> None:
    self._manager.close()


def saves(
    directory: epath.PathLike
) -> Iterator[tuple[int, dict[str, Params], dict[str, int]]]:
  """Steps, parameters by role and counts of updates of the saves of a run.

  Args:
    directory: `<stage>/checkpoints`; those that were kept are in it.
  """
  folders = {
      int(p.name): p for p in epath.Path(directory).iterdir()
      if p.name.isdigit()
  }
  for step, folder in sorted(folders.items()):
    params, rest = (
        ocp.StandardCheckpointer().restore(paths.absolute(folder) / item)
        for item in ('params', 'opt')
    )
    yield step, params, {k: int(v) for k, v in rest['updates'].items()}


def _rest(state: TrainState) -> dict[str, Any]:
  rest = {
      'opt': state.opt, 'step': state.step, 'updates': state.updates,
      'key': state.key,
  }
  return rest | ({'aux': state.aux} if jax.tree.leaves(state.aux) else {})


def _first_line(error: BaseException) -> str:
  return (str(error) or type(error).__name__).splitlines()[0][:200]


def _leaves(params: Params) -> dict[str, np.ndarray]:
  return {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


def _sha256(leaf: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()


def _to_host(leaf: jax.Array) -> np.ndarray:
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    return multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf)


def export(
    path: epath.PathLike, model: Model, params: Params,
    source: Mapping[str, Any],
) -> str:
  """Writes a network for everybody; complete or not there at all.

  Args:
    path: folder to make; an older export there is replaced.
    model: family and config go into `model.json`.
    params: arrays on any mesh.
    source: JSON-able description of the run that made them.

  Returns:
    A hash of family, config and every leaf.
  """
  path = epath.Path(path)
  params = jax.tree.map(_to_host, params)
  hashes = {k: _sha256(v) for k, v in _leaves(params).items()}
  digest = fingerprint(model, hashes)
  if jax.process_index() == 0:
    temporary = path.parent / f'{path.name}.tmp'
    if temporary.exists():
      temporary.rmtree()
    temporary.mkdir(parents=True)
    with ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0},
            barrier_sync_key_prefix='export',
        ) if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    ) as checkpointer:
      checkpointer.save(temporary / 'params', params)
    parameters = sum(v.size for v in jax.tree.leaves(params))
    write_description(temporary, model, hashes, parameters, source)
    if path.exists():
      path.rmtree()
    temporary.rename(path)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'export {path.name}')
  return digest


def fingerprint(model: Model, hashes: Mapping[str, str]) -> str:
  """The hash of an export: of family, config and the leaves' SHA-256."""
  return _digest(model.family, dataclasses.asdict(model.config), hashes)


def _digest(
    family: str, config: Mapping[str, Any], hashes: Mapping[str, str]
) -> str:
  text = canonical_json([family, config, hashes])
  return hashlib.sha256(text.encode()).hexdigest()


def write_description(
    folder: epath.Path, model: Model, hashes: Mapping[str, str],
    parameters: int, source: Mapping[str, Any],
) -> None:
  """Writes what `describe` reads, and a README, beside the parameters.

  Args:
    folder: of the export.
    model: its family and config.
    hashes: SHA-256 of every leaf by '/'-joined path.
    parameters: how many numbers the leaves hold.
    source: JSON-able description of the run that made them.
  """
  (folder / 'model.json').write_text(json.dumps({
      'format_version': FORMAT_VERSION,
      'family': model.family,
      'config': dataclasses.asdict(model.config),
      'parameters': parameters,
      'hash': fingerprint(model, hashes),
      'sha256': hashes,
      'source': dict(source),
  }, indent=1))
  (folder / 'README.md').write_text(_README.format(family=model.family))


def describe(path: epath.PathLike) -> dict[str, Any]:
  """The `model.json` of an export.

  Raises:
    FileNotFoundError: no export there.
    ValueError: not a description of one, changed since it was written, or
      written by a newer format.
  """
  file = epath.Path(path) / 'model.json'
  if not file.exists():
    raise FileNotFoundError(
        f'{file} is missing: {path} is not an export of dd_jax'
    )
  try:
    meta = json.loads(file.read_text())
    newer = meta['format_version'] > FORMAT_VERSION
    missing = _DESCRIBED - meta.keys()
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{file} does not describe an export of dd_jax ({e!r})'
    ) from e
  if newer:
    raise ValueError(
        f'{file}: format_version {meta["format_version"]} is newer than '
        f'{FORMAT_VERSION}; update dd_jax'
    )
  if missing:
    raise ValueError(f'{file} lacks {sorted(missing)}: it is damaged')
  if meta['hash'] != _digest(meta['family'], meta['config'], meta['sha256']):
    raise ValueError(
        f'{file}: its hash is not that of its family, config and sha256: it '
        'was changed; fetch the export again'
    )
  return meta


def tokenizer_of(meta: Mapping[str, Any]) -> str | None:
  """Hash of the tokenizer that a described network was trained with.

  None where its description does not say: networks of released files, and those
  that need none.
  """
  return meta['source'].get('frozen', {}).get('vae')


def check_own_tokenizer(
    network: epath.PathLike, vae: epath.PathLike, advice: str = 'name that one'
) -> None:
  """Raises where a network was trained with another tokenizer.

  One of the same sizes would be taken without a word, and give images of codes
  that mean something else. What does not say its tokenizer passes.

  Args:
    network: export folder of a teacher or a student.
    vae: export folder of a tokenizer.
    advice: what to do, for the message.

  Raises:
    FileNotFoundError: no export there.
    ValueError: names both folders and hashes.
  """
  wanted, found = tokenizer_of(describe(network)), describe(vae)['hash']
  if wanted not in (None, found):
    raise ValueError(
        f'{vae} ({found[:12]}) is not the tokenizer that {network} was trained '
        f'with ({wanted[:12]}); {advice}'
    )


def load_params(
    path: epath.PathLike, shardings: Any = None, dtype: Any = None
) -> Params:
  """The parameters of an export, checked against the hashes in it.

  Args:
    path: export folder.
    shardings: tree of shardings to place leaves on, or None for NumPy arrays.
    dtype: cast of floating-point leaves, or None to keep them.

  Raises:
    FileNotFoundError: no export there.
    ValueError: unreadable files, or a leaf that differs from its hash.
  """
  meta = describe(path)
  try:
    params = ocp.StandardCheckpointer().restore(
        paths.absolute(path) / 'params'
    )
  except jax.errors.JaxRuntimeError:  # of another process, not of the disk
    raise
  except Exception as e:
    raise ValueError(
        f'{path}/params cannot be read ({_first_line(e)}); redo the stage or '
        'fetch the export again'
    ) from e
  params = jax.tree.map(np.asarray, params)
  found = {k: _sha256(v) for k, v in _leaves(params).items()}
  if found != meta['sha256']:
    bad = sorted(
        k for k in found | meta['sha256']
        if found.get(k) != meta['sha256'].get(k)
    )
    raise ValueError(
        f'{path}/params: {bad[0]} differs from its hash in model.json '
        f'({len(bad)} leaves in all); redo the stage or fetch it again'
    )
  if dtype is not None:
    params = jax.tree.map(
        lambda x: x.astype(dtype, copy=False)
        if jax.numpy.issubdtype(x.dtype, np.floating) else x, params
    )
  return params if shardings is None else jax.device_put(params, shardings)


def load(path: epath.PathLike, **kwargs: Any) -> tuple[Model, Params]:
  """A network of an export: its model, rebuilt, and its parameters.

  Takes the arguments of `load_params` and raises what it raises.
  """
  meta = describe(path)
  model = registry.get('models', meta['family'])(meta['config'])
  return model, load_params(path, **kwargs)
