# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of the benchmark of DMD2: updates of student and critic.

Plain code for fixed sizes: samples are made once, both terms of the student's
loss go back through it in one pass, the discriminator looks at samples and data
in one batch, AdamW is fused; convolutions have channels last. Compiled, a
loss is one program. The UNet and its critic have the names of the released
files, the MLP such as these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dd_jax.tools.bench import torch_side, workloads
from dd_jax.tools.bench.program import Case, Program

Tensor = torch.Tensor
Tensors = torch_side.Tensors
_EPSILON = 1e-5
# Settings of ImageNet-64, as `methods.dmd2.Config`.
_LEVELS, _FIRST, _LAST = 1000, 20, 980
_GAN, _CRITIC_GAN, _FLOOR = 3e-3, 1e-2, 1e-8


class Labels(nn.Module):
  """Holds the embeddings of labels, by column."""

  def __init__(self, features: int, classes: int):
    super().__init__()
    self.weight = nn.Parameter(torch.empty(features, classes))

  def forward(self, labels: Tensor) -> Tensor:
    return F.embedding(labels, self.weight.t())


class Network(nn.Module):
  """What both networks have: the condition, of noise level and label."""

  def __init__(self, frequencies: int, features: int, classes: int):
    super().__init__()
    self.map_layer0 = nn.Linear(frequencies, features)
    self.map_layer1 = nn.Linear(features, features)
    self.map_label = Labels(features, classes)
    half = frequencies // 2
    rate = 10000.0 ** (-torch.arange(half).float() / half)
    self.register_buffer('rate', rate, persistent=False)

  def condition(self, noise: Tensor, labels: Tensor) -> Tensor:
    angle = noise[:, None] * self.rate
    wave = torch.cat([angle.cos(), angle.sin()], dim=1)
    e = self.map_layer1(F.silu(self.map_layer0(wave)))
    return F.silu(e + self.map_label(labels))


class MlpBlock(nn.Module):

  def __init__(self, width: int):
    super().__init__()
    self.affine = nn.Linear(width, 2 * width)
    self.dense_0 = nn.Linear(width, width)
    self.dense_1 = nn.Linear(width, width)

  def forward(self, x: Tensor, e: Tensor) -> Tensor:
    scale, shift = self.affine(e).chunk(2, dim=1)
    h = F.silu(torch.addcmul(shift, self.dense_0(F.silu(x)), 1 + scale))
    return x + self.dense_1(h)


class Mlp(Network):

  def __init__(self, fields: Mapping[str, Any]):
    width, values = fields['width'], math.prod(fields['shape'])
    super().__init__(width // 2 * 2, width, fields['num_classes'])
    self.inner = nn.Linear(values, width)
    self.blocks = nn.ModuleList(
        MlpBlock(width) for _ in range(fields['blocks'])
    )
    self.outer = nn.Linear(width, values)

  def features(self, x: Tensor, e: Tensor) -> Tensor:
    h = self.inner(x.flatten(1))
    for block in self.blocks[: len(self.blocks) // 2]:
      h = block(h, e)
    return h

  def forward(self, x: Tensor, e: Tensor) -> Tensor:
    h = self.features(x, e)
    for block in self.blocks[len(self.blocks) // 2 :]:
      h = block(h, e)
    return self.outer(F.silu(h)).view(x.shape)


class UnetBlock(nn.Module):
  """Two convolutions around a shortcut, then attention or none."""

  def __init__(
      self, inner: int, outer: int, features: int, head_dim: int = 0,
      resample: Callable[[Tensor], Tensor] | None = None,
  ):
    super().__init__()
    self.heads = outer // head_dim if head_dim else 0
    self.resample = resample
    self.norm0, self.norm1 = norm(inner), norm(outer)
    self.conv0 = nn.Conv2d(inner, outer, 3, padding=1)
    self.affine = nn.Linear(features, 2 * outer)
    self.conv1 = nn.Conv2d(outer, outer, 3, padding=1)
    if inner != outer:
      self.skip = nn.Conv2d(inner, outer, 1)
    if head_dim:
      self.norm2 = norm(outer)
      self.qkv = nn.Conv2d(outer, 3 * outer, 1)
      self.proj = nn.Conv2d(outer, outer, 1)

  def forward(self, x: Tensor, e: Tensor) -> Tensor:
    h = F.silu(self.norm0(x))
    if self.resample:
      h, x = self.resample(h), self.resample(x)
    scale, shift = self.affine(e)[:, :, None, None].chunk(2, dim=1)
    h = torch.addcmul(shift, self.norm1(self.conv0(h)), 1 + scale)
    h = self.conv1(F.silu(h))
    x = (self.skip(x) if hasattr(self, 'skip') else x) + h
    return x + self.attention(x) if self.heads else x

  def attention(self, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    # A channel is of a head, then of a place in it, then of one of the three.
    qkv = self.qkv(self.norm2(x)).reshape(
        batch, self.heads, -1, 3, height * width
    )
    q, k, v = qkv.permute(3, 0, 1, 4, 2).unbind()
    y = F.scaled_dot_product_attention(q, k, v)
    return self.proj(y.transpose(2, 3).reshape(x.shape))


class Unet(Network):

  def __init__(self, fields: Mapping[str, Any]):
    ch, count = fields['ch'], fields['res_blocks']
    size = 4 * ch
    super().__init__(ch, size, fields['num_classes'])
    levels = [
        (f'{side}x{side}', ch * multiple,
         fields['head_dim'] if side in fields['attention'] else 0)
        for i, multiple in enumerate(fields['ch_mult'])
        for side in [fields['image_size'] >> i]
    ]
    top, width = levels[0][0], ch
    self.enc = nn.ModuleDict(
        {f'{top}_conv': nn.Conv2d(fields['image_channels'], ch, 3, padding=1)}
    )
    skips = [width]
    for side, outer, heads in levels:
      if side != top:
        self.enc[f'{side}_down'] = UnetBlock(width, width, size, 0, halve)
        skips.append(width)
      for i in range(count):
        self.enc[f'{side}_block{i}'] = UnetBlock(width, outer, size, heads)
        width = outer
        skips.append(width)
    self.dec = nn.ModuleDict({
        f'{side}_in0': UnetBlock(width, width, size, fields['head_dim']),
        f'{side}_in1': UnetBlock(width, width, size),
    })
    lowest = side
    for side, outer, heads in reversed(levels):
      if side != lowest:
        self.dec[f'{side}_up'] = UnetBlock(width, width, size, 0, double)
      for i in range(count + 1):
        self.dec[f'{side}_block{i}'] = UnetBlock(
            width + skips.pop(), outer, size, heads
        )
        width = outer
    self.out_norm = norm(width)
    self.out_conv = nn.Conv2d(width, fields['image_channels'], 3, padding=1)

  def encode(self, x: Tensor, e: Tensor) -> list[Tensor]:
    first, *blocks = self.enc.values()
    maps = [first(x)]
    for block in blocks:
      maps.append(block(maps[-1], e))
    return maps

  def features(self, x: Tensor, e: Tensor) -> Tensor:
    return self.encode(x, e)[-1]

  def forward(self, x: Tensor, e: Tensor) -> Tensor:
    maps = self.encode(x, e)
    x = maps[-1]
    for name, block in self.dec.items():
      if 'block' in name:
        x = torch.cat([x, maps.pop()], dim=1)
      x = block(x, e)
    return self.out_conv(F.silu(self.out_norm(x)))


def norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
  """At most 32 groups, of no fewer than four channels, that divide them."""
  groups = min(32, channels // 4) if groups is None else groups
  while channels % groups:
    groups -= 1
  return nn.GroupNorm(groups, channels, _EPSILON)


def halve(x: Tensor) -> Tensor:
  return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
  return F.interpolate(x, scale_factor=2, mode='nearest')


class Denoiser(nn.Module):
  """A network under EDM's preconditioning: noisy data to clean data."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    self.model = {'mlp': Mlp, 'edm_unet': Unet}[fields['name']](fields)
    self.sigma_data = fields['sigma_data']

  def inputs(
      self, x: Tensor, sigma: Tensor, labels: Tensor
  ) -> tuple[Tensor, Tensor]:
    inner = (sigma**2 + self.sigma_data**2).rsqrt()
    return wide(inner, x) * x, self.model.condition(sigma.log() / 4, labels)

  def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    total = sigma**2 + self.sigma_data**2
    skip = self.sigma_data**2 / total
    out = sigma * self.sigma_data * total.rsqrt()
    y = self.model(*self.inputs(x, sigma, labels))
    return torch.addcmul(wide(skip, x) * x, wide(out, x), y)

  def features(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    return self.model.features(*self.inputs(x, sigma, labels))


class Critic(nn.Module):
  """A denoiser, and a discriminator on its encoder."""

  def __init__(self, fields: Mapping[str, Any]):
    super().__init__()
    self.fake_unet = Denoiser(fields)
    self.cls_pred_branch = nn.Sequential(*head(fields))

  def logits(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    features = self.fake_unet.features(x, sigma, labels)
    return self.cls_pred_branch(features).flatten()


def head(fields: Mapping[str, Any]) -> list[nn.Module]:
  """Layers of the discriminator of a denoiser."""
  if fields['name'] == 'mlp':
    width = fields['width']
    return [nn.Linear(width, width), nn.LayerNorm(width, _EPSILON), nn.SiLU(),
            nn.Linear(width, 1)]
  channels = fields['ch'] * fields['ch_mult'][-1]
  side = fields['image_size'] >> (len(fields['ch_mult']) - 1)
  groups = min(32, max(1, channels // 24))
  layers: list[nn.Module] = []
  while side > 1:
    whole = side <= 4
    layers += [
        nn.Conv2d(channels, channels, side, side) if whole
        else nn.Conv2d(channels, channels, 4, 2, 1),
        norm(channels, groups), nn.SiLU(),
    ]
    side = 1 if whole else side // 2
  return [*layers, nn.Conv2d(channels, 1, 1)]


class CriticLoss(nn.Module):
  """Denoising of samples, and telling them from data.

  Returns what is compared with our side, the loss first.
  """

  def __init__(self, student: Denoiser, critic: Critic):
    super().__init__()
    self.student, self.critic = student, critic

  def forward(self, d: Tensors) -> Tensors:
    with torch.no_grad():
      fake = self.student(d['start'], d['start_sigma'], d['wanted'])
    denoiser, sigma = self.critic.fake_unet, d['fit_sigma']
    error = denoiser(fake + d['fit'], sigma, d['wanted']) - fake
    weight = sigma**-2 + denoiser.sigma_data**-2
    denoising = (weight * error.square().flatten(1).mean(1)).mean()
    of_fake, of_real = self.critic.logits(
        torch.cat([fake + d['fake'], d['image'] + d['real']]),
        torch.cat([d['fake_sigma'], d['real_sigma']]),
        torch.cat([d['wanted'], d['label']]),
    ).chunk(2)
    gan = F.softplus(of_fake).mean() + F.softplus(-of_real).mean()
    return {
        'loss': denoising + _CRITIC_GAN * gan, 'denoising': denoising,
        'gan': gan,
    }


class StudentLoss(nn.Module):
  """The matching of distributions, and the discriminator's doubt.

  Returns what is compared with our side, the loss first.
  """

  def __init__(self, student: Denoiser, critic: Critic, teacher: Denoiser):
    super().__init__()
    self.student = student
    self.critic, self.teacher = (
        net.requires_grad_(False) for net in (critic, teacher)
    )

  def forward(self, d: Tensors) -> Tensors:
    fake = self.student(d['start'], d['start_sigma'], d['wanted'])
    with torch.no_grad():
      given = fake + d['match'], d['match_sigma'], d['wanted']
      real, made = self.teacher(*given), self.critic.fake_unet(*given)
      scale = (fake - real).abs().flatten(1).mean(1).clamp_min(_FLOOR)
      target = fake - (made - real) / wide(scale, fake)
    matching = 0.5 * F.mse_loss(fake, target)
    logits = self.critic.logits(
        fake + d['judged'], d['judged_sigma'], d['wanted']
    )
    gan = F.softplus(-logits).mean()
    return {'loss': matching + _GAN * gan, 'matching': matching, 'gan': gan}


def wide(values: Tensor, x: Tensor) -> Tensor:
  """Values (B,) that go with (B, ...) tensors."""
  return values.view(-1, *[1] * (x.ndim - 1))


class Draws:
  """What each call draws: as our side did at first, then anew.

  Both are laid out alike, or what is compiled would be compiled again.
  """

  def __init__(
      self, inputs: Tensors, classes: int, purposes: tuple[str, ...]
  ):
    image = inputs['image']
    if image.ndim == 4:
      image = image.movedim(-1, 1)
    self._image, self._purposes = image, ('start', *purposes)
    self._fixed = {'image': image, 'label': inputs['label']}
    names = [f'{p}{end}' for p in self._purposes for end in ('', '_sigma')]
    self._given = [
        {k: self._laid_out(inputs[k][:, i]) for k in ('wanted', *names)}
        for i in range(inputs['wanted'].shape[1])
    ]
    self._count, self._classes = 0, classes
    # EDM's levels (arXiv 2206.00364, eq. 5), evenly spaced in sigma^(1/7).
    ends = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), _LEVELS)
    self._sigmas = torch.from_numpy((ends**7).astype(np.float32))

  def _laid_out(self, x: Tensor) -> Tensor:
    if x.ndim < 2:
      return x.contiguous()
    x = x.movedim(-1, 1) if x.ndim == 4 else x
    return torch.empty_like(self._image).copy_(x)

  def __call__(self) -> tuple[Tensors, bool]:
    """Tensors of a call by purpose, and whether our side had the same."""
    self._count += 1
    if self._count <= len(self._given):
      return self._fixed | self._given[self._count - 1], True
    image, count = self._image, len(self._image)
    drawn = {
        'wanted': torch.randint_like(self._fixed['label'], self._classes),
    }
    for name in self._purposes:
      first, last = {
          'start': (_LEVELS - 1, _LEVELS - 1), 'match': (_FIRST, _LAST)
      }.get(name, (0, _LEVELS - 1))
      sigma = self._sigmas[torch.randint(first, last + 1, (count,))]
      drawn |= {
          name: torch.empty_like(image).normal_().mul_(wide(sigma, image)),
          f'{name}_sigma': sigma,
      }
    return self._fixed | drawn, False


def critic(
    case: Case, nets: Mapping[str, nn.Module], draws: Callable[..., Draws]
) -> Program:
  return _program(
      case, CriticLoss(nets['student'], nets['critic']), nets['critic'],
      draws(('fit', 'fake', 'real')),
  )


def student(
    case: Case, nets: Mapping[str, nn.Module], draws: Callable[..., Draws]
) -> Program:
  return _program(
      case, StudentLoss(nets['student'], nets['critic'], nets['teacher']),
      nets['student'], draws(('match', 'judged')),
  )


def _program(
    case: Case, losses: nn.Module, net: nn.Module, draws: Draws
) -> Program:
  """Steps of AdamW on one network."""
  torch_side.compile_in(case, losses)
  kernels = [
      m.weight for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)
  ]
  chosen = set(map(id, kernels))
  rest = [p for p in net.parameters() if id(p) not in chosen]
  # As `jax_dmd2.OPTIMIZER`: constant rate, decay of kernels alone.
  optimizer = torch.optim.AdamW(
      [{'params': kernels, 'weight_decay': 0.01},
       {'params': rest, 'weight_decay': 0.0}],
      lr=1e-4, betas=(0.9, 0.999), fused=True,
  )

  def step(checked: bool = False) -> tuple[Tensors, bool]:
    drawn, known = draws()
    found = losses(drawn)
    optimizer.zero_grad()
    found['loss'].backward()
    found = {k: v.detach() for k, v in found.items()}
    if checked:
      found['grad_norm'] = torch_side.exact_norm(net)
    nn.utils.clip_grad_norm_(net.parameters(), 10.0)
    optimizer.step()
    return found, known

  def run() -> float | None:
    found, known = step()
    # Losses of other draws have nothing to be compared with.
    return found['loss'].item() if known else None

  return torch_side.program(lambda: step(checked=True)[0], run)


_ROWS: Mapping[str, Callable[..., Program]] = {
    'critic': critic, 'student': student,
}


def make(row: str, case: Case) -> Program:
  """The program of a row, with its weights."""
  inputs = torch_side.prepare(case)
  fields = workloads.SIZES[case.model].denoiser
  nets = {
      name: torch_side.load(
          case, name, (Critic if name == 'critic' else Denoiser)(fields)
      ).to(memory_format=torch.channels_last)
      for name in workloads.rows(case.model)[row].networks
  }
  draws = functools.partial(Draws, inputs, fields['num_classes'])
  return _ROWS[row](case, nets, draws)
