# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The tool that measures a folder of images."""

from __future__ import annotations

from absl.testing import flagsaver
import jax
import numpy as np
from PIL import Image
import pytest

from dd_jax import checkpoint
from dd_jax.evals import fid
from dd_jax.models.inception import model as inception
from dd_jax.tools import reference_stats


@pytest.fixture
def paths(tmp_path):
  built = inception.build({'image_size': 75, 'slim': 16})
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: np.abs(rng.normal(size=x.shape) * 0.1).astype(np.float32),
      built.abstract(),
  )
  checkpoint.export(tmp_path / 'network', built, params, {})
  (tmp_path / 'images').mkdir()
  for i in range(10):
    pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'images' / f'{i}.png')
  return tmp_path


def call(paths, **flags):
  values = {'images': str(paths / 'images'), 'batch_size': 8,
            'inception': str(paths / 'network'),
            'output': str(paths / 'stats.npz'), **flags}
  with flagsaver.flagsaver(**values):
    reference_stats.main(['reference_stats'])


def test_statistics_say_how_they_were_made(paths, capsys):
  call(paths, features=4)
  found = fid.read_reference(paths / 'stats.npz')
  assert found.mean.shape == (128,) and found.features.shape == (4, 128)
  meta = found.meta
  assert meta['images'] == 10 and meta['image_size'] == 8
  assert not meta['resized']
  assert meta['inception'] == checkpoint.describe(paths / 'network')['hash']
  assert meta['inception_config'] == {'image_size': 75, 'slim': 16}
  assert meta['folder'] == 'images' and len(meta['images_sha256']) == 64
  assert {'dd_jax', 'jax', 'device'} <= set(meta['environment'])
  assert '10 images of 8 x 8' in capsys.readouterr().out


@pytest.mark.parametrize('flags, message', [
    ({'output': 'stats.txt'}, 'must end in .npz'),
    ({'images': '/nowhere'}, 'is no folder'),
    ({'inception': '/nowhere'}, 'not an export'),
])
def test_errors_are_one_line(paths, capsys, flags, message):
  with pytest.raises(SystemExit):
    call(paths, **flags)
  assert message in capsys.readouterr().err
  assert not (paths / 'stats.npz').exists()
