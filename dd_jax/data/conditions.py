# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What samples are made of: classes, or captions and their features."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from dd_jax.data import sources
from dd_jax.data.captions import CaptionSource
from dd_jax.data.pairs import PairSource

_CAPTION = ('features', 'mask')


class Classes:
  """The classes of a network, as a `sources.BatchSource` of `label`."""

  def __init__(self, num_classes: int):
    self.num_classes = num_classes
    self.labels = np.arange(num_classes, dtype=np.int32)

  def __len__(self) -> int:
    return self.num_classes

  def __getitem__(self, i: int) -> sources.Record:
    return {'label': self.labels[i]}

  def take(self, rows: np.ndarray) -> sources.Batch:
    return {'label': self.labels[rows]}


Conditions = Classes | CaptionSource


def of_network(
    config: Any, captions: str | os.PathLike[str] | None
) -> Conditions:
  """All that a network can be asked for.

  Args:
    config: of a teacher or student.
    captions: folder of a set of captions, for a network without classes.

  Raises:
    FileNotFoundError: see `CaptionSource`.
    ValueError: captions for a network of classes, none for one of captions, or
      features of another size than it takes; or see `CaptionSource`.
  """
  if config.num_classes:
    if captions:
      raise ValueError(f'captions={captions}: the network takes classes')
    return Classes(config.num_classes)
  if not captions:
    raise ValueError('captions: the network takes captions, name a set of them')
  source = CaptionSource(captions, caption_length=config.caption_length)
  if source.manifest.width != config.caption_dim:
    raise ValueError(
        f'{captions}: features of size {source.manifest.width}, the network '
        f'takes caption_dim={config.caption_dim}'
    )
  return source


class Captioned:
  """Records of a source with `features` and `mask` of a caption.

  A pair has the caption that it was made of, whose number is its label. An
  image has one of those of its class; which one depends on its number in the
  source alone.
  """

  def __init__(self, source: sources.BatchSource, captions: CaptionSource):
    """Adds captions to a source.

    Raises:
      ValueError: pairs of another set of captions; captions without labels
        beside images, or images of a class that no caption has.
    """
    self._source, self._captions = source, captions
    self.num_classes = captions.num_classes
    self._by_class: list[np.ndarray] | None = None
    if isinstance(source, PairSource):
      made_of = source.manifest.provenance.get('captions')
      if made_of != captions.manifest.sha256:
        raise ValueError(
            f'the pairs were made of captions {made_of}, these are '
            f'{captions.manifest.sha256}'
        )
      return
    if captions.num_classes is None:
      raise ValueError(
          'captions without labels: an image has a caption of its class, so '
          'each prompt needs a label'
      )
    labels = captions.labels
    self._by_class = [
        np.flatnonzero(labels == c) for c in range(captions.num_classes)
    ]
    empty = [c for c, rows in enumerate(self._by_class) if not len(rows)]
    if source.num_classes != captions.num_classes or empty:
      raise ValueError(
          f'images of {source.num_classes} classes and captions of '
          f'{captions.num_classes}, none of {empty}: they do not go together'
      )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> sources.Record:
    return {name: a[0] for name, a in self.take(np.array([i])).items()}

  def take(self, rows: np.ndarray) -> sources.Batch:
    batch = dict(self._source.take(rows))
    which = batch['label']
    if self._by_class is not None:
      choices = [self._by_class[c] for c in which.tolist()]
      which = np.array([
          c[int(row) % len(c)] for c, row in zip(choices, rows, strict=True)
      ])
    captions = self._captions.take(which)
    return batch | {name: captions[name] for name in _CAPTION}
