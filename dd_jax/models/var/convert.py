# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables of the released VAR transformers and of their students."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_jax.convert import family, table


def _linear(src: str, dst: str) -> list[table.Row]:
  return [
      table.Row(f'{src}.weight', f'{dst}/kernel', table.TRANSPOSE),
      table.Row(f'{src}.bias', f'{dst}/bias'),
  ]


def var_table(config: Any) -> table.Table:
  """Rows of VAR's `var_d*.pth`, given the `config` of a `var` model."""
  rows = [
      table.Row(
          'pos_start', 'pos_start/embedding',
          table.Reshape((1, 1, -1), (1, -1)),
      ),
      table.Row(
          'pos_1LC', 'pos_embed/embedding',
          table.Reshape((1, -1, config.width), (-1, config.width)),
      ),
      table.Row('class_emb.weight', 'class_embed/embedding'),
      table.Row('lvl_embed.weight', 'level_embed/embedding'),
      *_linear('word_embed', 'word_embed'),
      *_linear('head_nm.ada_lin.1', 'head/ada'),
      *_linear('head', 'head/logits'),
      table.Row(
          'blocks.{i}.attn.mat_qkv.weight',
          tuple(f'layers/attn/{x}/kernel' for x in 'qkv'),
          table.Chain(table.Split(3), table.TRANSPOSE),
      ),
      table.Row('blocks.{i}.attn.q_bias', 'layers/attn/q/bias'),
      table.Row('blocks.{i}.attn.v_bias', 'layers/attn/v/bias'),
      *_linear('blocks.{i}.attn.proj', 'layers/attn/proj'),
      *_linear('blocks.{i}.ffn.fc1', 'layers/fc1'),
      *_linear('blocks.{i}.ffn.fc2', 'layers/fc2'),
  ]
  if config.attn_l2_norm:
    rows.append(table.Row(
        'blocks.{i}.attn.scale_mul_1H11', 'layers/attn/log_scale',
        table.Reshape((1, -1, 1, 1), (-1,)),
    ))
  if config.shared_aln:
    rows += _linear('shared_ada_lin.1', 'shared_ada')
    rows.append(table.Row(
        'blocks.{i}.ada_gss', 'layers/ada_offset',
        table.Reshape((1, 1, 6, -1), (6, -1)),
    ))
  else:
    rows += _linear('blocks.{i}.ada_lin.1', 'layers/ada')
  return rows


def student_table(config: Any) -> table.Table:
  """Rows of the weights in DD1's `var-d*.pth`, for a `dd_var` model."""
  rows = [
      *var_table(config),
      table.Row('n_d_embed.weight', 'flag_embed/embedding'),
      table.Row('final_layer_conti.scale_shift_table', 'code_head/shift_scale'),
      *_linear('final_layer_conti.linear', 'code_head/proj'),
  ]
  if config.layerwise_flags:
    # One list in the file: a projection per block, then that of the heads.
    name, width, depth = 'layerwise_n_d_embed', config.width, config.depth
    for leaf, ours, shape, turn in (
        ('weight', 'kernel', (width, width), (table.TRANSPOSE,)),
        ('bias', 'bias', (width,), ()),
    ):
      rows.append(table.Row(
          tuple(f'{name}.{i}.{leaf}' for i in range(depth)),
          f'layers/flag/{ours}',
          table.Chain(
              *turn, table.Reshape(shape, (1, *shape)), table.Join(depth)
          ),
      ))
    rows += _linear(f'{name}.{depth}', 'head_flag')
  return rows


# Buffers of both; files of averaged weights may lack them.
IGNORE = ('lvl_1L', 'attn_bias_for_masking', 'blocks.{i}.attn.zero_k_bias')


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any], extra_slots: int = 0
) -> dict[str, Any]:
  """Fields of a config; a student has one slot more than tokens."""
  width = family.size(tensors, 'pos_start', -1)
  depth = family.count(tensors, 'blocks.{i}.attn.mat_qkv.weight')
  log_scale = 'blocks.0.attn.scale_mul_1H11'
  fields = {
      'num_classes': family.size(tensors, 'class_emb.weight', 0) - 1,
      'depth': depth,
      'width': width,
      'vocab_size': family.size(tensors, 'head.weight', 0),
      'code_dim': family.size(tensors, 'word_embed.weight', 1),
      'shared_aln': 'shared_ada_lin.1.weight' in tensors,
      'attn_l2_norm': log_scale in tensors,
      'mlp_ratio': family.size(tensors, 'blocks.0.ffn.fc1.weight', 0) // width,
  }
  if 'heads' not in given:
    if log_scale in tensors:
      fields['heads'] = family.size(tensors, log_scale, 1)
    elif width == 64 * depth:
      fields['heads'] = depth  # as in all published sizes
    else:
      raise family.Unknown('heads', width // 64 or 1, 'no tensor tells it')
  if 'patch_nums' not in given:
    fields['patch_nums'] = family.patch_nums(
        family.size(tensors, 'lvl_embed.weight', 0, family.MAX_SCALES)
        - extra_slots,
        family.size(tensors, 'pos_1LC', 1, family.MAX_SLOTS) - extra_slots,
    )
  return fields


def _infer_student(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  return _infer(tensors, given, extra_slots=1) | {
      'layerwise_flags': 'layerwise_n_d_embed.0.weight' in tensors
  }


def _buffers(config: Any) -> dict[str, np.ndarray]:
  levels = config.levels
  return _masks(config, levels, levels[:, None] >= levels)


def _student_buffers(config: Any) -> dict[str, np.ndarray]:
  levels = config.slot_levels
  visible = (levels[:, None] > levels) | np.eye(len(levels), dtype=bool)
  return _masks(config, levels, visible)


def _masks(
    config: Any, levels: np.ndarray, visible: np.ndarray
) -> dict[str, np.ndarray]:
  return {
      'lvl_1L': levels[None].astype(np.int64),
      'attn_bias_for_masking': np.where(
          visible, np.float32(0), np.float32(-np.inf)
      )[None, None],
  } | {
      f'blocks.{i}.attn.zero_k_bias': np.zeros(config.width, np.float32)
      for i in range(config.depth)
  }


_SIGNATURE = (
    'pos_start', 'pos_1LC', 'word_embed.weight', 'class_emb.weight',
    'lvl_embed.weight', 'head_nm.ada_lin.1.weight', 'head.weight',
)

VAR = family.Family('var', _SIGNATURE, _infer, var_table, buffers=_buffers)
STUDENT = family.Family(
    'dd_var',
    (*_SIGNATURE, 'n_d_embed.weight', 'final_layer_conti.linear.weight'),
    _infer_student, student_table, wrapper=('trainer', 'ema_parameters'),
    buffers=_student_buffers,
)
