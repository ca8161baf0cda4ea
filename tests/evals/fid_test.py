# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of FID, Inception Score, streaming moments and statistics files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dd_jax.evals import fid, frechet

RNG = np.random.default_rng
PROJECTION = RNG(9).normal(size=(12, 5)).astype(np.float32)
CLASSES = RNG(8).normal(size=(5, 7)).astype(np.float32)


def inception(pixels):
  """A stand-in: features and scores are linear in 2 x 2 RGB pixels."""
  features = pixels.reshape(len(pixels), -1) / np.float32(255) @ PROJECTION
  return features, features @ CLASSES


def pixels(count, seed=0, low=0):
  return RNG(seed).integers(low, 256, (count, 2, 2, 3), np.uint8)


def batched(images, size):
  return (images[i : i + size] for i in range(0, len(images), size))


def reference(images, keep=100):
  seen = fid.look([images], inception, keep=keep)
  return fid.make_reference(*seen.moments, seen.features)


def test_rounding_to_8_bits():
  levels = np.arange(256, dtype=np.float32) / 127.5 - 1
  np.testing.assert_array_equal(fid.to_uint8(levels), np.arange(256))
  # To the nearest, and clamped.
  found = fid.to_uint8(np.array([-3, -1, -1 + 0.9 / 127.5, 0, 0.999, 1, 3]))
  assert found.tolist() == [0, 0, 1, 128, 255, 255, 255]
  with pytest.raises(ValueError, match='NaN'):
    fid.to_uint8(np.array([0.0, np.nan]))


@pytest.mark.parametrize('size', [1, 7, 100, 1000])
def test_streaming_moments_are_those_of_all(size):
  features = RNG(0).normal(size=(1000, 6)) @ RNG(1).normal(size=(6, 6)) + 3
  moments = fid.Moments()
  for start in range(0, 1000, size):
    moments.add(features[start : start + size])
  for found, expected in zip(
      moments.result(), frechet.moments(features), strict=True
  ):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_a_large_mean_costs_no_digits():
  small = RNG(0).normal(size=(4000, 3))
  moments = fid.Moments()
  for part in np.split(small + 1e6, 40):
    moments.add(part)
  np.testing.assert_allclose(
      moments.result()[1], np.cov(small, rowvar=False), rtol=1e-8, atol=1e-8
  )


def test_moments_refuse_what_is_not_finite():
  with pytest.raises(ValueError, match='NaN'):
    fid.Moments().add(np.array([[1.0, np.inf]]))
  with pytest.raises(ValueError, match='at least 2'):
    fid.Moments().result()


def test_inception_score_of_known_distributions():
  # Sure and even over 8 classes: 8. The same for every image: 1.
  sure = np.tile(100.0 * np.eye(8), (20, 1))
  assert fid.inception_score(sure, splits=2)[0] == pytest.approx(8)
  same = np.tile(RNG(0).normal(size=8), (40, 1))
  assert fid.inception_score(same, splits=4) == pytest.approx((1, 0))
  # By the definition, of one part.
  x = RNG(1).normal(size=(30, 4))
  p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
  kl = (p * np.log(p / p.mean(0)[None])).sum(1).mean()
  assert fid.inception_score(x, splits=1)[0] == pytest.approx(np.exp(kl))
  # Shifts of all logits of an image say nothing.
  shifted = x + RNG(2).normal(size=(30, 1)) * 50
  assert fid.inception_score(shifted, 3) == pytest.approx(
      fid.inception_score(x, 3)
  )
  with pytest.raises(ValueError, match='5 images cannot be 10 parts'):
    fid.inception_score(x[:5])


def test_parts_of_the_score_cover_all_images():
  x = np.concatenate([np.zeros((8, 3)), 100 * np.eye(3)])  # 11 images
  parts = [x[:5], x[5:]]
  each = [fid.inception_score(p, 1)[0] for p in parts]
  assert fid.inception_score(x, 2) == pytest.approx(
      (np.mean(each), np.std(each))
  )


def test_the_batch_size_does_not_matter():
  images, real = pixels(60), reference(pixels(80, 1, 30))
  rows = [
      fid.evaluate(batched(images, size), inception, real)
      for size in (60, 7, 16)
  ]
  for row in rows[1:]:
    assert row == pytest.approx(rows[0], rel=1e-6)


def test_programs_see_one_batch_size():
  sizes = []

  def watched(images):
    sizes.append(len(images))
    return inception(images)

  assert fid.look(batched(pixels(23), 10), watched).count == 23
  assert fid.look(batched(pixels(5), 5), watched, batch_size=8).count == 5
  assert sizes == [10, 10, 10, 8]


def test_figures():
  real = pixels(100)
  same = fid.evaluate(batched(real, 50), inception, reference(real))
  assert same['fid'] == pytest.approx(0, abs=1e-6)
  assert same['precision'] == same['recall'] == 1
  other = fid.evaluate(
      batched(pixels(100, 1, 200), 50), inception, reference(real)
  )
  features = [inception(x)[0] for x in (real, pixels(100, 1, 200))]
  assert other['fid'] == pytest.approx(
      frechet.frechet_distance(*map(frechet.moments, features)), rel=1e-6
  )
  assert other['recall'] < 0.5
  assert other['images'] == other['manifold_samples'] == 100


def test_gray_images_are_made_rgb():
  gray = pixels(40)[..., :1]
  rgb = np.repeat(gray, 3, axis=-1)
  real = reference(pixels(40, 3))
  assert fid.evaluate([gray], inception, real) == (
      fid.evaluate([rgb], inception, real)
  )


def test_precision_needs_features():
  real = reference(pixels(50))
  bare = fid.make_reference(real.mean, real.cov)
  row = fid.evaluate([pixels(50, 1)], inception, bare)
  assert row['precision'] is row['recall'] is None
  assert row['manifold_reference'] == 0
  few = fid.evaluate([pixels(50, 1)], inception, real, keep=20)
  assert few['manifold_samples'] == few['manifold_reference'] == 20
  none = fid.evaluate([pixels(50, 1)], inception, real, keep=0)
  assert none['precision'] is None and none['fid'] == row['fid']


def test_another_network_is_refused():
  other = fid.make_reference(np.zeros(3), np.eye(3))
  with pytest.raises(ValueError, match='made with another network'):
    fid.evaluate([pixels(20)], inception, other)
  with pytest.raises(ValueError, match='need uint8'):
    fid.look([np.zeros((2, 2, 2, 3), np.float32)], inception)


def test_statistics_come_back(tmp_path):
  file = tmp_path / 'stats.npz'
  real = reference(pixels(50), keep=10)
  full = fid.make_reference(real.mean, real.cov, real.features, {'images': 50})
  fid.write_reference(file, full)
  back = fid.read_reference(file)
  for name in ('mean', 'cov', 'features'):
    np.testing.assert_array_equal(getattr(back, name), getattr(full, name))
  assert back.meta == {'images': 50}
  assert [f.name for f in tmp_path.iterdir()] == ['stats.npz']
  with np.load(file) as arrays:  # the names of PyTorch-FID
    assert {'mu', 'sigma'} <= set(arrays.files)
    assert json.loads(str(arrays['meta'])) == {'images': 50}


def test_foreign_statistics(tmp_path):
  file = tmp_path / 'stats.npz'
  np.savez(file, mu=np.ones(4), sigma=np.eye(4))
  assert fid.read_reference(file).features is None
  np.savez(file, mu=np.ones(4), sigma=np.eye(4), mu_s=np.ones(4))
  with pytest.raises(ValueError, match="ADM evaluator.*'adm_npz'"):
    fid.read_reference(file)
  np.savez(file, a=np.ones(4))
  with pytest.raises(ValueError, match=r"\['a'\], not mu and sigma"):
    fid.read_reference(file)
  np.savez(file, mu=np.array([{}]), sigma=np.eye(1))  # needs unpickling
  with pytest.raises(ValueError, match='no statistics'):
    fid.read_reference(file)
  file.write_bytes(file.read_bytes()[:200])
  with pytest.raises(ValueError, match='no statistics'):
    fid.read_reference(file)
  with pytest.raises(FileNotFoundError):
    fid.read_reference(tmp_path / 'none.npz')


@pytest.mark.parametrize('arrays, message', [
    ({'mu': np.ones(1 << 20)}, 'mu would unpack to 8388736 bytes'),
    ({'mu': np.ones(1 << 13)}, 'features of 8192 channels'),
    ({'sigma': np.ones((512, 512))}, 'sigma would unpack to 2097280 bytes'),
    ({'features': np.ones((1 << 19, 4), np.float32)}, 'features would unpack'),
    ({'meta': np.asarray('1' * (1 << 20))}, 'meta would unpack'),
])
def test_statistics_that_unpack_to_too_much(arrays, message, tmp_path):
  file = tmp_path / 'stats.npz'
  np.savez_compressed(file, **{'mu': np.ones(4), 'sigma': np.eye(4)} | arrays)
  with pytest.raises(ValueError, match=message):
    fid.read_reference(file)


@pytest.mark.parametrize('mean, cov, message', [
    (np.zeros(3), np.eye(2), r'need \(D,\) and \(D, D\)'),
    (np.zeros(2), np.array([[1.0, 0], [np.nan, 1]]), 'NaN'),
    (np.zeros(2), np.array([[1.0, 0], [0.5, 1]]), 'not symmetric'),
])
def test_wrong_statistics_are_refused(mean, cov, message):
  with pytest.raises(ValueError, match=message):
    fid.make_reference(mean, cov)
