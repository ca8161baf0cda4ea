# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of prompt files and of the embedded prompts."""

from __future__ import annotations

import re

import pytest

from dd_jax import registry
from dd_jax.data import prompts


def write(tmp_path, text, name='p.jsonl'):
  file = tmp_path / name
  file.write_bytes(text if isinstance(text, bytes) else text.encode())
  return file


def test_embedded_prompts():
  found = prompts.digit_words()
  assert len(found) == 80 == len(set(found.texts))
  assert found.texts[7] == 'a handwritten seven'
  assert found.texts[17] == 'the digit 7 drawn by hand'
  assert found.labels[:12] == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1)
  assert found.num_classes == 10
  assert found == prompts.digit_words()
  assert found.where[11] == 'digit_words:12'


def test_jsonl(tmp_path):
  file = write(tmp_path, '{"prompt": " a cat ", "label": 2}\n'
               '{"prompt": "a dog", "label": 0, "url": "x"}\n')
  found = prompts.jsonl(file)
  assert found.texts == ('a cat', 'a dog')
  assert (found.labels, found.num_classes) == ((2, 0), 3)
  assert found.where == (f'{file}:1', f'{file}:2')
  plain = prompts.jsonl(write(tmp_path, '{"prompt": "a cat"}\n'))
  assert (plain.labels, plain.num_classes) == (None, None)
  assert plain.sha256 != found.sha256


def test_text(tmp_path):
  found = prompts.text(write(tmp_path, 'a cat\nan ünicode dog', 'p.txt'))
  assert found.texts == ('a cat', 'an ünicode dog')
  assert found.labels is None
  assert found.where[1].endswith('p.txt:2')


@pytest.mark.parametrize('name, plain', [
    ('p.txt', True), ('p.TXT', True), ('p.jsonl', False), ('p', False),
])
def test_the_name_of_a_file_says_how_to_read_it(tmp_path, name, plain):
  read = registry.get('prompts', 'file')
  line = '{"prompt": "a cat"}'
  found = read(path=write(tmp_path, line, name))
  assert found.texts == ((line if plain else 'a cat'),)
  if not plain:
    with pytest.raises(ValueError, match=f'{name}:1: not JSON'):
      read(path=write(tmp_path, 'a cat', name))


@pytest.mark.parametrize('line, message', [
    ('', 'the line is empty; remove it'),
    ('   ', 'the line is empty; remove it'),
    ('{"prompt"', 'not JSON'),
    ('[' * 100_000, 'not JSON'),
    (r'{"prompt": "cute \ud83d"}', 'the prompt is no Unicode text'),
    ('"a cat"', 'not an object'),
    ('{"caption": "x"}', 'no field "prompt", only [\'caption\']'),
    ('{"prompt": "  ", "label": 1}', "no text or empty: '  '"),
    ('{"prompt": 3, "label": 1}', 'no text or empty: 3'),
    ('{"prompt": "x", "label": true}', 'integer from 0 on, not True'),
    ('{"prompt": "x", "label": -1}', 'integer from 0 on, not -1'),
    ('{"prompt": "x", "label": "3"}', "integer from 0 on, not '3'"),
    ('{"prompt": "x"}', 'in all lines or in none; this one lacks it'),
])
def test_bad_lines_are_named(tmp_path, line, message):
  file = write(tmp_path, f'{{"prompt": "a", "label": 1}}\n{line}\n')
  with pytest.raises(
      ValueError, match=re.escape(f'{file}:2: ') + '.*' + re.escape(message)
  ):
    prompts.jsonl(file)


def test_a_label_that_comes_late(tmp_path):
  file = write(tmp_path, '{"prompt": "a"}\n{"prompt": "a", "label": 1}\n')
  with pytest.raises(ValueError, match=':2: .*this one has it and others do'):
    prompts.jsonl(file)


def test_bad_files(tmp_path):
  with pytest.raises(ValueError, match=r'p\.txt:2: the line is empty'):
    prompts.text(write(tmp_path, 'a\n\nb\n', 'p.txt'))
  for read in (prompts.text, prompts.jsonl):
    with pytest.raises(ValueError, match='has no lines'):
      read(write(tmp_path, ''))
    with pytest.raises(ValueError, match=r'p\.jsonl:1: not UTF-8'):
      read(write(tmp_path, b'\xff\xfe\n'))
    with pytest.raises(FileNotFoundError):
      read(tmp_path / 'none')
