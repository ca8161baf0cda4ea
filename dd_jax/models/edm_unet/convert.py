# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables of the EDM UNet: EDM's pickles and DMD2's state dicts.

Both name tensors alike. DMD2's file of the critic holds two of these networks,
`fake_unet` and `real_unet`, and the discriminator beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_jax.convert import family, table
from dd_jax.models.vqvae.convert import conv, norm


def _linear(src: str, dst: str) -> list[table.Row]:
  return [
      table.Row(f'{src}.weight', f'{dst}/kernel', table.TRANSPOSE),
      table.Row(f'{src}.bias', f'{dst}/bias'),
  ]


def _block(
    src: str, dst: str, channels: int, head_dim: int
) -> list[table.Row]:
  """Rows of a block; a shortcut's convolution and attention may be absent."""
  heads = channels // head_dim
  # In the file a channel of qkv is (head, channel of the head, which of the
  # three); here the three come first.
  inner, outer = (heads, head_dim, 3), (3, heads, head_dim)
  kernel = table.Chain(
      table.Reshape((3 * channels, channels, 1, 1), (*inner, channels)),
      table.Permute((3, 2, 0, 1)),
      table.Reshape((channels, *outer), (channels, 3 * channels)),
  )
  bias = table.Chain(
      table.Reshape((3 * channels,), inner), table.Permute((2, 0, 1)),
      table.Reshape(outer, (3 * channels,)),
  )
  proj = table.Chain(
      table.Reshape((channels, channels, 1, 1), (channels, channels)),
      table.TRANSPOSE,
  )
  attention = f'{dst}/attention'
  return [
      *norm(f'{src}.norm0', f'{dst}/norm_0'),
      *conv(f'{src}.conv0', f'{dst}/conv_0'),
      *_linear(f'{src}.affine', f'{dst}/affine'),
      *norm(f'{src}.norm1', f'{dst}/norm_1'),
      *conv(f'{src}.conv1', f'{dst}/conv_1'),
      *conv(f'{src}.skip', f'{dst}/shortcut', optional=True),
      *norm(f'{src}.norm2', f'{attention}/norm', optional=True),
      table.Row(f'{src}.qkv.weight', f'{attention}/qkv/kernel', kernel, True),
      table.Row(f'{src}.qkv.bias', f'{attention}/qkv/bias', bias, True),
      table.Row(f'{src}.proj.weight', f'{attention}/out/kernel', proj, True),
      table.Row(f'{src}.proj.bias', f'{attention}/out/bias', optional=True),
  ]


def _rows(config: Any) -> table.Table:
  side = config.sides[0]
  made = [
      *_linear('model.map_layer0', 'condition/noise_0'),
      *_linear('model.map_layer1', 'condition/noise_1'),
      table.Row(
          'model.map_label.weight', 'condition/embedding', table.TRANSPOSE,
          optional=True,
      ),
      *conv(f'model.enc.{side}x{side}_conv', 'encoder/conv_in'),
      *norm('model.out_norm', 'decoder/norm_out'),
      *conv('model.out_conv', 'decoder/conv_out'),
  ]
  lowest = len(config.sides) - 1
  for level, (side, channels) in enumerate(
      zip(config.sides, config.channels, strict=True)
  ):
    enc, dec = f'model.enc.{side}x{side}', f'model.dec.{side}x{side}'

    def block(src: str, dst: str, channels=channels):
      return _block(src, dst, channels, config.head_dim)

    made += block(f'{enc}_block{{i}}', f'encoder/level_{level}_{{i}}')
    made += block(f'{dec}_block{{i}}', f'decoder/level_{level}_{{i}}')
    if level:
      made += block(
          f'{enc}_down', f'encoder/down_{level}', config.channels[level - 1]
      )
    if level < lowest:
      made += block(
          f'{dec}_up', f'decoder/up_{level}', config.channels[level + 1]
      )
    else:
      for i in (0, 1):
        made += block(f'{dec}_in{i}', f'decoder/middle_{i}')
  return tuple(made)


def _buffers(config: Any) -> dict[str, np.ndarray]:
  """The filters by which EDM resamples: a mean of two by two pixels."""
  made = {}
  for part, sides, name in (
      ('enc', config.sides[1:], 'down'), ('dec', config.sides[:-1], 'up')
  ):
    for side in sides:
      for where in ('conv0', 'skip'):
        key = f'model.{part}.{side}x{side}_{name}.{where}'
        made[f'{key}.resample_filter'] = np.full((1, 1, 2, 2), 0.25, np.float32)
  return made


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  sides = sorted((
      int(name.split('.')[2].partition('x')[0]) for name in tensors
      if name.startswith('model.enc.')
      and name.endswith(('_conv.weight', '_down.norm0.weight'))
  ), reverse=True)
  if not sides:
    raise ValueError("there is no tensor 'model.enc.<side>x<side>_conv.weight'")
  if len(sides) > family.MAX_BLOCKS:
    raise ValueError(f'there are {len(sides)} levels: too many')
  first = f'model.enc.{sides[0]}x{sides[0]}'
  blocks = {s: f'model.enc.{s}x{s}_block0' for s in sides}
  label = 'model.map_label.weight'
  ch = family.size(tensors, f'{first}_conv.weight', 0)
  return {
      'image_size': sides[0],
      'image_channels': family.size(tensors, f'{first}_conv.weight', 1),
      'num_classes': family.size(tensors, label, 1) if label in tensors else 0,
      'ch': ch,
      'ch_mult': tuple(
          family.size(tensors, f'{block}.conv0.weight', 0) // ch
          for block in blocks.values()
      ),
      'res_blocks': family.count(
          tensors, f'{first}_block{{i}}.conv0.weight', family.MAX_BLOCKS
      ),
      'attention': tuple(
          s for s, block in blocks.items() if f'{block}.qkv.weight' in tensors
      ),
      'embed_mult': family.size(tensors, 'model.map_layer0.weight', 0) // ch,
  }


EDM_UNET = family.Family(
    'edm_unet',
    ('model.map_layer0.weight', 'model.map_layer1.weight',
     'model.out_conv.weight'),
    _infer, _rows, buffers=_buffers,
)

# What is in every file of DMD2's critic; runs without a GAN have no head there.
CRITIC = ('fake_unet.model.out_conv.weight', 'real_unet.model.out_conv.weight')

FAKE, REAL = (
    family.Family(
        'edm_unet', CRITIC, _infer, _rows, buffers=_buffers, under=under
    )
    for under in ('fake_unet.', 'real_unet.')
)
