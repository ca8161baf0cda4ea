# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Small guards around a loop: throttle, NaN, preemption, profile."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import json
import math
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np


class NotFinite(FloatingPointError):
  """A metric became NaN or infinite."""


class Preempted(Exception):
  """A signal stopped the run after it saved; the same command resumes it."""


def raise_if_preempted(step: int, message: str) -> None:
  """Stops where any host was told to (SIGTERM).

  Args:
    step: the same on all hosts; they agree at which one to stop.
    message: what has been saved.

  Raises:
    Preempted: saying how to go on.
  """
  # Without a distributed client the signal ends the process by itself.
  if jax.distributed.is_initialized() and (
      multihost_utils.reached_preemption_sync_point(step)):
    raise Preempted(f'{message}; run the same command again to go on')


class Throttle:
  """Bounds how many steps are dispatched and not finished."""

  def __init__(self, limit: int = 2):
    self._limit = limit
    self._pending: collections.deque[Any] = collections.deque()

  def add(self, outputs: Any) -> None:
    self._pending.append(outputs)
    if len(self._pending) > self._limit:
      jax.block_until_ready(self._pending.popleft())


class NanGuard:
  """Stops a run at the first metric that is not finite.

  Writes `nan.json` beside the metrics: the step, the metric and the examples
  (`index`) of the last batch, enough to replay the step.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory

  def check(
      self, step: int, values: Mapping[str, float],
      batch: Mapping[str, np.ndarray],
  ) -> None:
    """Raises where a value is not finite.

    Raises:
      NotFinite: naming the metric, the step and the report.
    """
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if not bad:
      return
    report = self._directory / 'nan.json'
    report.write_text(json.dumps({
        'step': step, 'metrics': bad,
        'index': np.asarray(batch['index']).tolist(),
    }))
    raise NotFinite(
        f'{bad[0]} is not finite at or before step {step}; see {report}. The '
        'last checkpoint is from before it: lower the learning rate or look '
        'at the data, then run again'
    )


class Profile:
  """A window of the JAX profiler that always closes."""

  def __init__(self, directory: epath.Path, first: int, steps: int):
    self._directory, self._first = directory, first
    self._last = first + steps if steps else -1
    self._on = False

  def before(self, step: int) -> None:
    if step == self._first and self._last > step:
      jax.profiler.start_trace(str(self._directory))
      self._on = True

  def after(self, step: int, outputs: Any) -> None:
    if self._on and step >= self._last:
      jax.block_until_ready(outputs)
      self.close()

  def close(self) -> None:
    if self._on:
      jax.profiler.stop_trace()
      self._on = False
      logging.info('profile written to %s', self._directory)
