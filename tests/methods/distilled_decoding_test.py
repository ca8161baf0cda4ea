# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of Distilled Decoding's settings; its steps are tested by mesh."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from dd_jax import build
from dd_jax.method import Role
from dd_jax.methods.distilled_decoding import Config, DistilledDecoding

VAE = dict(
    name='llamagen_vq', image_size=8, image_channels=1, ch=8, ch_mult=[1, 2],
    res_blocks=1, z_channels=4, code_dim=4, vocab_size=16,
)
STUDENT = dict(
    name='dd_llamagen', num_classes=4, depth=1, width=16, heads=2,
    latent_size=4, vocab_size=16, code_dim=4, mlp_width=32,
)


def method(**fields):
  student, vae = build.build_model(STUDENT), build.build_model(VAE)
  role = Role(student, None, lambda key, _: student.init(key))
  return DistilledDecoding(Config(**fields), {'student': role}, {'vae': vae})


def test_flops_count_the_images_that_are_compared():
  def count(batch_size=8, **fields):
    made = method(**fields)
    return made.flops(made.updates(0), batch_size)

  plain, all_of_them = count(loss_norm='none'), count()
  assert plain == 8 * 3 * build.build_model(STUDENT).flops()
  assert all_of_them - plain == 4 * (count(perceptual_batch=2) - plain) > 0
  assert count(perceptual_batch=99) == all_of_them


@pytest.mark.parametrize('count, expected', [
    (0, range(8)), (8, range(8)), (9, range(8)), (2, [0, 4]),
    (4, range(0, 8, 2)),
    (3, range(3)),
])
def test_images_are_compared_of_every_part_of_a_batch(count, expected):
  picked = method(perceptual_batch=count)._some(jnp.arange(16).reshape(8, 2))
  assert picked[:, 0].tolist() == [2 * i for i in expected]


@pytest.mark.parametrize('fields, message', [
    ({'t_set': (0, 16)}, r't_set=\(0, 16\): expected steps in \[0, 16\)'),
    ({'t_set': ()}, 't_set'),
    ({'split': 17}, r'split=17: expected a step in \[0, 16\]'),
    ({'loss_norm': 'l3'}, "loss_norm='l3'"),
    ({'loss_norm': 'network'}, "needs a frozen network 'perceptual'"),
])
def test_settings_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    method(**fields)
