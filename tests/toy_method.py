# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A method with all that the loop must carry, small enough to read.

Two networks on a 5:1 clock (the critic at every step, the student at every
fifth), a low-rank role over a frozen network, a running statistic that no
gradient moves, and a source of numbers. The loop knows nothing of it: it comes
in by registry lines.
"""

from __future__ import annotations

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import config as config_lib
from dd_jax import registry
from dd_jax.method import Method, Output, Update
from dd_jax.model import Model
from dd_jax.models import layers


@dataclasses.dataclass(frozen=True)
class MlpConfig:
  width: int = 8


class Mlp(nn.Module):
  width: int

  @nn.compact
  def __call__(self, x):
    x = layers.Dense(self.width, ('embed', 'mlp'), name='up')(x)
    return layers.Dense(4, ('mlp', 'embed'), name='down')(jnp.tanh(x))


def build(config):
  config = config_lib.make(MlpConfig, config, 'mlp')
  module = Mlp(config.width)
  init, axes = layers.pure(module, jax.ShapeDtypeStruct((1, 4), jnp.float32))

  def forward(params, x):
    return module.apply({'params': params}, x)

  return Model(
      'mlp', config, init, {'forward': forward}, axes,
      lambda: 16 * config.width,
  )


@dataclasses.dataclass(frozen=True)
class Config:
  period: int = 5


class Toy(Method):
  """The student imitates the frozen teacher plus noise; see the module."""

  Config = Config

  def updates(self, step):
    critic = Update('critic', 'critic', self.critic_loss)
    if step % self.config.period:
      return (critic,)
    # Two programs of one role: they differ in a static alone.
    side = ('side', (step // self.config.period) % 2)
    student = Update('student', 'student', self.student_loss, (side,))
    return (student, critic, Update('adapter', 'adapter', self.adapter_loss))

  def init_aux(self):
    return {'mean': jnp.zeros((4,))}

  def prepare(self, inputs):
    teacher = self.frozen['teacher'].apply
    y = teacher(inputs.frozen['teacher'], inputs.batch['x'])
    noise = jax.vmap(lambda k: jax.random.normal(k, (4,)))(inputs.keys)
    return {'y': y + 0.1 * noise}

  def after(self, state, outputs):
    x = outputs['critic']['x'].mean(axis=(0, 1))
    return state.replace(aux={'mean': 0.9 * state.aux['mean'] + 0.1 * x})

  def _regress(self, role, params, inputs, weight=1.0):
    y = self.roles[role].model.apply(params, inputs.batch['x'])
    loss = weight * jnp.square(y - inputs.shared['y']).mean()
    return Output(loss, {'seen': loss}, {'x': inputs.batch['x']})

  def critic_loss(self, params, inputs):
    return self._regress('critic', params, inputs)

  def student_loss(self, params, inputs, *, side):
    return self._regress('student', params, inputs, 1.0 + side)

  def adapter_loss(self, params, inputs):
    return self._regress('adapter', params, inputs)


class Numbers:
  """Rows of standard normals; row i depends on i alone."""

  def __init__(self, count, bad=-1):
    self._count, self._bad = count, bad

  def __len__(self):
    return self._count

  def __getitem__(self, i):
    x = np.random.default_rng(i).normal(size=4).astype(np.float32)
    return {'x': x * np.nan if i == self._bad else x}


def register(monkeypatch):
  """The registry lines of a new method, model and source."""
  for table, name, attribute in (
      ('methods', 'toy', 'Toy'), ('models', 'mlp', 'build'),
      ('sources', 'numbers', 'Numbers'),
  ):
    monkeypatch.setitem(
        registry.TABLES[table], name, f'toy_method:{attribute}'
    )


def make_config(teacher, *, steps=12, save_every=100, micro_batches=1,
                rules='dp', mesh=None, bad=-1, **optimizer):
  """A run of one stage, with values as they come from a config file."""
  optimizer = dict(lr=1e-2, weight_decay=0.1, warmup=0.0) | optimizer
  role = dict(model=dict(name='mlp'), optimizer=optimizer)
  return dict(
      name='toy', seed=0, mesh=mesh or dict(data=-1), rules=rules,
      stages=dict(run=dict(
          kind='train', method=dict(name='toy'), steps=steps,
          batch_size=32, save_every=save_every, log_every=1,
          micro_batches=micro_batches,
          data=dict(source='numbers', count=128, bad=bad),
          frozen=dict(teacher=str(teacher)),
          roles=dict(
              student=dict(role, ema=0.9),
              critic=dict(role, optimizer=dict(optimizer, clock='step')),
              adapter=dict(
                  optimizer=optimizer, adapter=dict(base='teacher', rank=2),
              ),
          ),
      )),
  )
