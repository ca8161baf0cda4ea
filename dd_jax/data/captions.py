# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Features of captions on disk: shards of their tokens beside a manifest.

A set of captions is a folder on a local or mounted file system:

    manifest.json                        what they are, hash of each shard
    captions-00000-of-00002.safetensors  captions [0, shard_size)
    captions-00001-of-00002.safetensors  captions [shard_size, captions)

Padding is not stored: `features` (tokens, width) holds the tokens of all
captions of a shard one after another, and caption i of it has the rows
`offsets[i]` to `offsets[i + 1]`. Likewise `text` holds UTF-8 bytes and
`text_offsets` says whose they are. `labels` are there where captions have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from dd_jax.data import files, sources
from dd_jax.data.files import Shard

DTYPES: Mapping[str, np.dtype] = {
    'float16': np.dtype(np.float16), 'bfloat16': np.dtype(ml_dtypes.bfloat16),
}
_KINDS = {  # of .safetensors
    'F16': DTYPES['float16'], 'BF16': DTYPES['bfloat16'],
    'I64': np.dtype('<i8'), 'I32': np.dtype('<i4'), 'U8': np.dtype('u1'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(files.Manifest):
  """What a set of captions is.

  Attributes:
    captions: number of captions; prompt ids are [0, captions).
    shard_size: captions in each shard; the last one may hold fewer.
    width: size of a feature vector.
    caption_length: most tokens of a caption.
    dtype: stored type of the features, a key of `DTYPES`.
    num_classes: labels lie in [0, num_classes); None without labels.
    provenance: how they were made, as JSON: hash of the encoder, of the
      prompts, the tokenizer, ...
    shards: the finished files in order; empty until `CaptionWriter.finalize`.
  """

  KIND, SUFFIX, VERSION = 'captions', 'safetensors', 1

  captions: int
  shard_size: int
  width: int
  caption_length: int
  dtype: str
  num_classes: int | None
  provenance: Mapping[str, Any]
  shards: tuple[Shard, ...] = ()

  def __post_init__(self):
    self.check_count()
    for name in ('width', 'caption_length'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be positive: {getattr(self, name)}')
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype must be one of {list(DTYPES)}: {self.dtype!r}')


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
  """Reads the manifest of the set of captions in the folder `path`.

  Raises:
    FileNotFoundError: there is none.
    ValueError: it is damaged or its format is newer than this library; the
      message names the file.
  """
  return Manifest.read(_folder(path))


class CaptionWriter(files.Writer):
  """Writes a set of captions; see `files.Writer`."""

  def check(self, manifest: Manifest, shard: int) -> None:
    _open(self._path, manifest, shard)

  def write(
      self, shard: int, *, features: Sequence[np.ndarray],
      texts: Sequence[str], labels: Sequence[int] | None,
  ) -> None:
    """Writes all captions of one shard, and only then gives the file its name.

    Args:
      shard: which one; its captions are `Manifest.shard_ids(shard)`, N of them.
      features: N arrays (tokens, width), of any float type.
      texts: the N captions.
      labels: N integers in [0, num_classes); None without labels.

    Raises:
      ValueError: wrong numbers, shapes or values, NaN, or features that are
        too large for the stored type; nothing is written.
    """
    manifest = self._manifest
    ids = manifest.shard_ids(shard)
    if (labels is None) != (manifest.num_classes is None):
      raise ValueError('labels and num_classes go together')
    for name, values in (
        ('features', features), ('texts', texts), ('labels', labels)
    ):
      if values is not None and len(values) != len(ids):
        raise ValueError(f'{len(values)} {name} for {len(ids)} captions')
    stored = []
    with np.errstate(over='ignore'):  # found below, with a message
      for i, x in zip(ids, features, strict=True):
        stored.append(np.asarray(x).astype(DTYPES[manifest.dtype]))
        _check_features(manifest, i, stored[-1])
    text = [t.encode() for t in texts]
    tensors = {
        'features': np.concatenate(stored),
        'offsets': _offsets(stored),
        'text': np.frombuffer(b''.join(text), np.uint8),
        'text_offsets': _offsets(text),
    }
    if labels is not None:
      tensors['labels'] = np.asarray(labels, np.int32)
      _check_labels(manifest, shard, tensors['labels'])
    with self._written(shard) as part:
      safetensors.numpy.save_file(tensors, part)


def pad(
    features: Sequence[np.ndarray], length: int, width: int
) -> dict[str, np.ndarray]:
  """Features of captions in one array, each at the end of its row.

  So LlamaGen pads captions, with zeros before them.

  Args:
    features: N arrays (tokens, width), of at most `length` tokens.
    length: of the rows.
    width: size of a feature vector.

  Returns:
    `features` float32 (N, length, width), and `mask` bool (N, length), True
    where there is a token.
  """
  shape = (len(features), length)
  out = np.zeros((*shape, width), np.float32)
  mask = np.zeros(shape, bool)
  for k, x in enumerate(features):
    out[k, length - len(x):] = x
    mask[k, length - len(x):] = True
  return {'features': out, 'mask': mask}


class CaptionSource:
  """A finished set of captions as a `sources.BatchSource`.

  Records are `prompt_id` uint32, `features` float32 (caption_length, width),
  `mask` bool (caption_length,), and `label` int32 where there are labels.
  Features stand at the end and the mask is True on them, see `pad`. Files are
  mapped into memory, not read.

  Attributes:
    manifest: what the captions are.
    num_classes: labels lie in [0, num_classes); None without labels.
  """

  def __init__(
      self, path: str | os.PathLike[str], *, caption_length: int | None = None,
      verify: bool = True,
  ):
    """Opens the set of captions in the folder `path`.

    Args:
      path: folder of the set.
      caption_length: length of the padded features; None takes that of the
        manifest.
      verify: compares every file with its hash in the manifest.

    Raises:
      FileNotFoundError: the manifest or a shard is missing.
      ValueError: the set is not finished, its format is too new, a shard is
        truncated or changed, or its captions may be longer than
        `caption_length`; the message names the file.
    """
    self._path = _folder(path)
    self.manifest = read_manifest(self._path)
    self.manifest.check_finished(self._path)
    self._length = caption_length or self.manifest.caption_length
    if self._length < self.manifest.caption_length:
      raise ValueError(
          f'{self._path}: captions of up to {self.manifest.caption_length} '
          f'tokens do not fit in caption_length={self._length}'
      )
    self.num_classes = self.manifest.num_classes
    self._shards: dict[int, dict[str, np.ndarray]] = {}
    for shard in range(self.manifest.num_shards):
      self.manifest.check_file(self._path, shard, verify=verify)

  def __getstate__(self) -> dict[str, Any]:
    # Maps would be copied with all their contents.
    return self.__dict__ | {'_shards': {}}

  def __len__(self) -> int:
    return self.manifest.captions

  def __getitem__(self, i: int) -> sources.Record:
    return {name: a[0] for name, a in self.take(np.array([i])).items()}

  def take(self, rows: np.ndarray) -> sources.Batch:
    found, labels = [], np.zeros(len(rows), np.int32)
    for k, row in enumerate(np.asarray(rows).tolist()):
      tensors, i = self._find(row)
      start, stop = tensors['offsets'][i : i + 2]
      found.append(tensors['features'][start:stop])
      if self.num_classes is not None:
        labels[k] = tensors['labels'][i]
    batch = {
        'prompt_id': np.asarray(rows).astype(np.uint32),
        **pad(found, self._length, self.manifest.width),
    }
    return batch if self.num_classes is None else batch | {'label': labels}

  @property
  def labels(self) -> np.ndarray:
    """Classes (captions,) int32, of captions that have them."""
    firsts = range(0, len(self), self.manifest.shard_size)
    return np.concatenate([self._find(i)[0]['labels'] for i in firsts])

  def text(self, i: int) -> str:
    """The caption itself."""
    tensors, i = self._find(i)
    start, stop = tensors['text_offsets'][i : i + 2]
    return tensors['text'][start:stop].tobytes().decode()

  def _find(self, row: int) -> tuple[dict[str, np.ndarray], int]:
    """The shard of a caption, and its place there."""
    if not 0 <= row < len(self):
      raise IndexError(f'there is no caption {row} of {len(self)}')
    shard, i = divmod(row, self.manifest.shard_size)
    if shard not in self._shards:
      self._shards[shard] = _open(self._path, self.manifest, shard)
    return self._shards[shard], i


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
  return files.local_folder(path, 'a set of captions')


def _offsets(parts: Sequence[Any]) -> np.ndarray:
  return np.cumsum([0, *map(len, parts)]).astype(np.int64)


def _open(
    path: pathlib.Path, manifest: Manifest, shard: int
) -> dict[str, np.ndarray]:
  """Maps the tensors of a shard and checks its index."""
  file = path / manifest.shard_name(shard)
  count = len(manifest.shard_ids(shard))
  try:
    tensors = _map(file)
    names = {'features', 'offsets', 'text', 'text_offsets'}
    if manifest.num_classes is not None:
      names.add('labels')
    if tensors.keys() != names:
      raise ValueError(f'it holds {sorted(tensors)}')
    features, offsets = tensors['features'], tensors['offsets']
    if features.ndim != 2 or features.shape[1] != manifest.width or (
        features.dtype != DTYPES[manifest.dtype]
    ):
      raise ValueError(f'features are {features.dtype}{list(features.shape)}')
    lengths = np.diff(offsets)
    if not lengths.size or (
        lengths.min() < 1 or lengths.max() > manifest.caption_length
    ):
      raise ValueError('its captions have wrong lengths')
    for name, whole in (('offsets', 'features'), ('text_offsets', 'text')):
      index = tensors[name]
      if (len(index) != count + 1 or index[0] != 0
          or index[-1] != len(tensors[whole]) or (np.diff(index) < 0).any()):
        raise ValueError(f'{name} do not fit {whole}')
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(f'{file} is truncated or damaged: {e}') from e
  if manifest.num_classes is not None:
    _check_labels(manifest, shard, tensors['labels'])
  return tensors


def _map(file: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a .safetensors file, mapped into memory."""
  raw = np.memmap(file, np.uint8, 'r')
  begin = 8 + int.from_bytes(raw[:8].tobytes(), 'little')
  tensors = {}
  for name, entry in json.loads(raw[8:begin].tobytes()).items():
    start, stop = (begin + n for n in entry['data_offsets'])
    if stop > len(raw):
      raise ValueError(f'{name} ends behind the file')
    tensors[name] = np.asarray(raw[start:stop]).view(
        _KINDS[entry['dtype']]
    ).reshape(entry['shape'])
  return tensors


def _check_features(manifest: Manifest, i: int, features: np.ndarray) -> None:
  if features.ndim != 2 or features.shape[1] != manifest.width or not (
      1 <= len(features) <= manifest.caption_length
  ):
    raise ValueError(
        f'caption {i}: features {list(features.shape)} must be (1 to '
        f'{manifest.caption_length} tokens, {manifest.width})'
    )
  if not np.isfinite(features).all():
    raise ValueError(
        f'caption {i}: features hold NaN, infinity, or what is too large for '
        f'{manifest.dtype}'
    )


def _check_labels(manifest: Manifest, shard: int, labels: np.ndarray) -> None:
  ids = manifest.shard_ids(shard)
  inside = (labels >= 0) & (labels < manifest.num_classes)
  if labels.shape != (len(ids),) or not inside.all():
    raise ValueError(
        f'{manifest.shard_name(shard)}: labels must be {len(ids)} integers in '
        f'[0, {manifest.num_classes})'
    )
