# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Every argument of every config: its stages are parsed, its networks built."""

from __future__ import annotations

import ast
import json
import pathlib
import runpy

import pytest

from dd_jax import (
  build,
  evaluate,
  evaluate_denoiser,
  optim,
  registry,
  released,
  scoring,
  sharding,
  stages,
)
from dd_jax import config as config_lib
from dd_jax.method import Role

ROOT = pathlib.Path(__file__).parent.parent
FILES = {
    file.stem: runpy.run_path(str(file))['get_config']
    for file in sorted((ROOT / 'configs').glob('*.py'))
}


def arguments(get_config):
  """All that a config knows, which it names where it is given another."""
  with pytest.raises(ValueError) as error:
    get_config('?')
  return ast.literal_eval(str(error.value).partition('expected one of ')[2])


def network(entry, networks):
  """What a stage names, or describes."""
  if isinstance(entry, str):
    return networks[entry]
  return build.build_model(entry['model'])


def trained(config, networks):
  """The networks of a stage by role, once its method has accepted them."""
  roles = {}
  for name, entry in config.roles.items():
    role = config_lib.make(build.RoleConfig, entry, name)
    assert role.init is None or role.init in networks
    fields = dict(role.optimizer)
    steps = fields.pop('total', config.steps)
    optimizer = config_lib.make(optim.OptimizerConfig, fields, name)
    tx = optim.make_optimizer(optimizer, steps)
    roles[name] = Role(build.build_model(role.model), tx, None, role.ema)
  fields = dict(config.method)
  cls = registry.get('methods', fields.pop('name'))
  cls(config_lib.make(cls.Config, fields, 'method'), roles, {
      name: network(entry, networks) for name, entry in config.frozen.items()
  })
  for data in filter(None, (config.data, config.heldout)):
    registry.find('sources', data['source'])
  return {name: role.model for name, role in roles.items()}


@pytest.mark.parametrize('file, arg', [
    (file, arg) for file, get in FILES.items() for arg in arguments(get)
])
def test_every_stage_can_be_made(file, arg):
  own = ',path=images,classes=5' if arg.startswith('own_') else ''
  own += ',discriminator=True' if arg == 'own_64' else ''
  config = json.loads(json.dumps(FILES[file](arg + own).to_dict()))
  mesh = sharding.make_mesh(config['mesh'])
  networks = {}  # of the stages so far
  for stage in stages.parse(config):
    values = {k: v for k, v in stage.config.items() if k != 'seed'}
    made = config_lib.make(
        registry.get('configs', stage.kind), values, stage.name
    )
    models = {
        name: network(getattr(made, name), networks)
        for name in ('clip', 'encoder', 'inception', 'judge', 'student',
                     'teacher', 'vae')
        if getattr(made, name, None)
    }
    found = {}
    if stage.kind == 'convert':
      family = registry.get('families', made.family).model
      found[family] = build.build_model(
          dict(released.known_fields(made), name=family)
      )
    elif stage.kind == 'train':
      found = trained(made, networks)
    elif stage.kind == 'generate':
      assert made.shard_size % made.batch_size == 0
    elif stage.kind == 'evaluate':
      params = dict.fromkeys((*models, 'cumulative'))
      evaluate.make_panel(made, models, params, {}, 0, mesh)
    elif stage.kind == 'evaluate_denoiser':
      evaluate_denoiser.make_panel(made, models, dict.fromkeys(models), 0, mesh)
    elif stage.kind in ('fid', 'clip_score'):
      scoring.check(made, models['student'], stage.name, mesh)
    networks |= {f'stage:{stage.name}/{k}': v for k, v in found.items()}
    if len(found) == 1:
      networks[f'stage:{stage.name}'] = next(iter(found.values()))
