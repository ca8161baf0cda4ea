# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Times our programs, and PyTorch's of the same computation.

    python -m dd_jax.tools.bench --model=var_d16 --batch=1,4 --out=bench.jsonl

Both sides get the same weights and inputs, and must agree before anything is
timed. docs/benchmarks.md says what the rows mean and how they are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
import os
import pathlib
import sys
import tempfile

from absl import app, flags, logging

from dd_jax import console
from dd_jax.tools.bench import runner, workloads

_MODEL = flags.DEFINE_string(
    'model', 'var_tiny', f'One of {", ".join(workloads.SIZES)}.'
)
_BATCH = flags.DEFINE_list('batch', ['1'], 'Batch sizes.')
_FRAMEWORKS = flags.DEFINE_list(
    'frameworks', list(workloads.FRAMEWORKS), 'Sides to run.'
)
_ROWS = flags.DEFINE_list(
    'rows', [], 'What to time; default every row of the model.'
)
_VARIANTS = flags.DEFINE_list(
    'variants', list(workloads.VARIANTS), 'Ways to run each side.'
)
_ROUNDS = flags.DEFINE_integer(
    'rounds', 5, 'Processes for each row, batch size and variant.'
)
_SECONDS = flags.DEFINE_float(
    'seconds', 5.0, 'Time for the calls of a process; at least one is made.'
)
_WARM_UPS = flags.DEFINE_integer(
    'warm_ups', 3, 'Calls before the timed ones; one where a call takes long.'
)
_THREADS = flags.DEFINE_integer(
    'threads', None, 'Cores for each process; default all there are.'
)
_MESH = flags.DEFINE_multi_string(
    'mesh', [], 'Devices that ours runs on, as data:2,fsdp:4; given again, '
    'another mesh. On a CPU they are made up, and share its cores.',
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of weights and inputs.')
_OUT = flags.DEFINE_string('out', 'bench.jsonl', 'Where the figures go.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None,
    'Where weights and logs stay; default a temporary folder. A new one for '
    'every benchmark: compiled programs in it would be used again.',
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  try:
    settings = runner.Settings(
        model=_MODEL.value, batches=tuple(map(_integer, _BATCH.value)),
        frameworks=tuple(_FRAMEWORKS.value), rows=tuple(_ROWS.value),
        variants=tuple(_VARIANTS.value), rounds=_ROUNDS.value,
        seconds=_SECONDS.value, warm_ups=_WARM_UPS.value, seed=_SEED.value,
        meshes=tuple(_MESH.value),
        threads=_THREADS.value or len(os.sched_getaffinity(0)),
    )
    with tempfile.TemporaryDirectory() as temporary:
      folder = pathlib.Path(_WORKDIR.value or temporary)
      runner.run(settings, folder, pathlib.Path(_OUT.value))
  except (ValueError, OSError, runner.Failure) as e:
    console.fail(str(e))
    sys.exit(1)


def _integer(text: str) -> int:
  if not text.isdecimal():
    raise ValueError(f'--batch: {text!r} is not a number')
  return int(text)


if __name__ == '__main__':
  app.run(main)
