# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Figures that papers quote: FID here, or samples for the evaluator of ADM.

Two stage kinds for two protocols. Each result says which it is, with every
setting and hash that it depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import dataclasses
import hashlib
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from dd_jax import config as config_lib
from dd_jax import console, scoring, sharding
from dd_jax.convert import readers
from dd_jax.convert.lazy import LazyArray
from dd_jax.data import images as images_lib
from dd_jax.data import sources
from dd_jax.evals import adm, fid
from dd_jax.model import Model, Params
from dd_jax.stages import Context

_ORDER_SEED = 20260101  # of the files of a folder; fixed for good
# Of statistics in .pth files: DD1's release, and the names in .npz files.
_PTH_NAMES = (('m', 's'), ('mu', 'sigma'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidConfig(scoring.SamplesConfig):
  """A stage of kind 'fid': the protocol of PyTorch-FID.

  Figures of another number of samples than 50,000 are no FID-50k.

  Attributes:
    inception: export folder of the Inception network.
    reference: .npz or .pth of statistics, or a folder of images, which are cut
      to the size of the samples.
    labels: see `scoring.SamplesConfig`.
    manifold: features that precision and recall are computed from, at most.
  """

  inception: str
  reference: str
  labels: str = 'random'
  manifold: int = fid.MANIFOLD

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.samples < fid.SPLITS:
      raise ValueError(
          f'samples={self.samples}: expected at least {fid.SPLITS}, the parts '
          'of the Inception Score'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdmConfig(scoring.SamplesConfig):
  """A stage of kind 'adm_npz': samples for the evaluator of ADM, no figures."""


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'fid'; `report/fid.json` is its result.

  Returns:
    `artefact`, the folder of the result, and `hashes` of it.

  Raises:
    ValueError: settings, sizes or statistics that do not fit.
    Preempted: SIGTERM came; nothing is kept.
  """
  config = config_lib.make(FidConfig, context.config, context.name)
  began = time.monotonic()
  models, params, conditions = scoring.load(context, config, ('inception',))
  inception = on_mesh(models['inception'], params['inception'], context.mesh)
  file = context.resolve(config.reference)
  if file.is_dir():
    size = scoring.image_size(models)
    reference = measure_folder(
        file, inception, image_size=size, batch_size=config.batch_size,
        keep=config.manifold,
    )
    digest = reference.meta['images_sha256']
  else:
    reference = load_reference(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
  made_with = reference.meta.get('inception')
  hashes = scoring.hashes_of(context, config, conditions, ('inception',))
  if made_with not in (None, hashes['inception']):
    raise ValueError(
        f'{file} was made with another Inception export ({made_with[:16]}) '
        f'than {config.inception} ({hashes["inception"][:16]})'
    )
  seen = hashlib.sha256()
  batches = scoring.samples(
      context, config, models, params, conditions, fid.to_uint8, seen
  )
  figures = fid.evaluate(
      (pixels for pixels, _ in batches), inception, reference,
      batch_size=config.batch_size, keep=config.manifold,
  )
  row = {
      'protocol': fid.PROTOCOL,
      **figures,
      'seed': context.seed,
      'settings': scoring.plain(config),
      'inception_config': dataclasses.asdict(models['inception'].config),
      'reference': dict(reference.meta),
      'hashes': {
          **hashes, 'reference': digest, 'samples': seen.hexdigest(),
      },
      'environment': scoring.environment(),
  }
  if jax.process_index() == 0:
    scoring.write_json(context.directory / 'report' / 'fid.json', row)
    shown = [(k, '-' if v is None else v) for k, v in figures.items()]
    console.table('PyTorch-FID protocol', ('figure', 'value'), shown)
    if config.samples != fid.SAMPLES:
      console.say(
          f'{config.samples} samples: not comparable with figures of '
          f'{fid.SAMPLES}'
      )
    console.say(f'{context.name}: {time.monotonic() - began:.0f} s, '
                f'{context.directory / "report" / "fid.json"}')
  return {'artefact': 'report', 'hashes': {'row': scoring.digest_of(row)}}


def run_adm(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'adm_npz': `report/samples.npz` and `adm.json`.

  Returns:
    `artefact`, the folder of both, and `hashes` of the second.

  Raises:
    ValueError: settings or sizes that do not fit.
    Preempted: SIGTERM came; nothing is kept.
  """
  config = config_lib.make(AdmConfig, context.config, context.name)
  models, params, conditions = scoring.load(context, config)
  size = scoring.image_size(models)
  folder = context.directory / 'report'
  seen = hashlib.sha256()
  batches = scoring.samples(
      context, config, models, params, conditions, adm.to_uint8, seen
  )
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    rgb = (np.broadcast_to(b, (*b.shape[:3], 3)) for b, _ in batches)
    adm.write_npz(
        folder / 'samples.npz', rgb, (config.samples, size, size, 3)
    )
  else:
    for _ in batches:  # the programs run on all hosts
      pass
  row = {
      'protocol': adm.PROTOCOL,
      'seed': context.seed,
      'settings': scoring.plain(config),
      'hashes': {
          **scoring.hashes_of(context, config, conditions),
          'samples': seen.hexdigest(),
      },
      'environment': scoring.environment(),
  }
  if jax.process_index() == 0:
    scoring.write_json(folder / 'adm.json', row)
    console.say(f'{context.name}: {folder / "samples.npz"} is for the '
                'evaluator of ADM; figures of the kind fid are another '
                'protocol')
  return {'artefact': 'report', 'hashes': {'row': scoring.digest_of(row)}}


def make_inception(inception: Model, mesh: Any) -> Any:
  """A jitted `(params, pixels uint8)` -> features and scores, whole."""

  def apply(params: Params, pixels: jax.Array) -> Any:
    images = pixels.astype(np.float32) / 127.5 - 1.0
    return inception.fns['features_and_scores'](params, images)

  return jax.jit(apply, out_shardings=sharding.replicated(mesh))


def on_mesh(
    inception: Model, params: Params, mesh: Any
) -> fid.Inception:
  """The network on uint8 images, split over the mesh, results whole."""
  program = make_inception(inception, mesh)
  return lambda pixels: program(
      params, sharding.place_rows({'image': pixels}, mesh)['image']
  )


def load_reference(file: epath.PathLike) -> fid.Reference:
  """Statistics from .npz or .pth.

  Raises:
    FileNotFoundError: no such file.
    ValueError: another kind of file, or no statistics in it.
  """
  file = epath.Path(file)
  if file.suffix == '.npz':
    return fid.read_reference(file)
  if file.suffix not in ('.pth', '.pt'):
    raise ValueError(
        f'{file}: statistics are .npz or .pth, or a folder of images'
    )
  if not file.exists():
    raise FileNotFoundError(f'{file} does not exist')
  tree = readers.read(file).tree
  for names in _PTH_NAMES:
    if isinstance(tree, Mapping) and set(names) <= set(tree):
      found = [tree[name] for name in names]
      if not all(isinstance(x, LazyArray | np.ndarray) for x in found):
        raise ValueError(f'{file}: {" and ".join(names)} are no arrays')
      try:
        return fid.make_reference(*found)
      except (TypeError, ValueError) as e:
        raise ValueError(f'{file}: no statistics for FID ({e})') from e
  raise ValueError(
      f'{file} holds {readers.outline(tree)}; expected m and s, or mu and sigma'
  )


def measure_folder(
    folder: epath.PathLike, inception: fid.Inception, *,
    image_size: int | None, batch_size: int, keep: int,
) -> fid.Reference:
  """Statistics of all PNG and JPEG files in a folder and below it.

  Files are taken in one fixed shuffled order, so that the features that are
  kept are a fair sample of sorted folders.

  Args:
    folder: of images.
    inception: see `evals.fid.Inception`.
    image_size: side to which the shorter side is resized (Lanczos) before the
      middle is cut out; None takes images as they are.
    batch_size: images at once.
    keep: features that are kept, at most.

  Raises:
    ValueError: fewer than two images, a broken one, or several sizes and no
      `image_size`; names the file.
  """
  root = epath.Path(folder)
  files = sorted(
      f for f in _walk(root) if f.suffix.lower() in images_lib.SUFFIXES
  )
  if len(files) < 2:
    raise ValueError(f'{root} holds {len(files)} images; need at least 2')
  order = sources.permutation(len(files), _ORDER_SEED)
  digests: dict[str, str] = {}
  shape: tuple[int, ...] | None = None

  def one(file: epath.Path) -> np.ndarray:
    nonlocal shape
    image = images_lib.read(file, str(file))
    if image_size is None:
      pixels = np.asarray(image.convert('RGB'))
    else:
      pixels = images_lib.fit(image, image_size, 3)
    shape = shape or pixels.shape
    if pixels.shape != shape or pixels.shape[0] != pixels.shape[1]:
      raise ValueError(
          f'{file} is {pixels.shape[1]} x {pixels.shape[0]}; without an image '
          'size all must be squares of one size'
      )
    digests[file.relative_to(root).as_posix()] = hashlib.sha256(
        pixels.tobytes()).hexdigest()
    return pixels

  def batches() -> Iterator[np.ndarray]:
    with console.Progress('reference', len(files)) as bar:
      for start in range(0, len(files), batch_size):
        rows = order[start : start + batch_size]
        yield np.stack([one(files[i]) for i in rows])
        bar.update(start + len(rows))

  seen = fid.look(
      batches(), inception, batch_size=batch_size, keep=keep,
      keep_scores=False,
  )
  return fid.make_reference(*seen.moments, seen.features if keep else None, {
      'protocol': fid.PROTOCOL,
      'folder': root.name,
      'images': seen.count,
      'image_size': image_size or shape[0],
      'resized': image_size is not None,
      'features': len(seen.features),
      'images_sha256': scoring.digest_of(digests),
      'environment': scoring.environment(),
  })


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    if path.name.startswith('.'):
      continue
    if path.is_dir():
      yield from _walk(path)
    else:
      yield path
