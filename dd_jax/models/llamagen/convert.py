# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables of LlamaGen's transformers and of their students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dd_jax.convert import family, table
from dd_jax.models.llamagen.model import SIZES


def _linear(src: str, dst: str) -> table.Row:
  return table.Row(f'{src}.weight', f'{dst}/kernel', table.TRANSPOSE)


def _shared(config: Any) -> list[table.Row]:
  """Rows of the condition, the blocks and the logits."""
  condition, block = 'cls_embedding', 'layers.{i}'
  rows = [
      table.Row(
          f'{block}.attention.wqkv.weight',
          tuple(f'layers/attn/{x}/kernel' for x in 'qkv'),
          table.Chain(table.Split(3), table.TRANSPOSE),
      ),
      _linear(f'{block}.attention.wo', 'layers/attn/proj'),
      _linear(f'{block}.feed_forward.w1', 'layers/gate'),
      _linear(f'{block}.feed_forward.w3', 'layers/up'),
      _linear(f'{block}.feed_forward.w2', 'layers/down'),
      table.Row(f'{block}.attention_norm.weight', 'layers/attn_norm/scale'),
      table.Row(f'{block}.ffn_norm.weight', 'layers/mlp_norm/scale'),
      table.Row('norm.weight', 'norm/scale'),
      _linear('output', 'output'),
  ]
  if config.num_classes:
    return rows + [table.Row(
        f'{condition}.embedding_table.weight', 'condition/classes/embedding'
    )]
  return rows + [
      _linear(f'{condition}.cap_proj.fc1', 'condition/fc1'),
      _linear(f'{condition}.cap_proj.fc2', 'condition/fc2'),
      table.Row(f'{condition}.uncond_embedding', 'condition/null'),
  ]


def llamagen_table(config: Any) -> table.Table:
  """Rows of LlamaGen's `c2i_*.pt` and `t2i_*.pt`, for a `llamagen` model."""
  return [
      *_shared(config),
      table.Row('tok_embeddings.weight', 'token_embed/embedding'),
  ]


def student_table(config: Any) -> table.Table:
  """Rows of DD1's `llamagen-*.pt`, for a `dd_llamagen` model."""
  head = 'final_layer_conti'
  return [
      *_shared(config),
      _linear('tok_embeddings', 'code_embed'),
      table.Row('tok_embeddings.bias', 'code_embed/bias'),
      table.Row('n_d_embed.weight', 'flag_embed/embedding'),
      table.Row(f'{head}.scale_shift_table', 'code_head/shift_scale'),
      _linear(f'{head}.linear', 'code_head/proj'),
      table.Row(f'{head}.linear.bias', 'code_head/proj/bias'),
  ]


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  depth = family.count(tensors, 'layers.{i}.attention.wqkv.weight')
  width = family.size(tensors, 'norm.weight', 0)
  fields: dict[str, Any] = {
      'depth': depth, 'width': width,
      'vocab_size': family.size(tensors, 'output.weight', 0),
      'mlp_width': family.size(tensors, 'layers.0.feed_forward.w1.weight', 0),
  }
  classes = 'cls_embedding.embedding_table.weight'
  if classes in tensors:
    fields['num_classes'] = family.size(tensors, classes, 0) - 1
  else:
    null = 'cls_embedding.uncond_embedding'
    fields |= {
        'num_classes': 0,
        'caption_length': family.size(tensors, null, 0, family.MAX_SLOTS),
        'caption_dim': family.size(tensors, null, 1),
    }
  if 'heads' not in given:
    published = [
        size['heads'] for size in SIZES.values()
        if (size['depth'], size['width']) == (depth, width)
    ]
    if not published:
      raise family.Unknown('heads', width // 64 or 1, 'no tensor tells it')
    fields['heads'] = published[0]
  if 'latent_size' not in given:
    raise family.Unknown('latent_size', 16, 'no tensor tells it')
  return fields


def _infer_student(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  return _infer(tensors, given) | {
      'code_dim': family.size(tensors, 'tok_embeddings.weight', 1)
  }


_SIGNATURE = (
    'tok_embeddings.weight', 'layers.0.attention.wqkv.weight',
    'layers.0.feed_forward.w1.weight', 'norm.weight', 'output.weight',
)
# What some files have of the program's buffers; it makes them again.
_DROPPED = ('freqs_cis', 'causal_mask')

LLAMAGEN = family.Family(
    'llamagen', _SIGNATURE, _infer, llamagen_table, wrapper=('model',),
    dropped=_DROPPED,
)
STUDENT = family.Family(
    'dd_llamagen',
    (*_SIGNATURE, 'n_d_embed.weight', 'final_layer_conti.linear.weight'),
    _infer_student, student_table, wrapper=('ema',), dropped=_DROPPED,
)
