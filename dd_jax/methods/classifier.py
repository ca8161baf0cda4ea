# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the small classifier that judges samples."""

from __future__ import annotations

import dataclasses
from typing import Any

from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses


@dataclasses.dataclass(frozen=True)
class Config:
  """Nothing to set: the judge is the same everywhere."""


class TrainClassifier(Method):
  """Role 'judge': cross-entropy on labelled images."""

  Config = Config

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('judge', 'judge', self.loss),)

  def loss(self, params: Any, inputs: Inputs) -> Output:
    logits = self.roles['judge'].model.apply(params, inputs.batch['image'])
    label = inputs.batch['label']
    return Output(
        losses.cross_entropy(logits, label).mean(),
        {'accuracy': (logits.argmax(axis=-1) == label).mean()},
    )
