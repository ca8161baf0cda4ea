# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of the VQ-VAE: the flat state dict of VAR's `vae_*.pth`."""

from __future__ import annotations

from dd_jax.convert import table


def _conv(src: str, dst: str, optional: bool = False) -> list[table.Row]:
  return [
      table.Row(f'{src}.weight', f'{dst}/kernel', table.CONV, optional),
      table.Row(f'{src}.bias', f'{dst}/bias', optional=optional),
  ]


def _norm(src: str, dst: str, optional: bool = False) -> list[table.Row]:
  return [
      table.Row(f'{src}.weight', f'{dst}/scale', optional=optional),
      table.Row(f'{src}.bias', f'{dst}/bias', optional=optional),
  ]


def _block(src: str, dst: str) -> list[table.Row]:
  return [
      *_norm(f'{src}.norm1', f'{dst}/norm_0'),
      *_conv(f'{src}.conv1', f'{dst}/conv_0'),
      *_norm(f'{src}.norm2', f'{dst}/norm_1'),
      *_conv(f'{src}.conv2', f'{dst}/conv_1'),
  ]


def _attention(src: str, dst: str) -> list[table.Row]:
  return [
      *_norm(f'{src}.norm', f'{dst}/norm', optional=True),
      *_conv(f'{src}.qkv', f'{dst}/qkv', optional=True),
      *_conv(f'{src}.proj_out', f'{dst}/out', optional=True),
  ]


def _half(name: str, levels: str, resample: str) -> list[table.Row]:
  """Encoder or decoder; `levels` and `resample` are its names for those."""
  src, level = f'{name}.{levels}.{{l}}', f'{name}/level_{{l}}'
  return [
      *_conv(f'{name}.conv_in', f'{name}/conv_in'),
      *_block(f'{src}.block.{{b}}', f'{level}/block_{{b}}'),
      *_conv(
          f'{src}.block.{{b}}.nin_shortcut', f'{level}/block_{{b}}/shortcut',
          optional=True,
      ),
      *_attention(f'{src}.attn.{{b}}', f'{level}/attention_{{b}}'),
      *_conv(
          f'{src}.{resample}.conv', f'{name}/{resample}_{{l}}', optional=True
      ),
      *_block(f'{name}.mid.block_1', f'{name}/middle/block_0'),
      *_attention(f'{name}.mid.attn_1', f'{name}/middle/attention_0'),
      *_block(f'{name}.mid.block_2', f'{name}/middle/block_1'),
      *_norm(f'{name}.norm_out', f'{name}/norm_out'),
      *_conv(f'{name}.conv_out', f'{name}/conv_out'),
  ]


TABLE: table.Table = (
    *_half('encoder', 'down', 'downsample'),
    *_half('decoder', 'up', 'upsample'),
    *_conv('quant_conv', 'quant_conv'),
    *_conv('post_quant_conv', 'post_quant_conv'),
    *_conv('quantize.quant_resi.qresi_ls.{k}', 'phi_{k}'),
    table.Row('quantize.embedding.weight', 'embedding'),
)

# Hit counters of the training run.
IGNORE = ('quantize.ema_vocab_hit_SV',)
