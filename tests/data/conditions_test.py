# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of classes and captions as conditions."""

import types

import numpy as np
import pytest

from dd_jax import model
from dd_jax.data import captions, conditions, pairs, sources

WIDTH, LENGTH = 3, 4


@pytest.fixture
def folder(tmp_path):
  """Six captions of three classes; caption i has i % 2 + 1 tokens, all i."""
  writer = captions.CaptionWriter(tmp_path / 'captions', captions.Manifest(
      captions=6, shard_size=4, width=WIDTH, caption_length=LENGTH,
      dtype='float16', num_classes=3, provenance={},
  ))
  for shard in range(2):
    ids = writer._manifest.shard_ids(shard)
    writer.write(
        shard, features=[np.full((i % 2 + 1, WIDTH), i) for i in ids],
        texts=[str(i) for i in ids], labels=[i % 3 for i in ids],
    )
  writer.finalize()
  return tmp_path / 'captions'


def network(**fields):
  return types.SimpleNamespace(**fields)


def images(labels, num_classes=3):
  labels = np.asarray(labels, np.int32)
  return sources.ArraySource(
      {'image': np.zeros((len(labels), 2, 2, 1), np.float32), 'label': labels},
      num_classes=num_classes,
  )


def test_classes_go_by_their_number():
  classes = conditions.of_network(network(num_classes=5), None)
  assert len(classes) == classes.num_classes == 5
  np.testing.assert_array_equal(classes.take(np.array([4, 0]))['label'], [4, 0])
  batch = classes.take(np.array([3]))
  np.testing.assert_array_equal(model.condition_of(batch), [3])


def test_captions_are_padded_to_the_network(folder):
  source = conditions.of_network(
      network(num_classes=0, caption_length=LENGTH + 1, caption_dim=WIDTH),
      folder,
  )
  assert len(source) == 6
  np.testing.assert_array_equal(source.labels, [0, 1, 2, 0, 1, 2])
  wanted = model.condition_of(source.take(np.array([3])))
  assert wanted['features'].shape == (1, LENGTH + 1, WIDTH)
  np.testing.assert_array_equal(wanted['mask'][0], [0, 0, 0, 1, 1])


@pytest.mark.parametrize('fields, given, message', [
    ({'num_classes': 5}, True, 'the network takes classes'),
    ({'num_classes': 0}, False, 'the network takes captions'),
    ({'num_classes': 0, 'caption_length': 4, 'caption_dim': 7}, True,
     'features of size 3.*caption_dim=7'),
    ({'num_classes': 0, 'caption_length': 2, 'caption_dim': WIDTH}, True,
     'do not fit in caption_length=2'),
])
def test_conditions_of_another_network(folder, fields, given, message):
  with pytest.raises(ValueError, match=message):
    conditions.of_network(network(**fields), folder if given else None)


def test_an_image_gets_a_caption_of_its_class(folder):
  source = captions.CaptionSource(folder)
  rows = np.arange(9)
  batch = conditions.Captioned(images(rows % 3), source).take(rows)
  given = batch['features'].max((1, 2))
  np.testing.assert_array_equal(given % 3, batch['label'])
  assert set(given) == set(range(6))  # all captions of a class are used
  again = conditions.Captioned(images(rows % 3), source)[4]
  np.testing.assert_array_equal(again['features'], batch['features'][4])


def test_a_pair_gets_the_caption_that_it_was_made_of(folder, tmp_path):
  writer = pairs.PairWriter(tmp_path / 'pairs', pairs.Manifest(
      pairs=6, shard_size=6, length=2, vocab_size=4, num_classes=6,
      provenance={'captions': captions.read_manifest(folder).sha256},
  ))
  writer.write(0, seed=0, label=np.arange(6), indices=np.zeros((6, 2), int))
  writer.finalize()
  source = conditions.Captioned(
      pairs.PairSource(tmp_path / 'pairs'), captions.CaptionSource(folder)
  )
  batch = source.take(np.array([5, 0]))
  np.testing.assert_array_equal(batch['features'].max((1, 2)), [5, 0])


def test_sources_and_captions_that_do_not_go_together(folder, tmp_path):
  source = captions.CaptionSource(folder)
  with pytest.raises(ValueError, match='images of 4 classes'):
    conditions.Captioned(images([0, 1, 2, 3], 4), source)
  source.num_classes = None  # as of prompts without labels
  with pytest.raises(ValueError, match='each prompt needs a label'):
    conditions.Captioned(images([0, 1, 2, 3], 4), source)
  writer = pairs.PairWriter(tmp_path / 'pairs', pairs.Manifest(
      pairs=2, shard_size=2, length=2, vocab_size=4, num_classes=6,
      provenance={'captions': 'others'},
  ))
  writer.write(0, seed=0, label=np.arange(2), indices=np.zeros((2, 2), int))
  writer.finalize()
  with pytest.raises(ValueError, match='made of captions others'):
    conditions.Captioned(pairs.PairSource(tmp_path / 'pairs'), source)
