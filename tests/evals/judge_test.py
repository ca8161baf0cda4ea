# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the judging protocol on sets whose scores are known."""

import dataclasses

import numpy as np
import pytest

from dd_jax.evals import frechet, judge

CLASSES = 4


def features(images):
  """Stands for the judge: the pixels, halved."""
  return np.asarray(images).reshape(len(images), -1)[:, :8] / 2


def logits(images):
  return np.asarray(images).reshape(len(images), -1)[:, :CLASSES]


def draw(n, seed, spread=0.1):
  """Images whose first pixels say their class."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(CLASSES, size=n)
  pixels = spread * rng.normal(size=(n, 16))
  pixels[np.arange(n), labels] += 0.8
  return pixels.reshape(n, 4, 4, 1).astype(np.float32), labels


@pytest.fixture(scope='module')
def reference():
  look = lambda seed, n: judge.look(*draw(n, seed), features, logits)  # noqa: E731
  return judge.Reference(train=look(0, 1500), heldout=look(1, 400))


def score(images, labels, reference):
  return judge.score(images, labels, features, logits, reference)


def test_train_images_are_perfect_and_memorised(reference):
  scores = score(*draw(1500, 0), reference)
  assert tuple(scores) == judge.SCORES
  assert all(type(v) is float for v in scores.values())
  assert scores['fd_train'] < 1e-6 and scores['fd_pixel'] < 1e-6
  assert scores['precision'] == scores['recall'] == scores['accuracy'] == 1
  assert scores['cov_trace_ratio'] == pytest.approx(1)
  assert scores['nn_distance'] < 1e-3


def test_fresh_images_score_like_the_floor(reference):
  floor = judge.floor(reference)
  assert floor['fd_heldout'] < 1e-6
  scores = score(*draw(400, 2), reference)
  assert 0 < scores['fd_train'] < 3 * floor['fd_train']
  assert scores['nn_distance'] == pytest.approx(floor['nn_distance'], rel=0.1)
  assert not judge.is_weak(scores, floor)
  assert judge.is_fit(floor)


def test_the_number_of_images_alone_makes_a_distance(reference):
  other = lambda n: frechet.frechet_distance(*(  # noqa: E731
      frechet.moments(features(draw(m, seed)[0]))
      for seed, m in ((8, n), (9, 1500 - n))
  ))
  assert judge.resampled_fd(reference) == pytest.approx(other(400), rel=0.5)
  few = dataclasses.replace(reference, heldout=judge.look(
      *draw(100, 1), features, logits
  ))
  assert judge.resampled_fd(few) > 2 * judge.resampled_fd(reference)
  # More held out than there are train images.
  turned = judge.Reference(reference.heldout, reference.train)
  assert judge.resampled_fd(turned) > judge.resampled_fd(reference)


def test_values_are_those_of_their_definitions(reference):
  images, labels = draw(300, 5, spread=0.2)
  scores = score(images, labels, reference)
  train, _ = draw(1500, 0)
  flat, train_flat = images.reshape(300, -1), train.reshape(1500, -1)
  assert scores['fd_pixel'] == pytest.approx(frechet.frechet_distance(
      frechet.moments(flat), frechet.moments(train_flat)
  ))
  distances = np.linalg.norm(flat[:, None] - train_flat[None], axis=-1)
  assert scores['nn_distance'] == pytest.approx(distances.min(1).mean(),
                                                rel=1e-4)
  assert scores['cov_trace_ratio'] == pytest.approx(4, rel=0.1)


def test_lost_diversity_and_wrong_classes_show(reference):
  floor = judge.floor(reference)
  images, labels = draw(400, 3, spread=0.02)
  narrow = score(images, labels, reference)
  assert narrow['cov_trace_ratio'] < 0.1
  assert narrow['recall'] < 0.2 < narrow['precision']
  assert judge.is_weak(narrow, floor)
  wrong = score(images, (labels + 1) % CLASSES, reference)
  assert wrong['accuracy'] < 0.05


@pytest.mark.parametrize('fd, accuracy, weak', [
    (4.0, 0.97, False), (4.1, 0.99, True), (1.0, 0.969, True),
])
def test_thresholds(fd, accuracy, weak):
  row = {'fd_train': fd, 'accuracy': accuracy}
  assert judge.is_weak(row, {'fd_train': 1.0}) is weak
  assert judge.is_fit(row) is (accuracy >= 0.97)


def test_batches_have_one_size():
  sizes = []

  def spy(images):
    sizes.append(len(images))
    return features(images)

  images, labels = draw(1203, 0)
  judged = judge.look(images, labels, spy, logits)
  assert len(set(sizes)) == 1
  np.testing.assert_array_equal(judged.features, features(images))


def test_bad_images_are_refused():
  images, labels = draw(10, 0)
  with pytest.raises(ValueError, match='need'):
    judge.look(images, labels[:5], features, logits)
  images[3, 0, 0, 0] = np.nan
  with pytest.raises(ValueError, match='1 of 10 images'):
    judge.look(images, labels, features, logits)
