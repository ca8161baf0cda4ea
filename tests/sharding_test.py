# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Every model and every method gives the same on any mesh."""

from __future__ import annotations

import functools
import types

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from dd_jax import build, optim, registry, sharding, train
from dd_jax import config as config_lib
from dd_jax.method import Role
from tests import released_files

B = 16
VQVAE = dict(
    name='vqvae', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, vocab_size=16, patch_nums=[1, 2, 4],
)
VAR = dict(
    num_classes=4, depth=2, width=16, heads=2, patch_nums=[1, 2, 4],
    vocab_size=16, code_dim=4, gamma_init=1.0,
)
VQ = dict(
    name='llamagen_vq', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, code_dim=4, vocab_size=16,
)
GPT = dict(
    num_classes=4, depth=2, width=16, heads=2, latent_size=4, vocab_size=16,
    code_dim=4, mlp_width=32,
)
MLP = dict(name='mlp', shape=[8, 8, 1], num_classes=4, width=32)
MODELS = {
    'denoiser': MLP,
    'critic': dict(name='critic', denoiser=MLP),
    'vae': VQVAE,
    'vq': VQ,
    'gpt': dict(GPT, name='llamagen'),
    'gpt_student': dict(GPT, name='dd_llamagen'),
    'teacher': dict(VAR, name='var', shared_aln=True),
    'student': dict(VAR, name='dd_var', zero_flags=False),
    'judge': dict(name='judge', image_size=8, image_channels=1,
                  num_classes=4),
    'unet': dict(
        name='edm_unet', image_size=8, image_channels=1, num_classes=4, ch=8,
        ch_mult=[1], res_blocks=1, attention=[], head_dim=4,
    ),
    'discriminator': dict(name='discriminator', size=8, channels=8),
    'patchgan': dict(
        name='patchgan', image_size=8, image_channels=1, ch=8, halvings=1
    ),
    'mixture': dict(name='mixture', means=[[0.5, -1.0], [0.0, 1.0]], std=0.3),
    'lpips': dict(name='lpips', slim=32),
    't5': dict(
        name='t5', vocab_size=16, width=16, depth=2, heads=2, head_dim=4,
        mlp_dim=24,
    ),
    'words': dict(name='words', vocab_size=16, width=16),
    'clip': dict(
        name='clip', image_size=8, patch_size=4, image_width=16, image_depth=1,
        image_heads=2, image_mlp_dim=24, vocab_size=16, context_length=21,
        text_width=16, text_depth=1, text_heads=2, text_mlp_dim=24,
        projection_dim=8,
    ),
}
# Method -> role, model of the role, frozen networks, fields; or models by role.
# What follows the method's name is ours.
METHODS = {
    'vqvae': (
        'tokenizer', 'vae', {}, {'revive_every': 1, 'scale_dropout': 0.5},
    ),
    'vqvae of llamagen': (
        {'tokenizer': 'vq', 'discriminator': 'patchgan'}, None, {},
        {'revive_every': 1, 'adversarial_from': 1},
    ),
    'llamagen': ('teacher', 'gpt', {'vae': 'vq'}, {}),
    'distilled_decoding of llamagen': (
        'student', 'gpt_student', {'vae': 'vq'}, {'t_set': [0, 6], 'split': 5},
    ),
    'edm': ('teacher', 'denoiser', {}, {}),
    'dmd2': (
        {'student': 'denoiser', 'critic': 'critic'}, None,
        {'teacher': 'denoiser'}, {'ratio': 2, 'guidance': 1.5},
    ),
    'classifier': ('judge', 'judge', {}, {}),
    'var': ('teacher', 'teacher', {'vae': 'vae'}, {}),
    'distilled_decoding': ('student', 'student', {'vae': 'vae'},
                           {'t_set': [0, 1], 'split': 1}),
}
MESHES = {
    'dp': dict(data=8),
    'fsdp_tp': dict(data=2, fsdp=2, tensor=2),
}


def make_batch(tokens=21):
  rng = np.random.default_rng(0)
  return {
      'image': rng.uniform(-1, 1, (B, 8, 8, 1)).astype(np.float32),
      'label': rng.integers(0, 4, B).astype(np.int32),
      'index': np.arange(B, dtype=np.uint32),
      'pair_id': np.arange(B, dtype=np.uint32),
      'seed': np.full(B, 3, np.uint32),
      'indices': rng.integers(0, 16, (B, tokens)).astype(np.int32),
  }


@functools.cache
def one_step(name, rules, devices=8):
  role_name, role_model, frozen, fields = METHODS[name]
  if role_model is not None:
    role_name = {role_name: role_model}
  sizes = MESHES[rules] if devices > 1 else {}
  mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
  # Plain descent: Adam's first steps blow up what is near zero.
  tx = optim.scale_by_clock(lambda count: 0.1, 'step')
  roles = {}
  for role, config in role_name.items():
    net = build.build_model(MODELS[config])
    roles[role] = Role(net, tx, lambda key, _, n=net: n.init(key), ema=0.9)
  models = {n: build.build_model(MODELS[m]) for n, m in frozen.items()}
  params = {
      n: jax.device_put(p, sharding.shard_params(
          models[n].axes(), p, mesh, sharding.RULES[rules]
      )) for n, m in models.items()
      if (p := m.init(jax.random.key(1))) is not None
  }
  cls = registry.get('methods', name.split()[0])
  method = cls(
      config_lib.make(cls.Config, fields, name), roles, models
  )
  sources = dict.fromkeys(roles)
  _, fresh = train.fresh_state(method, 0, sources, mesh, rules)
  batch = make_batch(16 if 'llamagen' in name else 21)
  programs = train.Programs(method, 1, mesh)
  state = fresh(sources)
  for step in range(2):
    state, metrics = programs(
        method.updates(step), state, params,
        sharding.place_batch(batch, mesh),
    )
  assert len(programs.compiled) == len({*map(method.updates, range(2))})
  sharded = [
      not x.sharding.is_fully_replicated
      for x in jax.tree.leaves(state.params)
  ]
  return jax.device_get((state.params, state.ema, metrics)), any(sharded)


# Both rules split the examples; where nothing else is, light methods stand for
# the others. A second run of a method, on LlamaGen's networks, is slow: other
# cases compare these.
@pytest.mark.parametrize('name, rules', [
    *(pytest.param(
        name, 'fsdp_tp', marks=[pytest.mark.slow] * ('of llamagen' in name)
    ) for name in sorted(METHODS)),
    *((name, 'dp') for name in ('classifier', 'edm', 'llamagen')),
])
def test_train_step_is_that_of_one_device_on_any_mesh(name, rules):
  want, _ = one_step(name, 'dp', devices=1)
  got, sharded = one_step(name, rules)
  # Convolutions have no axis in the rules: tokenizers stay whole.
  whole = rules == 'dp' or name.split()[0] == 'vqvae'
  assert sharded != whole
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5),
      want, got,
  )


def forward_inputs(name):
  batch = make_batch()
  rng = np.random.default_rng(1)
  x = rng.normal(size=(B, 21, 4)).astype(np.float32)
  rgb = rng.uniform(-1, 1, (2, B, 16, 16, 3)).astype(np.float32)
  tokens = batch['indices']
  sigma = np.linspace(0.1, 50, B, dtype=np.float32)
  return {
      'vae': (batch['image'],),
      'vq': (batch['image'],),
      'gpt': (batch['label'], batch['indices'][:, :15]),
      'gpt_student': (x[:, :16], batch['label'], np.full(B, 3, np.int32)),
      'judge': (batch['image'],),
      'patchgan': (batch['image'],),
      **dict.fromkeys(
          ('denoiser', 'critic', 'unet'),
          (batch['image'], sigma, batch['label']),
      ),
      'discriminator': (np.tile(batch['image'], 8),),
      'mixture': (x[:, 0, :2], sigma, batch['label']),
      'lpips': tuple(rgb),
      **dict.fromkeys(('t5', 'words'), (tokens, tokens > 1)),
      'clip': (rgb[0, :, :8, :8], tokens),
      'teacher': (batch['label'], x[:, 1:]),
      'student': (x, batch['label'], np.full(B, 1, np.int32)),
  }[name]


def test_every_network_is_here():
  # Inception takes longest to compile; `vgg` is a part of `lpips`.
  assert {config['name'] for config in MODELS.values()} == (
      set(registry.TABLES['models']) - {'inception', 'vgg'}
  )


@pytest.mark.parametrize('name', sorted(MODELS))
def test_forward_is_the_same_on_any_mesh(name):
  model = build.build_model(MODELS[name])
  # Not those of `init`, where zeros hide what comes before them.
  params = released_files.random(model, 0)
  inputs = forward_inputs(name)
  want = jax.jit(model.apply)(params, *inputs)
  mesh = sharding.make_mesh(MESHES['fsdp_tp'])
  placed = jax.device_put(params, sharding.shard_params(
      model.axes(), params, mesh, sharding.RULES['fsdp_tp']
  ))
  rows = sharding.place_rows({str(i): x for i, x in enumerate(inputs)}, mesh)
  got = jax.jit(model.apply)(placed, *rows.values())
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      want, got,
  )


class Grid:
  """A mesh of which only the processes are known, in the order of devices."""

  axis_names = sharding.AXES

  def __init__(self, data, fsdp, tensor, per_process):
    shape = (data, fsdp, tensor, 1)
    self.shape = dict(zip(self.axis_names, shape, strict=True))
    self.devices = np.empty(shape, object)
    for i in range(self.devices.size):
      self.devices.flat[i] = types.SimpleNamespace(
          process_index=i // per_process
      )


@pytest.mark.parametrize('grid, shares', [
    (Grid(8, 1, 1, 2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    (Grid(2, 2, 2, 4), [(0, 2), (1, 2)]),
    # The weights of a layer lie on two processes, on all of them.
    (Grid(2, 1, 4, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (Grid(1, 2, 2, 1), [(0, 2), (0, 2), (1, 2), (1, 2)]),
    (Grid(1, 1, 8, 4), [(0, 1), (0, 1)]),
])
def test_processes_with_the_same_examples_read_them(grid, shares, monkeypatch):
  got = []
  for process in range(len(shares)):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    got.append(sharding.batch_share.__wrapped__(grid))
  assert got == shares


def test_processes_that_overlap_are_refused():
  with pytest.raises(ValueError, match='do not share the examples evenly'):
    sharding.batch_share(Grid(3, 1, 2, 3))


@pytest.mark.parametrize('size, fits', [(500, 504), (504, 504), (1, 8)])
def test_a_batch_that_devices_divide(size, fits):
  assert sharding.fit_batch(size, sharding.make_mesh({'data': 8})) == fits
  assert sharding.fit_batch(size, sharding.make_mesh({'tensor': 8})) == size
  with pytest.raises(ValueError, match='batch_size=0 must be at least 1'):
    sharding.fit_batch(0, sharding.make_mesh({'data': 8}))


@pytest.mark.parametrize('size, micro_batches', [(0, 1), (8, 0), (-8, 1)])
def test_no_batch_is_refused(size, micro_batches):
  with pytest.raises(ValueError, match='must be at least 1'):
    sharding.check_batch(size, sharding.make_mesh({'data': 8}), micro_batches)


def test_mesh_errors_name_what_is_wrong():
  with pytest.raises(ValueError, match="no axis \\['model'\\]"):
    sharding.make_mesh(dict(model=2))
  with pytest.raises(ValueError, match='only one axis may be -1'):
    sharding.make_mesh(dict(data=-1, fsdp=-1))
  with pytest.raises(ValueError, match='8 devices are not a multiple of 3'):
    sharding.make_mesh(dict(data=-1, tensor=3))
  with pytest.raises(ValueError, match='needs 4 devices, there are 8'):
    sharding.make_mesh(dict(data=4))


def test_axis_that_does_not_divide_is_named():
  model = build.build_model(dict(MODELS['teacher'], vocab_size=17))
  with pytest.raises(ValueError, match="head/logits/bias: axis 'vocab'"):
    sharding.shard_params(
        model.axes(), model.abstract(),
        sharding.make_mesh(MESHES['fsdp_tp']), sharding.RULES['fsdp_tp'],
    )


def test_large_arrays_without_a_rule_fall_back_to_fsdp():
  mesh = sharding.make_mesh(dict(data=2, fsdp=4))
  shapes = {'big': jax.ShapeDtypeStruct((3, 1024, 512), np.float32),
            'small': jax.ShapeDtypeStruct((4, 4), np.float32)}
  axes = {'big': (None, None, None), 'small': (None, None)}
  out = sharding.shard_params(axes, shapes, mesh, sharding.RULES['fsdp'])
  assert out['big'].spec == P(None, 'fsdp', None)
  assert out['small'].spec == P(None, None)
