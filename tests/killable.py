# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs dd_jax.main and kills it by a signal after a number of programs.

    python tests/killable.py KILL 7 --config=... --workdir=...
"""

import os
import signal
import sys

from dd_jax import hooks, main

name, count = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]
add = hooks.Throttle.add


def add_and_kill(self, outputs):
  global count
  add(self, outputs)
  count -= 1
  if not count:
    os.kill(os.getpid(), getattr(signal, f'SIG{name}'))


if name != 'NONE':
  hooks.Throttle.add = add_and_kill
main.cli()
