# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Fixed random word vectors plus positions: a text encoder without training.

It stands where a `t5` may stand, for captions of a few known words.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax import config as config_lib
from dd_jax.model import Axes, Model, Params
from dd_jax.models.layers import rows

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, and the seed of all weights.

  Attributes:
    vocab_size: words, padding included.
    width: size of a feature vector.
    max_length: most tokens of a caption.
    seed: of the weights; what `init` is given does not count.
  """

  vocab_size: int
  width: int
  max_length: int = 120
  seed: int = 0

  def __post_init__(self):
    if min(self.vocab_size, self.width, self.max_length) < 1:
      raise ValueError(f'sizes and counts must be at least 1: {self}')
    if not 0 <= self.seed < 2**32:
      raise ValueError(f'seed={self.seed} must be in [0, 2**32)')


def build(config: Mapping[str, Any]) -> Model:
  """Builds the encoder, whose weights are a function of the config.

  Its functions are `encode(params, tokens_BxT, mask_BxT) -> features_BxTxW`,
  float32, and `forward`, the same. Tokens are int32 in [0, vocab_size), the
  mask is True where a token counts, and elsewhere features are zero. Elements
  of a feature have variance 1, of which words have four fifths.

  Raises:
    ValueError: an unknown or invalid field; when traced, more tokens than
      max_length.
  """
  c = config_lib.make(Config, config, 'words')

  def init(key: Array) -> Params:
    del key
    shapes = {'embed': c.vocab_size, 'position': c.max_length}
    keys = jax.random.split(jax.random.key(c.seed), len(shapes))
    return {
        name: {'embedding': jax.random.normal(key, (count, c.width))}
        for key, (name, count) in zip(keys, shapes.items(), strict=True)
    }

  def axes() -> Axes:
    return {
        'embed': {'embedding': ('vocab', 'embed')},
        'position': {'embedding': ('length', 'embed')},
    }

  def encode(params: Params, tokens_BxT: Array, mask_BxT: Array) -> Array:
    length = tokens_BxT.shape[1]
    if length > c.max_length:
      raise ValueError(
          f'{length} tokens are more than max_length={c.max_length}'
      )
    word_BxTxW = rows(params['embed']['embedding'], tokens_BxT)
    place_1xTxW = params['position']['embedding'][None, :length]
    x_BxTxW = 0.8**0.5 * word_BxTxW + 0.2**0.5 * place_1xTxW
    x_BxTxW = x_BxTxW.astype(jnp.float32)
    return jnp.where(mask_BxT[:, :, None], x_BxTxW, 0.0)

  return Model(
      'words', c, init, {'forward': encode, 'encode': encode}, axes, lambda: 0
  )
