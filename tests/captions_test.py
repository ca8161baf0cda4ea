# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the stage that turns captions into features."""

from __future__ import annotations

from etils import epath
import jax
import numpy as np
import pytest

from dd_jax import captions, checkpoint, hooks, sharding, stages
from dd_jax.data import captions as captions_lib
from dd_jax.data import prompts, tokens
from dd_jax.models.t5 import model as t5
from dd_jax.models.words import model as words

WORDS = dict(name='words', vocab_size=45, width=12, seed=3)
CONFIG = dict(
    encoder=dict(model=WORDS), prompts=dict(source='digit_words'),
    tokenizer=dict(name='words'), shard_size=32, batch_size=16,
    caption_length=10,
)


MESHES = {
    'dp': dict(data=8), 'fsdp_tp': dict(data=2, fsdp=2, tensor=2),
}


def run(folder, rules='dp', **fields):
  """Runs the stage and reads what it made."""
  workdir = epath.Path(folder)
  context = stages.Context(
      'captions', CONFIG | fields, workdir / 'captions', workdir, 0,
      sharding.make_mesh(MESHES[rules]), rules,
  )
  outputs = captions.run(context)
  path = workdir / 'captions' / outputs['artefact']
  return outputs, captions_lib.CaptionSource(path), path


def contents(path):
  return {f.name: f.read_bytes() for f in path.iterdir()}


def t5_export(folder):
  """A small T5 for the embedded words, and its parameters."""
  model = t5.build(dict(
      vocab_size=48, width=12, depth=2, heads=2, head_dim=4, mlp_dim=16
  ))
  rng = np.random.default_rng(1)
  params = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32) / x.shape[-1]**0.5,
      model.abstract(),
  )
  checkpoint.export(folder / 't5', model, params, {})
  return model, params


def test_features_are_those_of_the_encoder(tmp_path):
  _, source, _ = run(tmp_path)
  texts = prompts.digit_words().texts
  model = words.build({k: v for k, v in WORDS.items() if k != 'name'})
  ids, mask = tokens.WordTokenizer(length=10)(texts)
  want = np.asarray(model.apply(model.init(jax.random.key(0)), ids, mask))
  assert len(source) == 80 and source.num_classes == 10
  for i in (0, 31, 32, 79):
    record = source[i]
    assert source.text(i) == texts[i] and record['label'] == i % 10
    np.testing.assert_array_equal(
        record['features'][record['mask']],
        want[i][mask[i]].astype(np.float16),
    )


def test_rerun_and_resume_leave_the_same_bytes(tmp_path, monkeypatch):
  outputs, _, path = run(tmp_path)
  want = contents(path)
  assert run(tmp_path)[0] == outputs and contents(path) == want
  (path / 'captions-00001-of-00003.safetensors').unlink()
  assert run(tmp_path)[0] == outputs and contents(path) == want

  answers = iter([False, True])
  with monkeypatch.context() as patch:
    patch.setattr(hooks, 'preempted', lambda: next(answers))
    with pytest.raises(hooks.Preempted, match='with 32 of 80 captions written'):
      run(tmp_path / 'other')
  other = tmp_path / 'other' / 'captions' / 'data'
  first = other / 'captions-00000-of-00003.safetensors'
  written = first.stat().st_mtime_ns
  run(tmp_path / 'other')
  assert contents(other) == want
  assert first.stat().st_mtime_ns == written


def test_an_export_encodes(tmp_path):
  model, params = t5_export(tmp_path)
  _, source, path = run(
      tmp_path, encoder=str(tmp_path / 't5'), dtype='bfloat16'
  )
  ids, mask = tokens.WordTokenizer(length=10)(prompts.digit_words().texts)
  want = np.asarray(jax.jit(model.apply)(params, ids, mask))
  record = source[17]
  found = record['features'][record['mask']]
  np.testing.assert_allclose(found, want[17][mask[17]], rtol=0.01, atol=0.02)
  digest = source.manifest.provenance['encoder']
  assert digest == checkpoint.describe(tmp_path / 't5')['hash']
  cast = dict(path=str(tmp_path / 't5'), dtype='bfloat16')
  _, other, _ = run(tmp_path / 'cast', encoder=cast)
  assert other.manifest.provenance['encoder'] == f'{digest} as bfloat16'


def test_the_mesh_leaves_no_trace(tmp_path):
  t5_export(tmp_path)
  found = [
      run(tmp_path / rules, rules, encoder=str(tmp_path / 't5'))[1]
      for rules in MESHES
  ]
  a, b = (s.take(np.arange(80)) for s in found)
  np.testing.assert_array_equal(a['mask'], b['mask'])
  np.testing.assert_allclose(a['features'], b['features'], atol=2e-3)


def test_prompts_from_a_file(tmp_path):
  file = tmp_path / 'p.txt'
  file.write_text('a handwritten two\nnine\n')
  _, source, _ = run(
      tmp_path, prompts=dict(source='text', path=str(file))
  )
  assert len(source) == 2 and source.text(1) == 'nine'
  assert 'label' not in source[0]
  file.write_text('nine\n' + 'nine ' * 11)
  with pytest.raises(ValueError, match='p.txt:2: the caption has 11 tokens'):
    run(tmp_path, prompts=dict(source='text', path=str(file)))
  file.write_text('nine\n\n')
  with pytest.raises(ValueError, match='p.txt:2: the line is empty'):
    run(tmp_path, prompts=dict(source='text', path=str(file)))


@pytest.mark.parametrize('fields, message', [
    ({'batch_size': 12}, 'batch_size=12 does not divide'),
    ({'shard_size': 24}, 'shard_size=24 is not a multiple of batch_size=16'),
    ({'prompts': {}}, "lacks 'source'"),
    ({'prompts': {'source': 'digits'}}, "no entry 'digits'"),
    ({'prompts': {'source': 'text'}}, "missing .*'path'"),
    ({'tokenizer': {'name': 'words', 'size': 3}}, "'size'"),
    ({'tokenizer': {'name': 'words', 'length': 11}},
     'caption_length is 10, but that of the tokenizer is 11'),
    ({'encoder': {'model': WORDS | {'vocab_size': 44}}},
     'the encoder has vocab_size 44, but that of the tokenizer is 45'),
    ({'encoder': {'model': {'name': 't5', **t5.SIZES['small']}}},
     "weights of a 't5' are not fixed by its config; give an export"),
    ({'dtype': 'float32'}, "'dtype' must be one of"),
    ({'caption_length': 120, 'encoder': {'model': WORDS | {'max_length': 90}}},
     '120 tokens are more than max_length=90'),
])
def test_bad_settings(tmp_path, fields, message):
  with pytest.raises(ValueError, match=message):
    run(tmp_path, **fields)


def test_a_run_has_such_a_stage(tmp_path):
  config = {'name': 'x', 'seed': 0, 'mesh': {'data': -1}, 'rules': 'dp'}
  parsed = stages.parse(config | {'stages': {
      'text': dict(CONFIG, kind='captions', encoder='stage:t5'),
      't5': dict(kind='convert', family='t5', input=['a.safetensors']),
  }})
  assert [s.name for s in parsed] == ['t5', 'text']
