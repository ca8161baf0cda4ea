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


@pytest.mark.parametrize('name, source, match', [
    ('own', {'frozen': {'vae': 'own'}}, True),
    ('other', {'frozen': {'vae': 'own'}}, False),
    # Of released files, of what needs no tokenizer, of what needs a teacher.
    ('other', {'files': {'a.pth': 'f' * 64}}, True),
    ('other', {'frozen': {}}, True),
    ('other', {'frozen': {'teacher': 'own'}}, True),
])
def test_a_network_knows_its_tokenizer(name, source, match, tmp_path):
  net = mlp.build({'shape': [2]})
  digest = {}
  for vae, leaf in ('own', 'a'), ('other', 'b'):  # of one size
    hashes = {'leaf': leaf * 64}
    (tmp_path / vae).mkdir()
    checkpoint.write_description(tmp_path / vae, net, hashes, 7, {})
    digest[vae] = checkpoint.fingerprint(net, hashes)
  if 'frozen' in source:
    source = {'frozen': {k: digest[v] for k, v in source['frozen'].items()}}
  (tmp_path / 'net').mkdir()
  checkpoint.write_description(tmp_path / 'net', net, {}, 7, source)
  folders = tmp_path / 'net', tmp_path / name
  if match:
    checkpoint.check_own_tokenizer(*folders)
    return
  with pytest.raises(ValueError) as info:
    checkpoint.check_own_tokenizer(*folders)
  assert str(info.value) == (
      f'{tmp_path}/other ({digest["other"][:12]}) is not the tokenizer that '
      f'{tmp_path}/net was trained with ({digest["own"][:12]}); name that one'
  )
