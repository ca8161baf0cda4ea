# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Captions to token numbers, by the files that come with the text encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import hashlib
import html
import importlib
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from dd_jax.data import prompts

LENGTH = 120  # tokens of a caption of LlamaGen, the end included
_T5_FILES = ('spiece.model', 'tokenizer.json')
_T5_END = 1
_CLIP_LENGTH = 77
_CLIP_ENDS = ('<|startoftext|>', '<|endoftext|>')


class Tokenizer(Protocol):
  """Turns captions into rows of one length.

  Attributes:
    length: of the rows.
    vocab_size: tokens lie in [0, vocab_size).
    identity: tells tokenizers apart that give different tokens.
  """

  length: int
  vocab_size: int
  identity: str

  def __call__(
      self, captions: Sequence[str], where: Sequence[str] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes captions.

    Args:
      captions: B texts.
      where: what to call each in errors, such as 'file:line'.

    Returns:
      Tokens (B, length) int32, zero behind the caption, and a mask (B, length)
      bool, True where there is a token.

    Raises:
      ValueError: an empty caption or one with too many tokens; names it.
    """
    ...


def clean(caption: str) -> str:
  """Lower case, no HTML entities, single spaces.

  This is what the text pipeline of LlamaGen (language/t5.py) does to ordinary
  sentences. It also removes web addresses, mark-up, file names, long numbers,
  brackets and ideographs from scraped captions: filter those beforehand.
  """
  return ' '.join(html.unescape(caption).lower().split())


class T5Tokenizer:
  """Tokens of T5 and flan-t5; see `Tokenizer`."""

  def __init__(
      self, path: str | os.PathLike[str], *, length: int = LENGTH,
      lower: bool = True,
  ):
    """Reads a tokenizer's file.

    Args:
      path: `spiece.model`, `tokenizer.json`, or a folder with one of them.
      length: of the rows; 120 for LlamaGen.
      lower: passes captions through `clean`, as LlamaGen was trained.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the library for this file is missing.
      ValueError: the file cannot be read.
    """
    file = _file(path, _T5_FILES)
    self.length, self._lower = length, lower
    if file.suffix == '.json':
      loaded = _load_json(file)
      self.vocab_size = loaded.get_vocab_size()
      self._encode = lambda caption: loaded.encode(
          caption, add_special_tokens=False).ids
    else:
      loaded = _load_sentencepiece(file)
      self.vocab_size = loaded.get_piece_size()
      self._encode = loaded.encode
    self.identity = f't5 {_sha256(file)} length={length} lower={lower}'

  def __call__(
      self, captions: Sequence[str], where: Sequence[str] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:

    def encode(caption: str, place: str) -> list[int]:
      ids = self._encode(clean(caption) if self._lower else caption)
      return [*ids, _T5_END] if ids else []

    return _rows(captions, where, encode, self.length)


class ClipTokenizer:
  """Tokens of CLIP, between its start and its end; see `Tokenizer`."""

  def __init__(
      self, path: str | os.PathLike[str], *, length: int = _CLIP_LENGTH,
      truncate: bool = False,
  ):
    """Reads a tokenizer's file.

    Args:
      path: `tokenizer.json`, or a folder with it.
      length: of the rows; 77 for published networks.
      truncate: cuts captions that are too long and keeps the end token,
        instead of raising.

    Raises:
      FileNotFoundError: no such file.
      ImportError: the library is missing.
      ValueError: the file cannot be read or lacks the start or end token.
    """
    file = _file(path, ('tokenizer.json',))
    self._loaded = _load_json(file)
    self.length, self._truncate = length, truncate
    self.vocab_size = self._loaded.get_vocab_size()
    ends = [self._loaded.token_to_id(t) for t in _CLIP_ENDS]
    if None in ends:
      raise ValueError(f'{file} lacks {" or ".join(_CLIP_ENDS)}')
    self._start, self._end = ends
    self.identity = f'clip {_sha256(file)} length={length} truncate={truncate}'

  def __call__(
      self, captions: Sequence[str], where: Sequence[str] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:

    def encode(caption: str, place: str) -> list[int]:
      ids = self._loaded.encode(caption, add_special_tokens=False).ids
      if self._truncate:
        ids = ids[:self.length - 2]
      return [self._start, *ids, self._end] if ids else []

    return _rows(captions, where, encode, self.length)


class WordTokenizer:
  """Whole words of the embedded captions, without files; see `Tokenizer`.

  Numbers go by the alphabet, from 1 on.
  """

  def __init__(self, *, length: int = LENGTH):
    self.length = length
    words = {w for t in prompts.digit_words().texts for w in t.split()}
    self._ids = {word: i for i, word in enumerate(sorted(words), 1)}
    self.vocab_size = len(self._ids) + 1
    digest = hashlib.sha256(' '.join(self._ids).encode()).hexdigest()
    self.identity = f'words {digest} length={length}'

  def __call__(
      self, captions: Sequence[str], where: Sequence[str] | None = None
  ) -> tuple[np.ndarray, np.ndarray]:

    def encode(caption: str, place: str) -> list[int]:
      words = clean(caption).split()
      unknown = [w for w in words if w not in self._ids]
      if unknown:
        raise ValueError(
            f'{place}: the word {unknown[0]!r} is not known; words are '
            f'{", ".join(self._ids)}'
        )
      return [self._ids[w] for w in words]

    return _rows(captions, where, encode, self.length)


def _rows(
    captions: Sequence[str], where: Sequence[str] | None,
    encode: Callable[[str, str], list[int]], length: int,
) -> tuple[np.ndarray, np.ndarray]:
  where = where or [f'caption {i}' for i in range(len(captions))]
  tokens = np.zeros((len(captions), length), np.int32)
  mask = np.zeros((len(captions), length), bool)
  for i, (caption, place) in enumerate(zip(captions, where, strict=True)):
    ids = encode(caption, place)
    if not ids:
      raise ValueError(f'{place}: the caption is empty: {caption!r}')
    if len(ids) > length:
      raise ValueError(
          f'{place}: the caption has {len(ids)} tokens, at most {length} are '
          f'allowed; shorten it: {caption[:60]!r}...'
      )
    tokens[i, :len(ids)] = ids
    mask[i, :len(ids)] = True
  return tokens, mask


def _file(
    path: str | os.PathLike[str], names: Sequence[str]
) -> pathlib.Path:
  """The file itself, or the first of `names` in a folder."""
  path = pathlib.Path(path)
  found = [path] if path.is_file() else [path / n for n in names]
  for file in found:
    if file.is_file():
      return file
  raise FileNotFoundError(
      f'{path}: no tokenizer here; it must be {" or ".join(names)}, or a '
      'folder with it'
  )


def _load_json(file: pathlib.Path) -> Any:
  library = _import('tokenizers', file)
  try:
    loaded = library.Tokenizer.from_file(str(file))
  except Exception as e:  # the library raises nothing narrower
    raise ValueError(f'{file}: not a tokenizer.json ({e})') from e
  # A file may say how to cut and fill, which is for us to do.
  loaded.no_truncation()
  loaded.no_padding()
  return loaded


def _load_sentencepiece(file: pathlib.Path) -> Any:
  library = _import('sentencepiece', file)
  try:
    return library.SentencePieceProcessor(model_file=str(file))
  except (OSError, RuntimeError) as e:
    raise ValueError(f'{file}: not a model of sentencepiece ({e})') from e


def _import(package: str, file: pathlib.Path) -> Any:
  try:
    return importlib.import_module(package)
  except ImportError as e:
    raise ImportError(
        f"{file} needs {package}: pip install 'dd_jax[text]'"
    ) from e


def _sha256(file: pathlib.Path) -> str:
  return hashlib.sha256(file.read_bytes()).hexdigest()
