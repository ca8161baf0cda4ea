# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of the VQ-VAE: the flat state dict of VAR's `vae_*.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_jax.convert import family, table


def conv(src: str, dst: str, optional: bool = False) -> list[table.Row]:
  """Rows of a convolution."""
  return [
      table.Row(f'{src}.weight', f'{dst}/kernel', table.CONV, optional),
      table.Row(f'{src}.bias', f'{dst}/bias', optional=optional),
  ]


def norm(src: str, dst: str, optional: bool = False) -> list[table.Row]:
  """Rows of a normalisation."""
  return [
      table.Row(f'{src}.weight', f'{dst}/scale', optional=optional),
      table.Row(f'{src}.bias', f'{dst}/bias', optional=optional),
  ]


def block(src: str, dst: str) -> list[table.Row]:
  """Rows of a residual block, without a shortcut's convolution."""
  return [
      *norm(f'{src}.norm1', f'{dst}/norm_0'),
      *conv(f'{src}.conv1', f'{dst}/conv_0'),
      *norm(f'{src}.norm2', f'{dst}/norm_1'),
      *conv(f'{src}.conv2', f'{dst}/conv_1'),
  ]


def _attention(src: str, dst: str) -> list[table.Row]:
  return [
      *norm(f'{src}.norm', f'{dst}/norm', optional=True),
      *conv(f'{src}.qkv', f'{dst}/qkv', optional=True),
      *conv(f'{src}.proj_out', f'{dst}/out', optional=True),
  ]


def _half(name: str, levels: str, resample: str) -> list[table.Row]:
  """Encoder or decoder; `levels` and `resample` are its names for those."""
  src, level = f'{name}.{levels}.{{l}}', f'{name}/level_{{l}}'
  return [
      *conv(f'{name}.conv_in', f'{name}/conv_in'),
      *block(f'{src}.block.{{b}}', f'{level}/block_{{b}}'),
      *conv(
          f'{src}.block.{{b}}.nin_shortcut', f'{level}/block_{{b}}/shortcut',
          optional=True,
      ),
      *_attention(f'{src}.attn.{{b}}', f'{level}/attention_{{b}}'),
      *conv(
          f'{src}.{resample}.conv', f'{name}/{resample}_{{l}}', optional=True
      ),
      *block(f'{name}.mid.block_1', f'{name}/middle/block_0'),
      *_attention(f'{name}.mid.attn_1', f'{name}/middle/attention_0'),
      *block(f'{name}.mid.block_2', f'{name}/middle/block_1'),
      *norm(f'{name}.norm_out', f'{name}/norm_out'),
      *conv(f'{name}.conv_out', f'{name}/conv_out'),
  ]


TABLE: table.Table = (
    *_half('encoder', 'down', 'downsample'),
    *_half('decoder', 'up', 'upsample'),
    *conv('quant_conv', 'quant_conv'),
    *conv('post_quant_conv', 'post_quant_conv'),
    *conv('quantize.quant_resi.qresi_ls.{k}', 'phi_{k}'),
    table.Row('quantize.embedding.weight', 'embedding'),
)

# Hit counters of the training run.
IGNORE = ('quantize.ema_vocab_hit_SV',)


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  ch = family.size(tensors, 'encoder.conv_in.weight', 0)
  levels = family.count(
      tensors, 'encoder.down.{i}.block.0.conv1.weight', family.MAX_BLOCKS
  )
  sides = given.get('patch_nums')
  if sides is None:
    if IGNORE[0] not in tensors:
      raise family.Unknown(
          'patch_nums', '1,2,3,4,5,6,8,10,13,16', 'no tensor tells it'
      )
    sides = family.patch_nums(
        family.size(tensors, IGNORE[0], 0, family.MAX_SCALES)
    )
  if isinstance(sides, int):
    raise ValueError(f'patch_nums={sides}: a single side is [{sides}]')
  return {
      'ch': ch,
      'ch_mult': tuple(
          family.size(tensors, f'encoder.down.{i}.block.0.conv1.weight', 0)
          // ch for i in range(levels)
      ),
      'res_blocks': family.count(
          tensors, 'encoder.down.0.block.{i}.conv1.weight', family.MAX_BLOCKS
      ),
      'attention': 'encoder.mid.attn_1.qkv.weight' in tensors,
      'image_channels': family.size(tensors, 'encoder.conv_in.weight', 1),
      'image_size': sides[-1] * 2 ** (levels - 1),
      'z_channels': family.size(tensors, 'quantize.embedding.weight', 1),
      'vocab_size': family.size(tensors, 'quantize.embedding.weight', 0),
      'patch_nums': sides,
      'phi_count': family.count(
          tensors, 'quantize.quant_resi.qresi_ls.{i}.weight'
      ),
  }


def _buffers(config: Any) -> dict[str, np.ndarray]:
  # Counters have run in a file; the program asks for them in any case.
  shape = (len(config.patch_nums), config.vocab_size)
  return {IGNORE[0]: np.zeros(shape, np.float32)}


VAR_VQVAE = family.Family(
    'vqvae',
    ('encoder.conv_in.weight', 'quantize.embedding.weight',
     'quantize.quant_resi.qresi_ls.0.weight', 'quant_conv.weight',
     'post_quant_conv.weight'),
    _infer, lambda config: TABLE, buffers=_buffers, kept=IGNORE,
)
