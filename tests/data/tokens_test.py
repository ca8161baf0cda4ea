# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of tokenizers: rows, limits, files, missing libraries."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest

from dd_jax.data import prompts, tokens

PIECES = ('<pad>', '</s>', '<unk>', 'a', 'cat', 'dog')


class Processor:
  """A stand-in for sentencepiece: whole words, case kept."""

  def __init__(self, model_file):
    if b'broken' in open(model_file, 'rb').read():
      raise RuntimeError('no model')

  def get_piece_size(self):
    return len(PIECES)

  def encode(self, caption):
    return [PIECES.index(w) if w in PIECES else 2 for w in caption.split()]


@pytest.fixture
def spiece(tmp_path, monkeypatch):
  """A T5 file and a library that reads it."""
  module = types.ModuleType('sentencepiece')
  module.SentencePieceProcessor = Processor
  monkeypatch.setitem(sys.modules, 'sentencepiece', module)
  file = tmp_path / 'spiece.model'
  file.write_bytes(b'model')
  return file


def test_clean():
  assert tokens.clean('  A  Cat &amp;\tDOG\n') == 'a cat & dog'


def test_t5_rows(spiece):
  for path in (spiece, spiece.parent):
    tokenizer = tokens.T5Tokenizer(path, length=5)
    ids, mask = tokenizer(['A  Cat', 'dog'])
    np.testing.assert_array_equal(ids, [[3, 4, 1, 0, 0], [5, 1, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids != 0)
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
  cased = tokens.T5Tokenizer(spiece, length=5, lower=False)
  np.testing.assert_array_equal(cased(['A cat'])[0], [[2, 4, 1, 0, 0]])
  assert cased.identity != tokenizer.identity
  assert tokens.T5Tokenizer(spiece).length == 120


def test_captions_that_do_not_fit_are_named(spiece):
  tokenizer = tokens.T5Tokenizer(spiece)
  full = ' '.join(['cat'] * 119)
  assert tokenizer([full])[1].all()
  with pytest.raises(
      ValueError, match='p.txt:7: the caption has 121 tokens, at most 120'
  ):
    tokenizer(['a cat', f'{full} dog'], ['p.txt:6', 'p.txt:7'])
  for empty in ('', ' \n', '&nbsp;'):
    with pytest.raises(ValueError, match='p.txt:7: the caption is empty'):
      tokenizer(['a cat', empty], ['p.txt:6', 'p.txt:7'])
  with pytest.raises(ValueError, match='caption 1: the caption is empty'):
    tokenizer(['a cat', ''])


def test_bad_files(spiece, tmp_path):
  with pytest.raises(FileNotFoundError, match='spiece.model or tokenizer.json'):
    tokens.T5Tokenizer(tmp_path / 'none')
  with pytest.raises(FileNotFoundError, match='no tokenizer here'):
    tokens.ClipTokenizer(spiece.parent)
  spiece.write_bytes(b'broken')
  with pytest.raises(ValueError, match='spiece.model: not a model of sentence'):
    tokens.T5Tokenizer(spiece)


@pytest.mark.parametrize('package, name, cls', [
    ('sentencepiece', 'spiece.model', tokens.T5Tokenizer),
    ('tokenizers', 'tokenizer.json', tokens.T5Tokenizer),
    ('tokenizers', 'tokenizer.json', tokens.ClipTokenizer),
])
def test_a_missing_library_names_the_extra(
    package, name, cls, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, package, None)
  (tmp_path / name).write_text('{}')
  with pytest.raises(ImportError, match=rf"{package}: .*dd_jax\[text\]"):
    cls(tmp_path)


def test_words():
  tokenizer = tokens.WordTokenizer(length=9)
  ids, mask = tokenizer(prompts.digit_words().texts)
  assert ids.shape == (80, 9) and ids.max() == tokenizer.vocab_size - 1
  assert len(np.unique(ids, axis=0)) == 80
  np.testing.assert_array_equal(mask, ids > 0)
  assert mask.sum(1).min() == 1
  again = tokenizer(['A  handwritten SEVEN'])[0]
  np.testing.assert_array_equal(again, ids[7:8])
  with pytest.raises(ValueError, match="p:3: the word 'llama' is not known"):
    tokenizer(['a llama'], ['p:3'])
  with pytest.raises(ValueError, match='at most 2 are allowed'):
    tokens.WordTokenizer(length=2)(['a handwritten seven'])


def word_level(library, file, extra=()):
  """A tokenizer.json of whole words that also pads and truncates."""
  words = [*extra, '<pad>', '</s>', '<unk>', 'a', 'cat', 'dog']
  made = library.Tokenizer(library.models.WordLevel(
      {w: i for i, w in enumerate(words)}, unk_token='<unk>'
  ))
  made.pre_tokenizer = library.pre_tokenizers.Whitespace()
  made.normalizer = library.normalizers.Lowercase()
  made.enable_truncation(2)
  made.enable_padding(length=4)
  made.save(str(file))


def test_tokenizers_files(tmp_path):
  library = pytest.importorskip('tokenizers')
  file = tmp_path / 'tokenizer.json'
  word_level(library, file)
  ids, _ = tokens.T5Tokenizer(file, length=6)(['A cat dog'])
  np.testing.assert_array_equal(ids, [[3, 4, 5, 1, 0, 0]])
  with pytest.raises(ValueError, match='lacks <|startoftext|>'):
    tokens.ClipTokenizer(file)
  word_level(library, file, tokens._CLIP_ENDS)
  ids, mask = tokens.ClipTokenizer(file, length=5)(['A cat dog', 'cat'])
  np.testing.assert_array_equal(ids, [[0, 5, 6, 7, 1], [0, 6, 1, 0, 0]])
  np.testing.assert_array_equal(mask.sum(1), [5, 3])
  with pytest.raises(ValueError, match='p:2: the caption has 5 tokens'):
    tokens.ClipTokenizer(file, length=4)(['cat', 'a cat dog'], ['p:1', 'p:2'])
  cut = tokens.ClipTokenizer(file, length=4, truncate=True)
  np.testing.assert_array_equal(cut(['a cat dog'])[0], [[0, 5, 6, 1]])
  with pytest.raises(ValueError, match='the caption is empty'):
    cut([''])
  file.write_text('{}')
  with pytest.raises(ValueError, match='not a tokenizer.json'):
    tokens.ClipTokenizer(file)


def test_sentencepiece_files(tmp_path):
  library = pytest.importorskip('sentencepiece')
  made = io.BytesIO()
  library.SentencePieceTrainer.train(
      sentence_iterator=iter(prompts.digit_words().texts), model_writer=made,
      vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
      minloglevel=2,
  )
  (tmp_path / 'spiece.model').write_bytes(made.getvalue())
  tokenizer = tokens.T5Tokenizer(tmp_path)
  assert tokenizer.vocab_size == 60
  ids, mask = tokenizer(prompts.digit_words().texts)
  assert len(np.unique(ids, axis=0)) == 80
  last = mask.sum(1) - 1
  np.testing.assert_array_equal(ids[np.arange(80), last], 1)
  assert (ids[mask] > 0).all() and not ids[~mask].any()
  (tmp_path / 'spiece.model').write_bytes(b'broken')
  with pytest.raises(ValueError, match='not a model of sentencepiece'):
    tokens.T5Tokenizer(tmp_path)


def test_t5_rows_are_those_of_transformers(tmp_path):
  library = pytest.importorskip('sentencepiece')
  transformers = pytest.importorskip('transformers')
  file = tmp_path / 'spiece.model'
  with file.open('wb') as made:
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts.digit_words().texts), model_writer=made,
        vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )
  theirs = transformers.T5Tokenizer.from_pretrained(str(tmp_path))
  texts = list(prompts.digit_words().texts[::9])
  want = theirs(texts, max_length=120, padding='max_length', truncation=True,
                return_tensors='np')
  ids, mask = tokens.T5Tokenizer(file)(texts)
  np.testing.assert_array_equal(ids, want['input_ids'])
  np.testing.assert_array_equal(mask, want['attention_mask'])
