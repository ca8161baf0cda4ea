# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the CLIP score and of what CLIP sees of an image."""

from __future__ import annotations

import numpy as np
import pytest

from dd_jax.evals import clip_score

RNG = np.random.default_rng


def pixels(*shape, seed=0):
  return RNG(seed).integers(0, 256, shape, np.uint8)


def denormalise(images):
  return images * np.float32(clip_score.STD) + np.float32(clip_score.MEAN)


def test_images_of_the_right_size_are_only_normalised():
  image = pixels(2, 16, 16, 3)
  found = clip_score.preprocess(image, 16)
  assert found.dtype == np.float32
  np.testing.assert_allclose(denormalise(found) * 255, image, atol=1e-3)
  # By hand: (1 - 0.48145466) / 0.26862954.
  white = clip_score.preprocess(np.full((1, 8, 8, 1), 255, np.uint8), 8)
  np.testing.assert_allclose(
      white[0, 0, 0], [1.9303361, 2.0748837, 2.1458828], rtol=1e-5
  )


def test_shorter_side_is_resized_and_the_middle_cut():
  ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, None, :, None], 20, 1)
  found = denormalise(clip_score.preprocess(ramp * 4, 10)) * 255
  assert found.shape == (1, 10, 10, 3)
  # Each new pixel stands for two old ones; 5 of 20 are cut on either side.
  want = 4 * (2 * (5 + np.arange(10)) + 0.5)
  np.testing.assert_allclose(
      found[0], np.broadcast_to(want[None, :, None], (10, 10, 3)), atol=1.01
  )
  turned = clip_score.preprocess(ramp.swapaxes(1, 2) * 4, 10)
  np.testing.assert_allclose(
      denormalise(turned)[0, :, 0] * 255, found[0, 0], atol=1e-3
  )


def test_large_images_are_antialiased():
  noise = pixels(1, 128, 128, 3)
  small = denormalise(clip_score.preprocess(noise, 16))
  assert small.std() < 0.3 * (noise / 255).std()


def test_preprocessing_is_that_of_transformers():
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  theirs = getattr(
      transformers, 'CLIPImageProcessorPil', transformers.CLIPImageProcessor
  )()
  image = pixels(2, 64, 48, 3)
  want = theirs(list(image), return_tensors='np')['pixel_values']
  np.testing.assert_allclose(
      clip_score.preprocess(image), want.transpose(0, 2, 3, 1), atol=1e-5
  )


def similarity(images, tokens):
  """A stand-in: the caption says what the cosine is."""
  assert images.shape[1:] == (8, 8, 3)
  return tokens[:, 0] / 10


def test_score():
  image = pixels(5, 8, 8, 1)
  tokens = np.array([[3], [-4], [10], [0], [5]])
  want = np.array([30, 0, 100, 0, 50])
  for size in (1, 2, 5):
    batches = (
        (image[i : i + size], tokens[i : i + size]) for i in range(0, 5, size)
    )
    row = clip_score.evaluate(batches, similarity, size=8)
    assert row['pairs'] == 5
    np.testing.assert_allclose(row['clip_score'], want.mean())
    np.testing.assert_allclose(row['standard_error'], want.std() / 5**0.5)


def test_batches_have_one_size():
  sizes = []

  def count(images, tokens):
    sizes.append((len(images), len(tokens)))
    return np.ones(len(images))

  batches = [(pixels(n, 8, 8, 3), np.ones((n, 2))) for n in (3, 0, 1)]
  assert clip_score.evaluate(
      batches, count, size=8, batch_size=4
  )['clip_score'] == 100
  assert sizes == [(4, 4), (4, 4)]


def test_bad_input():
  with pytest.raises(ValueError, match=r'images are float32\[1, 8, 8, 3\]'):
    clip_score.preprocess(np.zeros((1, 8, 8, 3), np.float32))
  with pytest.raises(ValueError, match=r'images are uint8\[1, 8, 8, 4\]'):
    clip_score.preprocess(pixels(1, 8, 8, 4))
  with pytest.raises(ValueError, match='no images to score'):
    clip_score.evaluate([], similarity)
  with pytest.raises(ValueError, match='2 images have 1 captions'):
    clip_score.evaluate(
        [(pixels(2, 8, 8, 3), np.ones((1, 1)))], similarity, size=8
    )
  with pytest.raises(ValueError, match='NaN or infinity'):
    clip_score.evaluate(
        [(pixels(1, 8, 8, 3), np.full((1, 1), np.nan))], similarity, size=8
    )
