# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Where scalars and images go: TensorBoard events and JSON lines, by CLU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import functools
import importlib.util
import json
import sys
import types
from typing import Any

from clu import metrics as clu_metrics
from etils import epath
import jax
import numpy as np


def let_clu_import_without_tensorflow() -> None:
  """Registers a stand-in for the one CLU module that needs TensorFlow.

  `clu.metric_writers` imports its TensorFlow writer eagerly. We write events
  with tensorboardX, so an empty stand-in is enough. Where TensorFlow is
  installed nothing happens.
  """
  name = 'clu.metric_writers.summary_writer'
  if name in sys.modules or importlib.util.find_spec('tensorflow'):
    return
  module = types.ModuleType(name)
  module.SummaryWriter = None
  sys.modules[name] = module


let_clu_import_without_tensorflow()

from clu import metric_writers  # noqa: E402
import tensorboardX  # noqa: E402


class TensorBoardWriter(metric_writers.MetricWriter):
  """TensorBoard events without TensorFlow."""

  def __init__(self, logdir: epath.PathLike):
    self._writer = tensorboardX.SummaryWriter(str(logdir))

  def write_summaries(self, step, values, metadata=None):
    del metadata
    for k, v in values.items():
      self._writer.add_scalar(k, np.asarray(v), step)

  def write_scalars(self, step, scalars):
    for k, v in scalars.items():
      self._writer.add_scalar(k, float(v), step)

  def write_images(self, step, images):
    for k, v in images.items():
      self._writer.add_images(k, np.asarray(v), step, dataformats='NHWC')

  def write_videos(self, step, videos):
    for k, v in videos.items():
      self._writer.add_video(k, np.moveaxis(np.asarray(v), -1, 2), step)

  def write_audios(self, step, audios, *, sample_rate):
    for k, v in audios.items():
      self._writer.add_audio(k, np.asarray(v), step, sample_rate=sample_rate)

  def write_texts(self, step, texts):
    for k, v in texts.items():
      self._writer.add_text(k, v, step)

  def write_histograms(self, step, arrays, num_buckets=None):
    for k, v in arrays.items():
      bins = (num_buckets or {}).get(k) or 'tensorflow'
      self._writer.add_histogram(k, np.asarray(v), step, bins=bins)

  def write_pointcloud(self, step, point_clouds, *, point_colors=None,
                       configs=None):
    raise ValueError('point clouds need the TensorFlow writer of clu')

  def write_hparams(self, hparams):
    self._writer.add_text('hparams', json.dumps(dict(hparams), default=str))

  def flush(self):
    self._writer.flush()

  def close(self):
    self._writer.close()


class JsonlWriter(metric_writers.MetricWriter):
  """One JSON object a line: {"step": 10, "student/loss": 1.5, ...}."""

  def __init__(self, file: epath.PathLike, *, resume_at: int):
    """Opens a file for appending.

    Args:
      file: path of the .jsonl.
      resume_at: records of later steps are dropped: they will come again.
    """
    self._file = epath.Path(file)
    kept = []
    if self._file.exists():
      kept = [
          line for line in self._file.read_text().splitlines()
          if _step_of(line) <= resume_at
      ]
    self._file.write_text(''.join(f'{line}\n' for line in kept))

  def write_scalars(self, step, scalars):
    record = {'step': step} | {k: float(v) for k, v in scalars.items()}
    with self._file.open('a') as f:
      f.write(json.dumps(record) + '\n')

  def _ignore(self, *args, **kwargs):
    """Only scalars go to JSON lines."""

  write_summaries = write_images = write_videos = write_audios = _ignore
  write_texts = write_histograms = write_pointcloud = write_hparams = _ignore
  flush = close = _ignore


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):  # the last line of a killed run
    return float('inf')


def make_writer(
    directory: epath.Path, *, resume_at: int
) -> metric_writers.MetricWriter:
  """TensorBoard and JSON lines on the first host, nothing elsewhere."""
  if jax.process_index():
    return metric_writers.MultiWriter([])
  directory.mkdir(parents=True, exist_ok=True)
  return metric_writers.MultiWriter([
      TensorBoardWriter(directory / 'tensorboard'),
      JsonlWriter(directory / 'metrics.jsonl', resume_at=resume_at),
  ])


def reduce(
    history: Sequence[Mapping[str, clu_metrics.Average]]
) -> dict[str, float]:
  """Means of several steps; a metric counts where it was reported."""
  merged: dict[str, list[Any]] = {}
  for metrics in jax.device_get(list(history)):
    for k, v in metrics.items():
      merged.setdefault(k, []).append(v)
  return {
      k: float(functools.reduce(lambda a, b: a.merge(b), v).compute())
      for k, v in merged.items()
  }
