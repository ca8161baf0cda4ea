# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The networks of golden cases, with converted weights."""

from __future__ import annotations

from typing import Any

from dd_jax.convert import table
from dd_jax.model import Model
from dd_jax.models.var import convert as var_convert
from dd_jax.models.var import model as var_model
from dd_jax.models.var import student as student_model
from dd_jax.models.vqvae import convert as vqvae_convert
from dd_jax.models.vqvae import model as vqvae_model
from tests.golden.golden_cases import Case


def transformer_fields(case: Case) -> dict[str, Any]:
  """Config of the teacher or student of a case."""
  c = case.config
  return {
      'num_classes': c['num_classes'], 'depth': c['depth'],
      'width': c['embed_dim'], 'heads': c['num_heads'],
      'patch_nums': c['patch_nums'], 'vocab_size': c['vqvae']['vocab_size'],
      'code_dim': c['vqvae']['z_channels'], 'shared_aln': c['shared_aln'],
      'attn_l2_norm': c['attn_l2_norm'],
  }


def teacher(case: Case, **fields) -> tuple[Model, Any]:
  """The transformer of a `var_transformer_*` case and its parameters."""
  net = var_model.build(transformer_fields(case) | fields)
  return net, table.convert(
      var_convert.var_table(net.config), case.tensors() | case.buffers(),
      net.abstract(), ignore=var_convert.IGNORE,
  )


def student(case: Case, **fields) -> tuple[Model, Any]:
  """The student of a `dd_var_*` case and its parameters."""
  net = student_model.build(transformer_fields(case) | fields)
  return net, table.convert(
      var_convert.student_table(net.config), case.tensors() | case.buffers(),
      net.abstract(), ignore=var_convert.IGNORE,
  )


def tokenizer(case: Case) -> tuple[Model, Any]:
  """The tokenizer of any of these cases or of `var_vqvae_*`."""
  nested = 'vqvae' in case.config
  sizes = case.config['vqvae'] if nested else case.config
  patch_nums = case.config['patch_nums']
  net = vqvae_model.build({
      'image_size': 16 * patch_nums[-1], 'ch_mult': [1, 1, 2, 2, 4],
      'patch_nums': patch_nums,
      **{k: sizes[k] for k in ('ch', 'z_channels', 'vocab_size')},
  })
  tensors = case.tensors('vqvae_params' if nested else 'params')
  return net, table.convert(
      vqvae_convert.TABLE, tensors if nested else tensors | case.buffers(),
      net.abstract(), ignore=vqvae_convert.IGNORE,
  )
