# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Released weight files to our exports, and back.

    <export>/original.json         where the tensors stood, under which names
    <export>/original.safetensors  tensors that are no weights but are kept
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from typing import Any

from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from dd_jax import checkpoint, console, registry, released, streaming
from dd_jax.convert import readers, table, writers
from dd_jax.convert.family import Family
from dd_jax.convert.lazy import LazyArray
from dd_jax.model import Model
from dd_jax.stages import Context

RECORD = 'original.json'
KEPT = 'original.safetensors'


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion that is known to work, before a parameter is made.

  Attributes:
    family: entry of `registry.TABLES['families']`.
    model: the network, its config read from the tensors.
    leaves: parameters by '/'-joined path.
    parts: per file, what is needed to write it again.
    kept: tensors that go into the side record.
    dropped: names of tensors and other things that are left out.
  """

  family: str
  model: Model
  leaves: Mapping[str, LazyArray]
  parts: Sequence[Mapping[str, Any]]
  kept: Mapping[str, LazyArray]
  dropped: Sequence[str]


def guess(names: Collection[str]) -> str | None:
  """The family whose files have these tensors, or None.

  Of several the one that asks for most, and the registry's first of those.
  """
  found = {k: len(f.signature) for k, f in families().items() if f.fits(names)}
  return max(found, key=found.get, default=None)


def families() -> dict[str, Family]:
  names = registry.TABLES['families']
  return {name: registry.get('families', name) for name in names}


def plan(
    name: str, inputs: Sequence[str | os.PathLike], *,
    given: Mapping[str, Any] | None = None,
    wrapper: Sequence[str] | None = None, inert: Collection[str] = (),
) -> Plan:
  """Compares files with a family.

  Reads shapes and, of values, buffers and tensors that repeat others.

  Args:
    name: of the family.
    inputs: files that together have the weights, most often one; or the
      `.index.json` that names them.
    given: fields of the model's config, before what the tensors tell.
    wrapper: keys that lead to the weights; found if None.
    inert: names that a pickle may hold, see `readers.read`.

  Raises:
    ValueError: the file cannot be read, is of another family, or does not
      match it in full; all that is wrong is listed.
  """
  family: Family = registry.get('families', name)
  given = dict(given or {})
  tensors: dict[str, LazyArray] = {}
  parts, dropped = [], []
  inputs = readers.expand(inputs)
  for path in inputs:
    contents = readers.read(path, inert)
    weights = readers.select(path, contents.tree, wrapper)
    if twice := sorted(tensors.keys() & weights.tensors.keys()):
      raise ValueError(f'{path}: {twice[0]!r} is in a file before it too')
    tensors |= weights.tensors
    dropped += weights.others
    parts.append({
        'format': contents.format, 'wrapper': list(weights.wrapper),
        'prefix': weights.prefix + family.under, 'tensors': {
            k: v.dtype.name for k, v in family.pick(weights.tensors).items()
        },
    })
  where = ', '.join(map(str, inputs))
  other = guess(tensors)
  if other and families()[other].signature != family.signature:
    raise ValueError(f'{where}: not a {name!r} file; use --family={other}')
  chosen = family.pick(tensors)
  dropped += [k for k in tensors if k.removeprefix(family.under) not in chosen
              or not k.startswith(family.under)]
  tensors = chosen
  try:
    fields = _merged(family.infer(tensors, given), given)
    model = registry.get('models', family.model)(fields)
    buffers = family.buffers(model.config)
    rows, wanted = family.rows(model.config), model.abstract()
  except (ArithmeticError, MemoryError, RecursionError, ValueError) as e:
    # Sizes may be nonsense.
    names = ', '.join(list(tensors)[:3])
    raise ValueError(f'{where}, with {names}, ...: {str(e) or repr(e)}') from e
  kept = {k: v for k, v in tensors.items() if family.is_kept(k)}
  problems = []
  for key, value in buffers.items():
    if key in tensors and key not in kept:
      found = tensors[key]
      if found.shape != value.shape or not np.array_equal(
          np.asarray(found), value.astype(found.dtype)
      ):
        problems.append(
            f'buffer {key!r} is not what the config makes; is one of '
            f'{sorted(given) or "its fields"} wrong?'
        )
  for key, origin in family.tied.items():
    if {key, origin} <= tensors.keys() and not np.array_equal(
        np.asarray(tensors[key]), np.asarray(tensors[origin])
    ):
      problems.append(f'tensor {key!r} should repeat {origin!r}, but differs')
  weights = {
      k: v for k, v in tensors.items()
      if k not in buffers and k not in kept and k not in family.tied
  }
  leaves: dict[str, LazyArray] = {}
  try:
    leaves = table.plan(rows, weights, wanted)
  except table.ConversionError as e:
    problems += e.problems
  if problems:
    raise ValueError(f'{where}: {table.ConversionError(problems)}')
  return Plan(name, model, leaves, parts, kept, dropped)


def _merged(
    found: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
  """Fields of both, also of networks within; those given stand before."""
  nested = {
      k: {**found[k], **v} for k, v in given.items()
      if isinstance(v, Mapping) and isinstance(found.get(k), Mapping)
  }
  return {**found, **given, **nested}


def write(
    work: Plan, output: epath.PathLike, source: Mapping[str, Any]
) -> str:
  """Writes the export of a plan; complete or not there at all.

  Returns:
    The hash of the export.
  """

  def add_record(folder: epath.Path) -> None:
    record = {'family': work.family, 'parts': work.parts}
    (folder / RECORD).write_text(json.dumps(record, indent=1))
    if work.kept:
      writers.write(
          folder / KEPT,
          {k: (v.shape, v.dtype) for k, v in work.kept.items()},
          ((k, _contiguous(v)) for k, v in work.kept.items()),
      )

  params = table.nest(work.model.abstract(), work.leaves)
  with console.Progress('convert', len(work.leaves)) as bar:
    return streaming.export(
        output, work.model, params, source, finish=add_record,
        progress=bar.update,
    )


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'convert'; see `released.ConvertConfig`.

  Returns:
    `exports`, the one folder by family of the network, its hash in `hashes`,
    and the hashes of its `files`.

  Raises:
    ValueError: as `plan`.
  """
  config = released.convert_config(context.config, context.name)
  work = plan(
      config.family, config.paths, given=config.config, wrapper=config.keys
  )
  name = work.model.family
  folder = context.directory / 'export' / name
  if jax.process_index() == 0:
    write(work, folder, {
        'stage': context.name, 'files': file_hashes(config.paths),
    })
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(context.name)
  meta = checkpoint.describe(folder)
  return {
      'exports': {name: f'export/{name}'},
      'hashes': {name: meta['hash']},
      'files': meta['source']['files'],
  }


def file_hashes(paths: Sequence[str | os.PathLike]) -> dict[str, str]:
  """SHA-256 of files, by their names."""
  digests = {}
  for path in readers.expand(paths):
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    digests[pathlib.Path(path).name] = digest
  return digests


def show(work: Plan) -> None:
  """Prints what goes where."""
  def brief(names: Sequence[str]) -> str:
    more = f' and {len(names) - 1} more' if len(names) > 1 else ''
    return f'{names[0]}{more}'

  console.table(
      f'{work.family}: every parameter and the tensors that make it',
      ('parameter', 'shape', 'type', 'from'),
      [(path, by(leaf.shape), leaf.dtype, brief(leaf.sources))
       for path, leaf in work.leaves.items()],
  )
  config = dataclasses.asdict(work.model.config)
  console.say(f'config: {json.dumps(config)}')
  used = {n for leaf in work.leaves.values() for n in leaf.sources}
  names = {n for part in work.parts for n in part['tensors']}
  made = sorted(names - used - work.kept.keys())
  for title, group in (
      ('made again from the config', made),
      ('kept beside the parameters', sorted(work.kept)),
      ('left out', sorted(work.dropped)),
  ):
    if group:
      console.say(f'{title}: {brief(group)}')
  total = sum(leaf.size for leaf in work.leaves.values())
  console.say(
      f'{len(used)} tensors -> {len(work.leaves)} parameters, {total:,} '
      'values; nothing missing, nothing left over'
  )


def restore(
    export: epath.PathLike, outputs: Sequence[str], name: str | None = None
) -> None:
  """Writes the file(s) that an export was made from.

  Names, order, types, wrapper and prefix are those of the original. An export
  that was trained here is laid out as its family's released file. Several
  `.safetensors` made of several get the index beside them that names them, as
  Hugging Face has it.

  Args:
    export: folder of an export.
    outputs: a file for each that it was made from; `.safetensors`, `.pth` or
      `.pt`. `.safetensors` has no wrappers.
    name: of the family; None takes that of the record or of the model.

  Raises:
    ValueError: no family writes this network, another number of files, an
      index that is there and names others, or anything that differs from what
      is expected.
  """
  export = epath.Path(export)
  meta = checkpoint.describe(export)
  model = registry.get('models', meta['family'])(meta['config'])
  file = export / RECORD
  record = json.loads(file.read_text()) if file.exists() else None
  name = name or (record or {}).get('family') or next(
      (k for k, v in families().items() if v.model == meta['family']), None
  )
  if name is None or registry.get('families', name).model != meta['family']:
    raise ValueError(
        f'{export}: a {meta["family"]!r} network; no family '
        f'{name or "of files"} is made of it'
    )
  family: Family = registry.get('families', name)
  groups = table.plan_inverse(
      family.rows(model.config),
      streaming.open_params(export, model.abstract()),
  )
  extra: dict[str, Any] = dict(family.buffers(model.config))
  if (export / KEPT).exists():
    extra |= readers.read(export / KEPT).tree
  made = {k: (shape, g.dtype) for g in groups for k, shape in g.shapes.items()}
  parts = record['parts'] if record else [{
      'wrapper': family.wrapper, 'prefix': family.under, 'tensors': {
          k: np.dtype(v[1] if k in made else v.dtype).name
          for k, v in (made | extra).items()
      },
  }]
  groups = [_with_tied(group, family.tied) for group in groups]
  made = {k: (shape, g.dtype) for g in groups for k, shape in g.shapes.items()}
  if len(parts) != len(outputs):
    raise ValueError(
        f'{export} was made from {len(parts)} file(s), but --output names '
        f'{len(outputs)}'
    )
  specs = [
      _specs(part, output, made, extra)
      for part, output in zip(parts, outputs, strict=True)
  ]
  sharded = {part.get('format') for part in parts} == {'safetensors'}
  index = _index(outputs, specs) if sharded else {}
  with console.Progress('restore', len(groups) * len(parts)) as bar:
    for i, (part, output) in enumerate(zip(parts, outputs, strict=True)):
      _restore_part(
          part, pathlib.Path(output), specs[i], groups, made, extra,
          lambda done, i=i: bar.update(i * len(groups) + done),
      )
  for path, text in index.items():
    path.write_text(text)


def _with_tied(group: table.Group, tied: Mapping[str, str]) -> table.Group:
  """A group that also makes the tensors that repeat one of its own."""
  names = {k: v for k, v in tied.items() if v in group.shapes}
  if not names:
    return group

  def make() -> dict[str, np.ndarray]:
    values = group.make()
    return values | {k: values[v] for k, v in names.items()}

  shapes = {k: group.shapes[v] for k, v in names.items()}
  return table.Group({**group.shapes, **shapes}, group.dtype, make)


def _specs(
    part: Mapping[str, Any], output: str, made: writers.Specs,
    extra: Mapping[str, Any],
) -> writers.Specs:
  """Every tensor of a file."""
  names = part['tensors']
  if lost := [n for n in names if n not in made and n not in extra]:
    raise ValueError(f'{output}: nothing makes tensor {lost[0]!r}')
  return {
      part['prefix'] + n:
          made[n] if n in made else (extra[n].shape, np.dtype(dtype))
      for n, dtype in names.items()
  }


def _index(
    outputs: Sequence[str], specs: Sequence[writers.Specs]
) -> dict[pathlib.Path, str]:
  """The index of several files, and where it goes; none of a single one."""
  paths = [pathlib.Path(output) for output in outputs]
  (folder, *others) = {path.parent for path in paths}
  kinds = {path.suffix for path in paths}
  if len(paths) == 1 or others or kinds != {'.safetensors'}:
    return {}
  total = sum(
      math.prod(shape) * dtype.itemsize
      for part in specs for shape, dtype in part.values()
  )
  text = json.dumps({
      'metadata': {'total_size': total},
      'weight_map': {
          name: path.name
          for path, part in zip(paths, specs, strict=True) for name in part
      },
  }, indent=1, sort_keys=True)
  index = folder / 'model.safetensors.index.json'
  if index.exists() and index.read_text() != text:
    raise ValueError(
        f'{index} names other files; remove it, or write to another folder'
    )
  return {index: text}


def _restore_part(
    part: Mapping[str, Any], output: pathlib.Path, specs: writers.Specs,
    groups: Sequence[table.Group], made: writers.Specs,
    extra: Mapping[str, Any], progress: Callable[[int], None],
) -> None:
  names, prefix = part['tensors'], part['prefix']

  def values() -> Iterator[tuple[str, np.ndarray]]:
    for done, group in enumerate(groups):
      progress(done)
      if names.keys() & group.shapes.keys():
        for n, value in group.make().items():
          if n in names:
            yield prefix + n, value
    progress(len(groups))
    for n in names:
      if n not in made:
        yield prefix + n, _contiguous(extra[n]).astype(names[n])

  output.parent.mkdir(parents=True, exist_ok=True)
  temporary = output.with_name(f'{output.stem}.tmp{output.suffix}')
  try:
    writers.write(temporary, specs, values(), part['wrapper'])
    os.replace(temporary, output)
  finally:
    temporary.unlink(missing_ok=True)


def _contiguous(value: Any) -> np.ndarray:
  return np.asarray(value, order='C')


def by(shape: Sequence[int]) -> str:
  """A shape for tables, such as 3x4."""
  return 'x'.join(map(str, shape)) or 'scalar'
