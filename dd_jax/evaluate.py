# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher, student and baselines, judged side by side, and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
import hashlib
import os
import platform
import time
from typing import Any

from etils import epath
import jax
import numpy as np

import dd_jax
from dd_jax import (
  build,
  checkpoint,
  console,
  generate,
  programs,
  registry,
  sharding,
)
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.data import pairs as pairs_lib
from dd_jax.evals import baselines, judge, report
from dd_jax.model import condition_of
from dd_jax.stages import Context

_PATH = 8  # images of an interpolation


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """A stage of kind 'evaluate'.

  The teacher is sampled with the guidance and the filters that made the
  student's pairs; they are read from the pairs' manifest.

  Attributes:
    teacher: export folder or 'stage:name'.
    student: export folder or 'stage:name'.
    vae: export folder or 'stage:name' of their tokenizer.
    judge: export folder or 'stage:name' of the classifier.
    pairs: folder or 'stage:name' of the student's pairs.
    reference: `source` of real images, with splits 'train' and 'heldout'.
    students: per row of the student its `t_list` (scales that are data when a
      step begins) and `split` (scale at which its heads change over).
    involved: scales (start, resume) that the teacher makes between two steps
      of the student, with the split of the first row; empty for no such rows.
    skips: numbers of last scales that the skip-n rows leave out.
    samples: images per row.
    batch_size: images per program run, over all hosts.
    captions: folder or 'stage:name' of captions, where those are what the
      networks take; a caption's class is what the judge looks for.
  """

  teacher: str
  student: str
  vae: str
  judge: str
  pairs: str
  reference: Mapping[str, Any]
  students: Mapping[str, Mapping[str, Any]]
  involved: tuple[int, ...] = ()
  skips: tuple[int, ...] = ()
  samples: int = 5000
  batch_size: int = 500
  captions: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the report: who, in how many network calls, and how."""

  name: str
  steps: int
  sample: programs.Sampler


def make_rows(
    config: EvaluateConfig, models: Mapping[str, Any],
    params: Mapping[str, Any], made: Mapping[str, Any], seed: int, mesh: Any,
) -> tuple[list[Row], Callable[..., Any], dict[str, Callable[..., Any]]]:
  """Rows of teacher and student, and what pictures are made of.

  Args:
    config: of the stage.
    models: 'teacher', 'student' and 'vae'.
    params: of the models.
    made: provenance of the student's pairs.
    seed: of noise and keys.
    mesh: of the devices.

  Returns:
    The rows; noise (B, L, C) by number; and by name the functions of noise and
    condition among the rows.
  """
  teacher, student, vae = (models[n] for n in ('teacher', 'student', 'vae'))
  lib = registry.get('samplers', teacher.family)
  settings = {k: made[k] for k in ('cfg', 'top_k', 'top_p')}
  offsets = teacher.config.offsets
  scales = len(offsets) - 1
  trees = params['teacher'], params['student'], params['vae']

  noise_of = functools.partial(programs.fresh_noise, teacher, seed)
  keys_of = functools.partial(programs.fresh_keys, seed)

  def by_lot(trees, ids, condition):
    return programs.teacher_images(
        teacher, vae, trees[0], trees[2], condition,
        lib.categorical(keys_of(ids)), settings,
    )

  def by_flow(trees, noise, condition):
    choose = generate.flow_choose(
        noise, offsets, solver=made['solver'], steps=made['solver_steps']
    )
    return programs.teacher_images(
        teacher, vae, trees[0], trees[2], condition, choose, settings
    )

  def few_step(choice, trees, noise, condition):
    return programs.student_images(
        student, vae, trees[1], trees[2], noise, condition,
        t_list=choice['t_list'], split=choice['split'],
    )

  def involved(options, trees, ids, condition):
    start, resume = config.involved
    split = next(iter(config.students.values()))['split']
    out = lib.teacher_involved(
        student, teacher, vae, trees[1], trees[0], trees[2], noise_of(ids),
        condition, lib.categorical(keys_of(ids)), start=start, resume=resume,
        split=split, **options, **settings,
    )
    return lib.images_from_codes(vae, trees[2], out['codes'])

  def skip(count, trees, ids, condition):
    return lib.skip_n(
        teacher, vae, trees[0], trees[2], condition,
        lib.categorical(keys_of(ids)), skip=count, **settings,
    )

  def program(fn):
    return programs.OnRows(fn, trees, mesh)

  def from_noise(fn):
    return program(
        lambda trees, ids, condition: fn(trees, noise_of(ids), condition)
    )

  students = {
      name: functools.partial(few_step, choice)
      for name, choice in config.students.items()
  }
  rows = [
      Row(report.TEACHER, scales, program(by_lot)),
      Row('teacher_flow', scales, from_noise(by_flow)),
      *(Row(n, len(config.students[n]['t_list']), from_noise(f))
        for n, f in students.items()),
  ]
  if config.involved:
    steps = lib.count_steps(*config.involved, scales)
    rows += [
        Row(f'involved_{name}', steps,
            program(functools.partial(involved, options)))
        for name, options in lib.INVOLVED.items()
    ]
  rows += [
      Row(f'skip_{n}', scales - n, program(functools.partial(skip, n)))
      for n in config.skips
  ]
  pictured = {'teacher': by_flow} | students
  draw = jax.jit(noise_of)
  return rows, draw, {
      name: jax.jit(functools.partial(fn, trees))
      for name, fn in pictured.items()
  }


def _baselines(
    models: Mapping[str, Any], params: Mapping[str, Any],
    pairs: pairs_lib.PairSource, conditions: conditions_lib.Conditions,
    real: Any, seed: int, mesh: Any,
) -> list[Row]:
  """Rows that no network samples."""
  teacher = models['teacher']
  indices = pairs.take(np.arange(len(pairs)))
  counts = baselines.fit(indices['indices'], teacher.config.vocab_size)
  decoder = jax.jit(
      functools.partial(programs.decode, teacher.family, models['vae']),
      out_shardings=sharding.replicated(mesh),
  )
  rng = np.random.default_rng(seed)

  def onestep_pooled(ids, batch):
    del batch
    return decoder(params['vae'], baselines.sample(rng, counts, len(ids)))

  def onestep_class(ids, batch):
    del ids
    return decoder(params['vae'], baselines.sample_per_class(
        rng, indices['indices'], conditions.labels[indices['label']],
        batch['label'], teacher.config.vocab_size,
    ))

  def mixed_pixels(ids, batch):
    del ids
    return baselines.mix_pixels(
        rng, real.arrays['image'], real.arrays['label'], batch['label']
    )

  return [
      Row('onestep_pooled', 1, onestep_pooled),
      Row('onestep_class', 1, onestep_class),
      Row(report.MIXED, 0, mixed_pixels),
  ]


def _run_row(
    row: Row, config: EvaluateConfig, conditions: conditions_lib.Conditions
) -> tuple[np.ndarray, np.ndarray, float]:
  """Images (N, H, W, C), their labels, and seconds an image once compiled."""
  size = config.batch_size
  images, labels, seconds = [], [], []
  for start in range(0, config.samples, size):
    ids = np.arange(start, start + size, dtype=np.uint32)
    batch = conditions.take(ids % len(conditions))
    labels.append(batch['label'])
    began = time.monotonic()
    images.append(np.asarray(row.sample(ids, batch)))
    seconds.append(time.monotonic() - began)
  # The first run compiles; where it is the only one, time another.
  if len(seconds) == 1:
    began = time.monotonic()
    np.asarray(row.sample(ids, batch))
    seconds.append(time.monotonic() - began)
  keep = slice(config.samples)
  return (
      np.concatenate(images)[keep], np.concatenate(labels)[keep],
      float(np.median(seconds[1:])) / size,
  )


def _slerp(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
  """Points between two noises whose norm stays that of noise."""
  angle = np.linspace(0.0, np.pi / 2, count).reshape(-1, *[1] * a.ndim)
  return np.cos(angle) * a + np.sin(angle) * b


def _pictures(
    draw: Callable[..., Any], pictured: Mapping[str, Callable[..., Any]],
    by_name: Mapping[str, np.ndarray], reference: Any,
    conditions: conditions_lib.Conditions, logs: Mapping[str, epath.Path],
) -> dict[str, Any]:
  shown = min(len(conditions), 10)
  ids = np.arange(shown, dtype=np.uint32)
  batch = conditions.take(ids)
  noise = np.asarray(draw(ids))
  same = {
      n: np.asarray(f(noise, condition_of(batch))) for n, f in pictured.items()
  }
  real = reference.arrays
  first = [int(np.argmax(real['label'] == c)) for c in batch['label']]
  grids = {'samples.png': report.grid({'real': real['image'][first]} | same)}
  rows = {}
  for i in ids[:4]:
    wanted = conditions.take(np.full(_PATH, i))
    path = _slerp(noise[0], noise[1], _PATH).astype(np.float32)
    for name in ('teacher', next(n for n in pictured if n != 'teacher')):
      rows[f'{name} {wanted["label"][0]}'] = np.asarray(
          pictured[name](path, condition_of(wanted))
      )
  grids['interpolation.png'] = report.grid(rows)
  grids['rows.png'] = report.grid(
      {n: images[:2 * shown] for n, images in by_name.items()}
  )
  if logs:
    grids['curves.png'] = report.curves(logs)
  return grids


def _environment(
    context: Context, config: EvaluateConfig, pairs: pairs_lib.PairSource,
) -> dict[str, Any]:
  device = jax.devices()[0]
  hashes = {
      name: checkpoint.describe(context.resolve(ref))['hash'][:16]
      for name, ref in (('teacher', config.teacher),
                        ('student', config.student), ('vae', config.vae),
                        ('judge', config.judge))
  }
  return {
      'dd_jax': dd_jax.__version__, 'jax': jax.__version__,
      'python': platform.python_version(), 'device': device.device_kind,
      'devices': jax.device_count(), 'cpu_count': os.cpu_count(),
      'samples': config.samples, 'batch_size': config.batch_size,
      **{f'{name}_{k}': v for name, choice in config.students.items()
         for k, v in choice.items()},
      **{f'pairs_{k}': v for k, v in pairs.manifest.provenance.items()
         if k not in ('teacher', 'vae')},
      'pairs': len(pairs),
      **{f'hash_{k}': v for k, v in hashes.items()},
  }


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'evaluate': `<workdir>/report/` is its result.

  Returns:
    `artefact`, the folder of the report, and `hashes` of its figures.
  """
  config = config_lib.make(EvaluateConfig, context.config, context.name)
  mesh = context.mesh
  sharding.check_batch(config.batch_size, mesh)
  models, params = build.load_frozen(
      {n: getattr(config, n) for n in ('teacher', 'student', 'vae', 'judge')},
      context.resolve, mesh, context.rules,
  )
  pairs = pairs_lib.PairSource(context.resolve(config.pairs))
  conditions = conditions_lib.of_network(
      models['teacher'].config,
      config.captions and context.resolve(config.captions),
  )
  if conditions.num_classes is None:
    raise ValueError(
        f'{context.name}: captions={config.captions}: the judge needs their '
        'classes, give each prompt a label'
    )
  features, logits = (
      functools.partial(
          jax.jit(models['judge'].fns[name]), params['judge']
      ) for name in ('features', 'forward')
  )
  real = {
      split: build.build_source(
          dict(config.reference, split=split), context.resolve
      ) for split in ('train', 'heldout')
  }
  reference = judge.Reference(**{
      split: judge.look(
          source.arrays['image'], source.arrays['label'], features, logits
      ) for split, source in real.items()
  })
  rows, draw, pictured = make_rows(
      config, models, params, pairs.manifest.provenance, context.seed, mesh
  )
  rows += _baselines(
      models, params, pairs, conditions, real['train'], context.seed, mesh
  )
  lines, images = [], {}
  with console.Progress(context.name, len(rows)) as bar:
    for row in rows:
      images[row.name], labels, seconds = _run_row(row, config, conditions)
      scores = judge.score(
          images[row.name], labels, features, logits, reference
      )
      lines.append({
          'name': row.name, 'steps': row.steps, 'seed': context.seed,
          **scores, 'seconds_per_image': seconds,
      })
      bar.update(len(lines), row.name)
  result = report.make(
      lines, judge.floor(reference), _environment(context, config, pairs)
  )
  folder = context.workdir / 'report'
  if jax.process_index() == 0:
    logs = {
        name: file for name in ('vae', 'teacher', 'student')
        # <stage>/export/<role>-<step> of a network that was trained here.
        if (file := context.resolve(getattr(config, name)).parent.parent
            / 'metrics.jsonl').exists()
    }
    report.write(folder, result, _pictures(
        draw, pictured, images, real['train'], conditions, logs
    ))
    for text in report.warnings(result):
      console.say(text)
    console.table('Report', *report.table(result))
    console.say(f'report: {folder / "report.md"}')
  digest = hashlib.sha256(
      config_lib.canonical_json(result['rows']).encode()
  ).hexdigest()
  return {'artefact': '../report', 'hashes': {'rows': digest}}
