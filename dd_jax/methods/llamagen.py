# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the LlamaGen transformer on the codes of a frozen tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses
from dd_jax.model import check_tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
  """Training of LlamaGen.

  Attributes:
    condition_dropout: probability that an example is trained without its class
      or caption.
  """

  condition_dropout: float = 0.1

  def __post_init__(self) -> None:
    losses.check_share('condition_dropout', self.condition_dropout)


class TrainLlamaGen(Method):
  """Role 'teacher', frozen 'vae': next-token prediction.

  Source: LlamaGen (arXiv 2406.06525), autoregressive/train/train_c2i.py.
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('teacher',), ('vae',))
    check_tokenizer(self.roles['teacher'].model, self.frozen['vae'])

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('teacher', 'teacher', self.loss),)

  def prepare(self, inputs: Inputs) -> Mapping[str, jax.Array]:
    to_indices = self.frozen['vae'].fns['to_indices']
    return {'indices': to_indices(inputs.frozen['vae'], inputs.batch['image'])}

  def loss(self, params: Any, inputs: Inputs) -> Output:
    model = self.roles['teacher'].model
    drop, key = jnp.unstack(jax.vmap(jax.random.split)(inputs.keys), axis=1)
    dropped = jax.vmap(jax.random.bernoulli, (0, None))(
        drop, self.config.condition_dropout
    ) & inputs.training
    condition = jax.tree.map(
        lambda given, null: jnp.where(
            dropped.reshape(-1, *[1] * (given.ndim - 1)), null, given
        ),
        inputs.condition, model.fns['null'](params, inputs.condition),
    )
    targets = inputs.shared['indices']
    logits = model.apply(
        params, condition, targets[:, :-1],
        key=key if inputs.training else None,
    )
    nats = losses.cross_entropy(logits, targets).mean()
    hits = logits.argmax(axis=-1) == targets
    return Output(nats, {'cross_entropy': nats, 'accuracy': hits.mean()})

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    encode = self.frozen['vae'].flops() // 2  # about
    return super().flops(updates, batch_size) + batch_size * encode
