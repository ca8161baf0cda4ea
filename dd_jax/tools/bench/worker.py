# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""One process of a benchmark: one program, compiled, checked and timed.

    python -m dd_jax.tools.bench.worker <job.json> <result.json>
"""

from __future__ import annotations

import importlib
import os
import pathlib
import resource
import sys
import time

_LONG = 2.0  # seconds; warming up slower calls once must do


def main(job_file: str, result_file: str) -> None:
  """Does the job; times are seconds, memory is bytes."""
  # Nothing heavy is imported yet: thread pools count the cores when they start.
  from dd_jax.tools.bench import program, workloads

  job = program.load(pathlib.Path(job_file))
  cores = sorted(os.sched_getaffinity(0))[: job['case']['threads']]
  os.sched_setaffinity(0, cores)
  paths = {k: pathlib.Path(job[k]) for k in ('folder', 'cache')}
  case = program.Case(**job['case'], **paths)
  if job['row'] is None:
    from dd_jax.tools.bench import inputs

    program.save(
        pathlib.Path(result_file), inputs.write(case, job['rows'], job['sides'])
    )
    return
  clock = [time.time()]
  seconds = {}

  def lap(name: str) -> None:
    clock.append(time.time())
    seconds[name] = clock[-1] - clock[-2]

  workload = workloads.rows(case.model)[job['row']]
  module = importlib.import_module(workload.modules[job['framework']])
  # From before the interpreter started.
  seconds['import'] = time.time() - job['started']
  clock.append(time.time())
  made = module.make(job['row'], case)
  lap('load')
  costs = dict(made.compile())
  lap('compile')
  outputs = made.check()
  lap('first_call')
  seconds['cold_start'] = time.time() - job['started']
  if job['outputs'] is not None:
    import numpy as np

    np.savez(job['outputs'], **outputs)
  calls, cpu, values = [], [], []

  def call() -> tuple[float, float]:
    began, busy = time.perf_counter(), time.process_time()
    value = made.run()
    took = time.perf_counter() - began, time.process_time() - busy
    if value is not None:
      values.append(value)
    return took

  warm_ups = 0
  while warm_ups < job['warm_ups']:
    warm_ups += 1
    if call()[0] > _LONG:
      break
  load = [os.getloadavg()[0]]
  while not calls or sum(calls) + calls[-1] / 2 < job['seconds']:
    for figures, figure in zip((calls, cpu), call(), strict=True):
      figures.append(figure)
  load.append(os.getloadavg()[0])
  usage = resource.getrusage(resource.RUSAGE_SELF)
  program.save(pathlib.Path(result_file), {
      'seconds': seconds, 'costs': costs, 'calls': calls, 'cpu': cpu,
      'values': values, 'warm_ups': warm_ups, 'load': max(load),
      'peak_rss': usage.ru_maxrss * 1024,
      'involuntary_switches': usage.ru_nivcsw,
  })


if __name__ == '__main__':
  main(*sys.argv[1:])
