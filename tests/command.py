# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line in processes of their own, and what they leave."""

from __future__ import annotations

from importlib import metadata
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

# Programs here run once or twice: compiling them is what takes time. Without
# emitters of fused kernels and without parallel code generation it takes a
# third less. XLA ends the process over a flag that it does not know, so that
# versions which nobody has tried get the first flag alone.
COMPILE_FAST = '--xla_backend_optimization_level=0'
if tuple(map(int, metadata.version('jaxlib').split('.')[:2])) < (0, 12):
  COMPILE_FAST += (
      ' --xla_cpu_use_fusion_emitters=false'
      ' --xla_cpu_parallel_codegen_split_count=1'
  )
ROOT = pathlib.Path(__file__).parent.parent
UNHARMED = ('NONE', '0')


def environment_of(cache, flags=''):
  """Variables of a run; its programs go to `cache`."""
  return os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
      'XLA_FLAGS': f'{flags} {COMPILE_FAST}',
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(ROOT),
      'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
  }


def run_main(cache, *args, kill=UNHARMED, flags=''):
  """Runs dd_jax.main as `tests/killable.py` says; programs go to `cache`."""
  return subprocess.run(
      [sys.executable, 'tests/killable.py', *kill, *args], cwd=ROOT,
      env=environment_of(cache, flags), capture_output=True, text=True,
      timeout=600, check=False,
  )


def start_main(cache, log, *args, kill=UNHARMED, flags=''):
  """As `run_main`, but does not wait; what it says is added to `log`."""
  with log.open('ab') as file:
    return subprocess.Popen(
        [sys.executable, 'tests/killable.py', *kill, *args], cwd=ROOT,
        env=environment_of(cache, flags), stdout=file, stderr=file,
    )


def start_pair(cache, log, *args, kills=(UNHARMED, UNHARMED)):
  """Two processes of four devices; the second one's log ends in `.1`."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  return [
      start_main(
          cache, log.with_suffix(f'.{i}'), *args,
          f'--coordinator=localhost:{port}', '--num_processes=2',
          f'--process_id={i}', kill=kill,
          flags='--xla_force_host_platform_device_count=4',
      )
      for i, kill in enumerate(kills)
  ]


def record(workdir, stage):
  """What a stage says of itself."""
  return json.loads((workdir / stage / 'stage.json').read_text())


def tree_of(folder):
  """Every file with its bytes, to show that nothing was touched."""
  return {
      str(p.relative_to(folder)): p.read_bytes()
      for p in sorted(folder.rglob('*')) if p.is_file()
  }


def copy_of(finished, tmp_path, without):
  """The finished run with some stages taken away."""
  workdir = tmp_path / 'copy'
  shutil.copytree(finished, workdir)
  for stage in without:
    shutil.rmtree(workdir / stage)
  return workdir


def unfinish(workdir, stage, *patterns):
  """Takes files away from a stage, as if it had been stopped before them."""
  told = record(workdir, stage) | {'complete': False}
  (workdir / stage / 'stage.json').write_text(json.dumps(told))
  for pattern in patterns:
    found = list((workdir / stage).glob(pattern))
    assert found, pattern
    for path in found:
      shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_refused(cache, config, workdir, *args, match):
  """One clear error, a non-zero exit, and finished artefacts as they were."""
  before = tree_of(workdir)
  result = run_main(cache, config, f'--workdir={workdir}', *args)
  assert result.returncode != 0
  assert match in result.stdout + result.stderr, result.stderr
  assert 'Traceback' not in result.stderr
  assert tree_of(workdir) == before
