# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What methods that train a teacher on its tokenizer's codes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.method import Inputs, Method, Update
from dd_jax.methods import losses
from dd_jax.model import check_tokenizer


class TrainNextTokens(Method):
  """Role 'teacher', frozen 'vae': subclasses have a `loss` of predictions."""

  def __post_init__(self) -> None:
    self.check_parts(('teacher',), ('vae',))
    check_tokenizer(self.roles['teacher'].model, self.frozen['vae'])

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('teacher', 'teacher', self.loss),)

  def prepare(self, inputs: Inputs) -> Mapping[str, jax.Array]:
    to_indices = self.frozen['vae'].fns['to_indices']
    return {'indices': to_indices(inputs.frozen['vae'], inputs.batch['image'])}

  def predict(
      self, params: Any, inputs: Inputs, condition: Any, earlier: jax.Array,
      dropout: float,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits (B, L, V), their mean cross-entropy, and (B, L) where they hit.

    Args:
      params: of the teacher.
      inputs: of the loss.
      condition: of each example.
      earlier: what the teacher is given of the tokens before each.
      dropout: probability that an example is trained without its condition.
    """
    model, targets = self.roles['teacher'].model, inputs.shared['indices']
    drop, key = jnp.unstack(jax.vmap(jax.random.split)(inputs.keys), axis=1)
    dropped = jax.vmap(jax.random.bernoulli, (0, None))(
        drop, dropout
    ) & inputs.training
    condition = jax.tree.map(
        lambda given, null: jnp.where(
            dropped.reshape(-1, *[1] * (given.ndim - 1)), null, given
        ),
        condition, model.fns['null'](params, condition),
    )
    logits = model.apply(
        params, condition, earlier, key=key if inputs.training else None
    )
    nats = losses.cross_entropy(logits, targets).mean()
    return logits, nats, logits.argmax(axis=-1) == targets

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    encode = self.frozen['vae'].flops() // 2  # about
    return super().flops(updates, batch_size) + batch_size * encode
