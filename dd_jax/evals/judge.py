# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""One protocol for judging samples of the embedded data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools

import numpy as np

from dd_jax.evals import frechet, precision_recall

Apply = Callable[[np.ndarray], np.ndarray]  # images -> (B, ...), any batch

# What `score` returns, in the order of the tables.
SCORES = (
    'fd_train', 'fd_heldout', 'fd_pixel', 'precision', 'recall', 'accuracy',
    'cov_trace_ratio', 'nn_distance',
)

WEAK_FLOOR_RATIO = 4
MIN_ACCURACY = 0.97

_BATCH = 500
_MANIFOLD_POINTS = 2000  # per set: precision and recall are quadratic in it


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
  """Images as the judge sees them; made by `look`.

  Attributes:
    pixels: (N, H * W * C) float32 in [-1, 1].
    labels: (N,) integers.
    features: (N, 64) float32.
    predictions: (N,) classes that the judge takes the images for.
  """

  pixels: np.ndarray
  labels: np.ndarray
  features: np.ndarray
  predictions: np.ndarray

  @functools.cached_property
  def moments(self) -> tuple[np.ndarray, np.ndarray]:
    return frechet.moments(self.features)

  @functools.cached_property
  def pixel_moments(self) -> tuple[np.ndarray, np.ndarray]:
    return frechet.moments(self.pixels)

  @functools.cached_property
  def manifold(self) -> np.ndarray:
    """Features of a fixed subset, for precision and recall."""
    order = np.random.default_rng(0).permutation(len(self.features))
    return self.features[np.sort(order[:_MANIFOLD_POINTS])]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """The two splits that samples are compared with; made once per judge."""

  train: Judged
  heldout: Judged


def look(
    images: np.ndarray,
    labels: np.ndarray,
    features_fn: Apply,
    logits_fn: Apply,
) -> Judged:
  """Passes images through the judge, in batches of one size.

  Args:
    images: (N, H, W, C) in [-1, 1].
    labels: (N,) integers: the classes that the images should show.
    features_fn: images -> (B, 64).
    logits_fn: images -> (B, classes).

  Raises:
    ValueError: if shapes do not agree or an image holds NaN or infinity.
  """
  images, labels = np.asarray(images, np.float32), np.asarray(labels)
  if images.ndim != 4 or labels.shape != images.shape[:1]:
    raise ValueError(
        f'images {images.shape} and labels {labels.shape}; need (N, H, W, C) '
        'and (N,)'
    )
  if bad := int((~np.isfinite(images).all((1, 2, 3))).sum()):
    raise ValueError(f'{bad} of {len(images)} images hold NaN or infinity')
  return Judged(
      pixels=images.reshape(len(images), -1),
      labels=labels,
      features=_batched(features_fn, images),
      predictions=_batched(logits_fn, images).argmax(-1),
  )


def score(
    images: np.ndarray,
    labels: np.ndarray,
    features_fn: Apply,
    logits_fn: Apply,
    reference: Reference,
) -> dict[str, float]:
  """Scores samples; arguments and errors as for `look`.

  Returns:
    fd_train, fd_heldout: Fréchet distance of features to either split.
    fd_pixel: Fréchet distance of pixels in [-1, 1] to the train split.
    precision, recall: of features against the train split, k = 3, on at most
      2,000 fixed points of each.
    accuracy: fraction that the judge takes for the wanted class.
    cov_trace_ratio: trace of the feature covariance within a class, mean over
      classes, over that of the train split; below 1 is lost diversity.
    nn_distance: mean L2 distance of pixels in [-1, 1] to the nearest train
      image; near 0 is memorisation.
  """
  return compare(look(images, labels, features_fn, logits_fn), reference)


def compare(judged: Judged, reference: Reference) -> dict[str, float]:
  """As `score`, of images that the judge has seen."""
  train = reference.train
  values = (
      frechet.frechet_distance(judged.moments, train.moments),
      frechet.frechet_distance(judged.moments, reference.heldout.moments),
      frechet.frechet_distance(judged.pixel_moments, train.pixel_moments),
      precision_recall.precision(train.manifold, judged.manifold),
      precision_recall.recall(train.manifold, judged.manifold),
      float((judged.predictions == judged.labels).mean()),
      _cov_trace_ratio(judged, train),
      float(precision_recall.kth_distance(judged.pixels, train.pixels).mean()),
  )
  return dict(zip(SCORES, values, strict=True))


def floor(reference: Reference) -> dict[str, float]:
  """Scores of the held-out split; its accuracy is that of the judge.

  It has fewer images than a row has samples, and Fréchet distances fall with
  their number: `resampled_fd` says how much of them that is.
  """
  return compare(reference.heldout, reference)


def resampled_fd(reference: Reference) -> float:
  """FD of train images, as many as are held out, to the other train images.

  The mean of ten draws, each of at most half of the train images. The two sides
  differ by chance alone, so this is what the number of images makes of the FD
  of the held-out split; it is about proportional to the sum of 1 / number over
  the two sides.
  """
  features = reference.train.features
  count = min(len(reference.heldout.features), len(features) // 2)
  rng = np.random.default_rng(0)
  draws = (rng.permutation(features) for _ in range(10))
  return float(np.mean([
      frechet.frechet_distance(
          frechet.moments(some[:count]), frechet.moments(some[count:])
      ) for some in draws
  ]))


def is_weak(row: Mapping[str, float], floor: Mapping[str, float]) -> bool:
  """Whether a teacher is too weak for ratios to it to mean much."""
  return (
      row['fd_train'] > WEAK_FLOOR_RATIO * floor['fd_train']
      or row['accuracy'] < MIN_ACCURACY
  )


def is_fit(floor: Mapping[str, float]) -> bool:
  """Whether the judge knows held-out images well enough to judge."""
  return floor['accuracy'] >= MIN_ACCURACY


def _batched(fn: Apply, images: np.ndarray) -> np.ndarray:
  # The last batch is filled up, so that a jitted `fn` compiles once.
  fill = -len(images) % _BATCH
  padded = np.pad(images, ((0, fill), (0, 0), (0, 0), (0, 0)))
  out = [
      np.asarray(fn(padded[i : i + _BATCH]), np.float32)
      for i in range(0, len(padded), _BATCH)
  ]
  return np.concatenate(out)[: len(images)]


def _cov_trace_ratio(judged: Judged, train: Judged) -> float:
  ours, theirs = _class_traces(judged), _class_traces(train)
  common = sorted(ours.keys() & theirs.keys())
  if not common:
    raise ValueError('no class has two samples and two train images')
  return sum(ours[c] for c in common) / sum(theirs[c] for c in common)


def _class_traces(judged: Judged) -> dict[int, float]:
  """Trace of the covariance within each class of at least two."""
  features = judged.features.astype(np.float64)
  return {
      int(c): float(features[judged.labels == c].var(0, ddof=1).sum())
      for c, n in zip(*np.unique(judged.labels, return_counts=True),
                      strict=True)
      if n > 1
  }
