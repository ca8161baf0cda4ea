# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of the discriminator in DMD2's file of the critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dd_jax.convert import family, table
from dd_jax.models.edm_unet.convert import CRITIC
from dd_jax.models.vqvae.convert import conv, norm


def _rows(config: Any) -> table.Table:
  # Its modules are numbered: convolution, normalisation, activation, ...
  halvings = max(config.size.bit_length() - 3, 0)
  made, last = [], 3 * (halvings + 1)
  for i in range(halvings + 1):
    made += conv(f'{3 * i}', f'conv_{i}')
    made += norm(f'{3 * i + 1}', f'norm_{i}')
  channels = config.channels
  made += [
      table.Row(f'{last}.weight', 'out/kernel', table.Chain(
          table.Reshape((1, channels, 1, 1), (1, channels)), table.TRANSPOSE,
      )),
      table.Row(f'{last}.bias', 'out/bias'),
  ]
  return tuple(made)


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  convs = sorted(
      int(k.removesuffix('.weight')) for k, v in tensors.items()
      if k.endswith('.weight') and len(v.shape) == 4 and v.shape[-1] > 1
  )
  if not convs:
    raise ValueError('there is no discriminator; was it trained without?')
  if len(convs) > family.MAX_BLOCKS:
    raise ValueError(f'the discriminator has {len(convs)} levels: too many')
  return {
      'size': family.size(tensors, f'{convs[-1]}.weight', -1)
              * 2 ** (len(convs) - 1),
      'channels': family.size(tensors, f'{convs[0]}.weight', 0),
  }


HEAD = family.Family(
    'discriminator', CRITIC, _infer, _rows, under='cls_pred_branch.'
)
