# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight tables of LPIPS: torchvision's `vgg16` and the linear heads.

The distance needs both files. Their names have nothing in common, so that the
tensors of both can be put into one mapping for `TABLE`; `VGG_TABLE` fills the
network without heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dd_jax.convert import family, table

# Number of each convolution in torchvision's list, which counts ReLU and pools.
_NUMBERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def _vgg(root: str) -> list[table.Row]:
  rows = []
  for level, numbers in enumerate(_NUMBERS):
    for i, number in enumerate(numbers):
      src, dst = f'features.{number}', f'{root}level_{level}/conv_{i}'
      rows += [
          table.Row(f'{src}.weight', f'{dst}/kernel', table.CONV),
          table.Row(f'{src}.bias', f'{dst}/bias'),
      ]
  return rows


VGG_TABLE: table.Table = tuple(_vgg(''))

TABLE: table.Table = (
    *_vgg('trunk/'),
    table.Row(
        'lin{i}.model.1.weight', 'head_{i}',
        table.Reshape((1, -1, 1, 1), (-1,)),
    ),
)

# The classifier of VGG16.
IGNORE = ('classifier.{i}.weight', 'classifier.{i}.bias')


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  return {'slim': 64 // family.size(tensors, 'features.0.weight', 0)}


_SIGNATURE = ('features.0.weight', 'features.28.weight')

VGG = family.Family(
    'vgg', _SIGNATURE, _infer, lambda config: VGG_TABLE, dropped=IGNORE
)
LPIPS = family.Family(
    'lpips', (*_SIGNATURE, *(f'lin{i}.model.1.weight' for i in range(5))),
    _infer, lambda config: TABLE, dropped=IGNORE,
)
