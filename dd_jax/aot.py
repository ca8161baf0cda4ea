# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What XLA's compiler for TPUs says of a program before it is done with it.

Memory and collectives are settled once the graph is optimised, scheduled and
placed, after seconds. What follows, a search for the fastest tiling of each
convolution and the instructions of every operation, takes minutes and changes
neither.
"""

from __future__ import annotations

from collections.abc import Mapping
import os
import pathlib
import re
import signal
import tempfile
import threading
import time
from typing import Any
import warnings

import jax

_TEXT = '*.after_optimizations_after_buffer_assignment.txt'
_MEMORY = '*.after_optimizations-buffer-assignment.txt'
_LIMIT_SECONDS = 1800
# libtpu logs from a thread that a forked process lacks: it must not log.
ENVIRONMENT = {'TPU_MIN_LOG_LEVEL': '3', 'TPU_STDERR_LOG_LEVEL': '3'}


def place(lowered: Any) -> tuple[str, dict[str, int]]:
  """Compiles until every value has its place, in a process that ends there.

  Args:
    lowered: `jax.jit(...).lower(...)` for TPUs. Environment variables
      `ENVIRONMENT` must have been set before libtpu was loaded.

  Returns:
    The scheduled HLO text, and the sizes of `read_sizes`.

  Raises:
    jax.errors.JaxRuntimeError: of the compiler, as RESOURCE_EXHAUSTED.
    RuntimeError: no answer.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    with warnings.catch_warnings():
      # The child calls nothing but the compiler.
      warnings.filterwarnings('ignore', message='.*fork', append=False)
      child = os.fork()
    if not child:
      try:
        _compile(lowered, folder)
      finally:  # whatever happens, nothing of the parent runs here
        os._exit(0)
    status = _wait(child)
    if (error := folder / 'error').exists():
      raise jax.errors.JaxRuntimeError(error.read_text())
    if status:
      raise RuntimeError(
          f'the compiler ended with {status}; let it finish in this process '
          'instead (--full)'
      )
    return _newest(folder, _TEXT), read_sizes(_newest(folder, _MEMORY))


def read_sizes(text: str) -> dict[str, int]:
  """Bytes in the chip's large memory, from a dump of the buffer assignment.

  Returns:
    `arguments`, `results` that are no arguments, `temporaries`.

  Raises:
    ValueError: no buffer assignment.
  """
  if not text.startswith('BufferAssignment'):
    raise ValueError('the text is no buffer assignment')
  sizes = {'arguments': 0, 'results': 0, 'temporaries': 0}
  for line in re.findall(r'^allocation \d+: (size .*):$', text, re.M):
    # Colors are other memories; thread-local ones are within operations.
    if re.search(r'\bcolor [1-9]', line) or 'thread-local' in line:
      continue
    kind = 'arguments' if ', parameter ' in line else (
        'results' if 'maybe-live-out' in line else 'temporaries'
    )
    sizes[kind] += int(re.match(r'size (\d+)', line)[1])
  return sizes


def _compile(lowered: Any, folder: pathlib.Path) -> None:
  options: Mapping[str, Any] = {
      'xla_dump_to': str(folder), 'xla_dump_hlo_as_text': True,
  }

  def run() -> None:
    try:
      lowered.compile(compiler_options=dict(options))
    except BaseException as e:
      part = folder / 'error.part'
      part.write_text(str(e))
      part.rename(folder / 'error')

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  sizes = None
  while thread.is_alive():
    before, sizes = sizes, [
        sum(f.stat().st_size for f in folder.glob(pattern))
        for pattern in (_TEXT, _MEMORY)
    ]
    if all(sizes) and sizes == before:  # written to their ends
      break
    time.sleep(0.5)


def _wait(child: int) -> int:
  """Exit status of a process, which is killed where it takes too long."""
  began = time.monotonic()
  while time.monotonic() - began < _LIMIT_SECONDS:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
      return status
    time.sleep(0.1)
  os.kill(child, signal.SIGKILL)
  return os.waitpid(child, 0)[1]


def _newest(folder: pathlib.Path, pattern: str) -> str:
  files = sorted(folder.glob(pattern), key=lambda f: f.stat().st_mtime_ns)
  if not files:
    raise RuntimeError(f'the compiler wrote no {pattern}')
  return files[-1].read_text()
