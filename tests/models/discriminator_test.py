# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the discriminator's heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.models import layers
from dd_jax.models.discriminator import convert, model
from tests import released_files


def count(net):
  return sum(x.size for x in jax.tree.leaves(net.abstract()))


@pytest.mark.parametrize('size, channels, parameters', [
    (8, 768, 18_879_745), (8, 1280, 52_437_761), (32, 1280, 104_874_241),
])
def test_published_sizes(size, channels, parameters):
  net = model.build({'size': size, 'channels': channels})
  assert count(net) == parameters
  groups = table.plan_inverse(convert.HEAD.rows(net.config), net.abstract())
  shapes = {k: v for g in groups for k, v in g.shapes.items()}
  halvings = len(shapes) // 4 - 1
  numbers = {int(k.split('.')[0]) for k in shapes}
  expected = [0, 1, 3, 4, 6] if size == 8 else [0, 1, 3, 4, 6, 7, 9, 10, 12]
  assert sorted(numbers) == expected and shapes['0.weight'][1:] == (
      channels, 4, 4
  )
  tensors = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
  assert convert.HEAD.infer(tensors, {}) == {
      'size': size, 'channels': channels
  }
  assert halvings == (1 if size == 8 else 3)


@pytest.mark.parametrize('size', [0, 1, 2, 4, 16])
def test_one_logit_per_example(size):
  net = model.build({'size': size, 'channels': 8})
  params = released_files.random(net, 0)
  shape = (3, size, size, 8) if size else (3, 8)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  logits = jax.jit(net.apply)(params, x)
  assert logits.shape == (3,) and logits.dtype == jnp.float32
  assert np.std(logits) > 0
  np.testing.assert_allclose(
      jax.jit(net.apply)(params, x[1:2]), logits[1:2], rtol=1e-5, atol=1e-6
  )
  # In float32 on any machine: a matrix unit for bfloat16 takes six passes.
  traced = jax.make_jaxpr(net.apply)(params, x[:1])
  assert layers.count_jaxpr(traced.jaxpr, passes=True) == 6 * net.flops() > 0
  jax.tree.map(
      lambda x, a: None if len(a) == x.ndim else pytest.fail(str(a)),
      params, net.axes(),
  )


def test_errors():
  for field, value in (('size', 6), ('size', -4), ('channels', 0)):
    with pytest.raises(ValueError, match=field):
      model.build({field: value})
  conv = jax.ShapeDtypeStruct((8, 8, 4, 4), jnp.float32)
  with pytest.raises(ValueError, match='17 levels: too many'):
    convert.HEAD.infer({f'{i}.weight': conv for i in range(17)}, {})
