# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""VAR, its student and its decoder in PyTorch, to compare our programs with.

Plain inference and training code for fixed sizes: fused attention, a cache that
is written in place, modulations made once. Parameters have the names of the
released files, so that their weight tables lead here. With the other
modules `torch_*` the only one of the library that needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor


class Attention(nn.Module):
  """Attention by cosine similarity; writes new keys and values to the cache."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
    self.q_bias = nn.Parameter(torch.empty(width))
    self.v_bias = nn.Parameter(torch.empty(width))
    self.scale_mul_1H11 = nn.Parameter(torch.empty(1, heads, 1, 1))
    self.proj = nn.Linear(width, width)
    self.register_buffer('k_bias', torch.zeros(width), persistent=False)

  def forward(
      self, x: Tensor, mask: Tensor | None, cache: Tensor | None, start: int
  ) -> Tensor:
    batch, n, width = x.shape
    bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
    qkv = F.linear(x, self.mat_qkv.weight, bias)
    q, k, v = (
        qkv.view(batch, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
    )
    scale = self.scale_mul_1H11.clamp_max(math.log(100)).exp()
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    if cache is not None:
      stop = start + n
      cache[0, :, :, start:stop] = k
      cache[1, :, :, start:stop] = v
      k, v = cache[0, :, :, :stop], cache[1, :, :, :stop]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return self.proj(y.transpose(1, 2).reshape(batch, n, width))


class FeedForward(nn.Module):

  def __init__(self, width: int, inner: int):
    super().__init__()
    self.fc1 = nn.Linear(width, inner)
    self.fc2 = nn.Linear(inner, width)

  def forward(self, x: Tensor) -> Tensor:
    return self.fc2(F.gelu(self.fc1(x), approximate='tanh'))


class Block(nn.Module):

  def __init__(self, width: int, heads: int, mlp_ratio: int = 4):
    super().__init__()
    self.attn = Attention(width, heads)
    self.ffn = FeedForward(width, mlp_ratio * width)
    self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

  def forward(
      self, x: Tensor, ada: Tensor, mask: Tensor | None = None,
      cache: Tensor | None = None, start: int = 0, flag: Tensor | None = None,
  ) -> Tensor:
    gamma1, gamma2, scale1, scale2, shift1, shift2 = ada.chunk(6, dim=1)
    y = self.attn(modulate(x, scale1, shift1), mask, cache, start)
    x = torch.addcmul(x, gamma1, y)
    if flag is not None:
      x = x + flag
    return torch.addcmul(x, gamma2, self.ffn(modulate(x, scale2, shift2)))


class Head(nn.Module):
  """Holds the modulation of the logits under its original name."""

  def __init__(self, width: int):
    super().__init__()
    self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))


class CodeHead(nn.Module):

  def __init__(self, width: int, code_dim: int):
    super().__init__()
    self.scale_shift_table = nn.Parameter(torch.empty(2, width))
    self.linear = nn.Linear(width, code_dim)

  def forward(self, x: Tensor, cond: Tensor) -> Tensor:
    shift, scale = (self.scale_shift_table + cond[:, None]).chunk(2, dim=1)
    return self.linear(modulate(x, scale, shift))


class Teacher(nn.Module):
  """The VAR transformer, one scale at a time.

  Sizes are those of a `var` model's config; `extra` is 1 for a student, which
  has a slot and a level more.
  """

  def __init__(self, fields: Mapping[str, Any], extra: int = 0):
    super().__init__()
    width, code_dim = fields['width'], fields['code_dim']
    sides = fields['patch_nums']
    sizes = [1] * extra + [n * n for n in sides]
    self.offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    self.num_classes = fields['num_classes']
    self.pos_start = nn.Parameter(torch.empty(1, 1, width))
    self.pos_1LC = nn.Parameter(torch.empty(1, self.offsets[-1], width))
    self.word_embed = nn.Linear(code_dim, width)
    self.class_emb = nn.Embedding(self.num_classes + 1, width)
    self.lvl_embed = nn.Embedding(len(sizes), width)
    self.blocks = nn.ModuleList(
        Block(width, fields['heads']) for _ in range(fields['depth'])
    )
    self.head_nm = Head(width)
    self.head = nn.Linear(width, fields['vocab_size'])
    levels = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(sizes)
    )
    self.register_buffer('levels', levels, persistent=False)

  def conditions(self, labels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """Class embedding, and the modulations of blocks and logits."""
    cond = self.class_emb(labels)
    blocks = [
        block.ada_lin(cond).view(len(labels), 6, -1) for block in self.blocks
    ]
    return cond, blocks, self.head_nm.ada_lin(cond).view(len(labels), 2, -1)

  def empty_cache(self, batch: int) -> list[Tensor]:
    attention = self.blocks[0].attn
    width = attention.q_bias.numel() // attention.heads
    return [
        torch.empty(2, batch, attention.heads, self.offsets[-1], width)
        for _ in self.blocks
    ]

  def embed(self, x: Tensor, start: int) -> Tensor:
    """Adds place and level to slots `start` and following."""
    slots = slice(start, start + x.shape[1])
    levels = self.lvl_embed(self.levels[slots])
    return x + (self.pos_1LC[:, slots] + levels)

  def logits(self, x: Tensor, ada: Tensor) -> Tensor:
    return self.head(modulate(x, *ada.chunk(2, dim=1)))

  def step(
      self, conditions: tuple[Tensor, list[Tensor], Tensor],
      cache: list[Tensor], maps: Tensor | None, scale: int,
  ) -> Tensor:
    """Logits of one scale; `maps` is None for the first."""
    cond, blocks, head = conditions
    if maps is None:
      x = cond[:, None] + self.pos_start
    else:
      x = self.word_embed(maps)
    start = self.offsets[scale]
    x = self.embed(x, start)
    for block, ada, part in zip(self.blocks, blocks, cache, strict=True):
      x = block(x, ada, cache=part, start=start)
    return self.logits(x, head)


class Student(Teacher):
  """The few-step student, on noise alone: no token is given."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__(fields, extra=1)
    width = fields['width']
    self.n_d_embed = nn.Embedding(2, width)
    self.layerwise_n_d_embed = nn.ModuleList(
        nn.Linear(width, width) for _ in range(len(self.blocks) + 1)
    )
    self.final_layer_conti = CodeHead(width, fields['code_dim'])
    mask = self.levels[:, None] > self.levels
    mask |= torch.eye(len(mask), dtype=torch.bool)
    self.register_buffer('mask', mask, persistent=False)

  def forward(
      self, x: Tensor, labels: Tensor, offset: Tensor
  ) -> tuple[Tensor, Tensor]:
    cond, blocks, head = self.conditions(labels)
    slots = torch.arange(len(self.levels))
    is_data = (slots <= offset[:, None])[..., None]
    flag = self.n_d_embed.weight
    x = torch.cat([cond[:, None] + self.pos_start, self.word_embed(x)], dim=1)
    x = self.embed(x, 0) + pick(flag, is_data)
    *between, last = (layer(flag) for layer in self.layerwise_n_d_embed)
    for block, ada, rows in zip(self.blocks, blocks, between, strict=True):
      x = block(x, ada, mask=self.mask, flag=pick(rows, is_data))
    x = (x + pick(last, is_data))[:, 1:]
    return self.logits(x, head), self.final_layer_conti(x, cond)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
  x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
  return torch.addcmul(shift, x, 1 + scale)


def pick(rows: Tensor, is_data: Tensor) -> Tensor:
  """Row 1 where a slot holds data, else row 0."""
  return torch.where(is_data, rows[1], rows[0])


class ResBlock(nn.Module):

  def __init__(self, channels: int, features: int):
    super().__init__()
    self.norm1, self.conv1 = norm(channels), conv(channels, features)
    self.norm2, self.conv2 = norm(features), conv(features, features)
    if channels != features:
      self.nin_shortcut = conv(channels, features, 1)

  def forward(self, x: Tensor) -> Tensor:
    y = self.conv1(F.silu(self.norm1(x)))
    y = self.conv2(F.silu(self.norm2(y)))
    return (self.nin_shortcut(x) if hasattr(self, 'nin_shortcut') else x) + y


class MapAttention(nn.Module):

  def __init__(self, channels: int):
    super().__init__()
    self.norm = norm(channels)
    self.qkv = conv(channels, 3 * channels, 1)
    self.proj_out = conv(channels, channels, 1)

  def forward(self, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    q, k, v = (
        self.qkv(self.norm(x)).view(batch, 3, channels, -1).transpose(2, 3)
        .unbind(1)
    )
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return x + self.proj_out(y.reshape(batch, channels, height, width))


class Middle(nn.Module):

  def __init__(self, channels: int):
    super().__init__()
    self.block_1 = ResBlock(channels, channels)
    self.attn_1 = MapAttention(channels)
    self.block_2 = ResBlock(channels, channels)

  def forward(self, x: Tensor) -> Tensor:
    return self.block_2(self.attn_1(self.block_1(x)))


class Upsample(nn.Module):

  def __init__(self, channels: int):
    super().__init__()
    self.conv = conv(channels, channels)

  def forward(self, x: Tensor) -> Tensor:
    return self.conv(F.interpolate(x, scale_factor=2.0, mode='nearest'))


class Level(nn.Module):
  """Blocks of one resolution, and the way up unless it is the highest."""

  def __init__(
      self, channels: int, features: int, blocks: int, lowest: bool,
      highest: bool,
  ):
    super().__init__()
    self.block = nn.ModuleList(
        ResBlock(features if i else channels, features) for i in range(blocks)
    )
    self.attn = nn.ModuleList(
        MapAttention(features) for _ in range(blocks * lowest)
    )
    if not highest:
      self.upsample = Upsample(features)

  def forward(self, x: Tensor) -> Tensor:
    for i, block in enumerate(self.block):
      x = block(x)
      if self.attn:
        x = self.attn[i](x)
    return self.upsample(x) if hasattr(self, 'upsample') else x


class Decoder(nn.Module):

  def __init__(self, fields: Mapping[str, Any], res_blocks: int = 3):
    super().__init__()
    widths = [fields['ch'] * m for m in fields['ch_mult']]
    last = len(widths) - 1
    self.conv_in = conv(fields['z_channels'], widths[-1])
    self.mid = Middle(widths[-1])
    self.up = nn.ModuleList(
        Level(
            widths[min(i + 1, last)], width, res_blocks, i == last, i == 0
        ) for i, width in enumerate(widths)
    )
    self.norm_out, self.conv_out = norm(widths[0]), conv(widths[0], 3)

  def forward(self, x: Tensor) -> Tensor:
    x = self.mid(self.conv_in(x))
    for level in reversed(self.up):
      x = level(x)
    return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
  """Codes, and what they add to the map of the image, scale by scale."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    size = fields['z_channels']
    self.sides = fields['patch_nums']
    self.embedding = nn.Embedding(fields['vocab_size'], size)
    self.quant_resi = nn.Module()
    self.quant_resi.qresi_ls = nn.ModuleList(
        conv(size, size) for _ in range(4)
    )
    scales = len(self.sides)
    self.phi = [nearest_phi(i, scales) for i in range(scales)]

  def add(self, f_hat: Tensor, codes: Tensor, scale: int) -> Tensor:
    """The map with a scale's codes (B, n, C) on top."""
    side = self.sides[scale]
    h = codes.transpose(1, 2).unflatten(2, (side, side))
    if side != self.sides[-1]:
      h = F.interpolate(h, size=f_hat.shape[2:], mode='bicubic')
    phi = self.quant_resi.qresi_ls[self.phi[scale]]
    return f_hat + torch.lerp(h, phi(h), 0.5)

  def next_map(self, f_hat: Tensor, scale: int) -> Tensor:
    """What the teacher is told of the image at the next scale, (B, n, C)."""
    side = self.sides[scale + 1]
    small = F.interpolate(f_hat, size=(side, side), mode='area')
    return small.flatten(2).transpose(1, 2)

  def empty_map(self, batch: int) -> Tensor:
    side = self.sides[-1]
    return torch.zeros(batch, self.embedding.embedding_dim, side, side)


class VQVAE(nn.Module):
  """From codes to images; the encoder is left out."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    self.decoder = Decoder(fields)
    self.quantize = Quantizer(fields)
    self.post_quant_conv = conv(fields['z_channels'], fields['z_channels'])

  def forward(self, codes: Tensor) -> Tensor:
    quantize = self.quantize
    f_hat = quantize.empty_map(len(codes))
    sizes = [n * n for n in quantize.sides]
    for scale, part in enumerate(codes.split(sizes, dim=1)):
      f_hat = quantize.add(f_hat, part, scale)
    return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)


def nearest_phi(scale: int, scales: int) -> int:
  """Which of four convolutions a scale uses: ticks at 1/12, ..., 11/12."""
  place = (Fraction(scale, scales - 1) - Fraction(1, 12)) / Fraction(5, 18)
  return min(max(math.floor(place + Fraction(1, 2)), 0), 3)  # of two, the upper


def norm(channels: int) -> nn.GroupNorm:
  return nn.GroupNorm(32, channels, eps=1e-6)


def conv(channels: int, features: int, size: int = 3) -> nn.Conv2d:
  return nn.Conv2d(channels, features, size, padding=size // 2)
