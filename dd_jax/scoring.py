# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What stages share that score a network's samples: images and settings.

The kinds fid, adm_npz and clip_score sample students, teachers, both together,
and denoisers; what does not fit is refused before weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import json
import platform
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

import dd_jax
from dd_jax import (
  build,
  checkpoint,
  console,
  hooks,
  programs,
  registry,
  sharding,
)
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.data import pairs as pairs_lib
from dd_jax.evals import baselines, fid
from dd_jax.flow import process as process_lib
from dd_jax.methods import dmd2
from dd_jax.model import Model, Params, condition_of
from dd_jax.sampling import guidance, steps
from dd_jax.stages import Context

_SAMPLED = ('student', 'teacher', 'vae')
# Of teacher and student, what must be the same where both make an image.
_COMMON = ('num_classes', 'patch_nums', 'latent_size', 'vocab_size', 'code_dim')
_OF_CAPTIONS = ('caption_length', 'caption_dim')
_PAIRS = 1 << 16  # counted at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesConfig:
  """What a stage samples, and how.

  Attributes:
    student: export folder or 'stage:name' of what is sampled; a teacher may
      stand here.
    vae: export folder or 'stage:name' of its tokenizer; None for a denoiser,
      which draws images.
    captions: folder or 'stage:name' of captions, where those are what it takes
      instead of classes.
    samples: images.
    batch_size: images per program run, over all hosts.
    t_list: of a student, scales that are data when each of its steps begins;
      empty for a teacher.
    split: of a student, scale at which its heads change over; None for a
      teacher.
    involved: of a student, scales (start, resume) that its teacher makes
      between two steps of the student, at 0 and at `resume`; see
      `sampling.steps.teacher_involved`. `t_list` is empty then.
    teacher: export folder or 'stage:name' of that teacher; None without
      `involved`.
    prefill_mask: what that teacher sees of its prefix, one of the sampler's
      `INVOLVED`; 'full' is that of DD1's release for VAR.
    skip: of a teacher, last scales that are left out, DD1's "skip-n".
    pairs: folder or 'stage:name' of pairs of a LlamaGen with `skip`: missing
      tokens are drawn from how often each place has a code. None decodes
      vectors of zeros there.
    cfg: guidance of a teacher.
    temperature: what the logits of a teacher are divided by, 1 for nothing.
    top_k: codes that a teacher draws from, 0 for all.
    top_p: probability that a teacher draws from, 1 for all.
    cfg_interval: where the guidance of a teacher ends, -1 for nowhere.
    levels: of a denoiser's student, those of its steps; see
      `methods.dmd2.Config`.
    steps: of a denoiser, noise levels that it visits; see `programs.denoised`.
    process: of a denoiser; see `methods.dmd2.Config`.
    labels: 'random' draws classes, or captions, by the stage's seed,
      'balanced' goes round.
  """

  student: str
  vae: str | None = None
  captions: str | None = None
  samples: int = fid.SAMPLES
  batch_size: int = 100
  t_list: tuple[int, ...] = ()
  split: int | None = None
  involved: tuple[int, ...] = ()
  teacher: str | None = None
  prefill_mask: str = 'causal'
  skip: int = 0
  pairs: str | None = None
  cfg: float = 0.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  cfg_interval: int = -1
  levels: tuple[int, ...] = ()
  steps: int = 0
  process: process_lib.Kind = 'edm'
  labels: str = 'balanced'

  def __post_init__(self) -> None:
    if len(self.involved) not in (0, 2):
      raise ValueError(f'involved={self.involved}: expected (start, resume)')
    if bool(self.involved) != (self.teacher is not None):
      raise ValueError(
          f'involved={self.involved} and teacher={self.teacher!r}: name both, '
          'the scales and the teacher that makes them, or neither'
      )
    if self.prefill_mask != 'causal' and not self.involved:
      raise ValueError(f'prefill_mask={self.prefill_mask!r} is of a teacher '
                       'that is involved; name what it makes (involved)')
    if self.pairs is not None and not self.skip:
      raise ValueError(f'pairs={self.pairs!r} stand for tokens that are '
                       'skipped; name how many (skip)')


def environment() -> dict[str, Any]:
  """Versions and device that figures depend on in the last digits."""
  return {
      'dd_jax': dd_jax.__version__, 'jax': jax.__version__,
      'numpy': np.__version__, 'python': platform.python_version(),
      'device': jax.devices()[0].device_kind, 'devices': jax.device_count(),
  }


def load(
    context: Context, config: SamplesConfig, judges: tuple[str, ...] = ()
) -> tuple[dict[str, Model], dict[str, Params], conditions_lib.Conditions]:
  """What is sampled, its tokenizer, networks that judge, and the conditions."""
  # Settings are checked before gigabytes are read.
  meta = checkpoint.describe(context.resolve(config.student))
  student = registry.get('models', meta['family'])(meta['config'])
  teacher = None
  if config.teacher is not None:
    there = checkpoint.describe(context.resolve(config.teacher))
    teacher = registry.get('models', there['family'])(there['config'])
  check(config, student, context.name, context.mesh, teacher)
  if config.vae is not None:
    for ref in filter(None, (config.student, config.teacher)):
      checkpoint.check_own_tokenizer(
          *map(context.resolve, (ref, config.vae))
      )
  counts = None
  if config.pairs is not None:
    counts = _count_codes(context, config, student)
  conditions = conditions_lib.of_network(
      student.config, config.captions and context.resolve(config.captions)
  )
  models, params = build.load_frozen(
      networks(config, judges), context.resolve, context.mesh, context.rules
  )
  if counts is not None:
    params['cumulative'] = jax.device_put(
        counts.cumsum(axis=1, dtype=np.int32),
        sharding.replicated(context.mesh),
    )
  return models, params, conditions


def _count_codes(
    context: Context, config: SamplesConfig, teacher: Model
) -> np.ndarray:
  """How often each place of the teacher's pairs has each code, (L, V)."""
  source = pairs_lib.PairSource(context.resolve(config.pairs))
  pairs_lib.check_origin(config.pairs, source.manifest, **{
      name: checkpoint.describe(context.resolve(ref))['hash']
      for name, ref in (('teacher', config.student), ('vae', config.vae))
  })
  shape = teacher.config.offsets[-1], teacher.config.vocab_size
  found = source.manifest.length, source.manifest.vocab_size
  if found != shape:
    raise ValueError(
        f'{context.name}: pairs={config.pairs} have {found[0]} tokens of '
        f'{found[1]} codes, the teacher {shape[0]} of {shape[1]}: take pairs '
        'that it made'
    )
  counts = np.zeros(shape, np.int64)
  for start in range(0, len(source), _PAIRS):
    rows = np.arange(start, min(start + _PAIRS, len(source)))
    counts += baselines.fit(source.take(rows)['indices'], shape[1])
  return counts


def networks(
    config: SamplesConfig, judges: tuple[str, ...] = ()
) -> dict[str, str]:
  """What a stage samples and judges with, by name."""
  refs = {n: getattr(config, n) for n in (*_SAMPLED, *judges)}
  return {n: ref for n, ref in refs.items() if ref is not None}


def image_size(models: Mapping[str, Model]) -> int:
  """The side of the images that are sampled."""
  return models.get('vae', models['student']).config.image_size


def hashes_of(
    context: Context, config: SamplesConfig,
    conditions: conditions_lib.Conditions, judges: tuple[str, ...] = (),
) -> dict[str, str]:
  """Hashes of all that `load` gives."""
  found = {
      name: checkpoint.describe(context.resolve(ref))['hash']
      for name, ref in networks(config, judges).items()
  }
  if config.captions:
    found['captions'] = conditions.manifest.sha256
  if config.pairs is not None:
    found['pairs'] = pairs_lib.read_manifest(
        context.resolve(config.pairs)
    ).sha256
  return found


def check(
    config: SamplesConfig, student: Model, name: str, mesh: Any,
    teacher: Model | None = None,
) -> None:
  """Raises ValueError where settings do not fit the networks or the mesh."""
  sharding.check_batch(config.batch_size, mesh)
  if config.labels not in ('random', 'balanced'):
    raise ValueError(f"{name}: labels={config.labels!r}: expected "
                     "'random' or 'balanced'")
  if programs.is_denoiser(student):
    _check_denoiser(config, name)
    return
  registry.find('samplers', student.family)
  if config.vae is None or config.levels or config.steps:
    raise ValueError(f'{name}: {config.student} needs a vae, and neither '
                     'levels nor steps')
  if _is_teacher(student):
    _check_teacher(config, student, name)
    return
  if config.skip:
    raise ValueError(f'{name}: skip={config.skip} is of a teacher; '
                     f'{config.student} is a student, leave it out')
  if config.involved:
    _check_involved(config, student, teacher, name)
    return
  if not config.t_list or config.split is None:
    raise ValueError(f'{name}: {config.student} is a student and '
                     'needs t_list and split')
  try:
    steps.check_choice(student.config, config.t_list, config.split)
  except ValueError as e:
    raise ValueError(f'{name}: {config.student}: {e}') from e
  if guidance.settings_of(config) != guidance.SETTINGS:
    raise ValueError(f'{name}: {", ".join(guidance.SETTINGS)} are of a '
                     'teacher; a student has taken in those of its pairs')


def _check_teacher(config: SamplesConfig, teacher: Model, name: str) -> None:
  """Raises ValueError where settings do not fit a teacher that is sampled."""
  if config.involved:
    raise ValueError(
        f'{name}: involved={config.involved} is of a student, but '
        f'{config.student} is a teacher; name the student there, and the '
        'teacher in teacher'
    )
  if (config.t_list, config.split) != ((), None):
    raise ValueError(f'{name}: {config.student} is a teacher; leave t_list and '
                     'split out')
  if config.skip:
    try:
      steps.check_skip(teacher.config, config.skip)
    except ValueError as e:
      raise ValueError(f'{name}: {config.student}: {e}') from e
  lib = registry.get('samplers', teacher.family)
  if config.pairs is not None and not lib.FILLS:
    raise ValueError(f'{name}: pairs={config.pairs}: nothing stands for what a '
                     f'{teacher.family!r} skips; leave pairs out')


def _check_involved(
    config: SamplesConfig, student: Model, teacher: Model | None, name: str
) -> None:
  """Raises ValueError where teacher and student do not make images together."""
  if config.t_list or config.split is None:
    raise ValueError(
        f'{name}: with involved={config.involved}, {config.student} needs '
        'split, and no t_list: its steps are at 0 and where the teacher ends'
    )
  try:
    steps.check_involved(student.config, config.involved)
    steps.check_choice(student.config, (0,), config.split)
  except ValueError as e:
    raise ValueError(f'{name}: {config.student}: {e}') from e
  lib = registry.get('samplers', student.family)
  if config.prefill_mask not in lib.INVOLVED:
    raise ValueError(
        f'{name}: prefill_mask={config.prefill_mask!r}: for a '
        f'{student.family!r} it is one of {list(lib.INVOLVED)}'
    )
  samplers = registry.TABLES['samplers']
  if (teacher is None or not _is_teacher(teacher)
      or samplers.get(teacher.family) != samplers[student.family]):
    raise ValueError(
        f'{name}: teacher={config.teacher} holds '
        f'a {teacher and teacher.family!r}, which is no teacher of a '
        f'{student.family!r}'
    )
  names = _COMMON if student.config.num_classes else _COMMON + _OF_CAPTIONS
  for field in names:
    ours, theirs = (
        getattr(m.config, field, None) for m in (student, teacher)
    )
    if ours != theirs:
      raise ValueError(
          f'{name}: teacher={config.teacher} does not go with '
          f'{config.student}: {field} is {theirs} there and {ours} here'
      )


def _check_denoiser(config: SamplesConfig, name: str) -> None:
  """Raises ValueError where settings do not fit a denoiser."""
  if bool(config.levels) == bool(config.steps):
    raise ValueError(f'{name}: {config.student} is a denoiser and needs steps, '
                     'or levels where it is a student')
  dmd2.Config(levels=config.levels or dmd2.Config().levels)
  others = (
      config.vae, config.t_list, config.split, config.involved, config.skip,
      guidance.settings_of(config),
  )
  if others != (None, (), None, (), 0, guidance.SETTINGS):
    raise ValueError(f'{name}: {config.student} is a denoiser; leave vae, '
                     't_list, split, involved, skip and '
                     f'{", ".join(guidance.SETTINGS)} out')


def _is_teacher(model: Model) -> bool:
  return 'step' in model.fns


def make_program(
    config: SamplesConfig, models: Mapping[str, Model], seed: int, mesh: Any,
) -> Callable[..., jax.Array]:
  """A jitted `(trees, rows)` -> images.

  Trees are those of `sampled`. Rows are `id` of images and what `conditions`
  give for them. Returns images (B, H, W, C) in [-1, 1], whole on every host.
  """
  model, vae = models['student'], models.get('vae')

  def images(
      trees: Mapping[str, Any], rows: Mapping[str, jax.Array]
  ) -> jax.Array:
    params, vae_params = trees['student'], trees.get('vae')
    ids, condition = rows['id'], condition_of(rows)
    if programs.is_denoiser(model):
      noise = programs.fresh_normal(model.config.shape, seed, ids)
      if config.steps:
        x0 = programs.denoised(
            model, params, noise, condition, steps=config.steps,
            kind=config.process,
        )
      else:
        x0 = programs.few_step(
            model, params, noise, condition, programs.fresh_keys(seed, ids),
            levels=config.levels, kind=config.process,
        )
      return jnp.clip(x0, -1, 1)
    lib = registry.get('samplers', model.family)
    keys = programs.fresh_keys(seed, ids)
    settings = guidance.settings_of(config)
    if config.skip:
      return programs.skip_images(
          model, vae, params, vae_params, condition, keys,
          trees.get('cumulative'), skip=config.skip, settings=settings,
      )
    if _is_teacher(model):
      return programs.teacher_images(
          model, vae, params, vae_params, condition, lib.categorical(keys),
          settings,
      )
    noise = programs.fresh_noise(model, seed, ids)
    if config.involved:
      return programs.involved_images(
          models, trees, noise, condition, keys, involved=config.involved,
          split=config.split, options=lib.INVOLVED[config.prefill_mask],
          settings=settings,
      )
    return programs.student_images(
        model, vae, params, vae_params, noise, condition,
        t_list=config.t_list, split=config.split,
    )

  return jax.jit(images, out_shardings=sharding.replicated(mesh))


def sampled(params: Mapping[str, Any]) -> dict[str, Any]:
  """Of what `load` gives, the parameters that make images."""
  return {n: params[n] for n in (*_SAMPLED, 'cumulative') if n in params}


def samples(
    context: Context, config: SamplesConfig, models: Mapping[str, Model],
    params: Mapping[str, Params], conditions: conditions_lib.Conditions,
    to_uint8: Callable[[np.ndarray], np.ndarray], seen: Any,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Images in batches, the same on every host.

  Args:
    context: of the stage.
    config: of the stage.
    models: see `load`.
    params: see `load`.
    conditions: see `load`.
    to_uint8: images in [-1, 1] to 8 bits.
    seen: hash that is updated with all images.

  Yields:
    Pixels (n, H, W, C) uint8 and the numbers (n,) of their conditions.

  Raises:
    Preempted: SIGTERM came.
  """
  program = make_program(config, models, context.seed, context.mesh)
  trees = sampled(params)
  size = config.batch_size
  # The last batch is filled up and cut.
  total = -(-config.samples // size) * size
  ids = np.arange(total, dtype=np.uint32)
  numbers = ids
  if config.labels == 'random':
    numbers = np.random.Philox([context.seed]).random_raw(total)
  numbers = (numbers % len(conditions)).astype(np.int32)
  with console.Progress(context.name, config.samples) as bar:
    for start in range(0, total, size):
      hooks.raise_if_preempted(
          f'{context.name}: stopped by a signal after {start} images'
      )
      part = slice(start, start + size)
      rows = sharding.place_rows(
          {'id': ids[part], **conditions.take(numbers[part])}, context.mesh
      )
      pixels = to_uint8(np.asarray(program(trees, rows)))
      pixels = pixels[:config.samples - start]
      seen.update(pixels.tobytes())
      yield pixels, numbers[part][:len(pixels)]
      bar.update(start + len(pixels))


def plain(config: Any) -> dict[str, Any]:
  return json.loads(json.dumps(dataclasses.asdict(config)))


def digest_of(value: Any) -> str:
  return hashlib.sha256(config_lib.canonical_json(value).encode()).hexdigest()


def write_json(file: epath.Path, value: Mapping[str, Any]) -> None:
  file.parent.mkdir(parents=True, exist_ok=True)
  temporary = file.with_name(f'{file.name}.tmp')
  temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + '\n')
  temporary.replace(file)
