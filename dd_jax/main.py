# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags and one call. Everything else can be imported from a notebook.

    python -m dd_jax.main --config=configs/dd_var.py:digits
"""

from __future__ import annotations

import ctypes
import logging as std_logging
import os
import socket
import sys
import traceback
from typing import NoReturn

from absl import app, flags, logging
from etils import epath
import jax

from dd_jax import config as config_lib
from dd_jax import console, hooks, stages

_CONFIG = config_lib.define_flag()
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where artefacts go; default runs/<name of the config>.'
)
_STAGE = flags.DEFINE_string('stage', None, 'Run this stage alone.')
_REDO = flags.DEFINE_list(
    'redo', [], 'Stages to make again, with those that depend on them.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'host:port of process 0; default: found by itself.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Hosts in all.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this host.')
_VERBOSE = flags.DEFINE_boolean(
    'verbose', False, 'Log every file touched, and errors with their trace.'
)

_EXPECTED = (ValueError, OSError, FloatingPointError, ImportError)
_EXIT_PREEMPTED = 143  # as if the signal had ended the process
_EXIT_LOST = 75  # EX_TEMPFAIL: the same command may well go on

# After so many seconds without a sign of life a process counts as dead, and
# one that is done does not wait any longer for the others to be done.
_TIMEOUTS = {'heartbeat_timeout_seconds': 30, 'shutdown_timeout_seconds': 60}
# A process alone has nobody to miss. On a busy machine its own answer to itself
# has come too late.
_ALONE = _TIMEOUTS | {'heartbeat_timeout_seconds': 10**8}

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def connect() -> None:
  """Joins the other hosts, or starts a cluster of one.

  Even a single process needs the client: it is what tells us of SIGTERM.

  Raises:
    RuntimeError: the others cannot be reached.
    ValueError: flags that do not fit.
  """
  address, count, number = (
      _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  told = (address, count, number) != (None, None, None)
  if told or jax.config.jax_platforms != 'cpu':
    try:
      if address and ':' not in address:
        raise ValueError('no port')
      jax.distributed.initialize(address, count, number, **_TIMEOUTS)
      return
    except (ValueError, IndexError) as e:
      # Nobody is there to be found, or what was found makes no sense.
      if isinstance(e, IndexError) or told:
        raise ValueError(
            f'--coordinator={address}, --num_processes={count} and '
            f'--process_id={number}: give host:port, how many, and one below '
            f'that; or none of them ({e})'
        ) from e
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  jax.distributed.initialize(f'localhost:{port}', 1, 0, **_ALONE)


def _keep_freed_memory() -> None:
  """Has glibc keep the memory of freed arrays.

  Every step on a CPU frees large arrays and needs them again. To give them back
  to the system and to fault their pages in anew can take a fifth of the time.
  """
  if sys.platform == 'linux' and jax.default_backend() == 'cpu':
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:  # other C libraries have none
      mallopt(_M_MMAP_MAX, 0)
      mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _leave(status: int) -> NoReturn:
  """Ends this process after an error, at once.

  Python's own end would first wait for the other processes, while they wait
  for this one's part of what they compute.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  logging.set_verbosity(
      logging.INFO if _VERBOSE.value else logging.WARNING
  )
  # Each of Orbax's tasks would tell of a write that we report once.
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)
  try:
    connect()
  except RuntimeError as e:
    console.fail(f'the other processes cannot be reached: {e}')
    _leave(_EXIT_LOST)
  except ValueError as e:
    console.fail(str(e))
    _leave(2)
  try:
    _keep_freed_memory()
    config = _CONFIG.value.to_dict()
    stages.check_fields(config)
    workdir = epath.Path(_WORKDIR.value or f'runs/{config["name"]}')
    if cache := config.get('compilation_cache'):
      jax.config.update('jax_compilation_cache_dir', cache)
    stages.run(config, workdir, only=_STAGE.value, redo=_REDO.value)
  except hooks.Preempted as e:
    console.say(str(e))
    sys.exit(_EXIT_PREEMPTED)
  except _EXPECTED as e:
    logging.info('%s', traceback.format_exc())
    console.fail(str(e))
    _leave(1)
  except Exception as e:
    traceback.print_exc()
    if isinstance(e, jax.errors.JaxRuntimeError) and jax.process_count() > 1:
      console.fail(
          f'process {jax.process_index()} of {jax.process_count()} stopped; '
          'most likely because another one ended, whose output says why. Run '
          'the same command again on all of them to go on'
      )
      _leave(_EXIT_LOST)
    _leave(1)


def cli() -> None:
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=console.parse_flags)


if __name__ == '__main__':
  cli()
