# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs of a benchmark, drawn once and written for both sides."""

from __future__ import annotations

from collections.abc import Sequence
import functools
import math
from typing import Any
import zlib

import jax
import numpy as np
from safetensors.numpy import save_file

from dd_jax.convert import table
from dd_jax.flow.noise import pair_noise
from dd_jax.model import Model
from dd_jax.tools.bench import jax_side, workloads
from dd_jax.tools.bench.program import Case


def write(
    case: Case, rows: Sequence[str], sides: Sequence[str]
) -> dict[str, Any]:
  """Writes weights in the layout of every side, and inputs.

  Returns:
    parameters by network, and FLOPs of one example by row.
  """
  known = workloads.rows(case.model)
  networks = {n for row in rows for n in known[row].networks}
  parameters = {}
  for name in sorted(networks):
    model = jax_side.build(case.model, name)
    drawn = dict(_draw(model, case.seed))
    parameters[name] = sum(x.size for x in drawn.values())
    if 'jax' in sides:
      save_file(drawn, case.weights(name, 'jax'))
    if 'torch' in sides:
      params = table.nest(model.abstract(), drawn)
      save_file(
          table.invert(
              jax_side.rows(case.model, name, model.config), params
          ),
          case.weights(name, 'torch'),
      )
  rng = np.random.default_rng(case.seed)
  teacher = jax_side.build(case.model, 'teacher').config
  length = teacher.offsets[-1]
  shape = length, teacher.code_dim
  number = np.arange(case.batch, dtype=np.uint32)
  seed = np.full_like(number, case.seed)
  np.savez(
      case.folder / 'inputs.npz',
      labels=(number % teacher.num_classes).astype(np.int32),
      seed=seed, pair_id=number,
      noise=np.asarray(jax.jit(
          functools.partial(pair_noise, shape=shape)
      )(seed, number)),
      indices=rng.integers(
          0, teacher.vocab_size, (case.batch, length), np.int32
      ),
  )
  return {
      'parameters': parameters,
      'flops': {row: jax_side.count(row, case.model) for row in rows},
  }


def _draw(model: Model, seed: int):
  """Weights by path, of sizes that let every layer matter.

  Initial ones would not do: their gates leave the blocks out.
  """
  for path, leaf in table.flatten(model.abstract()):
    rng = np.random.default_rng((seed, zlib.crc32(path.encode())))
    x = rng.standard_normal(leaf.shape, np.float32)
    kind = path.split('/')[-1]
    stacked = leaf.shape[0] if path.startswith('layers/') else 1
    if kind == 'kernel':
      x *= np.float32(math.prod(leaf.shape[:-1]) / stacked) ** np.float32(-0.5)
    elif kind == 'scale':
      x = 1 + np.float32(0.1) * x
    elif kind == 'log_scale':
      x = np.float32(np.log(4)) + np.float32(0.1) * x
    else:
      x *= np.float32(0.02 if kind == 'bias' else 0.5)
    yield path, x

