# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the VAR transformer on the codes of a frozen tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from dd_jax.method import Inputs, Output
from dd_jax.methods import losses
from dd_jax.methods.next_tokens import TrainNextTokens


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


class TrainVAR(TrainNextTokens):
  """Role 'teacher', frozen 'vae': next-scale prediction.

  Source: VAR, trainer.py; arXiv 2404.02905, section 3.1.
  """

  Config = Config

  def prepare(self, inputs: Inputs) -> Mapping[str, jax.Array]:
    fns, params = self.frozen['vae'].fns, inputs.frozen['vae']
    indices = super().prepare(inputs)['indices']
    maps = fns['var_input'](params, fns['codes'](params, indices))
    return {'indices': indices, 'maps': maps}

  def loss(self, params: Any, inputs: Inputs) -> Output:
    logits, nats, hits = self.predict(
        params, inputs, inputs.batch['label'], inputs.shared['maps'],
        self.config.label_dropout,
    )
    smooth = self.config.label_smoothing
    loss = nats
    if smooth:
      uniform = -jax.nn.log_softmax(logits).mean()
      loss = (1.0 - smooth) * nats + smooth * uniform
    last = self.roles['teacher'].model.config.patch_nums[-1] ** 2
    return Output(loss, {
        'cross_entropy': nats,
        'accuracy': hits.mean(),
        'accuracy_last_scale': hits[:, -last:].mean(),
    })
