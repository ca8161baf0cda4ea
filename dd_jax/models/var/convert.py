# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables of the released VAR transformers and of their students."""

from __future__ import annotations

from typing import Any

from dd_jax.convert import table


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
