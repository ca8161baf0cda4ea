# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the files for the evaluator of ADM."""

from __future__ import annotations

import numpy as np
import pytest

from dd_jax.evals import adm, fid

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), np.uint8)


def test_a_file_is_what_numpy_reads(tmp_path):
  file = tmp_path / 'samples.npz'
  adm.write_npz(file, (IMAGES[:5], IMAGES[5:]), IMAGES.shape)
  with np.load(file) as arrays:
    assert arrays.files == ['arr_0']
    assert arrays['arr_0'].dtype == np.uint8
    np.testing.assert_array_equal(arrays['arr_0'], IMAGES)
  once = file.read_bytes()
  adm.write_npz(file, [IMAGES], IMAGES.shape)
  assert file.read_bytes() == once


@pytest.mark.parametrize('batches, message', [
    ([IMAGES[:5]], '5 images came, not 7'),
    ([IMAGES, IMAGES[:1]], '8 images came, not 7'),
    ([IMAGES[..., :1]], r'need uint8 \(n, 4, 4, 3\)'),
    ([IMAGES.astype(np.float32)], 'need uint8'),
])
def test_a_wrong_file_is_not_written(tmp_path, batches, message):
  with pytest.raises(ValueError, match=message):
    adm.write_npz(tmp_path / 'samples.npz', batches, IMAGES.shape)
  assert not list(tmp_path.iterdir())


def test_rounding_is_not_that_of_the_other_protocol():
  x = np.linspace(-1, 1, 10_001)
  ours, theirs = adm.to_uint8(x).astype(int), fid.to_uint8(x).astype(int)
  assert set((theirs - ours).tolist()) == {0, 1}
  assert ours.min() == 0 and ours.max() == 255
  assert adm.to_uint8(np.array([-2.0, 0.999, 2.0])).tolist() == [0, 254, 255]
  with pytest.raises(ValueError, match='NaN'):
    adm.to_uint8(np.array([np.nan]))
