# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The few-step student of LlamaGen: all tokens from noise at once."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from dd_jax.kernels import attention as attention_lib
from dd_jax.model import Model, Params
from dd_jax.models import layers
from dd_jax.models.llamagen import model as llamagen

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config(llamagen.Config):
  """Sizes of a student: those of its teacher."""


class Student(nn.Module):
  """The teacher's blocks over a sequence of noise and data tokens."""

  config: Config

  @nn.compact
  def forward(
      self, x_BxLxC: Array, condition: llamagen.Condition, offset_B: Array, *,
      key: Array | None = None,
  ) -> dict[str, Array]:
    c = self.config
    prefix_BxTxW, valid_BxT = llamagen.Conditioner(c, name='condition')(
        condition
    )
    tokens_BxLxW = layers.Dense(
        c.width, ('code', 'embed'), True, nn.initializers.normal(c.init_std),
        dtype=c.dtype, name='code_embed',
    )(x_BxLxC)
    x_BxSxW = jnp.concatenate(
        [prefix_BxTxW, tokens_BxLxW], axis=1, dtype=jnp.float32
    )
    # Slot T + p holds token p. What the condition says is data.
    slots_S = jnp.arange(x_BxSxW.shape[1])
    is_data_BxS = slots_S[None] < c.slots + offset_B[:, None]
    x_BxSxW += layers.pick_flag(
        layers.embed(c, 2, 'flag_embed').embedding, is_data_BxS
    )
    x_BxSxW, _ = llamagen.run_blocks(
        c, x_BxSxW, jnp.asarray(llamagen.rotations(c)),
        attention_lib.causal(len(slots_S), valid_BxT), key=key,
    )
    x_BxLxW = x_BxSxW[:, c.slots :]
    return {
        'logits': llamagen.head(c, x_BxLxW),
        'codes': layers.CodeHead(c.code_dim, c.init_std, name='code_head')(
            x_BxLxW, _mean(prefix_BxTxW, valid_BxT)
        ),
    }


def build(config: Mapping[str, Any]) -> Model:
  """Builds the few-step student of LlamaGen.

  The functions are:

  - forward(params, x_BxLxC, condition, offset_B, *, key=None) -> dict of
    logits_BxLxV and codes_BxLxC, float32. The first offset (int32) tokens of x
    are code vectors, the others Gaussian noise; conditions are those of the
    teacher. What comes out at a place is about the final token there, and
    depends on the condition and on the tokens up to that place; dropout is on
    if there is a key per example
  - adopt(key, teacher) -> params, from those of a `llamagen` teacher of the
    same sizes; the key draws what the teacher lacks

  The code head is modulated by the class embedding or, with captions, by the
  mean of the caption's valid slots.

  Source: DD1 (arXiv 2412.17153), LlamaGen/ of its release, which has no
  students of captions.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = llamagen.make_config(Config, config, 'dd_llamagen')
  module = Student(c)
  length = c.offsets[-1]
  init, axes = layers.pure(
      module,
      jax.ShapeDtypeStruct((1, length, c.code_dim), jnp.float32),
      llamagen.example_condition(c),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      method='forward',
  )

  def adopt(key: Array, teacher: Params) -> Params:
    # The teacher's table of tokens has no counterpart: inputs are vectors.
    fresh = init(key)
    return {name: teacher.get(name, part) for name, part in fresh.items()}

  def flops() -> int:
    ends = 2 * length * c.width * (2 * c.code_dim + c.vocab_size)
    blocks = llamagen.block_flops(c, c.slots + length)
    return blocks + ends + llamagen.condition_flops(c)

  fns = layers.functions(module, ('forward',)) | {'adopt': adopt}
  return Model('dd_llamagen', c, init, fns, axes, flops)


def _mean(prefix_BxTxW: Array, valid_BxT: Array | None) -> Array:
  """Mean of the condition's slots that hold something, (B, W) float32."""
  prefix_BxTxW = prefix_BxTxW.astype(jnp.float32)
  if valid_BxT is None:
    return prefix_BxTxW.mean(1)
  weight_BxTx1 = valid_BxT.astype(jnp.float32)[..., None]
  count_Bx1 = jnp.maximum(weight_BxTx1.sum(1), 1)
  return (prefix_BxTxW * weight_BxTx1).sum(1) / count_Bx1
