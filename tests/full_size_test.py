# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""VAR-d16, its tokenizer and its student at the published sizes.

Slow, and some GB each. One file, so that one worker runs them one by one.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import checkpoint, console, stages
from dd_jax.data import pairs
from dd_jax.sampling import guidance
from dd_jax.sampling import var as sampling
from tests import released_files
from tests.command import COMPILE_FAST
from tests.golden import golden_cases, networks

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow

# What takes time here is running, not compiling as elsewhere in the suite.
jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 3}
)
NEAR_TIE = 4e-3  # twice what logits may differ
close = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)


def thinned(image_BxHxWxC):
  """Every fourth pixel, channels first and in [0, 1], as it is stored."""
  return (image_BxHxWxC.transpose(0, 3, 1, 2)[:, :, ::4, ::4] + 1) / 2


@functools.cache
def decoder():
  """Images of codes; the tokenizer of the cases below is one."""
  vae, params = networks.tokenizer(golden_cases.load('var_transformer_d16'))
  run = jit(functools.partial(sampling.images_from_codes, vae))
  return vae, params, lambda codes: thinned(run(params, codes))


def test_tokenizer_matches_the_original():
  case = golden_cases.load('var_vqvae_d16')
  vae, params = networks.tokenizer(case)
  image = case.uniform('image', 1, 3, 256, 256).transpose(0, 2, 3, 1)

  @jit
  def run(params, image, indices):
    latent = vae.fns['encode'](params, image)
    # What follows the choice of codes is compared on those that are stored.
    codes = vae.fns['codes'](params, indices)
    f_hat = vae.fns['accumulate'](params, codes)
    image = jnp.clip(vae.fns['decode'](params, f_hat), -1, 1)
    return {
        'latent': latent.transpose(0, 3, 1, 2),
        'indices': vae.fns['latent_to_indices'](params, latent),
        'f_hat': f_hat.transpose(0, 3, 1, 2),
        'var_input': vae.fns['var_input'](params, codes),
        'reconstruction': image.transpose(0, 3, 1, 2)[:, :, ::4, ::4],
    }

  stored = case.arrays
  found = run(params, image, stored['indices'].astype(np.int32))
  assert found.keys() == stored.keys()
  same = np.asarray(found.pop('indices')) == stored['indices']
  assert same.mean() >= 0.99
  for name, value in found.items():
    close(value, stored[name], err_msg=name)


def test_teacher_matches_the_original():
  case = golden_cases.load('var_transformer_d16')
  teacher, params = networks.teacher(case, unroll=False)
  maps = golden_cases.load('var_vqvae_d16').arrays['var_input']
  label = case.arrays['label']
  logits = jit(teacher.apply)(params, label, maps)
  close(logits[:, ::20, ::16], case.arrays['teacher_forced_logits'])

  vae, vae_params, decode = decoder()
  greedy, cfg = case.arrays['greedy_cfg_indices'], case.config['cfg']
  codes = vae.fns['codes'](vae_params, greedy)
  close(decode(codes), case.arrays['greedy_cfg_image'])

  @jit
  def best(params, label, maps):
    """The best token everywhere, and its lead over the second."""
    rows = jnp.concatenate([label, jnp.full_like(label, 1000)])
    logits = teacher.apply(params, rows, jnp.repeat(maps, 2, axis=0))
    ramp = cfg * teacher.config.levels / 9
    top, indices = jax.lax.top_k(
        guidance.guide(logits[:1], logits[1:], ramp[None, :, None]), 2
    )
    return indices[..., 0], top[..., 0] - top[..., 1]

  found, lead = best(
      params, label, jit(vae.fns['var_input'])(vae_params, codes)
  )
  assert np.all((found == greedy) | (lead < NEAR_TIE))
  sampled = np.asarray(jit(functools.partial(
      sampling.rollout, teacher, vae, choose=sampling.greedy, cfg=cfg,
      top_k=1, top_p=1.0,
  ))(params, vae_params, label))
  # After a near tie the two may go separate ways.
  parts = np.flatnonzero(sampled[0] != greedy[0])
  assert not len(parts) or lead[0, parts[0]] < NEAR_TIE


def test_student_matches_the_original():
  case = golden_cases.load('dd_var_d16')
  student, params = networks.student(case, unroll=False)
  stored = case.arrays
  noise, label = case.gauss('noise', 1, 680, 32), stored['label']

  @jit
  def heads(params, noise, label):
    return student.apply(params, noise, label, jnp.zeros_like(label))

  out = heads(params, noise, label)
  close(out['logits'][:, ::20, ::16], stored['step0_logits'])
  close(out['codes'][:, ::20], stored['step0_tokens'])

  vae, vae_params, decode = decoder()
  split = case.config['loss_split_t']
  found = jit(functools.partial(
      sampling.few_step, student, vae, t_list=(0,), split=split
  ))(params, vae_params, noise, label)
  sequence = stored['step0_final_sequence']
  cut = student.config.offsets[split]
  # Another code is as good after a near tie of its logits.
  top, _ = jax.lax.top_k(out['logits'][:, :cut], 2)
  clear = np.asarray(top[..., 0] - top[..., 1]) > NEAR_TIE
  assert clear.mean() > 0.9
  close(found['codes'][:, :cut][clear], sequence[:, :cut][clear])
  close(found['codes'][:, cut:], sequence[:, cut:])
  close(decode(sequence), stored['image'])


# What shrinks: how many, and nothing else.
COUNTS = {
    'trajectories': dict(pairs=2, shard_size=2, batch_size=2),
    'student': dict(batch_size=2, steps=2),
    # The fewest that an Inception score can be made of.
    **{f'evaluate_{name}': dict(samples=10, batch_size=2)
       for name in ('teacher', '1', '2')},
}


# A small process, as one starts with the peak of the one that it is a copy of.
MEASURE = """
import pathlib, resource, subprocess, sys
code = subprocess.call([sys.executable, '-m', *sys.argv[2:]])
used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
pathlib.Path(sys.argv[1]).write_text(str(used / 1e6))
sys.exit(code)
"""


class Commands:
  """Runs modules, which must succeed; shows their time and peak memory."""

  def __init__(self, folder):
    self.rows, self.used = [], folder / 'used'

  def __call__(self, name, *command):
    # Without those of this suite, see conftest.py.
    flags = [
        flag for flag in os.environ['XLA_FLAGS'].split()
        if flag not in COMPILE_FAST and 'device_count' not in flag
    ]
    began = time.monotonic()
    subprocess.run(
        [sys.executable, '-c', MEASURE, self.used, *command], cwd=ROOT,
        env=os.environ | {
            'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ' '.join(flags),
        }, check=True,
    )
    peak = float(self.used.read_text())
    self.rows.append((name, time.monotonic() - began, peak))
    console.table('d16', ('command', 'seconds', 'peak GB'), self.rows)
    assert peak < 14


def test_the_recipe_of_d16(tmp_path):
  weights, workdir = tmp_path / 'weights', tmp_path / 'run'
  released_files.write_full(weights)
  command = Commands(tmp_path)
  config = runpy.run_path(str(ROOT / 'configs/dd_var.py'))['get_config']('d16')
  counts = [f'--config.stages.{name}.{field}={value}'
            for name, fields in COUNTS.items()
            for field, value in fields.items()]
  for stage in stages.parse(config.to_dict()):
    command(
        stage.name, 'dd_jax.main', '--config=configs/dd_var.py:d16', *counts,
        f'--config.weights={weights}', f'--workdir={workdir}',
        f'--stage={stage.name}',
    )
  records = {
      name: stages.read_record(workdir / name) for name in config.stages
  }
  assert all(record['complete'] for record in records.values())

  teacher = checkpoint.describe(workdir / 'teacher/export/var')
  assert teacher['parameters'] == 310_283_520
  vae = checkpoint.describe(workdir / 'vae/export/vqvae')
  assert vae['parameters'] == 108_948_355

  reader = pairs.PairSource(workdir / 'trajectories/data')
  made = [reader[i] for i in range(len(reader))]
  assert [p['indices'].shape for p in made] == [(680,)] * 2
  assert all(len(np.unique(p['indices'])) > 100 for p in made)
  assert (made[0]['indices'] != made[1]['indices']).mean() > 0.5

  lines = (workdir / 'student/metrics.jsonl').read_text().splitlines()
  metrics = json.loads(lines[-1])
  assert 0 < metrics['student/perceptual'] < 10
  assert metrics['student/loss'] < 20
  export = workdir / 'student' / records['student']['outputs']['exports'][
      'student'
  ]
  student = checkpoint.describe(export)
  assert student['parameters'] == 328_165_664

  rows = [
      json.loads((workdir / f'evaluate_{name}/report/fid.json').read_text())
      for name in ('teacher', '1', '2')
  ]
  assert all(np.isfinite(row['fid']) and row['fid'] > 0 for row in rows)
  assert len({row['hashes']['samples'] for row in rows}) == 3

  # As a released file, and from there the same network again.
  file, again = tmp_path / 'var-d16.pth', tmp_path / 'again'
  command('to .pth', 'dd_jax.tools.convert', '--reverse', f'--input={export}',
          f'--output={file}')
  command('from .pth', 'dd_jax.tools.convert', '--family=dd_var',
          f'--input={file}', f'--output={again}')
  assert checkpoint.describe(again)['sha256'] == student['sha256']
