# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of reports: schema, medians, warnings, pictures."""

import json

import numpy as np
from PIL import Image
import pytest

from dd_jax.evals import judge, report

FLOOR = dict.fromkeys(judge.SCORES, 1.0) | {'fd_train': 0.5, 'accuracy': 0.99}


def row(name, seed=0, fd=1.0, seconds=0.1, **changes):
  scores = dict.fromkeys(judge.SCORES, 1.0) | {'fd_train': fd}
  return {
      'name': name, 'steps': 4, 'seed': seed, **scores,
      'seconds_per_image': seconds,
  } | changes


def one(seed=0, student=2.0):
  rows = [
      row('teacher', seed), row('student_1', seed, student, 0.025, steps=1)
  ]
  return report.make(rows, FLOOR, {'backend': 'cpu'})


def test_ratios_are_over_the_teacher():
  got = one()
  assert got['ratios'] == {
      'student_1': 2.0, 'student_2': None, 'onestep_pooled': None,
      'onestep_class': None,
  }
  report.validate(got)


def test_ratios_of_denoisers_are_those_of_their_rows():
  rows = [row('teacher'), row('student_4', fd=3.0), row('teacher_1', fd=7.0)]
  got = report.make(rows, FLOOR, {})
  assert got['ratios'] == {'student_4': 3.0, 'teacher_1': 7.0}
  report.validate(got)
  assert 'onestep' not in report.markdown(got)
  del got['ratios']['teacher_1']
  with pytest.raises(ValueError, match="ratios lacks 'teacher_1'"):
    report.validate(got)


def test_merged_seeds_give_medians():
  merged = report.merge_seeds([one(0, 2.0), one(1, 9.0), one(2, 3.0)])
  assert len(merged['rows']) == 6
  assert merged['ratios']['student_1'] == 3
  columns, rows = report.table(merged)
  assert all(len(line) == len(columns) for line in rows)
  assert [line[0] for line in rows] == (
      ['held-out'] + ['teacher'] * 4 + ['student_1'] * 4
  )
  median = dict(zip(columns, rows[-1], strict=True))
  assert median['seed'] == 'median'
  assert median['FD train'] == 3
  assert median['speed-up'] == pytest.approx(4)
  assert '2 seeds' not in report.markdown(merged)
  assert '3 seeds, median' in report.markdown(merged)
  with pytest.raises(ValueError, match="2 rows 'teacher' with seed 0"):
    report.merge_seeds([one(0), one(0)])
  with pytest.raises(ValueError, match='no reports'):
    report.merge_seeds([])


@pytest.mark.parametrize('spoil, message', [
    (lambda r: r.pop('floor'), "report lacks 'floor'"),
    (lambda r: r.update(note=1), "report has unknown 'note'"),
    (lambda r: r['rows'][0].pop('recall'), r"rows\[0\] lacks 'recall'"),
    (lambda r: r['rows'][1].update(extra=1), r"rows\[1\] has unknown 'extra'"),
    (lambda r: r['rows'][0].update(steps=1.5), r'rows\[0\].steps is 1.5'),
    (lambda r: r['rows'][0].update(fd_train=float('nan')), 'fd_train is nan'),
    (lambda r: r['rows'][0].update(precision='1'), "precision is '1'"),
    (lambda r: r['floor'].update(accuracy=None), 'floor.accuracy is None'),
    (lambda r: r['ratios'].pop('student_2'), "ratios lacks 'student_2'"),
    (lambda r: r['rows'].pop(0), "no row 'teacher' with seed 0"),
    (lambda r: r['rows'].clear(), 'no rows'),
])
def test_invalid_reports_are_refused_and_not_written(spoil, message, tmp_path):
  bad = one()
  spoil(bad)
  with pytest.raises(ValueError, match=message):
    report.write(tmp_path / 'report', bad, {})
  assert not (tmp_path / 'report').exists()


def test_all_problems_are_listed():
  bad = one()
  del bad['rows'][0]['recall']
  bad['floor']['accuracy'] = None
  with pytest.raises(ValueError, match='recall.*floor.accuracy'):
    report.validate(bad)


def test_warnings():
  assert not report.warnings(one())
  weak = report.make([row('teacher', fd=2.1)], FLOOR, {})
  assert 'seed 0 is weak (FD 4.20 times' in report.warnings(weak)[0]
  unfit = report.make([row('teacher')], FLOOR | {'accuracy': 0.9}, {})
  assert 'not fit to judge: 90.0%' in report.warnings(unfit)[0]
  assert report.warnings(unfit)[0] in report.markdown(unfit)
  blind = report.make([row('teacher'), row('mixed_pixels', fd=0.4)], FLOOR, {})
  assert 'FD 0.40) for better images' in report.warnings(blind)[0]


def test_write_and_read(tmp_path):
  picture = report.grid({'teacher': np.zeros((3, 8, 8, 1))})
  report.write(tmp_path / 'report', one(), {'samples.png': picture})
  files = sorted(p.name for p in (tmp_path / 'report').iterdir())
  assert files == ['report.json', 'report.md', 'samples.png']
  assert report.read(tmp_path / 'report') == one()
  text = (tmp_path / 'report' / 'report.md').read_text()
  assert '![samples.png](samples.png)' in text
  assert '| student_1 | 1 | 0 | 2 |' in text
  with Image.open(tmp_path / 'report' / 'samples.png') as saved:
    assert saved.size == picture.size


def test_grid_enlarges_whole_pixels_and_labels_rows():
  rng = np.random.default_rng(0)
  gray = rng.uniform(-1, 1, size=(2, 8, 8, 1))
  rgb = rng.uniform(-1, 1, size=(2, 8, 8, 3))
  picture = np.asarray(report.grid({'teacher': gray, 'student': rgb}))
  left = picture.shape[1] - 2 * (48 + 6)
  expected = (np.clip(rgb[0] * 127.5 + 128, 0, 255)).astype(np.uint8)
  top = 6 + 48 + 6
  cell = picture[top : top + 48, left : left + 48]
  np.testing.assert_array_equal(cell[::6, ::6], expected)
  np.testing.assert_array_equal(cell[5::6, 5::6], expected)
  label = picture[6:54, :left]
  assert label.min() < 100  # dark text on white
  assert label[:, :6].min() == 255


def test_large_images_keep_their_size():
  picture = report.grid({'a': np.zeros((1, 64, 64, 3))})
  assert picture.height == 64 + 12


def test_curves(tmp_path):
  log = tmp_path / 'metrics.jsonl'
  records = [
      {'step': s, 'student/loss': 1 / s, 'rate': 5.0} for s in (1, 2, 3)
  ]
  log.write_text(''.join(json.dumps(r) + '\n' for r in records))
  picture = report.curves({'teacher': log, 'student': log})
  assert picture.size == (1000, 350)
  assert np.asarray(picture.convert('L')).min() < 100
  log.write_text('{"step": 1, "rate": 5.0}\n')
  with pytest.raises(ValueError, match='holds no metric with "loss"'):
    report.curves({'student': log})
