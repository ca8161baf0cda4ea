# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of DMD2's critic: a network and its discriminator in one file.

The file holds the frozen teacher, too, which the critic is not made of: it is
left out, and no file that is written again has it.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from dd_jax import config as config_lib
from dd_jax.convert import family, table
from dd_jax.models.discriminator import convert as head
from dd_jax.models.discriminator import model as discriminator
from dd_jax.models.edm_unet import convert as unet
from dd_jax.models.edm_unet import model as edm_unet

_FAMILIES = {'denoiser': unet.FAKE, 'head': head.HEAD}


def _parts(config: Any) -> dict[str, Any]:
  """Configs of the networks that a critic's parameters are of, by name."""
  fields = dict(config.denoiser)
  name = fields.pop('name')
  if name != unet.FAKE.model:
    raise ValueError(
        f'files of a critic are of a {unet.FAKE.model!r} and its '
        f'discriminator; this one has a {name!r}'
    )
  made = {'denoiser': config_lib.make(edm_unet.Config, fields, name)}
  if config.head:
    made['head'] = discriminator.Config(
        made['denoiser'].sides[-1], made['denoiser'].channels[-1]
    )
  return made


def _rows(config: Any) -> table.Table:
  return tuple(
      dataclasses.replace(
          row, src=tuple(_FAMILIES[part].under + name for name in row.src),
          dst=tuple(f'{part}/{path}' for path in row.dst),
      )
      for part, network in _parts(config).items()
      for row in _FAMILIES[part].rows(network)
  )


def _buffers(config: Any) -> dict[str, np.ndarray]:
  return {
      _FAMILIES[part].under + name: value
      for part, network in _parts(config).items()
      for name, value in _FAMILIES[part].buffers(network).items()
  }


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  fields = unet.FAKE.infer(unet.FAKE.pick(tensors), {})
  return {
      'denoiser': {'name': unet.FAKE.model, **fields},
      # Without a GAN there is none.
      'head': bool(head.HEAD.pick(tensors)),
  }


CRITIC = family.Family(
    'critic', unet.CRITIC, _infer, _rows, buffers=_buffers,
    # The grid of levels, which its program saves with the weights.
    kept=('karras_sigmas',), beside=(unet.REAL.under,),
)
