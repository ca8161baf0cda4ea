# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""CLIP score: how well images fit their captions (arXiv 2104.08718).

The score of a pair is 100 max(cos, 0) between its two vectors in CLIP's space.
It depends on the network: figures of different ones must not be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

# Means and deviations of RGB in [0, 1] that CLIP was trained with
# (openai/CLIP: clip/clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Images as `preprocess` gives them and tokens (n, T) to cosines (n,).
Similarity = Callable[[np.ndarray, np.ndarray], Any]


def preprocess(pixels: np.ndarray, size: int = 224) -> np.ndarray:
  """What CLIP sees of images: resized, cut and normalised.

  The shorter side is resized to `size` by Pillow's bicubic filter, on 8 bits
  and with antialiasing, the middle is cut out, and channels are normalised by
  `MEAN` and `STD` (openai/CLIP: clip/clip.py).

  Args:
    pixels: uint8 (n, H, W, C), C 1 or 3.
    size: side of the network's images.

  Returns:
    float32 (n, size, size, 3).

  Raises:
    ValueError: another shape or type.
  """
  if (pixels.dtype != np.uint8 or pixels.ndim != 4
      or pixels.shape[-1] not in (1, 3)):
    raise ValueError(
        f'images are {pixels.dtype}{list(pixels.shape)}; need uint8 '
        '(n, H, W, 1 or 3)'
    )
  height, width = pixels.shape[1:3]
  short = min(height, width)
  height, width = height * size // short, width * size // short
  top, left = round((height - size) / 2), round((width - size) / 2)
  out = np.empty((len(pixels), size, size, 3), np.float32)
  for row, image in zip(out, pixels, strict=True):
    rgb = np.broadcast_to(image, (*image.shape[:2], 3))
    resized = Image.fromarray(np.ascontiguousarray(rgb)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    row[:] = np.asarray(resized)[top : top + size, left : left + size]
  mean, std = (np.asarray(v, np.float32)[None, None, None] for v in (MEAN, STD))
  return (out / np.float32(255) - mean) / std


def evaluate(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], similarity: Similarity,
    *, size: int = 224, batch_size: int | None = None,
) -> dict[str, float | int]:
  """Scores images against their captions.

  Args:
    batches: uint8 images (n, H, W, C) and tokens (n, T) of their captions.
    similarity: of a network; see `Similarity`.
    size: side of its images.
    batch_size: what smaller batches are filled up to, so that a jitted network
      compiles once; None takes that of the first.

  Returns:
    `clip_score`, the mean over pairs in [0, 100], its `standard_error`, and
    `pairs`, their number.

  Raises:
    ValueError: no pairs, unequal numbers of images and captions, a score that
      is not finite, or images of another shape or type.
  """
  scores = []
  for pixels, tokens in batches:
    count = len(pixels)
    if len(tokens) != count:
      raise ValueError(f'{count} images have {len(tokens)} captions')
    if not count:
      continue
    batch_size = batch_size or count
    images = preprocess(pixels, size)
    if count < batch_size:
      images, tokens = (
          np.resize(x, (batch_size, *x.shape[1:])) for x in (images, tokens)
      )
    cosines = np.asarray(similarity(images, tokens), np.float64)[:count]
    scores.append(100 * np.maximum(cosines, 0))
  if not scores:
    raise ValueError('there are no images to score')
  all_scores = np.concatenate(scores)
  if not np.isfinite(all_scores).all():
    raise ValueError('scores hold NaN or infinity')
  count = len(all_scores)
  return {
      'clip_score': float(all_scores.mean()),
      'standard_error': float(all_scores.std() / count**0.5),
      'pairs': count,
  }
