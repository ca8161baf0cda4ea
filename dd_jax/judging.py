# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Samplers judged side by side: their rows, pictures and the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import os
import platform
import time
from typing import Any

import jax
import numpy as np

import dd_jax
from dd_jax import build, checkpoint, console, hooks, programs, sharding
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.evals import baselines, judge, report
from dd_jax.model import Model, Params, condition_of
from dd_jax.stages import Context

_PATH = 8  # images of an interpolation


# What is judged stands whole on each device, whatever the rules of its stage or
# of its training: its images are small, and every host looks at all of them.
RULES = 'dp'


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedConfig:
  """What every stage has that ends in a report.

  Attributes:
    judge: export folder or 'stage:name' of the classifier.
    reference: `source` of real images, with splits 'train' and 'heldout'.
    samples: images per row.
    batch_size: images per program run, over all hosts; as many more as the
      mesh needs to divide them.
  """

  judge: str
  reference: Mapping[str, Any]
  samples: int = 5000
  batch_size: int = 500


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the report: who, in how many network calls, and how."""

  name: str
  steps: int
  sample: programs.Sampler


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
  """Who is judged.

  Attributes:
    rows: of the report.
    draw: numbers of images to the noise that they are made of, whole.
    pictured: by name functions of noise and condition to images; the teacher's
      is called 'teacher', and the first of the others is shown beside it.
  """

  rows: Sequence[Row]
  draw: Callable[..., Any]
  pictured: Mapping[str, Callable[..., Any]]


def real_images(config: JudgedConfig, context: Context) -> dict[str, Any]:
  """The sources of real images by split."""
  return {
      split: build.build_source(
          dict(config.reference, split=split), context.resolve
      ) for split in ('train', 'heldout')
  }


def mixed_pixels(rng: np.random.Generator, real: Any) -> Row:
  """The row of images whose pixels come from different real ones."""

  def sample(ids, batch):
    del ids
    return baselines.mix_pixels(
        rng, real.arrays['image'], real.arrays['label'], batch['label']
    )

  return Row(report.MIXED, 0, sample)


def environment(config: JudgedConfig) -> dict[str, Any]:
  """Versions, machine and sizes that figures depend on."""
  device = jax.devices()[0]
  return {
      'dd_jax': dd_jax.__version__, 'jax': jax.__version__,
      'python': platform.python_version(), 'device': device.device_kind,
      'devices': jax.device_count(), 'cpu_count': os.cpu_count(),
      'samples': config.samples, 'batch_size': config.batch_size,
  }


def hashes(context: Context, refs: Mapping[str, str]) -> dict[str, str]:
  """Short hashes of networks, for an environment."""
  return {
      f'hash_{name}': checkpoint.describe(context.resolve(ref))['hash'][:16]
      for name, ref in refs.items()
  }


def write_report(
    context: Context, config: JudgedConfig, classifier: tuple[Model, Params],
    real: Mapping[str, Any], conditions: conditions_lib.Conditions,
    panel: Panel, settings: Mapping[str, Any], trained: Mapping[str, str],
) -> dict[str, Any]:
  """Samples and judges every row; `<workdir>/report/` is the result.

  Args:
    context: of the stage.
    config: of the stage.
    classifier: that judges.
    real: see `real_images`.
    conditions: that images are sampled of, with classes.
    panel: who is judged.
    settings: the environment of the report.
    trained: by name the exports whose training is shown as curves, where they
      were trained in this workdir.

  Returns:
    What a stage returns: `artefact` and `hashes`.
  """
  model, params = classifier
  whole = sharding.replicated(context.mesh)
  features, logits = (
      functools.partial(jax.jit(model.fns[name], out_shardings=whole), params)
      for name in ('features', 'forward')
  )
  reference = judge.Reference(**{
      split: judge.look(
          source.arrays['image'], source.arrays['label'], features, logits
      ) for split, source in real.items()
  })
  lines, images = [], {}
  with console.Progress(context.name, len(panel.rows)) as bar:
    for row in panel.rows:
      hooks.raise_if_preempted(
          f'{context.name}: stopped by a signal before {row.name}'
      )
      images[row.name], labels, seconds = _run_row(row, config, conditions)
      scores = judge.score(
          images[row.name], labels, features, logits, reference
      )
      lines.append({
          'name': row.name, 'steps': row.steps, 'seed': context.seed,
          **scores, 'seconds_per_image': seconds,
      })
      bar.update(len(lines), row.name)
  result = report.make(lines, judge.floor(reference), {
      **settings, report.RESAMPLED: judge.resampled_fd(reference)
  })
  folder = context.workdir / 'report'
  # The programs of pictures run on all hosts.
  pictures = _pictures(panel, images, real['train'], conditions)
  if jax.process_index() == 0:
    logs = {
        name: file for name, ref in trained.items()
        # <stage>/export/<role>-<step> of a network that was trained here.
        if (file := context.resolve(ref).parent.parent
            / 'metrics.jsonl').exists()
    }
    if logs:
      pictures['curves.png'] = report.curves(logs)
    report.write(folder, result, pictures)
    for text in report.warnings(result):
      console.say(text)
    console.table('Report', *report.table(result))
    console.say(f'report: {folder / "report.md"}')
  digest = hashlib.sha256(
      config_lib.canonical_json(result['rows']).encode()
  ).hexdigest()
  return {'artefact': '../report', 'hashes': {'rows': digest}}


def _run_row(
    row: Row, config: JudgedConfig, conditions: conditions_lib.Conditions
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
    panel: Panel, by_name: Mapping[str, np.ndarray], reference: Any,
    conditions: conditions_lib.Conditions,
) -> dict[str, Any]:
  pictured = panel.pictured
  shown = min(len(conditions), 10)
  ids = np.arange(shown, dtype=np.uint32)
  batch = conditions.take(ids)
  noise = np.asarray(panel.draw(ids))
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
      rows[f'{name} {i}'] = np.asarray(
          pictured[name](path, condition_of(wanted))
      )
  grids['interpolation.png'] = report.grid(rows)
  grids['rows.png'] = report.grid(
      {n: images[:2 * shown] for n, images in by_name.items()}
  )
  return grids
