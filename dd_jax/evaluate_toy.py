# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher and student on points whose density is known."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from typing import Any

import jax
import numpy as np

from dd_jax import (
  build,
  checkpoint,
  console,
  judging,
  programs,
  scoring,
)
from dd_jax import config as config_lib
from dd_jax.data import toys as data
from dd_jax.evals import toys
from dd_jax.methods import dmd2
from dd_jax.stages import Context

_PLOTTED = 4000  # points of a set in pictures
_SEEDS = (0, 1)  # added to the first: points that nobody was trained on


@dataclasses.dataclass(frozen=True)
class EvaluateToyConfig:
  """A stage of kind 'evaluate_toy', on the points of the source 'toy2d'.

  Attributes:
    teacher: export folder or 'stage:name' of a denoiser, that the student was
      made of.
    student: 'stage:name/student'; the saves that its stage kept make a curve.
    levels: of the student's steps; see `methods.dmd2.Config`.
    steps: noise levels that the teacher visits.
    samples: points per row.
    std: of every Gaussian.
  """

  teacher: str
  student: str
  levels: tuple[int, ...] = dmd2.Config().levels
  steps: int = 18
  samples: int = 20_000
  std: float = 0.06


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'evaluate_toy': `<workdir>/report/toy.json`.

  Rows are real points (the floor), the exact denoiser and the teacher by Heun's
  method, the teacher as a student without training, and the student; beside
  them the curve and pictures.

  Returns:
    `artefact`, the folder of the report, and `hashes` of its figures.
  """
  config = config_lib.make(EvaluateToyConfig, context.config, context.name)
  dmd2.Config(levels=config.levels)  # refuses what are no levels
  began = time.monotonic()
  mixture = data.checkerboard(config.std)
  real, other = (
      mixture.sample(config.samples, data.TEST_SEED + i)[0] for i in _SEEDS
  )
  models, params = build.load_frozen(
      {'teacher': config.teacher, 'student': config.student}, context.resolve,
      context.mesh, judging.RULES,
  )
  exact = build.build_model({
      'name': 'mixture', 'std': config.std, 'sigma_data': mixture.sigma_data,
      'means': [[float(x) for x in mean] for mean in mixture.means],
  })
  ids = np.arange(config.samples, dtype=np.uint32)
  noise = programs.fresh_normal((2,), context.seed, ids)
  keys = programs.fresh_keys(context.seed, ids)
  # Networks of the plane have no use for the numbers of the Gaussians.
  condition = np.zeros(config.samples, np.int32)

  def many(model, params):
    draw = functools.partial(programs.denoised, model, steps=config.steps)
    return np.asarray(jax.jit(draw)(params, noise, condition))

  def few(model):
    draw = jax.jit(functools.partial(
        programs.few_step, model, levels=config.levels
    ))
    return lambda params: np.asarray(draw(params, noise, condition, keys))

  student = few(models['student'])
  points = {
      'real': other,
      'exact': many(exact, exact.init(jax.random.key(0))),
      'teacher': many(models['teacher'], params['teacher']),
      'teacher_1': few(models['teacher'])(params['teacher']),
      'student': student(params['student']),
  }
  calls = dict.fromkeys(points, 2 * config.steps - 1) | {
      'real': 0, 'teacher_1': 1, 'student': len(config.levels),
  }
  score = functools.partial(
      toys.score, real=real, means=mixture.means, std=config.std
  )
  rows = [
      {'name': name, 'calls': calls[name], **score(xy)}
      for name, xy in points.items()
  ]
  by_name = {row['name']: row for row in rows}
  saves = context.resolve(config.student).parent.parent / 'checkpoints'
  curve = [{'step': 0, 'updates': 0, **score(student(params['teacher']))}]
  for step, saved, updates in checkpoint.saves(saves):
    curve.append({
        'step': step, 'updates': updates['student'],
        **score(student(saved['student'])),
    })
  result = {
      'rows': rows, 'curve': curve, 'seed': context.seed,
      'over_initial':
          by_name['student']['sliced_w1'] / curve[0]['sliced_w1'],
      'settings': scoring.plain(config),
      'environment': scoring.environment(),
  }
  folder = context.workdir / 'report'
  if jax.process_index() == 0:
    scoring.write_json(folder / 'toy.json', result)
    some = {name: xy[:_PLOTTED] for name, xy in points.items()}
    for name, picture in {
        'points': toys.scatter(some),
        'curve': toys.curve(
            'sliced W1 to real points', [c['updates'] for c in curve],
            {'student': [c['sliced_w1'] for c in curve]},
            {n: by_name[n]['sliced_w1'] for n in ('real', 'teacher')},
        ),
    }.items():
      with (folder / f'{name}.png').open('wb') as file:
        picture.save(file, format='PNG')
    console.table('Points', list(rows[0]), [list(r.values()) for r in rows])
    console.say(
        f'{context.name}: {time.monotonic() - began:.0f} s, '
        f'{folder / "toy.json"}'
    )
  digest = hashlib.sha256(
      config_lib.canonical_json([rows, curve]).encode()
  ).hexdigest()
  return {'artefact': '../report', 'hashes': {'figures': digest}}
