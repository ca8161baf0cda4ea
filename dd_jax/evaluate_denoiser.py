# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A denoiser and its student of few steps, judged side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import build, judging, programs, sharding
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.evals import report
from dd_jax.flow import process as process_lib
from dd_jax.methods import dmd2
from dd_jax.stages import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateDenoiserConfig(judging.JudgedConfig):
  """A stage of kind 'evaluate_denoiser'.

  Attributes:
    teacher: export folder or 'stage:name'.
    student: export folder or 'stage:name'.
    students: per row of the student the levels of its steps; see
      `methods.dmd2.Config`.
    steps: noise levels that the teacher visits; it is called twice at each but
      the last.
    guidance: of the teacher, as the student has taken it in.
    process: of both; see `methods.dmd2.Config`.
  """

  teacher: str
  student: str
  students: Mapping[str, Sequence[int]]
  steps: int = 18
  guidance: float = 1.0
  process: process_lib.Kind = 'edm'


def make_panel(
    config: EvaluateDenoiserConfig, models: Mapping[str, Any],
    params: Mapping[str, Any], seed: int, mesh: Any,
) -> judging.Panel:
  """Rows of teacher and student, and what pictures are made of.

  Args:
    config: of the stage.
    models: 'teacher' and 'student'.
    params: of the models.
    seed: of noise and keys.
    mesh: of the devices.

  Raises:
    ValueError: levels that no student has, or networks without classes.
  """
  teacher, student = models['teacher'], models['student']
  for levels in config.students.values():
    dmd2.Config(levels=tuple(levels))
  for name in ('teacher', 'student'):
    model = models[name]
    if not programs.is_denoiser(model) or not model.config.num_classes:
      raise ValueError(f'{name}={getattr(config, name)}: expected a denoiser '
                       f'of classes, not a {model.family!r} without')
  trees = params['teacher'], params['student']
  noise_of = functools.partial(
      programs.fresh_normal, teacher.config.shape, seed
  )
  keys_of = functools.partial(programs.fresh_keys, seed)

  def many(trees, noise, condition, keys):
    del keys
    return programs.denoised(
        teacher, trees[0], noise, condition, steps=config.steps,
        guidance=config.guidance, kind=config.process,
    )

  def few(levels, trees, noise, condition, keys):
    return programs.few_step(
        student, trees[1], noise, condition, keys, levels=tuple(levels),
        kind=config.process,
    )

  def untrained(trees, noise, condition, keys):
    return programs.few_step(
        teacher, trees[0], noise, condition, keys,
        levels=dmd2.Config().levels, kind=config.process,
    )

  def row(name, count, fn):
    def images(trees, ids, condition):
      return jnp.clip(
          fn(trees, noise_of(ids), condition, keys_of(ids)), -1, 1
      )
    return judging.Row(name, count, programs.OnRows(images, trees, mesh))

  jit = functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))

  def picture(fn):
    def images(trees, noise, condition):
      ids = jnp.arange(len(noise), dtype=jnp.uint32)
      return jnp.clip(fn(trees, noise, condition, keys_of(ids)), -1, 1)
    return functools.partial(jit(images), trees)

  students = {
      name: functools.partial(few, levels)
      for name, levels in config.students.items()
  }
  calls = {
      report.TEACHER: (2 * config.steps - 1, many),
      **{n: (len(config.students[n]), fn) for n, fn in students.items()},
      report.ONE_CALL: (1, untrained),
  }
  return judging.Panel(
      [row(name, count, fn) for name, (count, fn) in calls.items()],
      jit(noise_of),
      {n: picture(calls[n][1]) for n in (report.TEACHER, *students)},
  )


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'evaluate_denoiser': `<workdir>/report/`.

  Returns:
    `artefact`, the folder of the report, and `hashes` of its figures.
  """
  config = config_lib.make(EvaluateDenoiserConfig, context.config, context.name)
  config = dataclasses.replace(
      config, batch_size=sharding.fit_batch(config.batch_size, context.mesh)
  )
  refs = {n: getattr(config, n) for n in ('teacher', 'student', 'judge')}
  models, params = build.load_frozen(
      refs, context.resolve, context.mesh, judging.RULES
  )
  panel = make_panel(config, models, params, context.seed, context.mesh)
  real = judging.real_images(config, context)
  rng = np.random.default_rng(context.seed)
  panel = dataclasses.replace(
      panel, rows=[*panel.rows, judging.mixed_pixels(rng, real['train'])]
  )
  settings = judging.environment(config) | {
      **{f'{name}_levels': list(v) for name, v in config.students.items()},
      'steps': config.steps, 'guidance': config.guidance,
      'process': config.process,
  } | judging.hashes(context, refs)
  return judging.write_report(
      context, config, (models['judge'], params['judge']), real,
      conditions_lib.Classes(models['teacher'].config.num_classes), panel,
      settings, {n: refs[n] for n in ('teacher', 'student')},
  )
