# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""How well points follow a mixture of Gaussians that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io

import numpy as np
from PIL import Image

PROJECTIONS = 256
_NEAR = 3.0  # standard deviations within which a point is of a Gaussian
_FOUND = 0.2  # of its fair share that a Gaussian must get
_SIDE = 1.6  # of a picture, from the middle


def sliced_w1(a: np.ndarray, b: np.ndarray) -> float:
  """Mean distance of sorted projections of two sets of points.

  Args:
    a: (N, 2) points.
    b: as many.

  Raises:
    ValueError: shapes do not agree.
  """
  if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 2:
    raise ValueError(f'points {a.shape} and {b.shape}; need (N, 2) twice')
  angle = np.pi * np.arange(PROJECTIONS) / PROJECTIONS
  lines = np.stack([np.cos(angle), np.sin(angle)])
  a, b = (np.sort(x.astype(np.float64) @ lines, axis=0) for x in (a, b))
  return float(np.abs(a - b).mean())


def score(
    points: np.ndarray, real: np.ndarray, means: np.ndarray, std: float
) -> dict[str, float]:
  """Scores points.

  Args:
    points: (N, 2).
    real: (N, 2) of the mixture.
    means: (K, 2) of the Gaussians, which weigh the same.
    std: of every Gaussian.

  Returns:
    sliced_w1: distance to `real`.
    near: share of points within 3 std of a mean.
    modes: Gaussians that get at least a fifth of their share of all points.
    variation: total variation between the Gaussians' shares of the near points
      and even ones; 1 where there are none.

  Raises:
    ValueError: shapes do not agree, or a point is not finite.
  """
  if not np.isfinite(points).all():
    raise ValueError('points hold NaN or infinity')
  squares = np.square(points[:, None] - means).sum(-1)
  near = squares.min(1) <= (_NEAR * std) ** 2
  counts = np.bincount(squares.argmin(1)[near], minlength=len(means))
  fair = 1 / len(means)
  apart = np.abs(counts / max(near.sum(), 1) - fair).sum() / 2
  return {
      'sliced_w1': sliced_w1(points, real),
      'near': float(near.mean()),
      'modes': int((counts / len(points) >= _FOUND * fair).sum()),
      'variation': float(apart) if near.any() else 1.0,
  }


def curve(
    title: str, xs: Sequence[float], ys: Mapping[str, Sequence[float]],
    levels: Mapping[str, float],
) -> Image.Image:
  """A plot of curves on a logarithmic axis, with levels to compare with."""
  from matplotlib.figure import Figure  # an extra; needs no display this way

  figure = Figure(figsize=(7, 4), layout='constrained')
  ax = figure.subplots()
  for name, values in ys.items():
    ax.plot(xs, values, marker='.', label=name)
  for i, (name, value) in enumerate(levels.items(), 1):
    ax.axhline(value, label=name, linestyle='--', color=f'C{i}')
  ax.set(title=title, xlabel='updates of the student', yscale='log')
  ax.legend(fontsize='small')
  ax.grid(alpha=0.3)
  return _image(figure)


def scatter(points: Mapping[str, np.ndarray]) -> Image.Image:
  """Sets of points (N, 2) side by side."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(3 * len(points), 3.2), layout='constrained')
  axes = figure.subplots(1, len(points), squeeze=False)[0]
  for ax, (name, xy) in zip(axes, points.items(), strict=True):
    ax.plot(*xy.T, linestyle='', marker=',')
    ax.set(title=name, xlim=(-_SIDE, _SIDE), ylim=(-_SIDE, _SIDE), aspect=1)
  return _image(figure)


def _image(figure) -> Image.Image:
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=100)
  return Image.open(buffer)
