# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""FID, Inception Score, precision and recall by the protocol of PyTorch-FID.

Images are rounded to 8 bits before the network sees them, features are float32
and statistics float64. Figures of the other protocol (`evals.adm`) come from
another network and other rounding: they must not stand beside these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import json
from typing import Any
import zipfile

from etils import epath
import numpy as np

from dd_jax.evals import frechet, precision_recall

PROTOCOL = 'pytorch-fid'
SAMPLES = 50_000  # that published figures take
MANIFOLD = 10_000  # features kept for precision and recall
SPLITS = 10  # of the Inception Score
_MOST_CHANNELS = 1 << 12  # of features in a file; Inception's are 2048
_MOST_TEXT = 1 << 20  # bytes that describe an array, or all of them

# Pixels uint8 (n, H, W, 3) to features (n, D) and logits without bias (n, K).
Inception = Callable[[np.ndarray], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """What samples are compared with.

  Attributes:
    mean: (D,) float64 mean of the features.
    cov: (D, D) float64 unbiased covariance.
    features: (M, D) some of the features, or None: no precision and recall.
    meta: how they were made, as far as is known.
  """

  mean: np.ndarray
  cov: np.ndarray
  features: np.ndarray | None = None
  meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Moments:
  """Mean and covariance of features that come in batches, in float64.

  Batches are merged by their means and centred sums (Chan et al., 1979), which
  loses nothing where the mean is large.
  """

  def __init__(self):
    self.count = 0
    self._mean: Any = 0.0
    self._scatter: Any = 0.0

  def add(self, features: np.ndarray) -> None:
    """Takes a batch (n, D); raises ValueError where it is not finite."""
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
      raise ValueError('features hold NaN or infinity')
    count = len(features)
    if not count:
      return
    mean = features.mean(0)
    centred = features - mean[None]
    total, gap = self.count + count, mean - self._mean
    self._scatter = (
        self._scatter + centred.T @ centred
        + np.outer(gap, gap) * (self.count * count / total)
    )
    self._mean = self._mean + gap * (count / total)
    self.count = total

  def result(self) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D).

    Raises:
      ValueError: fewer than two rows.
    """
    if self.count < 2:
      raise ValueError(f'{self.count} features; need at least 2')
    return self._mean, self._scatter / (self.count - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
  """Images as the network sees them.

  Attributes:
    count: number of images.
    moments: of all features, as `frechet.moments` gives them.
    features: (M, D) float32, those of the first images.
    scores: (N, K) float32 logits of all images, or None.
  """

  count: int
  moments: tuple[np.ndarray, np.ndarray]
  features: np.ndarray
  scores: np.ndarray | None


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Rounds images in [-1, 1] to the nearest of 256 levels.

  Raises:
    ValueError: an image holds NaN or infinity.
  """
  images = np.asarray(images, np.float32)
  if not np.isfinite(images).all():
    raise ValueError('images hold NaN or infinity')
  return np.clip(images * 127.5 + 128.0, 0, 255).astype(np.uint8)


def look(
    batches: Iterable[np.ndarray], inception: Inception, *,
    batch_size: int | None = None, keep: int = MANIFOLD,
    keep_scores: bool = True,
) -> Seen:
  """Passes images through the network.

  Args:
    batches: uint8 (n, H, W, C), C 1 or 3.
    inception: see `Inception`.
    batch_size: what smaller batches are filled up to, so that a jitted network
      compiles once and divides over a mesh; None takes that of the first.
    keep: features of so many images, the first, are kept.
    keep_scores: whether logits are kept.

  Raises:
    ValueError: fewer than two images, wrong shape or type.
  """
  moments, features, scores, size = Moments(), [], [], batch_size
  for pixels in batches:
    if pixels.dtype != np.uint8 or pixels.ndim != 4:
      raise ValueError(
          f'images are {pixels.dtype}{list(pixels.shape)}; need uint8 '
          '(n, H, W, C)'
      )
    count = len(pixels)
    size = size or count
    if count < size:
      pixels = np.resize(pixels, (size, *pixels.shape[1:]))
    if pixels.shape[-1] == 1:
      pixels = np.repeat(pixels, 3, axis=-1)
    found, logits = (np.asarray(x)[:count] for x in inception(pixels))
    if moments.count < keep:
      features.append(found[:keep - moments.count])
    if keep_scores:
      scores.append(logits)
    moments.add(found)
  return Seen(
      count=moments.count,
      moments=moments.result(),
      features=np.concatenate(features) if features else np.empty((0, 0)),
      scores=np.concatenate(scores) if scores else None,
  )


def inception_score(
    scores: np.ndarray, splits: int = SPLITS
) -> tuple[float, float]:
  """exp of the mean KL divergence of p(class | image) from p(class).

  Args:
    scores: (N, K) logits without bias (arXiv 1606.03498).
    splits: parts, in the order of the images, that are scored one by one.

  Returns:
    Mean and standard deviation over the parts.

  Raises:
    ValueError: fewer images than parts.
  """
  if len(scores) < splits:
    raise ValueError(f'{len(scores)} images cannot be {splits} parts')
  values = []
  bounds = np.arange(splits + 1) * len(scores) // splits
  for start, stop in zip(bounds, bounds[1:], strict=False):
    x = scores[start:stop].astype(np.float64)
    x -= x.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    p = np.exp(log_p)
    # A class that no image of the part has adds nothing.
    log_mean = np.log(np.maximum(p.mean(0), np.finfo(np.float64).tiny))
    values.append(np.exp((p * (log_p - log_mean[None])).sum(1).mean()))
  return float(np.mean(values)), float(np.std(values))


def evaluate(
    batches: Iterable[np.ndarray], inception: Inception,
    reference: Reference, *, batch_size: int | None = None,
    keep: int = MANIFOLD,
) -> dict[str, float | int | None]:
  """Scores samples against a reference.

  Args:
    batches: uint8 (n, H, W, C); `to_uint8` makes them.
    inception: see `Inception`.
    reference: of features of the same network.
    batch_size: see `look`.
    keep: precision and recall compare the first so many samples with at most
      so many features of the reference.

  Returns:
    fid, inception_score and inception_score_std (of 10 parts), precision and
    recall (k = 3; None where the reference has no features or `keep` is 0),
    images, and manifold_samples and manifold_reference, the numbers of points
    that precision and recall saw.

  Raises:
    ValueError: shapes that do not fit, or too few images.
  """
  seen = look(batches, inception, batch_size=batch_size, keep=keep)
  if seen.moments[0].shape != reference.mean.shape:
    raise ValueError(
        f'features have {seen.moments[0].size} channels, those of the '
        f'reference {reference.mean.size}: it was made with another network'
    )
  score, deviation = inception_score(seen.scores)
  precision = recall = None
  real = None if reference.features is None else reference.features[:keep]
  if real is not None and keep:
    precision = precision_recall.precision(real, seen.features)
    recall = precision_recall.recall(real, seen.features)
  return {
      'fid': frechet.frechet_distance(
          seen.moments, (reference.mean, reference.cov)
      ),
      'inception_score': score,
      'inception_score_std': deviation,
      'precision': precision,
      'recall': recall,
      'images': seen.count,
      'manifold_samples': len(seen.features),
      'manifold_reference': 0 if real is None else len(real),
  }


def make_reference(
    mean: Any, cov: Any, features: Any = None,
    meta: Mapping[str, Any] | None = None,
) -> Reference:
  """Checks shapes and values of statistics, and makes them float64.

  Raises:
    ValueError: they are not the moments of features.
  """
  mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
  if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
    raise ValueError(
        f'mean {mean.shape} and covariance {cov.shape}; need (D,) and (D, D)'
    )
  if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
    raise ValueError('statistics hold NaN or infinity')
  if not np.allclose(cov, cov.T, atol=1e-6):
    raise ValueError('the covariance is not symmetric')
  if features is not None:
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or features.shape[1] != mean.size:
      raise ValueError(
          f'features {features.shape} do not fit a mean of {mean.size}'
      )
  return Reference(mean, cov, features, dict(meta or {}))


def write_reference(file: epath.PathLike, reference: Reference) -> None:
  """Writes mu, sigma, features and meta as .npz, whole or not at all.

  PyTorch-FID reads the same file.
  """
  arrays = {
      'mu': reference.mean, 'sigma': reference.cov,
      'meta': np.asarray(json.dumps(dict(reference.meta), sort_keys=True)),
  }
  if reference.features is not None:
    arrays['features'] = reference.features
  file = epath.Path(file)
  temporary = file.with_name(f'{file.name}.tmp')
  with temporary.open('wb') as f:
    np.savez(f, **arrays)
  temporary.replace(file)


def read_reference(file: epath.PathLike) -> Reference:
  """Statistics from .npz, of ours or of PyTorch-FID.

  Raises:
    ValueError: not such a file, one that unpacks to more than statistics need,
      or statistics of the other protocol.
  """
  file = epath.Path(file)
  try:
    with file.open('rb') as f, np.load(f, allow_pickle=False) as arrays:
      names = set(arrays.files)
      if names & {'mu_s', 'sigma_s'}:
        raise ValueError(
            'statistics of the ADM evaluator, which has another network: '
            "write samples with a stage of kind 'adm_npz' for it"
        )
      if not {'mu', 'sigma'} <= names:
        raise ValueError(f'it holds {sorted(names)}, not mu and sigma')
      mean = _unpack(arrays, 'mu', 8 * _MOST_CHANNELS)
      size = np.size(mean)
      if size > _MOST_CHANNELS:
        raise ValueError(f'features of {size} channels')
      cov = _unpack(arrays, 'sigma', 8 * size**2)
      features = meta = None
      if 'features' in names:
        features = _unpack(arrays, 'features', 4 * size * SAMPLES)
      if 'meta' in names:
        meta = json.loads(str(_unpack(arrays, 'meta', _MOST_TEXT)))
      return make_reference(mean, cov, features, meta)
  except FileNotFoundError:
    raise
  except Exception as e:  # a damaged archive raises anything
    raise ValueError(f'{file}: no statistics for FID ({e})') from e


def _unpack(arrays: Any, name: str, limit: int) -> np.ndarray:
  """An array of an open .npz; where compressed, of about so many bytes."""
  info = arrays.zip.getinfo(f'{name}.npy')
  stored = info.compress_type == zipfile.ZIP_STORED
  if not stored and info.file_size > limit + _MOST_TEXT:
    raise ValueError(f'{name} would unpack to {info.file_size} bytes')
  return arrays[info.filename]
