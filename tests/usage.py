# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory that a part of a test takes, shown and bounded."""

from __future__ import annotations

import contextlib
import pathlib
import resource
import time


@contextlib.contextmanager
def bounded(*, seconds: float, gigabytes: float):
  """Shows seconds and the peak of this process's memory; both have a limit.

  For `with`, and as a decorator. What tests before have left behind counts.
  """
  # Linux forgets the peak of the tests before; elsewhere it counts, too.
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  began = time.monotonic()
  yield
  spent = time.monotonic() - began
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
  print(f'{spent:.0f} s, peak {peak:.1f} GB')
  assert spent < seconds, f'{spent:.0f} s, at most {seconds} s'
  assert peak < gigabytes, f'{peak:.1f} GB, at most {gigabytes} GB'
