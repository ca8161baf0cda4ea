# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Pairs are what the flow makes of their noise, whatever mesh made them."""

from __future__ import annotations

import math
import types

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import build, checkpoint, generate, sharding
from dd_jax.data.pairs import PairSource, read_manifest
from dd_jax.flow import discrete
from dd_jax.flow.noise import pair_noise
from dd_jax.stages import Context

SIZES = dict(
    num_classes=5, depth=2, width=32, heads=2, vocab_size=24, code_dim=6,
)
VAE = dict(
    ch=8, ch_mult=[1, 2], res_blocks=1, attention=False, z_channels=6,
    vocab_size=24, image_channels=1,
)
# By family: teacher, tokenizer and how the teacher is sampled.
FAMILIES = {
    'var': (
        dict(SIZES, patch_nums=[1, 2, 4]),
        dict(VAE, name='vqvae', image_size=8, patch_nums=[1, 2, 4]),
        dict(cfg=1.5, solver='heun', solver_steps=8, chunk=24),
    ),
    'llamagen': (
        dict(SIZES, latent_size=3, mlp_width=48),
        dict(VAE, name='llamagen_vq', image_size=6, code_dim=6),
        dict(cfg=2.5, temperature=0.8, cfg_interval=3, solver='dpmpp_2m',
             solver_steps=12),
    ),
}
TOP_K, TOP_P = 12, 0.9
SEED = 7
# The last of the shards is short, and its batch is filled up.
COUNTS = dict(pairs=200, shard_size=64, batch_size=16)
# Of tokens; rounding may decide between codes that are as good as each other.
AGREEMENT = 0.999


def random_params(net, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: jnp.asarray(0.25 * rng.standard_normal(x.shape), x.dtype),
      net.abstract(),
  )


def make_pairs(case, name, sizes, rules):
  """All pairs of a teacher, made by the devices of a mesh."""
  mesh = sharding.make_mesh(
      sizes, jax.devices()[: math.prod(sizes.values())]
  )
  config = dict(
      COUNTS, **case.settings, top_k=TOP_K, top_p=TOP_P,
      teacher=str(case.folder / 'teacher'), vae=str(case.folder / 'vae'),
  )
  context = Context(
      name, config, case.folder / name, case.folder, SEED, mesh, rules
  )
  with sharding.kernels_on(mesh):
    outputs = generate.run(context)
  source = PairSource(context.directory / outputs['artefact'])
  return source.take(np.arange(len(source)))


@pytest.fixture(scope='module', params=sorted(FAMILIES))
def case(request, tmp_path_factory):
  """Random networks, how they are sampled, and pairs that one device made."""
  teacher, vae, settings = FAMILIES[request.param]
  case = types.SimpleNamespace(
      teacher=build.build_model(dict(teacher, name=request.param)),
      vae=build.build_model(vae), settings=settings,
      folder=epath.Path(tmp_path_factory.mktemp(request.param)),
  )
  case.tp, case.vp = random_params(case.teacher, 0), random_params(case.vae, 1)
  checkpoint.export(case.folder / 'teacher', case.teacher, case.tp, {})
  checkpoint.export(case.folder / 'vae', case.vae, case.vp, {})
  case.pairs = make_pairs(case, 'one', dict(data=1), 'dp')
  return case


def guided_logits(case):
  """What the teacher says of each stored code, given those before it."""
  labels, inputs = case.pairs['label'], case.pairs['indices'][:, :-1]
  cfg = case.settings['cfg']
  if case.teacher.family == 'var':
    codes = case.vae.fns['codes'](case.vp, case.pairs['indices'])
    inputs = jax.jit(case.vae.fns['var_input'])(case.vp, codes)
    weight = cfg * np.repeat([0, 1, 2], [1, 4, 16]) / 2  # grows with the scale
  else:
    # LlamaGen has no number for the first token.
    guided = np.arange(-1, 8) <= case.settings['cfg_interval']
    weight = np.where(guided, cfg - 1, 0)
  forward = jax.jit(case.teacher.apply)
  cond, null = (
      np.asarray(forward(case.tp, y, inputs))
      for y in (labels, np.full_like(labels, SIZES['num_classes']))
  )
  logits = cond + weight[None, :, None].astype(np.float32) * (cond - null)
  return logits / np.float32(case.settings.get('temperature', 1))


def keep_likely(logits):
  """One token's logits; -inf but for the likely codes."""
  order = np.argsort(-logits)[:TOP_K]
  p = np.exp(logits[order] - logits[order[0]])
  p /= p.sum()
  kept = order[np.cumsum(p) - p < TOP_P]
  out = np.full_like(logits, -np.inf)
  out[kept] = logits[kept]
  return out


def test_a_pair_is_what_the_flow_makes_of_its_noise(case):
  pairs = case.pairs
  ids = np.arange(COUNTS['pairs'])
  assert (pairs['pair_id'] == ids).all() and (pairs['seed'] == SEED).all()
  assert (pairs['label'] == ids % SIZES['num_classes']).all()
  log_p = np.apply_along_axis(keep_likely, -1, guided_logits(case))
  codebook = case.vae.fns['codebook'](case.vp)
  # As training makes it from what is stored.
  noise = pair_noise(
      pairs['seed'], pairs['pair_id'], (log_p.shape[1], SIZES['code_dim'])
  )

  def agreement(noise):
    found = [
        discrete.flow_map(
            noise[:, i], log_p[:, i], codebook, solver=case.settings['solver'],
            steps=case.settings['solver_steps'],
        ) for i in range(log_p.shape[1])
    ]
    return (np.stack(found, axis=1) == pairs['indices']).mean()

  assert agreement(noise) >= AGREEMENT
  # Codes depend on the noise, so that this says something.
  assert agreement(np.roll(noise, 1, axis=1)) < 0.5
  assert agreement(np.roll(noise, 1, axis=0)) < 0.5


def test_the_manifest_says_what_made_the_pairs(case):
  settings = {k: v for k, v in case.settings.items() if k != 'chunk'}
  # A report samples its teacher with the settings that stand here, or else
  # with the defaults: VAR's set is as before there was a temperature.
  assert read_manifest(case.folder / 'one/data').provenance == {
      'cfg_interval': -1, **settings, 'top_k': TOP_K, 'top_p': TOP_P,
      'seed': SEED, 'micro_batch': COUNTS['batch_size'],
      **{name: checkpoint.describe(case.folder / name)['hash']
         for name in ('teacher', 'vae')},
  }


def test_one_program_makes_the_same_pairs_on_many_devices(case, caplog):
  with jax.log_compiles():
    pairs = make_pairs(
        case, 'many', dict(data=2, fsdp=2, tensor=2), 'fsdp_tp'
    )
  # There are four shards and 13 batches.
  compiled = [m for m in caplog.messages if 'compilation of jit(program)' in m]
  assert len(compiled) == 1
  same = pairs['indices'] == case.pairs['indices']
  assert same.mean() >= AGREEMENT


def test_a_tokenizer_of_the_same_sizes_that_is_not_the_teachers(
    case, tmp_path
):
  checkpoint.export(
      tmp_path / 'teacher', case.teacher, case.tp, {'frozen': {'vae': 'f' * 64}}
  )
  (tmp_path / 'vae').symlink_to(case.folder / 'vae')
  other = types.SimpleNamespace(**vars(case) | {'folder': epath.Path(tmp_path)})
  with pytest.raises(ValueError, match='vae .*is not the tokenizer that .*/te'):
    make_pairs(other, 'one', dict(data=1), 'dp')
  assert not (tmp_path / 'one').exists()
