# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the fixed word vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import checkpoint
from dd_jax.models.words import model

CONFIG = dict(vocab_size=20, width=64, max_length=8)


def encode(tokens, lengths, **fields):
  built = model.build(CONFIG | fields)
  params = built.init(jax.random.key(0))
  tokens = jnp.asarray(tokens)
  mask = jnp.arange(tokens.shape[1])[None] < jnp.asarray(lengths)[:, None]
  return np.asarray(jax.jit(built.fns['encode'])(params, tokens, mask))


def test_features_tell_words_places_and_padding():
  y = encode([[3, 4, 5, 0], [4, 3, 0, 0]], [3, 2])
  assert y.shape == (2, 4, 64) and y.dtype == np.float32
  assert not y[0, 3].any() and not y[1, 2:].any()
  assert np.abs(y[0, 0] - y[1, 1]).max() > 0.1  # the same word elsewhere
  near = np.corrcoef(y[0, 0], y[1, 1])[0, 1]
  assert near > 0.6 > 0.5 > abs(np.corrcoef(y[0, 0], y[1, 0])[0, 1])
  assert abs(y[0, :3].std() - 1) < 0.2


def test_weights_are_a_function_of_the_config():
  built = model.build(CONFIG)
  a, b = (built.init(jax.random.key(i)) for i in (0, 1))
  jax.tree.map(np.testing.assert_array_equal, a, b)
  other = model.build(CONFIG | {'seed': 1}).init(jax.random.key(0))
  assert np.abs(a['embed']['embedding'] - other['embed']['embedding']).max() > 1
  names = jax.tree.map(
      len, built.axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert names == jax.tree.map(lambda x: x.ndim, a)


def test_export(tmp_path):
  built = model.build(CONFIG)
  params = built.init(jax.random.key(0))
  checkpoint.export(tmp_path / 'words', built, params, {})
  loaded, found = checkpoint.load(tmp_path / 'words')
  assert loaded.config == built.config
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_bad_input():
  with pytest.raises(ValueError, match='9 tokens are more than max_length=8'):
    encode([[1] * 9], [9])
  assert np.isnan(encode([[20]], [1])).all()
  with pytest.raises(ValueError, match='must be at least 1'):
    model.build(CONFIG | {'width': 0})
  with pytest.raises(ValueError, match=r'seed=-1 must be in'):
    model.build(CONFIG | {'seed': -1})
  with pytest.raises(ValueError, match="unknown field 'depth'"):
    model.build(CONFIG | {'depth': 2})
