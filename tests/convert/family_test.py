# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what tells the sizes of a network from its tensors."""

from __future__ import annotations

import numpy as np
import pytest

from dd_jax.convert import family, table

FAMILY = family.Family(
    'm', ('a', 'b'), lambda tensors, given: {}, lambda config: (),
    kept=('hits.{i}',), dropped=('classifier.{i}.weight',),
)


@pytest.mark.parametrize('sides', [
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4), (1,), (1, 2, 4),
])
def test_maps_from_the_number_of_tokens(sides):
  assert family.patch_nums(len(sides), sum(n * n for n in sides)) == sides


def test_maps_that_are_not_told():
  assert family.patch_nums(10)[-1] == 16  # released
  with pytest.raises(family.Unknown, match='no sequence of 2 scales with 4 '):
    family.patch_nums(2, 4)
  several = [s for s in range(9, 600) if len(family._squares(4, s, 1)) > 1]
  with pytest.raises(family.Unknown, match=r'several .*patch_nums=1,2,3,4'):
    family.patch_nums(4, several[0])
  with pytest.raises(family.Unknown, match='several sequences of 3 scales fit'):
    family.patch_nums(3)
  for scales in 0, -1:
    with pytest.raises(family.Unknown, match=f'there are {scales} scales'):
      family.patch_nums(scales, 5)


def test_names():
  assert FAMILY.fits(['b', 'c', 'a']) and not FAMILY.fits(['a', 'c'])
  assert FAMILY.is_kept('hits.3') and not FAMILY.is_kept('hits.x')
  assert FAMILY.is_dropped('classifier.0.weight')
  assert FAMILY.is_dropped('blocks.0.attn.kv_cache.k')
  assert not FAMILY.is_dropped('my_kv_cache_layer.weight')
  assert table.matches(('a.{i}', 'b'), 'a.10')
  assert not table.matches(('a.{i}', 'b'), 'a.01')


def test_sizes():
  tensors = {f'block.{i}.w': np.zeros((3, 4)) for i in (0, 1, 3)}
  assert family.count(tensors, 'block.{i}.w') == 2
  assert family.size(tensors, 'block.0.w', -1) == 4
  with pytest.raises(ValueError, match="there is no tensor 'x'"):
    family.size(tensors, 'x', 0)
  with pytest.raises(ValueError, match='too few axes'):
    family.size(tensors, 'block.0.w', 2)
  assert family.size(tensors, 'block.0.w', 0, 3) == 3
  with pytest.raises(ValueError, match=r'\(3, 4\): too large'):
    family.size(tensors, 'block.0.w', 0, 2)
  assert family.count(tensors, 'block.{i}.w', 2) == 2
  with pytest.raises(ValueError, match="2 tensors 'block.{i}.w': too many"):
    family.count(tensors, 'block.{i}.w', 1)
  for shape in (1 << 40, 0), (0, 1 << 40):  # no bytes of a file
    with pytest.raises(ValueError, match='no values'):
      family.size({'w': np.zeros(shape)}, 'w', 0)
