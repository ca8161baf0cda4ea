# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the roles of a config start from."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest

from dd_jax import build, checkpoint, registry, sharding, train
from dd_jax.data import pairs
from dd_jax.method import Method, Update
from tests import released_files

MLP = dict(name='mlp', width=8, blocks=2)
CRITIC = dict(name='critic', denoiser=MLP)
HEADLESS = dict(CRITIC, head=False)


@dataclasses.dataclass(frozen=True)
class Config:
  first: int = 0


class Late(Method):
  """Trains the first role always, the others from one step on."""

  Config = Config

  def updates(self, step):
    names = [*self.roles] if step >= self.config.first else [*self.roles][:1]
    return tuple(Update(name, name, None) for name in names)


@pytest.fixture
def make(monkeypatch):
  """Fresh parameters of roles, of a method that takes any."""
  monkeypatch.setitem(registry.TABLES['methods'], 'late', 'build_test:Late')
  mesh = sharding.make_mesh(dict(data=1), jax.devices()[:1])

  def fresh_params(roles, resolve, **fields):
    method, sources, _ = build.build_method(
        dict(name='late', **fields),
        {name: dict(role, optimizer={}) for name, role in roles.items()},
        {}, 10, resolve, mesh, 'dp',
    )
    _, fresh = train.fresh_state(method, 0, sources, mesh, 'dp')
    return fresh(sources).params

  return fresh_params


def test_roles_start_from_exports(make, tmp_path):
  exports = {}
  for name, config in (
      ('mlp', MLP), ('critic', CRITIC), ('headless', HEADLESS)
  ):
    model = build.build_model(config)
    exports[name] = released_files.random(model, 7)
    checkpoint.export(tmp_path / name, model, exports[name], {})
  params = make(dict(
      a=dict(init='mlp'), b=dict(init='mlp', model=MLP),
      c=dict(init='critic', model=CRITIC), d=dict(init='mlp', model=CRITIC),
      e=dict(init='headless', model=CRITIC),
  ), tmp_path.joinpath)
  # The same network is copied, the critic's head too.
  for role, name in (('a', 'mlp'), ('b', 'mlp'), ('c', 'critic')):
    jax.tree.map(np.testing.assert_array_equal, params[role], exports[name])
  # Another one is adopted; what it lacks is drawn from the role's own key.
  adopt, key = build.build_model(CRITIC).fns['adopt'], jax.random.key(0)
  expected = jax.jit(lambda: dict(
      d=adopt(jax.random.fold_in(key, 3), exports['mlp']),
      e=adopt(jax.random.fold_in(key, 4), exports['headless']),
  ))()
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-5),
      {role: params[role] for role in 'de'}, expected,
  )


@pytest.mark.parametrize('role, message', [
    (dict(init='critic', model=MLP), "'mlp' cannot start from a 'critic'"),
    (dict(), 'roles.student needs a model or an init'),
])
def test_a_role_without_a_start_is_refused(make, role, message):
  with pytest.raises(ValueError, match=message):
    make(dict(student=role), lambda _: build.build_model(CRITIC))


def test_a_role_that_no_step_trains_is_refused(make):
  roles = dict(early=dict(model=MLP), late=dict(model=MLP))
  assert make(roles, None, first=9).keys() == roles.keys()
  with pytest.raises(ValueError, match=r"none of 10 steps trains \['late'\]"):
    make(roles, None, first=10)


def test_pairs_of_another_tokenizer_are_refused(tmp_path):
  manifest = pairs.Manifest(
      pairs=1, shard_size=1, length=1, vocab_size=2, num_classes=1,
      provenance={'vae': 'a' * 64},
  )
  (tmp_path / 'manifest.json').write_text(manifest.to_json())
  data = dict(source='pairs', path=str(tmp_path))
  build.check_pairs(data, {'vae': 'a' * 64}, pathlib.Path)
  build.check_pairs(data, {}, pathlib.Path)
  build.check_pairs(dict(source='digits'), {'vae': 'b' * 64}, pathlib.Path)
  with pytest.raises(ValueError, match='made with the vae aaaaaaaaaaaa'):
    build.check_pairs(data, {'vae': 'b' * 64}, pathlib.Path)
