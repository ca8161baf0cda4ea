# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The stage kind 'clip_score', and 'fid' of captions, on random networks."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest

from dd_jax import build, checkpoint, evaluate_clip, evaluate_fid, stages
from dd_jax.data import captions, prompts, tokens
from dd_jax.evals import clip_score

GPT = dict(
    depth=1, width=8, heads=2, latent_size=2, vocab_size=16, code_dim=4,
    caption_length=8, caption_dim=12,
)
NETWORKS = {
    'vae': dict(name='llamagen_vq', image_size=4, ch=4, ch_mult=[1, 2],
                res_blocks=1, attention=False, z_channels=4, code_dim=4,
                vocab_size=16),
    'teacher': dict(name='llamagen', num_classes=0, **GPT),
    'student': dict(name='dd_llamagen', num_classes=0, **GPT),
    'by_class': dict(name='dd_llamagen', num_classes=3, **GPT),
    'clip': dict(name='clip', image_size=8, patch_size=4, image_width=8,
                 image_depth=1, image_heads=2, image_mlp_dim=8, vocab_size=48,
                 context_length=9, text_width=8, text_depth=1, text_heads=2,
                 text_mlp_dim=8, projection_dim=6),
}
STUDENT = dict(t_list=[0, 2], split=2)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Exports of random networks, and the captions of the digits."""
  root = tmp_path_factory.mktemp('made')
  rng = np.random.default_rng(0)
  for name, config in NETWORKS.items():
    model = build.build_model(config)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32),
        model.abstract(),
    )
    checkpoint.export(root / name, model, params, {})
  stages.run({
      'name': 'x', 'seed': 0, 'mesh': dict(data=-1), 'rules': 'dp', 'stages': {
          'captions': dict(
              kind='captions', prompts=dict(source='digit_words'),
              encoder=dict(model=dict(name='words', vocab_size=48, width=12)),
              tokenizer=dict(name='words'), caption_length=8, shard_size=32,
              batch_size=16,
          ),
      },
  }, root)
  return root


def run(made, workdir, kind='clip_score', **fields):
  stage = dict(
      kind=kind, samples=20, batch_size=8, captions=str(made / 'captions/data'),
      **{n: str(made / n) for n in ('student', 'vae')},
  )
  if kind == 'clip_score':
    stage |= dict(clip=str(made / 'clip'), tokenizer=dict(name='words'))
  stage = {k: v for k, v in (stage | fields).items() if v is not None}
  record = stages.run({
      'name': 'x', 'seed': 3, 'mesh': dict(data=-1), 'rules': 'dp',
      'stages': {'score': stage},
  }, workdir)['score']
  return workdir / 'score' / record['outputs']['artefact']


@pytest.fixture(scope='module')
def seen(made, tmp_path_factory):
  """What the network that judges was shown, and the row of the result."""
  shown = []
  evaluate = clip_score.evaluate

  def spy(batches, *args, **kwargs):
    def listen():
      for batch in batches:
        shown.append(batch)
        yield batch
    return evaluate(listen(), *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(clip_score, 'evaluate', spy)
    folder = run(made, tmp_path_factory.mktemp('scored'), **STUDENT)
  row = json.loads((folder / 'clip_score.json').read_text())
  return [np.concatenate(x) for x in zip(*shown, strict=True)], row


def test_each_image_is_compared_with_its_own_caption(made, seen):
  (pixels, ids), row = seen
  texts = prompts.digit_words().texts[:20]  # captions go round
  np.testing.assert_array_equal(
      ids, tokens.WordTokenizer(length=9)(texts)[0]
  )
  assert pixels.shape == (20, 4, 4, 3) and len(np.unique(pixels)) > 20
  model, params = checkpoint.load(made / 'clip')
  cosines = np.asarray(model.fns['similarity'](
      params, clip_score.preprocess(pixels, 8), ids
  ))
  assert row['clip_score'] == pytest.approx(
      100 * np.maximum(cosines, 0).mean(), rel=1e-3
  )
  assert row['hashes']['samples'] == (
      hashlib.sha256(pixels.tobytes()).hexdigest()
  )


def test_the_row_says_everything(made, seen):
  _, row = seen
  assert row['protocol'] == 'clip-score' and row['pairs'] == 20
  assert set(row['settings']) == {
      f.name for f in dataclasses.fields(evaluate_clip.ClipScoreConfig)
  }
  for name in ('student', 'vae', 'clip'):
    assert row['hashes'][name] == checkpoint.describe(made / name)['hash']
  manifest = (made / 'captions/data/manifest.json').read_bytes()
  assert row['hashes']['captions'] == hashlib.sha256(manifest).hexdigest()
  assert row['tokenizer'] == tokens.WordTokenizer(length=9).identity
  assert row['clip_config']['projection_dim'] == 6
  assert row['seed'] == 3


def test_a_teacher_of_captions_makes_samples(made, tmp_path):
  folder = run(
      made, tmp_path, kind='adm_npz', student=str(made / 'teacher'), cfg=2.0,
      top_k=8, samples=8,
  )
  row = json.loads((folder / 'adm.json').read_text())
  source = captions.CaptionSource(made / 'captions/data')
  assert row['hashes']['captions'] == source.manifest.sha256
  with np.load(folder / 'samples.npz') as arrays:
    assert arrays['arr_0'].std() > 0


def test_a_teacher_may_be_involved(made, tmp_path, seen):
  folder = run(
      made, tmp_path, teacher=str(made / 'teacher'), involved=[1, 3], split=2,
      cfg=2.0,
  )
  row = json.loads((folder / 'clip_score.json').read_text())
  assert row['hashes']['teacher'] == checkpoint.describe(
      made / 'teacher'
  )['hash']
  assert row['hashes']['samples'] != seen[1]['hashes']['samples']


def test_fid_is_of_captions_too(made, tmp_path, monkeypatch):
  monkeypatch.setattr(evaluate_fid, 'on_mesh', lambda *_: lambda pixels: (
      pixels.reshape(len(pixels), -1)[:, :4].astype(np.float32),
  ) * 2)
  checkpoint.export(
      tmp_path / 'inception', build.build_model(NETWORKS['clip']),
      checkpoint.load_params(made / 'clip'), {},
  )
  rng = np.random.default_rng(0)
  features = 255 * rng.random((30, 4))
  np.savez(tmp_path / 'stats.npz', mu=features.mean(0),
           sigma=np.cov(features, rowvar=False))
  rows = {}
  for labels in ('balanced', 'random'):
    folder = run(
        made, tmp_path / labels, kind='fid', labels=labels, **STUDENT,
        inception=str(tmp_path / 'inception'),
        reference=str(tmp_path / 'stats.npz'),
    )
    rows[labels] = json.loads((folder / 'fid.json').read_text())
    assert rows[labels]['fid'] > 0
    assert len(rows[labels]['hashes']['captions']) == 64
  assert rows['balanced']['hashes']['samples'] != (
      rows['random']['hashes']['samples']
  )


def test_a_tokenizer_of_another_network(made, tmp_path):
  checkpoint.export(
      tmp_path / 'student', *checkpoint.load(made / 'student'),
      {'frozen': {'vae': 'f' * 64}},
  )
  with pytest.raises(ValueError, match='is not the tokenizer that .*/student'):
    run(made, tmp_path / 'run', student=str(tmp_path / 'student'), **STUDENT)


@pytest.mark.parametrize('fields, message', [
    ({'captions': None}, 'score: a CLIP score is of captions; name a set'),
    ({'student': 'by_class'}, 'captions=.*: the network takes classes'),
    ({'kind': 'adm_npz', 'captions': None}, 'captions: the network takes'),
    ({'tokenizer': {'name': 'words', 'length': 10}},
     'the CLIP network has context_length 9, but that of the tokenizer is 10'),
    ({'tokenizer': {'name': 'words', 'size': 3}}, "'size'"),
    ({'tokenizer': {'name': 'words', 'length': 3}}, 'caption 10: .* 6 tokens'),
    ({'clip': 'vae'}, "a 'llamagen_vq' does not compare images"),
])
def test_wrong_settings_are_refused(made, tmp_path, fields, message):
  fields = {
      k: str(made / v) if k in ('student', 'clip') else v
      for k, v in fields.items()
  }
  with pytest.raises(ValueError, match=message):
    run(made, tmp_path, **STUDENT, **fields)
