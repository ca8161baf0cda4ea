# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Where scalars and images go: TensorBoard events and JSON lines, by CLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import importlib.util
import json
import resource
import sys
import time
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


class TensorBoardWriter(metric_writers.MetricWriter):
  """TensorBoard events without TensorFlow."""

  def __init__(self, logdir: epath.PathLike):
    import tensorboardX  # late, for it imports torch where that is installed

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
    # Nothing can be added to an object of a bucket: it is written anew.
    self._bucket = '://' in str(self._file)
    self._lines = []
    if self._file.exists():
      self._lines = [
          line for line in self._file.read_text().splitlines()
          if _step_of(line) <= resume_at
      ]
    self._write()

  def _write(self):
    # On a disk by another name first: it might be stopped half way.
    part = self._file
    if not self._bucket:
      part = part.with_name(f'{part.name}.tmp')
    part.write_text(''.join(f'{line}\n' for line in self._lines))
    if part != self._file:
      part.replace(self._file)
    self._written = time.monotonic()

  def write_scalars(self, step, scalars):
    record = {'step': step} | {k: float(v) for k, v in scalars.items()}
    self._lines.append(json.dumps(record))
    if not self._bucket:
      with self._file.open('a') as f:
        f.write(f'{self._lines[-1]}\n')
    elif time.monotonic() - self._written > _BUCKET_SECONDS:
      self._write()

  def flush(self):
    if self._bucket:
      self._write()

  close = flush

  def _ignore(self, *args, **kwargs):
    """Only scalars go to JSON lines."""

  write_summaries = write_images = write_videos = write_audios = _ignore
  write_texts = write_histograms = write_pointcloud = write_hparams = _ignore


_BUCKET_SECONDS = 60.0  # between two writes of a whole file


def _step_of(line: str) -> float:
  try:
    return json.loads(line)['step']
  except (ValueError, KeyError):  # the last line of a killed run
    return float('inf')


class Clock:
  """Where the time goes: every moment belongs to one part.

  It starts in `init`. What runs within `spend` belongs to that part alone.
  """

  PARTS = ('init', 'compile', 'data', 'step', 'save', 'eval')

  def __init__(self) -> None:
    self._part = 'init'
    self._began = time.monotonic()
    self._seconds = dict.fromkeys(self.PARTS, 0.0)

  def turn(self, part: str) -> str:
    """From now on it is another part's time; returns the one before."""
    now = time.monotonic()
    self._seconds[self._part] += now - self._began
    before, self._part, self._began = self._part, part, now
    return before

  @contextlib.contextmanager
  def spend(self, part: str) -> Iterator[None]:
    before = self.turn(part)
    try:
      yield
    finally:
      self.turn(before)

  def take(self) -> dict[str, float]:
    """Seconds of each part since the last call."""
    self.turn(self._part)
    taken, self._seconds = self._seconds, dict.fromkeys(self.PARTS, 0.0)
    return {f'time/{k}_seconds': v for k, v in taken.items()}


def peak_memory() -> dict[str, float]:
  """Highest use so far in GiB: of this host, and of its fullest device.

  Devices that do not count, CPUs among them, are left out.
  """
  peaks = {'host': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  stats = [d.memory_stats() for d in jax.local_devices()]
  devices = [s['peak_bytes_in_use'] for s in stats if s]
  if devices:
    peaks['device'] = max(devices)
  return {f'memory/{k}_peak_gib': v / 2**30 for k, v in peaks.items()}


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
