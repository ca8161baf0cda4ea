# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Noise-to-data pairs of a frozen teacher: sharded, resumable, the same bytes.

Every pair depends on the job's seed and its own number alone, and every
program runs on the same number of pairs: which machine makes which shard, and
how often the job was killed, leaves no trace in the data.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import (
    build,
    checkpoint,
    console,
    hooks,
    metrics,
    registry,
    sharding,
    shards,
)
from dd_jax import config as config_lib
from dd_jax.data import conditions as conditions_lib
from dd_jax.data import pairs
from dd_jax.flow import discrete
from dd_jax.flow.noise import pair_noise
from dd_jax.model import Model, Params, condition_of
from dd_jax.sampling import guidance
from dd_jax.stages import Context


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """A stage of kind 'generate'.

  Attributes:
    teacher: export folder or 'stage:name'.
    vae: export folder or 'stage:name' of its tokenizer.
    pairs: pairs in all; labels go round the classes, or round the captions.
    shard_size: pairs a file; a kill loses at most one.
    batch_size: pairs a program run, over all hosts. Batches of one may differ
      from larger ones in the last bits, so at least 2 a device.
    cfg: guidance, as the sampler of the teacher's family has it.
    temperature: what logits are divided by, 1 for nothing.
    top_k: codes kept, 0 for all.
    top_p: probability kept, 1 for all.
    cfg_interval: where guidance ends, as the sampler has it; -1 for nowhere.
    solver: of the flow map; see `flow.discrete.flow_map`.
    solver_steps: steps of the solver.
    chunk: tokens that the flow map integrates at once, None for all.
    captions: folder or 'stage:name' of captions, where those are what the
      teacher takes; the label of a pair is then the number of its caption.
  """

  teacher: str
  vae: str
  pairs: int
  shard_size: int
  batch_size: int
  cfg: float
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  cfg_interval: int = -1
  solver: discrete.Solver = 'deis'
  solver_steps: int = 50
  chunk: int | None = None
  captions: str | None = None


def flow_choose(
    noise: jax.Array, offsets: tuple[int, ...], *, solver: str, steps: int,
    chunk: int | None = None,
) -> Callable[..., jax.Array]:
  """A choice of tokens by the flow map instead of by lot.

  Args:
    noise: (B, L, C) standard normal.
    offsets: where each autoregressive step's tokens start, and L.
    solver: see `flow.discrete.flow_map`.
    steps: see `flow.discrete.flow_map`.
    chunk: see `flow.discrete.flow_map`.

  Returns:
    `choose(log_p_BxnxV, step, codebook) -> indices_Bxn`, for a rollout.
  """

  def choose(log_p, step, codebook):
    # The step may be traced: where tokens come one by one it is scanned over.
    part = jax.lax.dynamic_slice_in_dim(
        noise, jnp.asarray(offsets)[step], log_p.shape[1], axis=1
    )
    flat = discrete.flow_map(
        part.reshape(-1, part.shape[-1]),
        log_p.reshape(-1, log_p.shape[-1]), codebook,
        steps=steps, solver=solver, chunk=chunk,
    )
    return flat.reshape(part.shape[:-1])

  return choose


def make_program(
    config: GenerateConfig, teacher: Model, vae: Model, mesh: Any
) -> Callable[..., jax.Array]:
  """A jitted `(teacher_params, vae_params, rows)` -> codes.

  Rows are `seed` and `id` of pairs and what `conditions` give for them; codes
  are indices (B, L) int32, whole on every host.
  """
  sampler = registry.get('samplers', teacher.family)
  offsets = teacher.config.offsets
  shape = (offsets[-1], teacher.config.code_dim)

  def program(teacher_params: Params, vae_params: Params, rows):
    noise = pair_noise(rows['seed'], rows['id'], shape)
    return sampler.rollout(
        teacher, vae, teacher_params, vae_params, condition_of(rows),
        flow_choose(noise, offsets, solver=config.solver,
                    steps=config.solver_steps, chunk=config.chunk),
        **guidance.settings_of(config),
    )

  return jax.jit(program, out_shardings=sharding.replicated(mesh))


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'generate'; see `GenerateConfig`.

  Returns:
    `artefact`, the folder of the pairs, and `hashes` of their manifest.

  Raises:
    ValueError: batch or shard sizes that do not fit the mesh or each other, or
      a tokenizer that is not the teacher's.
    Preempted: SIGTERM came between two shards.
  """
  clock = metrics.Clock()
  config = config_lib.make(GenerateConfig, context.config, context.name)
  mesh = context.mesh
  sharding.check_batch(config.batch_size, mesh)
  if config.batch_size < 2 * sharding.count_parts(mesh):
    logging.warning(
        '%s: batch_size=%d leaves each device a single pair, and products of '
        'one row may differ in their last bits: another number of devices may '
        'make other pairs', context.name, config.batch_size,
    )
  if config.shard_size % config.batch_size:
    raise ValueError(
        f'{context.name}: shard_size={config.shard_size} is not a multiple of '
        f'batch_size={config.batch_size}'
    )
  checkpoint.check_own_tokenizer(
      *map(context.resolve, (config.teacher, config.vae))
  )
  models, params = build.load_frozen(
      {'teacher': config.teacher, 'vae': config.vae}, context.resolve, mesh,
      context.rules,
  )
  teacher = models['teacher'].config
  captions = config.captions and context.resolve(config.captions)
  conditions = conditions_lib.of_network(teacher, captions)
  made_of = {
      name: checkpoint.describe(context.resolve(ref))['hash']
      for name, ref in (('teacher', config.teacher), ('vae', config.vae))
  }
  if captions:
    made_of['captions'] = conditions.manifest.sha256
  manifest = pairs.Manifest(
      pairs=config.pairs, shard_size=config.shard_size,
      length=teacher.offsets[-1], vocab_size=teacher.vocab_size,
      num_classes=len(conditions),
      provenance=made_of | {
          'seed': context.seed,
          **guidance.recorded(guidance.settings_of(config)),
          'solver': config.solver,
          'solver_steps': config.solver_steps,
          'micro_batch': config.batch_size,
      },
  )
  writer = pairs.PairWriter(context.directory / shards.FOLDER, manifest)
  program = make_program(config, models['teacher'], models['vae'], mesh)
  todo = shards.pending(writer, manifest)
  done = config.pairs - sum(len(manifest.shard_ids(s)) for s in todo)
  throttle = hooks.Throttle()
  log = metrics.make_writer(context.directory, resume_at=done)
  clock.turn('compile')  # up to the first program
  with (contextlib.closing(log),
        console.Progress(context.name, config.pairs, done) as bar):
    for shard in todo:
      hooks.raise_if_preempted(
          f'{context.name}: stopped by a signal with {done} of {config.pairs} '
          'pairs written'
      )
      ids = np.asarray(manifest.shard_ids(shard), np.uint32)
      # The last shard may be short: its last batch is filled up and cut.
      padded = np.resize(ids, -(-len(ids) // config.batch_size)
                         * config.batch_size)
      labels = (padded % len(conditions)).astype(np.int32)
      chunks = []
      for start in range(0, len(padded), config.batch_size):
        rows = slice(start, start + config.batch_size)
        batch = sharding.place_rows({
            'seed': np.full(config.batch_size, context.seed, np.uint32),
            'id': padded[rows], **conditions.take(labels[rows]),
        }, mesh)
        chunks.append(program(params['teacher'], params['vae'], batch))
        clock.turn('step')
        throttle.add(chunks[-1])
      indices = np.concatenate([np.asarray(c) for c in chunks])[:len(ids)]
      if jax.process_index() == 0:
        with clock.spend('save'):
          writer.write(shard, seed=context.seed, label=labels[:len(ids)],
                       indices=indices)
      done += len(ids)
      spent = clock.take()
      log.write_scalars(done, spent | metrics.peak_memory() | {
          'time/pairs_per_second': len(ids) / sum(spent.values()),
      })
      bar.update(done)
  return shards.finish(writer, context)
