# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of LlamaGen's tokenizers, `vq_ds*_*.pt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_jax.convert import family, table
from dd_jax.models.vqvae.convert import block, conv, norm


def _attention(src: str, dst: str, optional: bool = True) -> list[table.Row]:
  """Three convolutions of the file are one of ours."""
  names = tuple(f'{src}.{x}' for x in 'qkv')
  return [
      *norm(f'{src}.norm', f'{dst}/norm', optional),
      table.Row(
          tuple(f'{n}.weight' for n in names), f'{dst}/qkv/kernel',
          table.Chain(table.Join(3), table.CONV), optional,
      ),
      table.Row(
          tuple(f'{n}.bias' for n in names), f'{dst}/qkv/bias', table.Join(3),
          optional,
      ),
      *conv(f'{src}.proj_out', f'{dst}/out', optional),
  ]


def _level(src: str, half: str, level: int, config: Any) -> list[table.Row]:
  """One resolution; the file calls it `src`, in the order of execution."""
  dst = f'{half}/level_{level}'
  lowest = level == len(config.ch_mult) - 1
  rows = [
      *block(f'{src}.res.{{b}}', f'{dst}/block_{{b}}'),
      *conv(
          f'{src}.res.{{b}}.nin_shortcut', f'{dst}/block_{{b}}/shortcut',
          optional=True,
      ),
  ]
  if lowest and config.attention:
    rows += _attention(f'{src}.attn.{{b}}', f'{dst}/attention_{{b}}')
  if half == 'encoder' and not lowest:
    rows += conv(f'{src}.downsample.conv', f'{half}/downsample_{level}')
  if half == 'decoder' and level:
    rows += conv(f'{src}.upsample.conv', f'{half}/upsample_{level}')
  return rows


def vq_table(config: Any) -> table.Table:
  """Rows of a tokenizer's file, given the `config` of a `llamagen_vq`."""
  rows = [
      *conv('quant_conv', 'quant_conv'),
      *conv('post_quant_conv', 'post_quant_conv'),
      table.Row('quantize.embedding.weight', 'embedding'),
  ]
  levels = list(range(len(config.ch_mult)))
  for half, order in (('encoder', levels), ('decoder', levels[::-1])):
    for i, level in enumerate(order):
      rows += _level(f'{half}.conv_blocks.{i}', half, level, config)
    rows += [
        *conv(f'{half}.conv_in', f'{half}/conv_in'),
        *block(f'{half}.mid.0', f'{half}/middle/block_0'),
        *block(f'{half}.mid.2', f'{half}/middle/block_1'),
        *norm(f'{half}.norm_out', f'{half}/norm_out'),
        *conv(f'{half}.conv_out', f'{half}/conv_out'),
    ]
    if config.attention:
      rows += _attention(
          f'{half}.mid.1', f'{half}/middle/attention_0', optional=False
      )
  return rows


# Which codes the training run used of late.
USED = 'quantize.codebook_used'


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  ch = family.size(tensors, 'encoder.conv_in.weight', 0)
  first = 'encoder.conv_blocks.{i}.res.0.conv1.weight'
  levels = family.count(tensors, first, family.MAX_BLOCKS)
  if 'image_size' not in given:
    raise family.Unknown('image_size', 256, 'no tensor tells it')
  return {
      'image_channels': family.size(tensors, 'encoder.conv_in.weight', 1),
      'ch': ch,
      'ch_mult': tuple(
          family.size(tensors, first.replace('{i}', str(i)), 0) // ch
          for i in range(levels)
      ),
      'res_blocks': family.count(
          tensors, 'encoder.conv_blocks.0.res.{i}.conv1.weight',
          family.MAX_BLOCKS,
      ),
      'attention': 'encoder.mid.1.q.weight' in tensors,
      'z_channels': family.size(tensors, 'quant_conv.weight', 1),
      'code_dim': family.size(tensors, 'quantize.embedding.weight', 1),
      'vocab_size': family.size(tensors, 'quantize.embedding.weight', 0),
  }


def _buffers(config: Any) -> dict[str, np.ndarray]:
  del config
  return {USED: np.zeros(65536, np.float32)}


LLAMAGEN_VQ = family.Family(
    'llamagen_vq',
    ('encoder.conv_in.weight', 'encoder.conv_blocks.0.res.0.conv1.weight',
     'quantize.embedding.weight', 'quant_conv.weight',
     'post_quant_conv.weight'),
    _infer, vq_table, wrapper=('model',), buffers=_buffers, kept=(USED,),
)
