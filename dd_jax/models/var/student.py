# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The few-step student of VAR: a whole token sequence from noise at once."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import config as config_lib
from dd_jax.kernels import attention as attention_lib
from dd_jax.model import Model, Params
from dd_jax.models import layers
from dd_jax.models.var import model as var

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config(var.Config):
  """Sizes of a student; those of its teacher and two choices more.

  Attributes:
    layerwise_flags: every block, and the heads, project the noise-or-data flag
      into the residual stream; otherwise it is added to the input only.
    zero_flags: those projections start at zero, so that the blocks compute at
      first what the teacher's do.
  """

  layerwise_flags: bool = True
  zero_flags: bool = True

  @property
  def slot_levels(self) -> np.ndarray:
    """Level of each slot, (L+1,): the start slot is a level by itself."""
    return np.concatenate([[0], self.levels + 1])


class Block(var.Block):
  """Adds a projection of the flags between attention and feed-forward."""

  def between(self, x_BxNxW: Array, extra: tuple[Array, Array]) -> Array:
    if not self.config.layerwise_flags:
      return x_BxNxW
    return x_BxNxW + _project_flags(self.config, *extra, name='flag')


class Student(nn.Module):
  """The teacher's blocks over a sequence of noise and data tokens."""

  config: Config

  @nn.compact
  def forward(
      self, x_BxLxC: Array, labels_B: Array, offset_B: Array, *,
      key: Array | None = None,
  ) -> dict[str, Array]:
    c = self.config
    levels_S = c.slot_levels
    slots = np.arange(len(levels_S))
    # Slot 0 is the start and slot p + 1 holds token p.
    is_data_BxS = slots[None] <= offset_B[:, None]
    cond_BxW = var.class_embed(c, labels_B)
    tokens = var.word_embed(c, x_BxLxC).astype(jnp.float32)
    x_BxSxW = jnp.concatenate([var.start_slot(c, cond_BxW), tokens], axis=1)
    level_embed = layers.embed(c, len(c.patch_nums) + 1, 'level_embed')
    pos_embed = layers.embed(c, len(levels_S), 'pos_embed')
    flag_2xW = layers.embed(c, 2, 'flag_embed').embedding
    x_BxSxW += level_embed(levels_S)[None] + pos_embed.embedding[None]
    x_BxSxW += layers.pick_flag(flag_2xW, is_data_BxS)
    # Tokens of one scale do not see each other, only themselves.
    mask = attention_lib.Mask(tuple(levels_S.tolist()), alone=True)
    x_BxSxW, _ = var.run_blocks(
        c, x_BxSxW, cond_BxW, mask=mask, key=key, block=Block,
        extra=(flag_2xW, is_data_BxS),
    )
    if c.layerwise_flags:
      x_BxSxW += _project_flags(c, flag_2xW, is_data_BxS, name='head_flag')
    x_BxLxW = x_BxSxW[:, 1:]
    return {
        'logits': var.Head(c, name='head')(x_BxLxW, cond_BxW),
        'codes': layers.CodeHead(c.code_dim, c.init_std, name='code_head')(
            x_BxLxW, cond_BxW
        ),
    }


def build(config: Mapping[str, Any]) -> Model:
  """Builds the few-step student of VAR.

  The functions are:

  - forward(params, x_BxLxC, labels_B, offset_B, *, key=None) -> dict of
    logits_BxLxV and codes_BxLxC, float32. The first offset (int32) tokens of x
    are code vectors, the others Gaussian noise. What comes out at a place is
    about the final token there, and depends on the class, the tokens of coarser
    scales and the token at that place; drop-path is on if there is a key per
    example
  - adopt(key, teacher) -> params, from those of a `var` teacher of the same
    sizes; the key draws what the teacher lacks

  Source: DD1 (arXiv 2412.17153), VAR/models/var.py of its release.

  Raises:
    ValueError: an unknown or invalid field.
  """
  c = config_lib.make(Config, config, 'dd_var')
  module = Student(c)
  length = c.offsets[-1]
  init, axes = layers.pure(
      module,
      jax.ShapeDtypeStruct((1, length, c.code_dim), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
      method='forward',
  )

  def adopt(key: Array, teacher: Params) -> Params:
    fresh = init(key)
    params = _overlay(fresh, teacher)
    # The teacher's slot p predicts token p, as the student's slot p + 1 does.
    # Its slot 0 went to the student's start, so row 1 of both is new.
    for name in ('level_embed', 'pos_embed'):
      new, old = fresh[name]['embedding'], teacher[name]['embedding']
      params[name] = {
          'embedding': jnp.concatenate([old[:1], new[1:2], old[1:]])
      }
    return params

  def flops() -> int:
    projections = 4 * c.width**2 * (c.depth + 1) * c.layerwise_flags
    ends = 2 * c.width * (
        length * (2 * c.code_dim + c.vocab_size) + 2 * c.width
    )
    return var.block_flops(c, length + 1) + projections + ends

  fns = layers.functions(module, ('forward',)) | {'adopt': adopt}
  return Model('dd_var', c, init, fns, axes, flops)


def _overlay(params: Params, teacher: Params) -> dict[str, Any]:
  """Params with the teacher's leaves in place of those of the same path."""
  out = dict(params)
  for name, leaf in teacher.items():
    deeper = isinstance(leaf, Mapping)
    out[name] = _overlay(params[name], leaf) if deeper else leaf
  return out


def _project_flags(
    c: Config, flag_2xW: Array, is_data_BxS: Array, name: str
) -> Array:
  """A linear map of each slot's flag embedding, (B, S, W)."""
  init = nn.initializers.normal(c.init_std)
  rows_2xW = layers.Dense(
      c.width, ('embed', 'mlp'), True,
      nn.initializers.zeros if c.zero_flags else init,
      dtype=c.dtype, name=name,
  )(flag_2xW)
  return layers.pick_flag(rows_2xW, is_data_BxS)
