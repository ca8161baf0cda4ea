# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what describes an export."""

from __future__ import annotations

import json

import pytest

from dd_jax import checkpoint
from dd_jax.models.mlp import model as mlp


@pytest.mark.parametrize('change, message', [
    ({}, None),
    ({'source': {'stage': 'other'}}, None),
    ({'config': {'shape': [2], 'sigma_data': 1.0}}, 'it was changed'),
    ({'family': 'edm_unet'}, 'it was changed'),
    ({'sha256': {'a': '0' * 64}}, 'it was changed'),
    ({'hash': 'f' * 64}, 'it was changed'),
    ({'parameters': None}, r"lacks \['parameters'\]"),
    ({'format_version': 2}, 'format_version 2 is newer than 1'),
    ({'format_version': 'x'}, 'does not describe an export'),
])
def test_a_description_that_was_changed_is_refused(change, message, tmp_path):
  net = mlp.build({'shape': [2]})
  checkpoint.write_description(tmp_path, net, {'a': 'f' * 64}, 7, {'step': 1})
  file = tmp_path / 'model.json'
  meta = json.loads(file.read_text()) | change
  file.write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))
  if message is None:
    assert checkpoint.describe(tmp_path)['parameters'] == 7
    return
  with pytest.raises(ValueError, match=message) as info:
    checkpoint.describe(tmp_path)
  assert str(file) in str(info.value)
