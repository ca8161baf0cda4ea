# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of the benchmark of LlamaGen: cached decoding by class.

Plain code for fixed sizes: one pass over both rows of an example, a cache that
is written in place, fused attention. Eager, it attends to the slots filled so
far; compiled, to all of them under a mask, so that one program serves every
token. Parameters have the names of the released files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dd_jax.tools.bench import torch_side, workloads
from dd_jax.tools.bench.program import Case, Program

Tensor = torch.Tensor
_EPSILON = 1e-5


class Attention(nn.Module):
  """Of one slot to those before it and itself."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.wqkv = nn.Linear(width, 3 * width, bias=False)
    self.wo = nn.Linear(width, width, bias=False)

  def forward(
      self, x: Tensor, cache: Tensor, slot: Tensor, turn: Tensor,
      mask: Tensor | None, stop: int,
  ) -> Tensor:
    q, k, v = self.wqkv(x).view(len(x), 3, self.heads, -1).unbind(1)
    new = torch.stack([rotate(k, turn), v])[:, :, :, None]
    cache.index_copy_(3, slot, new)
    k, v = cache[:, :, :, :stop]
    y = F.scaled_dot_product_attention(
        rotate(q, turn)[:, :, None], k, v, attn_mask=mask
    )
    return self.wo(y.reshape(x.shape))


class FeedForward(nn.Module):

  def __init__(self, width: int, inner: int):
    super().__init__()
    self.w1 = nn.Linear(width, inner, bias=False)
    self.w2 = nn.Linear(inner, width, bias=False)
    self.w3 = nn.Linear(width, inner, bias=False)

  def forward(self, x: Tensor) -> Tensor:
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    width = fields['width']
    self.attention = Attention(width, fields['heads'])
    self.feed_forward = FeedForward(width, fields['mlp_width'])
    self.attention_norm = nn.RMSNorm(width, _EPSILON)
    self.ffn_norm = nn.RMSNorm(width, _EPSILON)

  def forward(self, x: Tensor, *where: Any) -> Tensor:
    x = x + self.attention(self.attention_norm(x), *where)
    return x + self.feed_forward(self.ffn_norm(x))


class Labels(nn.Module):

  def __init__(self, classes: int, width: int):
    super().__init__()
    self.embedding_table = nn.Embedding(classes + 1, width)


class Transformer(nn.Module):
  """One slot of LlamaGen's transformer: a class, then tokens."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    width = fields['width']
    self.fields = fields
    self.cls_embedding = Labels(fields['num_classes'], width)
    self.tok_embeddings = nn.Embedding(fields['vocab_size'], width)
    self.layers = nn.ModuleList(
        Block(fields) for _ in range(fields['depth'])
    )
    self.norm = nn.RMSNorm(width, _EPSILON)
    self.output = nn.Linear(width, fields['vocab_size'], bias=False)
    slots = fields['latent_size'] ** 2
    self.register_buffer('turns', rotations(fields), persistent=False)
    self.register_buffer(
        'seen', torch.ones(slots, slots).tril().bool(), persistent=False
    )

  def empty_cache(self, rows: int) -> list[Tensor]:
    f = self.fields
    size = f['width'] // f['heads']
    shape = (2, rows, f['heads'], f['latent_size'] ** 2, size)
    return [torch.zeros(shape) for _ in self.layers]

  def forward(
      self, x: Tensor, cache: list[Tensor], slot: Tensor, stop: int
  ) -> Tensor:
    """Logits (B, V) after a slot.

    Args:
      x: (B, W) embedding of the class or the token there.
      cache: of the slots before; gets this one.
      slot: (1,), its number.
      stop: slots that are looked at; those after this one are hidden.
    """
    mask = None if stop < len(self.seen) else self.seen[slot]
    for block, part in zip(self.layers, cache, strict=True):
      x = block(x, part, slot, self.turns[slot], mask, stop)
    return self.output(self.norm(x))


def rotations(fields: Mapping[str, Any]) -> Tensor:
  """Cosine and sine by slot and pair, (slots, D/2, 2); the class has zeros."""
  half = fields['width'] // fields['heads'] // 2
  frequency = 1.0 / 10000 ** (torch.arange(0, half, 2).float() / half)
  side = fields['latent_size']
  angle = torch.arange(side).float()[:, None] * frequency
  rows = angle[:, None].expand(-1, side, -1)
  columns = angle[None].expand(side, -1, -1)
  grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)
  table = torch.stack([grid.cos(), grid.sin()], dim=-1)
  return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
  """Turns neighbouring pairs of heads (B, H, D) by angles (1, D/2, 2)."""
  a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
  cos, sin = turn.unbind(-1)
  return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def teacher(
    case: Case, size: workloads.Size, inputs: torch_side.Tensors
) -> Program:
  net = torch_side.load(case, 'teacher', Transformer(size.teacher))
  torch_side.compile_in(case, net)
  length = size.teacher['latent_size'] ** 2
  whole = case.variant == 'compile'

  @torch.inference_mode()
  def sample(temperature: float) -> Tensor:
    labels = inputs['labels']
    null = torch.full_like(labels, size.teacher['num_classes'])
    cache = net.empty_cache(2 * len(labels))
    x = net.cls_embedding.embedding_table(torch.cat([labels, null]))
    tokens = []
    for i in range(length):
      stop = length if whole else i + 1
      cond, uncond = net(x, cache, torch.tensor([i]), stop).chunk(2)
      logits = torch.lerp(uncond, cond, size.sampling['cfg'])
      logits = torch_side.filter_top_k(logits, size.sampling['top_k'])
      tokens.append(torch_side.draw(logits.log_softmax(-1), temperature))
      x = net.tok_embeddings(tokens[-1].repeat(2))
    return torch.stack(tokens, dim=1)

  return torch_side.program(
      lambda: {'indices': sample(0.0)}, lambda: sample(1.0)
  )


_ROWS = {'teacher': teacher}


def make(row: str, case: Case) -> Program:
  """The program of a row, with its weights."""
  inputs = torch_side.prepare(case)
  return _ROWS[row](case, workloads.SIZES[case.model], inputs)
