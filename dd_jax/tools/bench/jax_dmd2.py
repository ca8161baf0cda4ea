# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Our side of the benchmark of DMD2: the library's steps, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from dd_jax import optim, registry, sharding
from dd_jax.convert import table
from dd_jax.method import Inputs, Role
from dd_jax.methods import dmd2
from dd_jax.model import Model
from dd_jax.models.critic import model as critic
from dd_jax.models.layers import count_flops
from dd_jax.step import train_step
from dd_jax.tools.bench import jax_side, workloads
from dd_jax.tools.bench.program import Case, Program

OPTIMIZER = {
    'lr': 1e-4, 'b1': 0.9, 'b2': 0.999, 'weight_decay': 0.01, 'clip': 10.0,
    'warmup': 0.0, 'decay': 'constant',
}
# First calls whose draws the other side is given.
GIVEN = 4
# What the sides must agree on, by row.
_METRICS = {
    'critic': ('loss', 'denoising', 'gan', 'grad_norm'),
    'student': ('loss', 'matching', 'gan', 'grad_norm'),
}

Arrays = jax_side.Arrays


class DMD2(dmd2.DMD2):
  """The method, and what it draws: another framework cannot draw the same."""

  def draws(self, inputs: Inputs) -> dict[str, jax.Array]:
    """Noise (B, ...) that is added to data, its level and labels, (B,).

    `start` is the student's input; the others are of the comparison, of the
    generator's discriminator, of the critic's denoising, and of its
    discriminator on samples and on data.
    """
    shared = self.prepare(inputs)
    found = {
        'start': shared['input'], 'wanted': shared['condition'],
        'start_sigma': self.process.level(shared['place']),
    }
    bounds = self.config.first, self.config.last
    for name, purpose, *levels in (
        ('match', dmd2._MATCH, *bounds), ('judged', dmd2._JUDGED),
        ('fit', dmd2._FIT), ('fake', dmd2._FAKE), ('real', dmd2._REAL),
    ):
      found[name], place = self._noisy(
          inputs, jnp.zeros_like(shared['input']), purpose, *levels
      )
      found[f'{name}_sigma'] = self.process.level(place)
    return found


def build(size: str, network: str) -> Model:
  """A network of a size."""
  fields = dict(workloads.SIZES[size].denoiser)
  denoiser = registry.get('models', fields.pop('name'))(fields)
  if network == 'critic':
    # Not `dd_jax.build`, which would import all that reads data.
    config = critic.Config(workloads.SIZES[size].denoiser)
    return critic.compose(config, denoiser)
  return denoiser


def rows(size: str, network: str, config: Any) -> table.Table:
  """How the network's weights are named and laid out on the other side."""
  if workloads.SIZES[size].denoiser['name'] == 'mlp':
    return _mlp_critic_rows() if network == 'critic' else _mlp_rows('', '')
  family = 'dmd2_critic' if network == 'critic' else 'edm_unet'
  return registry.get('families', family).rows(config)


def _mlp_rows(src: str, dst: str) -> table.Table:
  """Rows of an MLP, which no release has, under names such as the UNet's."""
  names = {
      'map_layer0': 'condition/noise_0', 'map_layer1': 'condition/noise_1',
      'inner': 'in', 'outer': 'out',
      **{f'blocks.{{i}}.{layer}': f'block_{{i}}/{layer}'
         for layer in ('affine', 'dense_0', 'dense_1')},
  }
  label = f'{src}model.map_label.weight'
  return (
      table.Row(label, f'{dst}condition/embedding', table.TRANSPOSE),
      *(row for theirs, ours in names.items()
        for row in _linear(f'{src}model.{theirs}', dst + ours)),
  )


def _mlp_critic_rows() -> table.Table:
  head = 'cls_pred_branch'
  return (
      *_mlp_rows('fake_unet.', 'denoiser/'),
      *_linear(f'{head}.0', 'head/hidden'), *_linear(f'{head}.3', 'head/out'),
      table.Row(f'{head}.1.weight', 'head/norm/scale'),
      table.Row(f'{head}.1.bias', 'head/norm/bias'),
  )


def _linear(src: str, dst: str) -> tuple[table.Row, ...]:
  return (
      table.Row(f'{src}.weight', f'{dst}/kernel', table.TRANSPOSE),
      table.Row(f'{src}.bias', f'{dst}/bias'),
  )


def make_method(size: str) -> DMD2:
  """The method with its default settings, which are those of the release."""
  tx = optim.make_optimizer(optim.OptimizerConfig(**OPTIMIZER), total=1)
  roles = {
      name: Role(build(size, name), tx, lambda key, source: source)
      for name in ('student', 'critic')
  }
  return DMD2(dmd2.Config(), roles, {'teacher': build(size, 'teacher')})


def draw(case: Case) -> dict[str, np.ndarray]:
  """A batch, and what our steps draw in the first calls, (B, calls, ...)."""
  method = make_method(case.model)
  config = method.frozen['teacher'].config
  rng = np.random.default_rng(case.seed)
  index = np.arange(case.batch, dtype=np.uint32)
  shape = case.batch, *config.shape
  batch = {
      'image': rng.uniform(-1, 1, shape).astype(np.float32),
      'label': (index % config.num_classes).astype(np.int32),
      'index': index,
  }

  @jax.jit
  def one(call: jax.Array) -> dict[str, jax.Array]:
    # As in a step of the library, from the key of `jax_side.first_state`.
    key = jax.random.fold_in(jax.random.key(0), call)
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        {n: role.model.abstract() for n, role in method.roles.items()},
    )
    return method.draws(Inputs(
        params, {}, {}, batch, key,
        jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(index)),
        {}, {},
    ))

  calls = [jax.device_get(one(i)) for i in range(GIVEN)]
  return batch | {k: np.stack([c[k] for c in calls], 1) for k in calls[0]}


def train(
    row: str, size: str, weights: Arrays, mesh: Mesh | None = None
) -> tuple[Callable[..., Any], Any, Arrays]:
  """A step, its first state and the frozen weights; see `jax_side.train`."""
  method = make_method(size)
  # The student is updated before the critic, where both are.
  updates = method.updates(0)[:1] if row == 'student' else method.updates(1)

  def step(state: Any, frozen: Arrays, batch: Arrays) -> tuple[Any, Arrays]:
    state, metrics = train_step(method, updates, 1, False, state, frozen, batch)
    return state, {k: metrics[f'{row}/{k}'].compute() for k in _METRICS[row]}

  state = jax_side.first_state(
      method, {n: weights[n] for n in method.roles}, mesh
  )
  return step, state, {n: weights[n] for n in method.frozen if n in weights}


def tokens(size: str) -> None:
  """Tokens of an example: there are none."""
  del size


def count(row: str, size: str) -> int:
  """FLOPs of the products of one call on one example."""
  weights = {
      n: build(size, n).abstract() for n in workloads.rows(size)[row].networks
  }
  step, state, frozen = train(row, size, weights)
  config = build(size, 'teacher').config
  return count_flops(step, state, frozen, {
      'image': jax.ShapeDtypeStruct((1, *config.shape), jnp.float32),
      'label': jax.ShapeDtypeStruct((1,), jnp.int32),
      'index': jax.ShapeDtypeStruct((1,), jnp.uint32),
  })


def make(row: str, case: Case) -> Program:
  """The program of a row, with its weights."""
  mesh = jax_side.set_up(case)
  weights = {
      n: jax_side.load(case, n, build(case.model, n), mesh)
      for n in workloads.rows(case.model)[row].networks
  }
  inputs = case.inputs()
  batch = {k: inputs[k] for k in ('image', 'label', 'index')}
  return jax_side.train_program(
      *train(row, case.model, weights, mesh),
      jax.device_put(batch, sharding.batch_sharding(mesh)), mesh,
  )
