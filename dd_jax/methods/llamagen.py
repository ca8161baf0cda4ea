# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of the LlamaGen transformer on the codes of a frozen tokenizer."""

from __future__ import annotations

import dataclasses
from typing import Any

from dd_jax.method import Inputs, Output
from dd_jax.methods import losses
from dd_jax.methods.next_tokens import TrainNextTokens


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


class TrainLlamaGen(TrainNextTokens):
  """Role 'teacher', frozen 'vae': next-token prediction.

  Source: LlamaGen (arXiv 2406.06525), autoregressive/train/train_c2i.py.
  """

  Config = Config

  def loss(self, params: Any, inputs: Inputs) -> Output:
    _, nats, hits = self.predict(
        params, inputs, inputs.condition, inputs.shared['indices'][:, :-1],
        self.config.condition_dropout,
    )
    return Output(nats, {'cross_entropy': nats, 'accuracy': hits.mean()})
