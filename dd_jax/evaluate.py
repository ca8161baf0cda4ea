# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher, student and baselines, judged side by side, and the report."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from dd_jax import (
    build,
    checkpoint,
    generate,
    judging,
    programs,
    registry,
    sharding,
)
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.data import pairs as pairs_lib
from dd_jax.evals import baselines, report
from dd_jax.sampling import guidance
from dd_jax.sampling import steps as steps_lib
from dd_jax.stages import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(judging.JudgedConfig):
  """A stage of kind 'evaluate'.

  The teacher is sampled with the guidance and the filters that made the
  student's pairs; they are read from the pairs' manifest.

  Attributes:
    teacher: export folder or 'stage:name'.
    student: export folder or 'stage:name'.
    vae: export folder or 'stage:name' of their tokenizer.
    pairs: folder or 'stage:name' of the student's pairs.
    students: per row of the student its `t_list` (scales that are data when a
      step begins) and `split` (scale at which its heads change over).
    involved: scales (start, resume) that the teacher makes between two steps
      of the student, with the split of the first row; empty for no such rows.
    skips: numbers of last scales that the skip-n rows leave out.
    captions: folder or 'stage:name' of captions, where those are what the
      networks take; a caption's class is what the judge looks for.
  """

  teacher: str
  student: str
  vae: str
  pairs: str
  students: Mapping[str, Mapping[str, Any]]
  involved: tuple[int, ...] = ()
  skips: tuple[int, ...] = ()
  captions: str | None = None

  def __post_init__(self) -> None:
    for name, choice in self.students.items():
      if set(choice) != {'t_list', 'split'}:
        raise ValueError(
            f'students.{name}={dict(choice)}: expected t_list and split'
        )
    if len(self.involved) not in (0, 2) or (self.involved and not (
        self.students)):
      raise ValueError(
          f'involved={self.involved}: expected (start, resume), and a row of '
          'the student whose split it takes'
      )


def make_panel(
    config: EvaluateConfig, models: Mapping[str, Any],
    params: Mapping[str, Any], made: Mapping[str, Any], seed: int, mesh: Any,
) -> judging.Panel:
  """Rows of teacher and student, and what pictures are made of.

  Args:
    config: of the stage.
    models: 'teacher', 'student' and 'vae'.
    params: of the models, and 'cumulative', (L, V) int32: how often each place
      of the pairs has each code or one before it.
    made: provenance of the student's pairs.
    seed: of noise and keys.
    mesh: of the devices.

  Raises:
    ValueError: steps that the networks do not have.
  """
  teacher, student, vae = (models[n] for n in ('teacher', 'student', 'vae'))
  for name, choice in config.students.items():
    try:
      steps_lib.check_choice(student.config, choice['t_list'], choice['split'])
    except ValueError as e:
      raise ValueError(f'students.{name}: {e}') from e
  if config.involved:
    steps_lib.check_involved(student.config, config.involved)
  for count in config.skips:
    steps_lib.check_skip(teacher.config, count, 'skips')
  lib = registry.get('samplers', teacher.family)
  # Pairs of earlier versions do not name every setting.
  settings = {k: made.get(k, v) for k, v in guidance.SETTINGS.items()}
  offsets = teacher.config.offsets
  scales = len(offsets) - 1
  trees = tuple(
      params[n] for n in ('teacher', 'student', 'vae', 'cumulative')
  )

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
    by_name = dict(zip(('teacher', 'student', 'vae'), trees[:3], strict=True))
    return programs.involved_images(
        models, by_name, noise_of(ids), condition, keys_of(ids),
        involved=config.involved,
        split=next(iter(config.students.values()))['split'], options=options,
        settings=settings,
    )

  def skip(count, trees, ids, condition):
    return programs.skip_images(
        teacher, vae, trees[0], trees[2], condition, keys_of(ids), trees[3],
        skip=count, settings=settings,
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
      judging.Row(report.TEACHER, scales, program(by_lot)),
      judging.Row('teacher_flow', scales, from_noise(by_flow)),
      *(judging.Row(n, len(config.students[n]['t_list']), from_noise(f))
        for n, f in students.items()),
  ]
  if config.involved:
    steps = lib.count_steps(*config.involved, scales)
    rows += [
        judging.Row(
            f'involved_{name}', steps,
            program(functools.partial(involved, options)),
        )
        for name, options in lib.INVOLVED.items()
    ]
  rows += [
      judging.Row(f'skip_{n}', scales - n, program(functools.partial(skip, n)))
      for n in config.skips
  ]
  pictured = {'teacher': by_flow} | students
  jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  return judging.Panel(rows, jit(noise_of), {
      name: functools.partial(jit(fn), trees) for name, fn in pictured.items()
  })


def _baselines(
    models: Mapping[str, Any], params: Mapping[str, Any],
    indices: Mapping[str, np.ndarray], counts: np.ndarray,
    conditions: conditions_lib.Conditions, real: Any, seed: int, mesh: Any,
) -> list[judging.Row]:
  """Rows that no network samples."""
  teacher = models['teacher']
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

  return [
      judging.Row('onestep_pooled', 1, onestep_pooled),
      judging.Row('onestep_class', 1, onestep_class),
      judging.mixed_pixels(rng, real),
  ]


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'evaluate': `<workdir>/report/` is its result.

  Returns:
    `artefact`, the folder of the report, and `hashes` of its figures.

  Raises:
    ValueError: networks, pairs or captions that do not go together.
    Preempted: SIGTERM came between two rows.
  """
  config = config_lib.make(EvaluateConfig, context.config, context.name)
  mesh = context.mesh
  config = dataclasses.replace(
      config, batch_size=sharding.fit_batch(config.batch_size, mesh)
  )
  refs = {
      n: getattr(config, n) for n in ('teacher', 'student', 'vae', 'judge')
  }
  for name in ('teacher', 'student'):
    checkpoint.check_own_tokenizer(
        *map(context.resolve, (refs[name], refs['vae']))
    )
  models, params = build.load_frozen(
      refs, context.resolve, mesh, judging.RULES
  )
  pairs = pairs_lib.PairSource(context.resolve(config.pairs))
  pairs_lib.check_origin(config.pairs, pairs.manifest, **{
      n: checkpoint.describe(context.resolve(refs[n]))['hash']
      for n in ('teacher', 'vae')
  })
  conditions = conditions_lib.of_network(
      models['teacher'].config,
      config.captions and context.resolve(config.captions),
  )
  if conditions.num_classes is None:
    raise ValueError(
        f'{context.name}: captions={config.captions}: the judge needs their '
        'classes, give each prompt a label'
    )
  real = judging.real_images(config, context)
  indices = pairs.take(np.arange(len(pairs)))
  counts = baselines.fit(
      indices['indices'], models['teacher'].config.vocab_size
  )
  params['cumulative'] = jax.device_put(
      counts.cumsum(axis=1, dtype=np.int32), sharding.replicated(mesh)
  )
  panel = make_panel(
      config, models, params, pairs.manifest.provenance, context.seed, mesh
  )
  panel = dataclasses.replace(panel, rows=[*panel.rows, *_baselines(
      models, params, indices, counts, conditions, real['train'], context.seed,
      mesh,
  )])
  settings = judging.environment(config) | {
      **{f'{name}_{k}': v for name, choice in config.students.items()
         for k, v in choice.items()},
      **{f'pairs_{k}': v for k, v in pairs.manifest.provenance.items()
         if k not in ('teacher', 'vae')},
      'pairs': len(pairs),
  } | judging.hashes(context, refs)
  return judging.write_report(
      context, config, (models['judge'], params['judge']), real, conditions,
      panel, settings, {n: refs[n] for n in ('vae', 'teacher', 'student')},
  )
