# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of the benchmark of VAR: eager, or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dd_jax.tools.bench import torch_nets, torch_side, workloads
from dd_jax.tools.bench.program import Case, Program

Tensor = torch.Tensor
Tensors = torch_side.Tensors


def make(row: str, case: Case) -> Program:
  """The program of a row, with its weights."""
  inputs = torch_side.prepare(case)
  return _ROWS[row](case, workloads.SIZES[case.model], inputs)


def teacher(case: Case, size: workloads.Size, inputs: Tensors) -> Program:
  net = torch_side.load(case, 'teacher', torch_nets.Teacher(size.teacher))
  quantize = torch_side.load(case, 'vae', torch_nets.VQVAE(size.vae)).quantize
  # Of the whole network torch would compile a program for every scale; of a
  # block it compiles one for every scale too, but a depth-th of the size.
  for block in net.blocks:
    torch_side.compile_in(case, block)
  scales = len(size.vae['patch_nums'])

  @torch.inference_mode()
  def sample(temperature: float) -> Tensor:
    labels = inputs['labels']
    null = torch.full_like(labels, net.num_classes)
    conditions = net.conditions(torch.cat([labels, null]))
    cache = net.empty_cache(2 * len(labels))
    f_hat = quantize.empty_map(len(labels))
    maps, tokens = None, []
    for scale in range(scales):
      cond, uncond = net.step(conditions, cache, maps, scale).chunk(2)
      ramp = size.sampling['cfg'] * scale / (scales - 1)
      logits = torch.lerp(cond, uncond, -ramp)
      log_p = filtered(logits, size.sampling).log_softmax(-1)
      tokens.append(torch_side.draw(log_p, temperature))
      codes = quantize.embedding(tokens[-1])
      f_hat = quantize.add(f_hat, codes, scale)
      if scale < scales - 1:
        maps = quantize.next_map(f_hat, scale).repeat(2, 1, 1)
    return torch.cat(tokens, dim=1)

  return torch_side.program(
      lambda: {'indices': sample(0.0)}, lambda: sample(1.0)
  )


def filtered(logits: Tensor, sampling: Mapping[str, Any]) -> Tensor:
  """Logits with -inf for what top-k and, of the rest, top-p leave out."""
  logits = torch_side.filter_top_k(logits, sampling['top_k'])
  ordered, order = logits.sort(-1)
  drop = ordered.softmax(-1).cumsum(-1) <= 1 - sampling['top_p']
  drop[..., -1] = False
  return logits.masked_fill(
      torch.empty_like(drop).scatter_(-1, order, drop), -torch.inf
  )


def student(case: Case, size: workloads.Size, inputs: Tensors) -> Program:
  net = torch_side.load(case, 'student', torch_nets.Student(size.teacher))
  vae = torch_side.load(case, 'vae', torch_nets.VQVAE(size.vae))
  codebook = vae.quantize.embedding
  torch_side.compile_in(case, net)
  split = sum(n * n for n in size.vae['patch_nums'][: size.split])
  offset = torch.zeros_like(inputs['labels'])

  @torch.inference_mode()
  def step() -> Tensors:
    logits, codes = net(inputs['noise'], inputs['labels'], offset)
    indices = logits.argmax(-1)
    merged = torch.cat([codebook(indices[:, :split]), codes[:, split:]], dim=1)
    return {'codes': merged, 'indices': indices}

  return torch_side.program(step, step)


def decode(case: Case, size: workloads.Size, inputs: Tensors) -> Program:
  net = torch_side.load(case, 'vae', torch_nets.VQVAE(size.vae))
  net = net.to(memory_format=torch.channels_last)
  torch_side.compile_in(case, net)

  @torch.inference_mode()
  def images() -> Tensors:
    codes = net.quantize.embedding(inputs['indices'])
    return {'image': net(codes).permute(0, 2, 3, 1)}

  return torch_side.program(images, images)


def train(case: Case, size: workloads.Size, inputs: Tensors) -> Program:
  net = torch_side.load(case, 'student', torch_nets.Student(size.teacher))
  vae = torch_side.load(case, 'vae', torch_nets.VQVAE(size.vae))
  codebook = vae.quantize.embedding.weight.detach().clone()
  del vae
  torch_side.compile_in(case, net)
  kernels = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
  chosen = set(map(id, kernels))
  rest = [p for p in net.parameters() if id(p) not in chosen]
  # As `jax_side.OPTIMIZER`: constant rate, decay of kernels alone.
  optimizer = torch.optim.AdamW(
      [{'params': kernels, 'weight_decay': 0.05},
       {'params': rest, 'weight_decay': 0.0}],
      lr=1e-4, betas=(0.9, 0.95), fused=True,
  )
  targets = inputs['indices'].long()
  offset = torch.zeros_like(inputs['labels'])

  def step(checked: bool = False) -> Tensors:
    logits, codes = net(inputs['noise'], inputs['labels'], offset)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = loss + 0.1 * F.mse_loss(codes, F.embedding(targets, codebook))
    optimizer.zero_grad()
    loss.backward()
    exact = {'grad_norm': torch_side.exact_norm(net)} if checked else {}
    nn.utils.clip_grad_norm_(net.parameters(), 2.0)
    optimizer.step()
    return {'loss': loss.detach(), **exact}

  return torch_side.program(
      lambda: step(checked=True), lambda: step()['loss'].item()
  )


_ROWS: Mapping[str, Callable[[Case, workloads.Size, Tensors], Program]] = {
    'teacher': teacher, 'student': student, 'decode': decode, 'train': train,
}
