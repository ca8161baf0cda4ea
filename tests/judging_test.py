# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What is judged and shown, by samplers of which every pixel is known."""

from __future__ import annotations

import json
import types

from etils import epath
import jax
import numpy as np
import pytest

from dd_jax import judging, sharding
from dd_jax.data import sources
from dd_jax.evals import report
from dd_jax.stages import Context

# Of captions, whose feature is their number; which is never their class.
CLASSES = np.array([2, 0, 0, 1, 3, 2])
CAPTIONS = sources.ArraySource({
    'label': CLASSES, 'mask': np.ones((6, 1), bool),
    'features': np.arange(6, dtype=np.float32).reshape(6, 1, 1),
}, num_classes=4)
# Two numbers an image: noises 0 and 1 are of one length, at right angles.
NOISE = np.array(
    [[3, 4], [-4, 3], [1, 1], [0, 2], [2, 0], [5, 1]], np.float32
)


def number_of(condition):
  return condition['features'][:, 0, 0].astype(int)


def flat(images):
  """Images of a pixel each, whose channels are their numbers."""
  return np.asarray(images, np.float32)[:, None, None]


def make_real(count):
  """Images of every class, which is about their first number."""
  labels = np.arange(count) % 4
  pixels = 0.01 * np.random.default_rng(0).normal(size=(count, 3))
  pixels[:, 0] += labels
  return sources.ArraySource(
      {'image': flat(pixels), 'label': labels}, num_classes=4
  )


JUDGED = flat(np.arange(120).reshape(40, 3))  # of a row


@pytest.fixture
def grids(monkeypatch):
  """Rows of each picture of two samplers that show noise and caption."""
  monkeypatch.setattr(report, 'grid', lambda rows: rows)

  def shows(sign):
    return lambda noise, condition: flat(np.column_stack(
        [sign * noise, number_of(condition)]
    ))

  panel = judging.Panel([], lambda ids: NOISE[ids], {
      'teacher': shows(1), 'student_1': shows(-1), 'student_2': shows(0),
  })
  return judging._pictures(
      panel, {'a': JUDGED, 'b': -JUDGED}, make_real(12), CAPTIONS
  )


def test_samplers_are_shown_with_the_same_noise(grids):
  real, *others = grids['samples.png'].values()
  assert list(grids['samples.png']) == [
      'real', 'teacher', 'student_1', 'student_2'
  ]
  # Column by column: an image of the caption's class, then noise and caption.
  np.testing.assert_array_equal(real[:, 0, 0, 0].round(), CLASSES)
  for sign, images in zip((1, -1, 0), others, strict=True):
    np.testing.assert_array_equal(images[..., :2], flat(sign * NOISE))
    np.testing.assert_array_equal(images[:, 0, 0, 2], np.arange(6))


def test_both_samplers_walk_between_the_same_noises(grids):
  rows = grids['interpolation.png']
  assert list(rows) == [
      f'{name} {i}' for i in range(4) for name in ('teacher', 'student_1')
  ]
  path = rows['teacher 0'][:, 0, 0, :2]
  np.testing.assert_allclose(path[[0, -1]], NOISE[:2], atol=1e-6)
  # In equal steps, and no point is shorter than noise is.
  np.testing.assert_allclose(np.linalg.norm(path, axis=1), 5, rtol=1e-6)
  steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
  np.testing.assert_allclose(steps, steps[0], rtol=1e-5)
  for i in range(4):
    for name, sign in ('teacher', 1), ('student_1', -1):
      image = rows[f'{name} {i}'][:, 0, 0]
      np.testing.assert_array_equal(image[:, :2], sign * path)
      assert (image[:, 2] == i).all()


def test_the_first_images_of_every_row_are_shown(grids):
  shown = grids['rows.png']
  np.testing.assert_array_equal(shown['a'], JUDGED[:12])
  np.testing.assert_array_equal(shown['b'], -JUDGED[:12])


def test_accuracy_is_of_the_class_that_a_caption_has(tmp_path):
  classifier = types.SimpleNamespace(fns={
      'forward': lambda _, x: -(x[:, 0, 0, :1] - np.arange(4)[None]) ** 2,
      'features': lambda _, x: x[:, 0, 0],
  }), {}
  made = []

  def row(name, class_of):
    def sample(ids, batch):
      number = number_of(batch)
      made.extend(ids)
      np.testing.assert_array_equal(number, ids % 6)  # captions go round
      return flat(np.stack([class_of(number), ids / 20, ids % 5 / 5], axis=1))
    return judging.Row(name, 1, sample)

  rows = [
      row('teacher', lambda i: CLASSES[i]), row('student_1', lambda i: i % 4),
  ]
  panel = judging.Panel(rows, lambda ids: NOISE[ids], {
      row.name: lambda noise, _: flat(noise[:, [0, 1, 1]]) for row in rows
  })
  workdir = epath.Path(tmp_path)
  context = Context(
      'x', {}, workdir / 'x', workdir, 0,
      sharding.make_mesh({}, jax.devices()[:1]), 'dp',
  )
  config = judging.JudgedConfig(
      judge='', reference={}, samples=18, batch_size=8
  )
  real = {'train': make_real(40), 'heldout': make_real(20)}
  judging.write_report(
      context, config, classifier, real, CAPTIONS, panel, {}, {}
  )
  assert set(made) == set(range(24))  # all batches are of one size
  result = json.loads((workdir / 'report/report.json').read_text())
  assert [row['accuracy'] for row in result['rows']] == [1, 0]
