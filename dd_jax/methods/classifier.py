# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the small classifier that judges samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses


@dataclasses.dataclass(frozen=True)
class Config:
  """Nothing to set: the judge is the same everywhere."""


class TrainClassifier(Method):
  """Role 'judge': cross-entropy on labelled images, moved by up to 1/8.

  Unmoved, digits are so well aligned that a classifier need not look at
  strokes: it then takes pixels drawn one by one from images of a class for
  better digits than real ones that it has not seen (see `evals.judge`).
  """

  Config = Config

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('judge', 'judge', self.loss),)

  def loss(self, params: Any, inputs: Inputs) -> Output:
    image = jax.vmap(_move)(inputs.keys, inputs.batch['image'])
    logits = self.roles['judge'].model.apply(params, image)
    label = inputs.batch['label']
    return Output(
        losses.cross_entropy(logits, label).mean(),
        {'accuracy': (logits.argmax(axis=-1) == label).mean()},
    )


def _move(key: jax.Array, image: jax.Array) -> jax.Array:
  """Moves an (H, W, C) image by whole pixels; background (-1) comes in."""
  reach = image.shape[0] // 8
  room = jnp.pad(
      image, ((reach, reach), (reach, reach), (0, 0)), constant_values=-1.0
  )
  row, column = jax.random.randint(key, (2,), 0, 2 * reach + 1)
  return jax.lax.dynamic_slice(room, (row, column, 0), image.shape)
