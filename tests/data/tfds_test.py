# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of sets that TensorFlow Datasets prepared, without TensorFlow."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds_lib

from dd_jax import registry
from dd_jax.data import sources, tfds

NAMES = ['c', 'a', 'b']


class DdJaxStripes(tfds_lib.core.GeneratorBasedBuilder):
  """Gray images, each of one value."""

  VERSION = tfds_lib.core.Version('1.0.0')

  def _info(self):
    return tfds_lib.core.DatasetInfo(
        builder=self,
        features=tfds_lib.features.FeaturesDict({
            'image': tfds_lib.features.Image(shape=(None, None, 1)),
            'label': tfds_lib.features.ClassLabel(names=NAMES),
        }),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(20),
            'test': self._generate_examples(6)}

  def _generate_examples(self, count):
    for i in range(count):
      file = io.BytesIO()
      pixels = np.full((9, 7), 10 * i + i % 3, np.uint8)
      Image.fromarray(pixels).save(file, 'PNG')
      file.seek(0)
      yield i, {'image': file, 'label': i % 3}


@pytest.fixture
def data_dir(tmp_path):
  DdJaxStripes(
      data_dir=tmp_path, file_format='array_record'
  ).download_and_prepare()
  return tmp_path


@pytest.fixture
def folder(data_dir):
  return data_dir / 'dd_jax_stripes/1.0.0'


def check(source, count):
  assert isinstance(source, sources.BatchSource)
  assert len(source) == count and source.num_classes == 3
  value = (source.arrays['image'] + 1) * 127.5
  # The value says which record it is, and so its label.
  number = np.round(value[:, 0, 0, 0]) // 10
  assert sorted(number.tolist()) == list(range(count))
  np.testing.assert_array_equal(source.arrays['label'], number % 3)
  np.testing.assert_array_equal(source[2]['image'], source.arrays['image'][2])


def test_from_a_folder(folder):
  source = tfds.from_folder(folder, 'train', size=8, channels=1)
  check(source, 20)
  assert source.arrays['image'].shape == (20, 8, 8, 1)
  check(tfds.from_folder(folder, 'heldout', size=8, num_classes=3), 6)
  assert 'tensorflow' not in sys.modules


def test_by_name(data_dir):
  read = registry.get('sources', 'tfds')
  check(read('dd_jax_stripes', 'train', size=8, data_dir=data_dir), 20)
  check(read('dd_jax_stripes:1.0.0', 'heldout', size=8, data_dir=data_dir), 6)
  parts = [
      read('dd_jax_stripes', split, size=8, data_dir=data_dir,
           train='train[:15]', heldout='train[15:]')
      for split in sources.SPLITS
  ]
  assert [len(p) for p in parts] == [15, 5]
  values = [set(p.arrays['image'][:, 0, 0, 0].tolist()) for p in parts]
  assert not values[0] & values[1]


def test_what_is_refused(data_dir, folder):

  def read(name='dd_jax_stripes', split='heldout', **options):
    return tfds.by_name(name, split, size=8, data_dir=data_dir, **options)

  with pytest.raises(FileNotFoundError, match='cifar10.*download=True'):
    read('cifar10')  # and reaches for no network
  with pytest.raises(ValueError, match=r"'tset'.*\['test', 'train'\]"):
    read(heldout='tset')
  with pytest.raises(ValueError, match='3 classes, not 4'):
    read(num_classes=4)
  with pytest.raises(ValueError, match="'train', 'heldout'.*'test'"):
    read(split='test')
  with pytest.raises(FileNotFoundError, match='dataset_info.json is missing'):
    tfds.from_folder(folder.parent, 'train', size=8)


def test_another_format_is_refused(folder):
  info = folder / 'dataset_info.json'
  fields = json.loads(info.read_text()) | {'fileFormat': 'tfrecord'}
  info.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match='as ArrayRecord.* format tfrecord'):
    tfds.from_folder(folder, 'train', size=8)


def test_classes_in_the_order_of_their_names(folder):
  own, by_order = (
      tfds.from_folder(folder, 'train', size=8, sort_classes=order).arrays
      for order in (False, True)
  )
  assert [NAMES[i] for i in own['label']] == [
      'abc'[i] for i in by_order['label']
  ]
  assert len(set(own['label'].tolist())) == 3
  np.testing.assert_array_equal(own['image'], by_order['image'])


def test_features_that_are_refused(folder):
  file = folder / 'features.json'
  fields = json.loads(file.read_text())
  features = fields['featuresDict']['features']
  label, image = features.pop('label'), features['image']
  file.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="no feature 'label': it has .*image"):
    tfds.from_folder(folder, 'train', size=8)
  features |= {'label': label, 'image': label}
  file.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="'image' is no image but ClassLabel"):
    tfds.from_folder(folder, 'train', size=8)
  features |= {'image': image, 'label': image}
  file.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="'label' is no class but Image"):
    tfds.from_folder(folder, 'train', size=8)


@pytest.mark.parametrize('harm', ['truncate', 'flip'])
def test_a_damaged_file_names_its_folder(folder, harm):
  (file,) = folder.glob('*train*')
  content = file.read_bytes()
  file.write_bytes({
      'truncate': content[:-100],
      'flip': content[:200] + b'\xff' * 40 + content[240:],
  }[harm])
  source = tfds.from_folder(folder, 'train', size=8)
  with pytest.raises(ValueError, match=f'{folder}: record'):
    source.take(np.arange(20))
