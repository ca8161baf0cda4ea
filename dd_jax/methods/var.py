# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the VAR transformer on the codes of a frozen tokenizer."""

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
  """Training of VAR.

  Attributes:
    label_dropout: probability that an example is trained without its class.
    label_smoothing: probability mass spread evenly over all codes.
  """

  label_dropout: float = 0.1
  label_smoothing: float = 0.0

  def __post_init__(self) -> None:
    losses.check_share('label_dropout', self.label_dropout)
    losses.check_share('label_smoothing', self.label_smoothing)


class TrainVAR(Method):
  """Role 'teacher', frozen 'vae': next-scale prediction.

  Source: VAR, trainer.py; arXiv 2404.02905, section 3.1.
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('teacher',), ('vae',))
    check_tokenizer(self.roles['teacher'].model, self.frozen['vae'])

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('teacher', 'teacher', self.loss),)

  def prepare(self, inputs: Inputs) -> Mapping[str, jax.Array]:
    fns, params = self.frozen['vae'].fns, inputs.frozen['vae']
    indices = fns['to_indices'](params, inputs.batch['image'])
    maps = fns['var_input'](params, fns['codes'](params, indices))
    return {'indices': indices, 'maps': maps}

  def loss(self, params: Any, inputs: Inputs) -> Output:
    model = self.roles['teacher'].model
    drop, path = jnp.unstack(jax.vmap(jax.random.split)(inputs.keys), axis=1)
    dropped = jax.vmap(jax.random.bernoulli, (0, None))(
        drop, self.config.label_dropout
    )
    labels = jnp.where(
        dropped & inputs.training, model.config.num_classes,
        inputs.batch['label'],
    )
    logits = model.apply(
        params, labels, inputs.shared['maps'],
        key=path if inputs.training else None,
    )
    targets = inputs.shared['indices']
    nats = losses.cross_entropy(logits, targets).mean()
    smooth = self.config.label_smoothing
    loss = nats
    if smooth:
      uniform = -jax.nn.log_softmax(logits).mean()
      loss = (1.0 - smooth) * nats + smooth * uniform
    last = model.config.patch_nums[-1] ** 2
    hits = logits.argmax(axis=-1) == targets
    return Output(loss, {
        'cross_entropy': nats,
        'accuracy': hits.mean(),
        'accuracy_last_scale': hits[:, -last:].mean(),
    })

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    encode = self.frozen['vae'].flops() // 2  # about
    return super().flops(updates, batch_size) + batch_size * encode
