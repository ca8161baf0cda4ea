# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weights and inputs of a benchmark, drawn once and written for both sides."""

from __future__ import annotations

from collections.abc import Sequence
import importlib
import math
from typing import Any
import zlib

import numpy as np
from safetensors.numpy import save_file

from dd_jax.convert import table
from dd_jax.model import Model
from dd_jax.tools.bench import workloads
from dd_jax.tools.bench.program import Case


def write(
    case: Case, rows: Sequence[str], sides: Sequence[str]
) -> dict[str, Any]:
  """Writes weights in the layout of every side, and inputs.

  Returns:
    parameters by network, FLOPs of one example by row, and its tokens (None
    where it has none).
  """
  known = workloads.rows(case.model)
  ours = importlib.import_module(known[rows[0]].modules['jax'])
  networks = {n for row in rows for n in known[row].networks}
  parameters = {}
  for name in sorted(networks):
    model = ours.build(case.model, name)
    drawn = dict(_draw(model, case.seed))
    parameters[name] = sum(x.size for x in drawn.values())
    if 'jax' in sides:
      save_file(drawn, case.weights(name, 'jax'))
    if 'torch' in sides:
      params = table.nest(model.abstract(), drawn)
      save_file(
          table.invert(
              ours.rows(case.model, name, model.config), params
          ),
          case.weights(name, 'torch'),
      )
  np.savez(case.folder / 'inputs.npz', **ours.draw(case))
  return {
      'parameters': parameters,
      'flops': {row: ours.count(row, case.model) for row in rows},
      'tokens': ours.tokens(case.model),
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

