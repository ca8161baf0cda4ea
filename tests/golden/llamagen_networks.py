# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The networks of LlamaGen's golden cases, with converted weights."""

from __future__ import annotations

import functools
from typing import Any

import jax

from dd_jax.convert import table
from dd_jax.model import Model
from dd_jax.models.llamagen import convert as llamagen_convert
from dd_jax.models.llamagen import model as llamagen_model
from dd_jax.models.llamagen import student as student_model
from dd_jax.models.llamagen_vq import convert as vq_convert
from dd_jax.models.llamagen_vq import model as vq_model
from tests.golden.golden_cases import Case

# At published sizes running takes time, not compiling as elsewhere in the
# suite.
fast_jit = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 3}
)


def fields(case: Case) -> dict[str, Any]:
  """Config of the teacher or student of a case."""
  c = case.config
  return {
      'num_classes': c.get('num_classes', 0), 'depth': c['n_layer'],
      'width': c['dim'], 'heads': c['n_head'], 'vocab_size': c['vocab_size'],
      'latent_size': round(c['block_size'] ** 0.5),
      'caption_dim': c.get('caption_dim', 1),
  }


def teacher(case: Case) -> tuple[Model, Any]:
  """The transformer of a `llamagen_gpt_*` case and its parameters."""
  net = llamagen_model.build(fields(case))
  return net, table.convert(
      llamagen_convert.llamagen_table(net.config), case.tensors(),
      net.abstract(),
  )


def student(case: Case) -> tuple[Model, Any]:
  """The student of a `dd_llamagen_*` case and its parameters."""
  net = student_model.build(fields(case))
  return net, table.convert(
      llamagen_convert.student_table(net.config), case.tensors(),
      net.abstract(),
  )


def tokenizer(case: Case) -> tuple[Model, Any]:
  """The tokenizer of a `dd_llamagen_*` or `llamagen_vq_*` case."""
  c, nested = case.config, 'vq' in case.config
  sizes = c['vq'] if nested else c
  size = c.get('image_size') or 16 * round(c['block_size'] ** 0.5)
  net = vq_model.build({
      'image_size': size, 'ch': c['ch'], 'ch_mult': sizes['encoder_ch_mult'],
      'z_channels': sizes.get('z_channels', 256),
      'code_dim': sizes['codebook_embed_dim'],
      'vocab_size': sizes['codebook_size'],
  })
  tensors = case.tensors('vq_params' if nested else 'params')
  return net, table.convert(
      vq_convert.vq_table(net.config), tensors, net.abstract()
  )


def condition(case: Case, *, mask: bool = True) -> Any:
  """Labels of a case, or captions with or without their padding masked."""
  if 'label' in case.arrays:
    return case.arrays['label']
  valid = case.arrays['caption_mask'].astype(bool)
  features = case.gauss('caption', *valid.shape, case.config['caption_dim'])
  features *= valid[..., None]
  return {'features': features, 'mask': valid if mask else valid | True}
