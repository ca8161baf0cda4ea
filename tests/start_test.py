# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of networks that start from others."""

from __future__ import annotations

from etils import epath
import jax
import jax.numpy as jnp
import pytest

from dd_jax import build, checkpoint
from tests import released_files

MLP = dict(name='mlp', width=8)
UNET = dict(
    name='edm_unet', image_size=8, num_classes=3, image_channels=1, ch=16,
    ch_mult=[1, 2], res_blocks=1, attention=[4], head_dim=16,
)
VAR = dict(
    name='var', num_classes=5, depth=2, width=32, heads=4, vocab_size=24,
    patch_nums=[1, 2, 3], code_dim=6,
)
LLAMAGEN = dict(
    name='llamagen', num_classes=5, depth=2, width=32, heads=4, vocab_size=24,
    latent_size=3, code_dim=6,
)
VQVAE = dict(
    name='vqvae', image_size=8, ch=8, ch_mult=[1, 2], res_blocks=1,
    attention=False, z_channels=4, vocab_size=16, patch_nums=[1, 2, 4],
)


def critic(denoiser, **fields):
  return dict(name='critic', denoiser=denoiser, **fields)


def role(init, resolve, **fields):
  entry = dict(optimizer={}, init=init, **fields)
  return build._role('student', entry, 1, resolve, {}, {})


@pytest.mark.parametrize('network', [None, MLP, critic(MLP)])
def test_roles_are_trained_in_float32(network, tmp_path):
  net = build.build_model(MLP)
  half = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), released_files.random(net, 0)
  )
  checkpoint.export(tmp_path / 'half', net, half, {})
  made, source = role(str(tmp_path / 'half'), epath.Path, model=network)
  params = jax.eval_shape(made.init, jax.random.key(0), source)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('origin, model, message', [
    (MLP, MLP | {'sigma_data': 1}, 'sigma_data: 0.5 -> 1.0'),
    (UNET, UNET | {'head_dim': 8}, 'head_dim: 16 -> 8'),
    (VAR, VAR | {'heads': 2}, 'heads: 4 -> 2'),
    (VQVAE, VQVAE | {'phi_ratio': 1}, 'phi_ratio: 0.5 -> 1.0'),
    (VAR, VAR | {'name': 'dd_var', 'heads': 2}, 'heads: 4 -> 2'),
    (VAR, VAR | {'name': 'dd_var', 'patch_nums': [1, 3]}, 'patch_nums'),
    (LLAMAGEN, LLAMAGEN | {'name': 'dd_llamagen', 'heads': 2}, 'heads: 4'),
    (MLP, critic(MLP | {'sigma_data': 1}), 'sigma_data: 0.5 -> 1.0'),
    (critic(MLP), critic(MLP | {'sigma_data': 1}), 'sigma_data: 0.5 -> 1.0'),
    (UNET, critic(UNET | {'head_dim': 8}, head=False), 'head_dim: 16 -> 8'),
    # What is no part of the function, and what the other does not have.
    (UNET, UNET | {'dropout': 0.1, 'dtype': 'bfloat16', 'remat': 'full'}, None),
    (VAR | {'drop_path': 0.1}, VAR | {
        'name': 'dd_var', 'gamma_init': 1e-3, 'dtype': 'bfloat16',
        'remat': 'dots', 'unroll': False, 'layerwise_flags': False,
    }, None),
    (LLAMAGEN | {'mlp_width': 256, 'token_dropout': 0.1},
     LLAMAGEN | {'name': 'dd_llamagen'}, None),
    (VQVAE, VQVAE | {
        'image_size': 16, 'patch_nums': [1, 2, 4, 8], 'beta': 1,
    }, None),
    (critic(MLP), critic(MLP, head=False), None),
    (critic(MLP), critic(MLP | {'sigma_data': 0.5}), None),
])
def test_a_role_computes_what_it_starts_from(origin, model, message):
  net = build.build_model(origin)
  if message is None:
    role('stage:x', lambda _: net, model=model)
    return
  with pytest.raises(ValueError, match=f'roles.student.model .* {message}'):
    role('stage:x', lambda _: net, model=model)
