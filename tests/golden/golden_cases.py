# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Golden cases: outputs of the original programs, and how to rebuild inputs.

A case is `<name>.json` (sizes, seed, and centre, amplitude and shape of every
weight under its original name) and `<name>.npz` (stored arrays). Weights and
inputs are never stored: a uniform draw whose seed is the CRC-32 of a text names
each one, so that any program can rebuild them.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any
import zlib

import numpy as np

_FOLDER = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Case:
  """One golden case: `meta` is its JSON, `arrays` its stored arrays."""

  meta: dict[str, Any]
  arrays: dict[str, np.ndarray]

  @property
  def config(self) -> dict[str, Any]:
    return self.meta['config']

  def tensors(self, field: str = 'params') -> dict[str, np.ndarray]:
    """Weights by original name, float32 in the original layout."""
    made = {}
    for name, rule in self.meta[field].items():
      u = _draw(f'{self.meta["seed"]}:{name}').random(tuple(rule['shape']))
      spread = rule['amplitude'] * (2.0 * u - 1.0)
      made[name] = (rule['center'] + spread).astype(np.float32)
    return made

  def buffers(self) -> dict[str, np.ndarray]:
    """Zeros under the names that hold no weights."""
    return {k: np.zeros(s) for k, s in self.meta['buffers'].items()}

  def uniform(self, name: str, *shape: int) -> np.ndarray:
    """The input `name`, uniform in [-1, 1], float32."""
    u = _draw(f'{self.meta["seed"]}:input:{name}').random(shape)
    return (2.0 * u - 1.0).astype(np.float32)

  def gauss(self, name: str, *shape: int) -> np.ndarray:
    """The input `name`, standard normal by Box and Muller, float32."""
    draw = _draw(f'{self.meta["seed"]}:input:{name}')
    radius = np.sqrt(-2.0 * np.log(1.0 - draw.random(shape)))
    angle = 2.0 * np.pi * draw.random(shape)
    return (radius * np.cos(angle)).astype(np.float32)


def load(name: str) -> Case:
  """Reads a case that lies beside this file."""
  meta = json.loads((_FOLDER / f'{name}.json').read_text())
  with np.load(_FOLDER / f'{name}.npz') as file:
    return Case(meta, dict(file))


def _draw(text: str) -> np.random.Generator:
  return np.random.Generator(np.random.PCG64(zlib.crc32(text.encode())))
