# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of a denoiser at all noise levels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.flow import edm
from dd_jax.method import Inputs, Method, Output, Update


@dataclasses.dataclass(frozen=True)
class Config:
  """Noise levels and classes.

  Attributes:
    log_sigma_mean: of the normal distribution of log sigma.
    log_sigma_std: of the same.
    label_dropout: probability that an example is trained without its class.
  """

  log_sigma_mean: float = -1.2
  log_sigma_std: float = 1.2
  label_dropout: float = 0.0

  def __post_init__(self):
    if self.log_sigma_std <= 0 or not 0 <= self.label_dropout < 1:
      raise ValueError(
          f'log_sigma_std={self.log_sigma_std} must be positive and '
          f'label_dropout={self.label_dropout} in [0, 1)'
      )


class TrainEDM(Method):
  """Role 'teacher', a denoiser: weighted mean squared error to the data.

  Reads `image` (B, ...) and, where the network has classes, `label`.

  Source: EDM (arXiv 2206.00364), table 1 and section 5.
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('teacher',))

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('teacher', 'teacher', self.loss),)

  def loss(self, params: Any, inputs: Inputs) -> Output:
    model, config = self.roles['teacher'].model, self.config
    image = inputs.batch['image']
    level, noise, drop, network = jnp.unstack(
        jax.vmap(lambda key: jax.random.split(key, 4))(inputs.keys), axis=1
    )
    log_sigma = config.log_sigma_mean + config.log_sigma_std * (
        jax.vmap(jax.random.normal)(level)
    )
    sigma = jnp.exp(log_sigma)
    epsilon = jax.vmap(
        lambda key: jax.random.normal(key, image.shape[1:])
    )(noise)
    labels = jnp.zeros(image.shape[:1], jnp.int32)
    if classes := model.config.num_classes:
      dropped = jax.vmap(jax.random.bernoulli, (0, None))(
          drop, config.label_dropout
      )
      labels = jnp.where(
          dropped & inputs.training, classes, inputs.batch['label']
      )
    x0 = model.apply(
        params, edm.diffuse(image, epsilon, 1.0, sigma), sigma, labels,
        key=network if inputs.training else None,
    )
    error = jnp.square(x0 - image).reshape(image.shape[0], -1).mean(-1)
    weighted = edm.loss_weight(sigma, model.config.sigma_data) * error
    return Output(weighted.mean(), {'squared_error': error.mean()})
