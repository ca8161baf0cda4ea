# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs dd_jax.main and lets something go wrong.

    python tests/killable.py KILL 7 ...    signal after 7 programs; TERM, STOP
    python tests/killable.py FAIL 7 ...    error after 7 programs
    python tests/killable.py FULL 4096 ... no file may grow beyond 4096 bytes
    python tests/killable.py NONE 0 ...    nothing
"""

import os
import resource
import signal
import sys
import time

from dd_jax import hooks, main

name, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
add = hooks.Throttle.add


def add_and_kill(self, outputs):
  global count
  add(self, outputs)
  count -= 1
  if not count and name == 'FAIL':
    raise ValueError('planted')
  if not count:
    sys.stderr.write(f'SIG{name} now\n')
    sys.stderr.flush()
    os.kill(os.getpid(), getattr(signal, f'SIG{name}'))
    time.sleep(3)  # what listens for the signal has a thread of its own


if name == 'FULL':
  resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
elif name != 'NONE':
  hooks.Throttle.add = add_and_kill
main.cli()
