# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The best denoiser of a mixture of Gaussians, in the place of a network."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Axes, Model, Params
from dd_jax.ops import mixture

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """The mixture, whose parts weigh the same.

  Attributes:
    means: of every part.
    std: of every part, in all directions.
    sigma_data: standard deviation of the data, as networks are told.
  """

  means: tuple[tuple[float, ...], ...]
  std: float
  sigma_data: float = 0.5

  def __post_init__(self):
    if len({len(mean) for mean in self.means}) != 1 or not self.means[0]:
      raise ValueError('means must be vectors of one size')
    if self.std <= 0 or self.sigma_data <= 0:
      raise ValueError(
          f'std={self.std} and sigma_data={self.sigma_data} must be positive'
      )

  @property
  def shape(self) -> tuple[int, ...]:
    """Of an example."""
    return (len(self.means[0]),)

  @property
  def num_classes(self) -> int:
    """It does not look at labels."""
    return 0


def build(config: Mapping[str, Any]) -> Model:
  """The denoiser, whose weights are a function of the config.

  `forward(params, x_BxD, sigma_B, labels_B, *, key=None) -> denoised_BxD` is
  the posterior mean, float32; labels and key are not looked at.

  Raises:
    ValueError: on unknown or invalid fields.
  """
  cfg = config_lib.make(Config, config, 'mixture')

  def init(key: Array) -> Params:
    del key
    return {'means': jnp.asarray(cfg.means, jnp.float32)}

  def axes() -> Axes:
    return {'means': (None, None)}

  def forward(
      params: Params, x_BxD: Array, sigma_B: Array, labels_B: Array, *,
      key: Array | None = None,
  ) -> Array:
    del labels_B, key
    count = len(cfg.means)
    log_weights = jnp.full((count,), -jnp.log(count))
    return mixture.posterior_mean(
        x_BxD.astype(jnp.float32), sigma_B, params['means'], log_weights,
        cfg.std,
    )

  return Model('mixture', cfg, init, {'forward': forward}, axes, lambda: 0)
