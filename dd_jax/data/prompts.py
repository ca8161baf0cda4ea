# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Captions to draw: from files, and an embedded set for the ten digits."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

_WORDS = (
    'zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight',
    'nine',
)
_TEMPLATES = (
    'a handwritten {word}',
    'the digit {numeral} drawn by hand',
    'a picture of the number {word}',
    'the number {numeral} in white on black',
    'handwriting that shows the digit {word}',
    'someone wrote {numeral} with a pen',
    'a small gray image of the digit {numeral}',
    '{word}',
)


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Captions in a fixed order; a caption's position is its prompt id.

  Attributes:
    texts: captions, none of them blank.
    where: 'file:line' of each, for messages.
    labels: classes of the captions, or None.
    num_classes: labels lie in [0, num_classes); None without labels.
  """

  texts: tuple[str, ...]
  where: tuple[str, ...]
  labels: tuple[int, ...] | None = None
  num_classes: int | None = None

  def __len__(self) -> int:
    return len(self.texts)

  @property
  def sha256(self) -> str:
    """Of captions and labels."""
    text = json.dumps([self.texts, self.labels, self.num_classes])
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: str | os.PathLike[str]) -> Prompts:
  """As `text` where the name ends with .txt, as `jsonl` elsewhere."""
  suffix = pathlib.Path(path).suffix.lower()
  return text(path) if suffix == '.txt' else jsonl(path)


def jsonl(path: str | os.PathLike[str]) -> Prompts:
  """Lines of JSON: {"prompt": "a cat"} or {"prompt": "a cat", "label": 3}.

  Further fields are left alone. Labels are for all lines or for none; there
  are as many classes as the largest one asks for.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no lines, or a line that is empty, broken or lacks a field; the
      message names the file and the line.
  """
  texts, where, labels = [], [], []
  for line, place in _lines(path):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as e:
      raise ValueError(f'{place}: not JSON ({e})') from e
    if not isinstance(record, dict):
      raise ValueError(f'{place}: not an object such as {{"prompt": "a cat"}}')
    if 'prompt' not in record:
      raise ValueError(
          f'{place}: there is no field "prompt", only {sorted(record)}'
      )
    texts.append(_caption(record['prompt'], place))
    where.append(place)
    if 'label' in record:
      labels.append(_label(record['label'], place))
    if len(labels) not in (0, len(texts)):
      raise ValueError(
          f'{place}: "label" must be in all lines or in none; this one '
          + ('has it and others do not' if 'label' in record else 'lacks it')
      )
  return Prompts(
      tuple(texts), tuple(where), tuple(labels) or None,
      max(labels) + 1 if labels else None,
  )


def text(path: str | os.PathLike[str]) -> Prompts:
  """A caption on each line, without labels.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no lines, or an empty one; the message names the file and the
      line.
  """
  pairs = [(_caption(line, place), place) for line, place in _lines(path)]
  texts, where = zip(*pairs, strict=True)
  return Prompts(texts, where)


def digit_words() -> Prompts:
  """Captions of the ten digits, in words and numerals: 80 with labels.

  Prompt i is template i // 10 for the digit i % 10, so that classes go round.
  """
  texts = tuple(
      template.format(word=word, numeral=digit)
      for template in _TEMPLATES for digit, word in enumerate(_WORDS)
  )
  where = tuple(f'digit_words:{i + 1}' for i in range(len(texts)))
  return Prompts(texts, where, tuple(i % 10 for i in range(len(texts))), 10)


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
  """Lines of a file and their names; at least one."""
  file, number = pathlib.Path(path), 0
  try:
    with file.open(encoding='utf-8') as lines:
      for number, line in enumerate(lines, 1):
        place = f'{file}:{number}'
        if not line.strip():
          raise ValueError(f'{place}: the line is empty; remove it')
        yield line, place
  except UnicodeDecodeError as e:
    raise ValueError(f'{file}:{number + 1}: not UTF-8 text ({e})') from e
  if not number:
    raise ValueError(f'{file} has no lines')


def _caption(value: Any, place: str) -> str:
  if not isinstance(value, str) or not value.strip():
    raise ValueError(f'{place}: the prompt is no text or empty: {value!r}')
  try:
    value.encode()
  except UnicodeEncodeError as e:  # half of a character, cut in two
    raise ValueError(f'{place}: the prompt is no Unicode text ({e})') from e
  return value.strip()


def _label(value: Any, place: str) -> int:
  if type(value) is not int or not 0 <= value < 2**31:
    raise ValueError(
        f'{place}: the label must be an integer from 0 on, not {value!r}'
    )
  return value
