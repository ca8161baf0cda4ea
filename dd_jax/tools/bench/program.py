# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What a side of a benchmark hands to the process that times it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
  """Inputs of a program.

  Attributes:
    folder: with the weights in both layouts and the inputs, see `inputs`.
    model: entry of `workloads.SIZES`.
    batch: examples.
    variant: of the workload.
    threads: cores.
    seed: of draws.
    cache: folder of compiled programs.
    mesh: devices that ours is split over, as in 'data:2,fsdp:4'; '' is one.
  """

  folder: pathlib.Path
  model: str
  batch: int
  variant: str
  threads: int
  seed: int
  cache: pathlib.Path
  mesh: str = ''

  def weights(self, network: str, layout: str) -> pathlib.Path:
    """The file of a network in a framework's layout."""
    return self.folder / f'{network}.{layout}.safetensors'

  def inputs(self) -> Mapping[str, np.ndarray]:
    """Arrays whose rows are examples."""
    with np.load(self.folder / 'inputs.npz') as arrays:
      return {k: v[: self.batch] for k, v in arrays.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
  """A workload that is ready to be compiled.

  Attributes:
    compile: compiles, and returns seconds and bytes by name.
    check: runs once without chance; what the two sides must agree on.
    run: one call, until its results are there. A number that it returns must
      agree too, call by call.
  """

  compile: Callable[[], Mapping[str, float]]
  check: Callable[[], Mapping[str, np.ndarray]]
  run: Callable[[], float | None]


def save(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values))


def load(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text())
