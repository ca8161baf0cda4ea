# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Our side of the benchmark: the library's functions, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from safetensors import safe_open

from dd_jax import generate, optim, registry, sharding
from dd_jax.convert import table
from dd_jax.flow import discrete
from dd_jax.flow.noise import pair_noise
from dd_jax.method import Method, Role
from dd_jax.methods import distilled_decoding
from dd_jax.model import Model
from dd_jax.models.layers import count_flops
from dd_jax.sampling import guidance
from dd_jax.state import init_state
from dd_jax.step import train_step
from dd_jax.tools.bench import workloads
from dd_jax.tools.bench.program import Case, Program

FAMILIES = {
    'var': {'teacher': 'var', 'student': 'dd_var', 'vae': 'var_vqvae'},
    'llamagen': {
        'teacher': 'llamagen', 'student': 'dd_llamagen', 'vae': 'llamagen_vq',
    },
}
OPTIMIZER = {
    'lr': 1e-4, 'b1': 0.9, 'b2': 0.95, 'weight_decay': 0.05, 'clip': 2.0,
    'warmup': 0.0, 'decay': 'constant',
}

Models = Mapping[str, Model]
Arrays = Mapping[str, Any]
# (weights by network, inputs) -> outputs.
Function = Callable[[Arrays, Arrays], Arrays]


def build(size: str, network: str, variant: str = 'scan') -> Model:
  """A network of a size; its blocks in a loop, or one after the other."""
  sizes = workloads.SIZES[size]
  family = _family(size, network)
  if network == 'vae':
    return registry.get('models', family.model)(sizes.vae)
  fields = dict(sizes.teacher, unroll=variant == 'unrolled')
  return registry.get('models', family.model)(fields)


def rows(size: str, network: str, config: Any) -> table.Table:
  """How the network's weights are named and laid out in its original."""
  return _family(size, network).rows(config)


def _family(size: str, network: str) -> Any:
  families = FAMILIES[workloads.SIZES[size].family]
  return registry.get('families', families[network])


def draw(case: Case) -> dict[str, np.ndarray]:
  """What both sides are given, a row for each example."""
  rng = np.random.default_rng(case.seed)
  config = build(case.model, 'teacher').config
  length = config.offsets[-1]
  shape = length, config.code_dim
  number = np.arange(case.batch, dtype=np.uint32)
  seed = np.full_like(number, case.seed)
  return {
      'labels': (number % config.num_classes).astype(np.int32),
      'seed': seed, 'pair_id': number,
      'noise': np.asarray(jax.jit(
          functools.partial(pair_noise, shape=shape)
      )(seed, number)),
      'indices': rng.integers(
          0, config.vocab_size, (case.batch, length), np.int32
      ),
  }


def teacher(size: workloads.Size, models: Models) -> Function:
  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    def choose(log_p, scale, codebook):
      del codebook
      key = jax.random.fold_in(inputs['key'], scale)
      # At temperature 1 this is how categorical variables are drawn.
      chance = inputs['temperature'] * jax.random.gumbel(key, log_p.shape)
      return jnp.argmax(log_p + chance, axis=-1).astype(jnp.int32)

    return _rollout(size, models, weights, inputs, choose)

  return run


def pairs(size: workloads.Size, models: Models) -> Function:
  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    choose = generate.flow_choose(
        inputs['noise'], models['teacher'].config.offsets, solver='deis',
        steps=50,
    )
    return _rollout(size, models, weights, inputs, choose)

  return run


def _rollout(
    size: workloads.Size, models: Models, weights: Arrays, inputs: Arrays,
    choose: Callable[..., jax.Array],
) -> Arrays:
  return {'indices': registry.get('samplers', size.family).rollout(
      models['teacher'], models['vae'], weights['teacher'], weights['vae'],
      inputs['labels'], choose, **size.sampling,
  )}


def student(size: workloads.Size, models: Models) -> Function:
  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    return registry.get('samplers', size.family).few_step(
        models['student'], models['vae'], weights['student'], weights['vae'],
        inputs['noise'], inputs['labels'], t_list=(0,), split=size.split,
    )

  return run


def decode(size: workloads.Size, models: Models) -> Function:
  lib = registry.get('samplers', size.family)

  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    vae = models['vae']
    codes = vae.fns['codes'](weights['vae'], inputs['indices'])
    return {'image': lib.images_from_codes(vae, weights['vae'], codes)}

  return run


def transformer(size: workloads.Size, models: Models) -> Function:
  net = models['teacher']

  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    labels = jnp.repeat(inputs['labels'], 2)
    maps = jnp.repeat(inputs['noise'], 2, axis=0)
    offsets = net.config.offsets
    cache = net.fns['init_cache'](weights['teacher'], len(labels))
    out = {}
    for scale in range(len(offsets) - 1):
      here = maps[:, offsets[scale] : offsets[scale + 1]] if scale else None
      out[f'logits_{scale}'], cache = net.fns['step'](
          weights['teacher'], cache, labels, here, scale
      )
    return out

  del size
  return run


def ode(steps: int, size: workloads.Size, models: Models) -> Function:
  offsets = models['vae'].config.offsets

  def run(weights: Arrays, inputs: Arrays) -> Arrays:
    codebook = models['vae'].fns['codebook'](weights['vae'])
    out = []
    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
      noise, log_p = (
          inputs[k][:, start:stop].reshape(-1, inputs[k].shape[-1])
          for k in ('noise', 'log_p')
      )
      out.append(discrete.flow_map(noise, log_p, codebook, steps=steps))
    return {'indices': jnp.concatenate(out)}

  del size
  return run


_FUNCTIONS: Mapping[str, Callable[[workloads.Size, Models], Function]] = {
    'teacher': teacher,
    'pairs': pairs,
    'student': student,
    'decode': decode,
    'transformer': transformer,
    'ode_50': functools.partial(ode, 50),
    'ode_100': functools.partial(ode, 100),
}


def train(
    size: workloads.Size, models: Models, weights: Arrays,
    mesh: Mesh | None = None,
) -> tuple[Callable[..., Any], Any, Arrays]:
  """A step, its first state and the frozen weights.

  The state is built from the student's weights, or from their shapes; see
  `first_state`.
  """
  tx = optim.make_optimizer(optim.OptimizerConfig(**OPTIMIZER), total=1)
  role = Role(models['student'], tx, lambda key, source: source)
  config = distilled_decoding.Config(
      t_set=(0,), split=size.split, loss_norm='none'
  )
  method = distilled_decoding.DistilledDecoding(
      config, {'student': role}, {'vae': models['vae']}
  )
  updates = method.updates(0)

  def step(state: Any, frozen: Arrays, batch: Arrays) -> tuple[Any, Arrays]:
    state, metrics = train_step(method, updates, 1, False, state, frozen, batch)
    return state, {
        'loss': metrics['student/loss'].compute(),
        'grad_norm': metrics['student/grad_norm'].compute(),
    }

  state = first_state(method, {'student': weights['student']}, mesh)
  return step, state, {'vae': weights['vae']}


def first_state(
    method: Method, weights: Arrays, mesh: Mesh | None = None
) -> Any:
  """The state that starts from weights of the roles, or from their shapes.

  With a mesh it is split over it.
  """

  def first(weights: Arrays) -> Any:
    return init_state(method, jax.random.key(0), weights)

  if isinstance(jax.tree.leaves(weights)[0], jax.ShapeDtypeStruct):
    return jax.eval_shape(first, weights)
  state = first(weights)
  return jax.device_put(state, sharding.shard_state(
      method, state, mesh, sharding.RULES['fsdp']
  ))


def tokens(size: str) -> int:
  """Tokens of an example."""
  return build(size, 'teacher').config.offsets[-1]


def count(row: str, size: str) -> int:
  """FLOPs of the products of one call on one example."""
  sizes = workloads.SIZES[size]
  models = {n: build(size, n) for n in workloads.rows(size)[row].networks}
  weights = {n: m.abstract() for n, m in models.items()}
  inputs = jax.eval_shape(lambda: _example(size))
  if row == 'train':
    step, state, frozen = train(sizes, models, weights)
    return count_flops(step, state, frozen, _batch(inputs))
  return count_flops(_FUNCTIONS[row](sizes, models), weights, inputs)


def make(row: str, case: Case) -> Program:
  """The program of a row, with its weights."""
  mesh = set_up(case)
  sizes = workloads.SIZES[case.model]
  networks = workloads.rows(case.model)[row].networks
  models = {n: build(case.model, n, case.variant) for n in networks}
  weights = {n: load(case, n, m, mesh) for n, m in models.items()}
  inputs = jax.device_put(case.inputs(), sharding.batch_sharding(mesh))
  if row == 'train':
    return train_program(
        *train(sizes, models, weights, mesh), _batch(inputs), mesh
    )
  whole = sharding.replicated(mesh)
  inputs |= jax.device_put(
      {'key': jax.random.key(case.seed), 'temperature': jnp.zeros(())}, whole
  )
  if row.startswith('ode'):
    inputs['log_p'] = _log_p(sizes, inputs)
  function = _FUNCTIONS[row](sizes, models)
  compiled = None

  def compile_() -> Mapping[str, float]:
    nonlocal compiled
    compiled, costs = _compile(jax.jit(function), mesh, weights, inputs)
    return costs

  def check() -> Mapping[str, np.ndarray]:
    return jax.tree.map(np.asarray, compiled(weights, inputs))

  def run() -> None:
    inputs['key'] = jax.random.fold_in(inputs['key'], 1)
    inputs['temperature'] = jax.device_put(jnp.ones(()), whole)
    jax.block_until_ready(compiled(weights, inputs))

  return Program(compile_, check, run)


def set_up(case: Case) -> Mesh:
  """Has compiled programs kept for the rounds that follow; makes the mesh."""
  jax.config.update('jax_compilation_cache_dir', str(case.cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  sizes = sharding.parse_mesh(case.mesh or 'data:1')
  return sharding.make_mesh(
      sizes, jax.devices()[: math.prod(sizes.values())]
  )


def train_program(
    step: Callable[..., Any], state: Any, frozen: Arrays, batch: Arrays,
    mesh: Mesh,
) -> Program:
  """A program whose calls are the steps of a training, one after the other.

  Args:
    step: `(state, frozen, batch) -> state, metrics`, among them `loss`.
    state: the first one; given away.
    frozen: weights that no step moves.
    batch: of every step.
    mesh: that all of them are on.
  """
  compiled = None

  def compile_() -> Mapping[str, float]:
    nonlocal compiled
    kept = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(kept, None))
    compiled, costs = _compile(jitted, mesh, state, frozen, batch)
    return costs

  def check() -> Mapping[str, np.ndarray]:
    nonlocal state
    state, metrics = compiled(state, frozen, batch)
    return jax.tree.map(np.asarray, metrics)

  return Program(compile_, check, lambda: float(check()['loss']))


def _compile(
    jitted: Any, mesh: Mesh, *inputs: Any
) -> tuple[Any, Mapping[str, float]]:
  began = time.perf_counter()
  with sharding.kernels_on(mesh):
    lowered = jitted.lower(*inputs)
  traced = time.perf_counter()
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  return compiled, {
      'trace': traced - began, 'compile': time.perf_counter() - traced,
      'arguments': memory.argument_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
  }


def load(case: Case, network: str, model: Model, mesh: Mesh) -> Any:
  """Weights of a network from its file, split over a mesh."""
  with safe_open(case.weights(network, 'jax'), framework='numpy') as file:
    leaves = {k: jnp.array(file.get_tensor(k)) for k in file.keys()}
  params = table.nest(model.abstract(), leaves)
  return jax.device_put(params, sharding.shard_params(
      model.axes(), params, mesh, sharding.RULES['fsdp']
  ))


def _batch(inputs: Arrays) -> Arrays:
  """What a stage of pairs gives to a training step."""
  names = {'labels': 'label', 'indices': 'indices', 'seed': 'seed',
           'pair_id': 'pair_id'}
  batch = {new: inputs[old] for old, new in names.items()}
  return batch | {'index': inputs['pair_id']}


def _log_p(size: workloads.Size, inputs: Arrays) -> jax.Array:
  """Log-probabilities such as a rollout hands to the flow map."""
  shape = *inputs['indices'].shape, size.teacher['vocab_size']
  logits = jax.random.normal(jax.random.fold_in(inputs['key'], 0), shape)
  logits = guidance.filter_top_k(logits, size.sampling['top_k'])
  logits = guidance.filter_top_p(logits, size.sampling['top_p'])
  return jax.nn.log_softmax(logits)


def _example(size: str) -> Arrays:
  """Inputs of one example, for their shapes."""
  config = build(size, 'teacher').config
  length = config.offsets[-1]
  tokens = jnp.zeros((1, length), jnp.int32)
  number = jnp.zeros(1, jnp.uint32)
  inputs = {
      'labels': jnp.zeros(1, jnp.int32), 'indices': tokens, 'seed': number,
      'pair_id': number,
      'noise': jnp.zeros((1, length, config.code_dim)),
      'key': jax.random.key(0), 'temperature': jnp.zeros(()),
  }
  return inputs | {'log_p': _log_p(workloads.SIZES[size], inputs)}
