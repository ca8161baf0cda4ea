# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The whole chain on several seeds, and one table of all of them.

    python -m dd_jax.tools.repeat --config=configs/dd_var.py:digits

Each seed has a workdir of its own and resumes like any run. Overrides, such as
--config.stages.student.steps=100, go to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
import subprocess
import sys

from absl import app, flags
from etils import epath

from dd_jax import console
from dd_jax.evals import report

_CONFIG = flags.DEFINE_string(
    'config', None, 'Config file, with its argument after a colon.',
    required=True,
)
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of the chain.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Where runs go; default runs/<config>-seeds.'
)


def main(argv: Sequence[str]) -> None:
  """Runs the seeds one after the other; flags of `dd_jax.main` go to each."""
  name = epath.Path(_CONFIG.value.replace('.py:', '_')).name
  workdir = epath.Path(_WORKDIR.value or f'runs/{name}-seeds')
  reports = []
  for seed in _SEEDS.value:
    here = workdir / f'seed_{seed}'
    console.say(f'seed {seed}: {here}')
    code = subprocess.run([
        sys.executable, '-m', 'dd_jax.main', f'--config={_CONFIG.value}',
        f'--config.seed={seed}', f'--workdir={here}', *argv[1:],
    ], check=False).returncode
    if code:
      console.fail(f'seed {seed} ended with {code}; the same command goes on')
      sys.exit(code)
    if not (here / 'report' / 'report.json').exists():
      console.fail(f'{_CONFIG.value} ends without a report to compare: {here}')
      sys.exit(1)
    reports.append(report.read(here / 'report'))
  merged = report.merge_seeds(reports)
  report.write(workdir / 'report', merged, {})
  console.table('All seeds', *report.table(merged))
  console.table(
      'FD over the teacher\'s, median of seeds', ('sampler', 'ratio'),
      list(merged['ratios'].items()),
  )
  console.say(f'report: {workdir / "report" / "report.md"}')


if __name__ == '__main__':
  # What is no flag of this program is one of each run.
  app.run(
      main, flags_parser=lambda args: flags.FLAGS(args, known_only=True)
  )
