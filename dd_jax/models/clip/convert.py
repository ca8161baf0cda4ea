# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of CLIP: Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dd_jax.convert import family, table

_LINEAR = {
    'self_attn.q_proj': 'q', 'self_attn.k_proj': 'k', 'self_attn.v_proj': 'v',
    'self_attn.out_proj': 'proj', 'mlp.fc1': 'fc1', 'mlp.fc2': 'fc2',
}
_TOWERS = {'vision_model': 'image', 'text_model': 'text'}
# The first is misspelt in the files.
_NORMS = {
    'vision_model.pre_layrnorm': 'image/pre_norm',
    'vision_model.post_layernorm': 'image/norm',
    'text_model.final_layer_norm': 'text/norm',
    **{
        f'{src}.encoder.layers.{{i}}.layer_norm{k}': f'{dst}/layers/{name}_norm'
        for src, dst in _TOWERS.items()
        for k, name in ((1, 'attn'), (2, 'mlp'))
    },
}
_PATCH = 'vision_model.embeddings.patch_embedding.weight'
_IMAGE_POSITION = 'vision_model.embeddings.position_embedding.weight'
_TEXT_POSITION = 'text_model.embeddings.position_embedding.weight'
_TOKEN = 'text_model.embeddings.token_embedding.weight'
_HEADS = {512: 8, 768: 12, 1024: 16}  # of published towers, by width


def clip_table(config: Any) -> table.Table:
  """Rows of the weights, for a `clip` model."""
  size, width = config.patch_size, config.image_width
  rows = [
      table.Row('logit_scale', 'log_scale'),
      table.Row(_TOKEN, 'text/embed/embedding'),
      table.Row(_TEXT_POSITION, 'text/pos_embed/embedding'),
      table.Row(_IMAGE_POSITION, 'image/pos_embed/embedding'),
      table.Row('vision_model.embeddings.class_embedding', 'image/class_embed'),
      # A convolution over patches that do not overlap.
      table.Row(_PATCH, 'image/patch_embed/kernel', table.Chain(
          table.CONV,
          table.Reshape((size, size, 3, width), (3 * size * size, width)),
      )),
      table.Row(
          'visual_projection.weight', 'image/proj/kernel', table.TRANSPOSE
      ),
      table.Row('text_projection.weight', 'text/proj/kernel', table.TRANSPOSE),
  ]
  for src, dst in _NORMS.items():
    rows += [
        table.Row(f'{src}.weight', f'{dst}/scale'),
        table.Row(f'{src}.bias', f'{dst}/bias'),
    ]
  for tower, ours in _TOWERS.items():
    for src, dst in _LINEAR.items():
      src, dst = f'{tower}.encoder.layers.{{i}}.{src}', f'{ours}/layers/{dst}'
      rows += [
          table.Row(f'{src}.weight', f'{dst}/kernel', table.TRANSPOSE),
          table.Row(f'{src}.bias', f'{dst}/bias'),
      ]
  return rows


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  patch = family.size(tensors, _PATCH, 2)
  slots = family.size(tensors, _IMAGE_POSITION, 0, family.MAX_SLOTS)
  side = round((slots - 1) ** 0.5)
  fields = {
      'image_size': side * patch,
      'patch_size': patch,
      'image_width': family.size(tensors, _PATCH, 0),
      'vocab_size': family.size(tensors, _TOKEN, 0),
      'text_width': family.size(tensors, _TOKEN, 1),
      'context_length': family.size(
          tensors, _TEXT_POSITION, 0, family.MAX_SLOTS
      ),
      'projection_dim': family.size(tensors, 'text_projection.weight', 0),
  }
  for tower, ours in _TOWERS.items():
    weight = f'{tower}.encoder.layers.{{i}}.mlp.fc1.weight'
    fields[f'{ours}_depth'] = family.count(tensors, weight)
    fields[f'{ours}_mlp_dim'] = family.size(
        tensors, weight.replace('{i}', '0'), 0
    )
    heads, width = f'{ours}_heads', fields[f'{ours}_width']
    if heads not in given:
      if width not in _HEADS:
        raise family.Unknown(heads, width // 64 or 1, 'no tensor tells it')
      fields[heads] = _HEADS[width]
  return fields


def _buffers(config: Any) -> dict[str, np.ndarray]:
  counts = {
      'vision_model': config.patches + 1, 'text_model': config.context_length
  }
  return {
      f'{tower}.embeddings.position_ids': np.arange(count)[None]
      for tower, count in counts.items()
  }


CLIP = family.Family(
    'clip', ('logit_scale', _PATCH, _TOKEN, 'visual_projection.weight'),
    _infer, clip_table, buffers=_buffers,
)
