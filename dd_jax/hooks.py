# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Small guards around a loop: throttle, NaN, preemption, profile."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
import itertools
import json
from typing import Any, NoReturn

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import numpy as np

from dd_jax.method import Method


class NotFinite(FloatingPointError):
  """A metric became NaN or infinite."""


class Preempted(Exception):
  """A signal stopped the run after it saved; the same command resumes it."""


# JAX has the hosts stop at the number after the highest that one of them has
# asked for, and at no other: whoever asks, the numbers must never go back.
_asked = itertools.count(1)


def preempted() -> bool:
  """Whether any host was told to stop (SIGTERM).

  All hosts must ask equally often, and all learn of it at the same time.
  """
  # Without a distributed client the signal ends the process by itself.
  return jax.distributed.is_initialized() and (
      multihost_utils.reached_preemption_sync_point(next(_asked))
  )


def raise_if_preempted(message: str) -> None:
  """Stops where any host was told to; see `preempted`.

  Args:
    message: what has been saved.

  Raises:
    Preempted: saying how to go on.
  """
  if preempted():
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

  Leaves what replays that step: `nan.json` (the step, its metrics that are not
  finite, the run's seed, the step's key as `Inputs.key` has it, the updates and
  the last checkpoint) and, for every process, `nan-<process>.npz`, its part of
  the batch as the source gives it.

  Args:
    directory: where to.
    seed: of the run.
    batch_of: gives this process's part of a step's batch.
    method: tells the updates of a step.
  """

  def __init__(
      self, directory: epath.Path, seed: int,
      batch_of: Callable[[int], Mapping[str, np.ndarray]], method: Method,
  ):
    self._directory, self._seed = directory, seed
    self._batch_of, self._method = batch_of, method

  def check(
      self, first: int, history: Sequence[Mapping[str, Any]],
      saved: int | None,
  ) -> None:
    """Raises where a value is not finite.

    Args:
      first: step of the first entry of `history`.
      history: metrics of consecutive steps, on the host.
      saved: step of the last checkpoint.

    Raises:
      NotFinite: naming the metric, the step and the report.
    """
    for step, metrics in enumerate(history, first):
      bad = [k for k, v in metrics.items() if not np.isfinite(v.compute())]
      if bad:
        self._stop(step, bad, saved)

  def _stop(self, step: int, bad: Sequence[str], saved: int | None) -> NoReturn:
    batch = self._batch_of(step)
    self._directory.mkdir(parents=True, exist_ok=True)
    part = self._directory / f'nan-{jax.process_index()}.npz'
    with part.open('wb') as f:
      np.savez(f, **batch)
    report = self._directory / 'nan.json'
    if jax.process_index() == 0:
      key = jax.random.fold_in(jax.random.key(self._seed), step)
      report.write_text(json.dumps({
          'step': step, 'metrics': bad, 'seed': self._seed,
          'key': jax.random.key_data(key).tolist(),
          'updates': [u.name for u in self._method.updates(step)],
          'checkpoint': saved,
      }))
    if jax.process_count() > 1:  # who ends first would end the others
      multihost_utils.sync_global_devices('nan')
    raise NotFinite(
        f'{bad[0]} is not finite at step {step}; see {report} and {part.name} '
        f'beside it. What is saved is from before it (step {saved or 0}): '
        'lower the learning rate or look at the data, then run again'
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
