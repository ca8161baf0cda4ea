# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of LlamaGen from released files: the whole chains.

They are those of the configs `b`, `b_released` and `t2i_xl`, with small
networks in files of the same names and layout.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import jax
import numpy as np

from dd_jax import checkpoint, sample
from dd_jax.data import captions as captions_lib
from dd_jax.data import pairs
from tests import released_files
from tests.released_test import (
  KINDS,
  LLAMAGEN,
  LLAMAGEN_ARGS,
  config_of,
  run_on_one_device,
  score_by_pixels,
)


def shrink(config):
  """Sizes of the small networks; stages and settings stay the config's."""
  values = config.to_dict()
  by_name = values['stages']
  by_name['vae']['config']['image_size'] = 16
  for name in {'teacher', 'student'} & set(by_name):
    if by_name[name]['kind'] == 'convert':
      by_name[name]['config'] |= dict(latent_size=4, heads=4)
  if 'inception' in by_name:
    by_name['inception']['config']['image_size'] = 75
  if 'clip' in by_name:
    by_name['clip']['config'] |= dict(image_heads=2, text_heads=2)
  for name, stage in by_name.items():
    assert stage['kind'] in KINDS, name
    if stage['kind'] == 'captions':
      stage |= dict(shard_size=4, batch_size=2)
    if stage['kind'] in ('fid', 'clip_score'):
      stage |= dict(samples=12, batch_size=8)
      if 'split' in stage:
        stage |= dict(split=5, t_list=(0, 5)[:len(stage['t_list'])])
  if 'trajectories' not in by_name:
    return values
  by_name['trajectories'] |= dict(pairs=8, shard_size=8, batch_size=4)
  student = by_name['student']
  student['method'] |= dict(t_set=(0, 5), split=5, perceptual_batch=4)
  model = student['roles']['student']['model']
  del model['size']
  model |= dict(depth=2, width=64, heads=4, latent_size=4, vocab_size=64)
  model |= dict(caption_dim=24) if 'captions' in by_name else dict(
      num_classes=10
  )
  student |= dict(batch_size=4, steps=2)
  return values


def read_rows(workdir, file):
  """The reports of the three stages that end a chain."""
  return {
      name: json.loads((workdir / name / 'report' / file).read_text())
      for name in ('evaluate_teacher', 'evaluate_1', 'evaluate_2')
  }


def hashes_of(records):
  """Of each stage's first artefact."""
  return {
      name: next(iter(record['outputs']['hashes'].values()))
      for name, record in records.items()
  }


def test_the_chain_of_classes_ends_in_figures(tmp_path, monkeypatch):
  score_by_pixels(monkeypatch)
  released_files.write_small_c2i(tmp_path / 'weights')
  config = shrink(config_of('b', tmp_path / 'weights', LLAMAGEN))
  workdir = tmp_path / 'run'
  records = run_on_one_device(config, workdir)
  assert set(records) == set(LLAMAGEN_ARGS['b'])
  hashes = hashes_of(records)
  rows = read_rows(workdir, 'fid.json')
  for name, row in rows.items():
    judged = 'teacher' if name == 'evaluate_teacher' else 'student'
    assert row['hashes']['student'] == hashes[judged]
    assert row['hashes']['vae'] == hashes['vae']
    assert row['fid'] > 0
  assert len({row['hashes']['samples'] for row in rows.values()}) == 3
  assert rows['evaluate_1']['settings']['t_list'] == [0]
  assert rows['evaluate_2']['settings']['t_list'] == [0, 5]
  settings = rows['evaluate_teacher']['settings']
  assert (settings['cfg'], settings['top_k']) == (2.0, 8000)

  made = pairs.PairSource(workdir / 'trajectories/data')
  assert made.manifest.provenance['teacher'] == hashes['teacher']
  # As LlamaGen samples.
  teacher = checkpoint.describe(workdir / 'teacher/export/llamagen')
  assert teacher['config']['dtype'] == 'bfloat16'
  export = workdir / 'student' / records['student']['outputs']['exports'][
      'student'
  ]
  images = sample.load(export, workdir / 'vae/export/llamagen_vq', split=5)(
      [3, 7], steps=1
  )
  assert images.shape == (2, 16, 16, 3) and images.std() > 0.01


def test_a_released_student_is_scored(tmp_path, monkeypatch):
  score_by_pixels(monkeypatch)
  released_files.write_small_c2i(tmp_path / 'weights')
  config = shrink(config_of('b_released', tmp_path / 'weights', LLAMAGEN))
  records = run_on_one_device(config, tmp_path / 'run')
  assert set(records) == set(LLAMAGEN_ARGS['b_released'])
  hashes = hashes_of(records)
  for name, t_list in (('evaluate_1', [0]), ('evaluate_2', [0, 5])):
    row = json.loads((tmp_path / f'run/{name}/report/fid.json').read_text())
    assert row['settings']['t_list'] == t_list and row['fid'] > 0
    assert row['hashes']['student'] == hashes['student']


def test_the_chain_of_captions_ends_in_clip_scores(tmp_path, monkeypatch):
  if importlib.util.find_spec('tokenizers') is None:
    library = types.SimpleNamespace(Tokenizer=released_files.Tokenizer)
    monkeypatch.setitem(sys.modules, 'tokenizers', library)
  released_files.write_small_t2i(tmp_path / 'weights')
  config = config_of('t2i_xl', tmp_path / 'weights', LLAMAGEN)
  texts = ['a red cat', 'two dog', 'a blue dog', 'dog on a sofa', 'a sofa']
  config.prompts = str(tmp_path / 'prompts.txt')
  (tmp_path / 'prompts.txt').write_text('\n'.join(texts))
  heldout = ['two cat', 'a red sofa', 'two blue cat on a red sofa']
  config.heldout_prompts = str(tmp_path / 'heldout.jsonl')
  (tmp_path / 'heldout.jsonl').write_text(
      '\n'.join(json.dumps({'prompt': text}) for text in heldout)
  )
  workdir = tmp_path / 'run'
  records = run_on_one_device(shrink(config), workdir)
  assert set(records) == set(LLAMAGEN_ARGS['t2i_xl'])
  hashes = hashes_of(records)
  rows = read_rows(workdir, 'clip_score.json')
  for name, row in rows.items():
    assert row['pairs'] == 12 and 0 < row['clip_score'] < 100
    judged = 'teacher' if name == 'evaluate_teacher' else 'student'
    assert {k: row['hashes'][k] for k in ('captions', 'clip', 'vae')} == {
        'captions': hashes['heldout'], 'clip': hashes['clip'],
        'vae': hashes['vae'],
    }
    assert row['hashes']['student'] == hashes[judged]
  assert len({row['hashes']['samples'] for row in rows.values()}) == 3
  assert rows['evaluate_1']['settings']['t_list'] == [0]
  assert rows['evaluate_2']['settings']['t_list'] == [0, 5]
  assert rows['evaluate_teacher']['settings']['cfg'] == 7.5

  known = captions_lib.CaptionSource(workdir / 'captions/data')
  assert [known.text(i) for i in range(len(known))] == texts
  encoder, params = checkpoint.load(workdir / 'encoder/export/t5')
  features = jax.jit(encoder.fns['encode'])(
      params, np.array([[3, 6, 4, 1]], np.int32), np.ones((1, 4), bool)
  )
  found = known.take(np.array([0]))
  valid = found['mask'][0]
  assert valid.sum() == 4
  np.testing.assert_allclose(
      found['features'][0][valid].astype(np.float32), features[0], atol=0.05,
      rtol=0.02,
  )
  made = pairs.PairSource(workdir / 'trajectories/data')
  assert made.manifest.provenance['captions'] == hashes['captions']
  assert [made[i]['label'] for i in range(8)] == [0, 1, 2, 3, 4, 0, 1, 2]

  # As the page has it: the run tells the tokenizers and the text encoder.
  export = workdir / 'student' / records['student']['outputs']['exports'][
      'student'
  ]
  images = sample.load(export, split=5)(['a red cat'], steps=2)
  assert images.shape == (1, 16, 16, 3) and images.std() > 0.01
