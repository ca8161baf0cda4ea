# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of low-rank adapters."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dd_jax.adapter import Adapter

BASE = {
    'conv': {'kernel': np.zeros((3, 3, 4, 8)), 'bias': np.zeros(8)},
    'layers': {'fc': {'kernel': np.zeros((5, 4, 8)), 'bias': np.zeros((5, 8))}},
    'out': {'kernel': np.zeros((8, 6))},
}


def test_kernels_that_read_their_correction_get_one():
  found = Adapter('base', rank=2).init(jax.random.key(0), BASE)
  assert jax.tree.map(lambda x: x.shape, found) == {
      'layers': {'fc': {'kernel_a': (5, 4, 2), 'kernel_b': (5, 2, 8)}},
      'out': {'kernel_a': (8, 2), 'kernel_b': (2, 6)},
  }
  some = Adapter('base', rank=2, targets='^(conv|out)')
  assert set(some.init(jax.random.key(0), BASE)) == {'out'}


@pytest.mark.parametrize('targets', ['conv', 'fc/bias', 'nothing'])
def test_targets_that_nothing_can_adapt(targets):
  with pytest.raises(ValueError, match=f'{targets}.*no kernel of a Dense'):
    Adapter('base', rank=2, targets=targets).init(jax.random.key(0), BASE)
