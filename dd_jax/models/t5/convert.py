# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight table of T5's encoder: Hugging Face's names.

Files hold the encoder alone or the whole network; the decoder is left out. A
large network comes as `model-00001-of-0000N.safetensors` and so on, which are
all given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dd_jax.convert import family, table

_BLOCK = 'encoder.block.{i}.layer'
_LINEAR = {
    '0.SelfAttention.q': 'q', '0.SelfAttention.k': 'k',
    '0.SelfAttention.v': 'v', '0.SelfAttention.o': 'o',
    '1.DenseReluDense.wi_0': 'gate', '1.DenseReluDense.wi_1': 'up',
    '1.DenseReluDense.wo': 'down',
}
_EMBED = 'shared.weight'
_BIAS = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'

TABLE: table.Table = (
    table.Row(_EMBED, 'embed/embedding'),
    table.Row(_BIAS, 'relative_bias/embedding'),
    table.Row('encoder.final_layer_norm.weight', 'norm/scale'),
    table.Row(f'{_BLOCK}.0.layer_norm.weight', 'layers/attn_norm/scale'),
    table.Row(f'{_BLOCK}.1.layer_norm.weight', 'layers/mlp_norm/scale'),
    *(
        table.Row(
            f'{_BLOCK}.{src}.weight', f'layers/{dst}/kernel', table.TRANSPOSE
        ) for src, dst in _LINEAR.items()
    ),
)

# The decoder and its head.
_DECODER = 'decoder.block.{i}.layer'
DROPPED = (
    'lm_head.weight', 'decoder.embed_tokens.weight',
    'decoder.final_layer_norm.weight',
    *(f'{_DECODER}.{k}.layer_norm.weight' for k in range(3)),
    *(
        f'{_DECODER}.{part}.{leaf}.weight'
        for part in ('0.SelfAttention', '1.EncDecAttention')
        for leaf in ('q', 'k', 'v', 'o', 'relative_attention_bias')
    ),
    *(
        f'{_DECODER}.2.DenseReluDense.{leaf}.weight'
        for leaf in ('wi_0', 'wi_1', 'wo')
    ),
)


def _infer(
    tensors: family.Tensors, given: Mapping[str, Any]
) -> dict[str, Any]:
  del given
  heads = family.size(tensors, _BIAS, 1)
  first = _BLOCK.replace('{i}', '0')
  inner = family.size(tensors, f'{first}.0.SelfAttention.q.weight', 0)
  return {
      'vocab_size': family.size(tensors, _EMBED, 0),
      'width': family.size(tensors, _EMBED, 1),
      'depth': family.count(tensors, f'{_BLOCK}.0.SelfAttention.q.weight'),
      'heads': heads,
      'head_dim': inner // heads,
      'mlp_dim': family.size(
          tensors, f'{first}.1.DenseReluDense.wi_0.weight', 0
      ),
      'buckets': family.size(tensors, _BIAS, 0),
  }


T5 = family.Family(
    't5', (_EMBED, _BIAS, 'encoder.block.0.layer.1.DenseReluDense.wi_0.weight'),
    _infer, lambda config: TABLE, dropped=DROPPED,
    tied={'encoder.embed_tokens.weight': _EMBED},
)
