# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of the Inception network: `pt_inception-2015-12-05-*.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dd_jax.convert import family, table

_STEM = {
    'Conv2d_1a_3x3': 'conv_1a', 'Conv2d_2a_3x3': 'conv_2a',
    'Conv2d_2b_3x3': 'conv_2b', 'Conv2d_3b_1x1': 'conv_3b',
    'Conv2d_4a_3x3': 'conv_4a',
}
_TRIPLE = ('branch3x3dbl_1', 'branch3x3dbl_2', 'branch3x3dbl_3')
_A = ('branch1x1', 'branch5x5_1', 'branch5x5_2', *_TRIPLE, 'branch_pool')
_B = ('branch3x3', *_TRIPLE)
_C = (
    'branch1x1',
    *(f'branch7x7_{i}' for i in range(1, 4)),
    *(f'branch7x7dbl_{i}' for i in range(1, 6)),
    'branch_pool',
)
_D = (
    'branch3x3_1', 'branch3x3_2', *(f'branch7x7x3_{i}' for i in range(1, 5)),
)
_E = (
    'branch1x1', 'branch3x3_1', 'branch3x3_2a', 'branch3x3_2b',
    *_TRIPLE[:2], 'branch3x3dbl_3a', 'branch3x3dbl_3b', 'branch_pool',
)
_BLOCKS = {
    '5b': _A, '5c': _A, '5d': _A, '6a': _B, '6b': _C, '6c': _C, '6d': _C,
    '6e': _C, '7a': _D, '7b': _E, '7c': _E,
}
_CONVOLUTIONS = _STEM | {
    f'Mixed_{block}.{branch}': f'mixed_{block}/{branch}'
    for block, branches in _BLOCKS.items() for branch in branches
}


def _conv(src: str, dst: str) -> list[table.Row]:
  return [
      table.Row(f'{src}.conv.weight', f'{dst}/kernel', table.CONV),
      table.Row(f'{src}.bn.weight', f'{dst}/scale'),
      table.Row(f'{src}.bn.bias', f'{dst}/bias'),
      table.Row(f'{src}.bn.running_mean', f'{dst}/mean'),
      table.Row(f'{src}.bn.running_var', f'{dst}/var'),
  ]


TABLE: table.Table = (
    *(row for pair in _CONVOLUTIONS.items() for row in _conv(*pair)),
    table.Row('fc.weight', 'logits/kernel', table.TRANSPOSE),
    table.Row('fc.bias', 'logits/bias'),
)

# Counters of the training run.
IGNORE = tuple(f'{src}.bn.num_batches_tracked' for src in _CONVOLUTIONS)


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  return {'slim': 32 // family.size(tensors, 'Conv2d_1a_3x3.conv.weight', 0)}


INCEPTION = family.Family(
    'inception',
    ('Conv2d_1a_3x3.conv.weight', 'Mixed_7c.branch_pool.bn.running_var',
     'fc.weight'),
    _infer, lambda config: TABLE, kept=IGNORE,
)
