# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the programs of PyTorch's side have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
import time
from typing import Any

import numpy as np
from safetensors import safe_open
import torch
from torch import nn

from dd_jax.tools.bench.program import Case, Program

Tensors = Mapping[str, torch.Tensor]


def prepare(case: Case) -> Tensors:
  """Sets torch up for a case, and reads its inputs."""
  # Read when torch compiles its first program.
  os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(case.cache)
  os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = str(case.threads)
  torch.set_num_threads(case.threads)
  torch.manual_seed(case.seed)
  return {
      # Unsigned numbers are those of pairs, which only our side draws from.
      k: torch.from_numpy(v) for k, v in case.inputs().items()
      if v.dtype != np.uint32
  }


def program(
    check: Callable[[], Tensors], run: Callable[[], float | Any]
) -> Program:
  """A program whose first call compiles, as torch has it."""
  first = None

  def compile_() -> Mapping[str, float]:
    nonlocal first
    began = time.perf_counter()
    first = {k: v.numpy() for k, v in check().items()}
    return {'compile': time.perf_counter() - began}

  def call() -> float | None:
    value = run()
    return value if isinstance(value, float) else None

  return Program(compile_, lambda: first, call)


def load(case: Case, network: str, net: nn.Module) -> nn.Module:
  """The network with its weights; those that it does not have are left out."""
  wanted = net.state_dict()
  with safe_open(case.weights(network, 'torch'), framework='pt') as file:
    for name in wanted:
      wanted[name].copy_(file.get_tensor(name))
  return net


def compile_in(case: Case, net: nn.Module) -> None:
  """Has a module compiled when it is first called, if the variant says so."""
  if case.variant == 'compile':
    torch._dynamo.config.recompile_limit = 64
    net.compile(dynamic=False)


def exact_norm(net: nn.Module) -> torch.Tensor:
  """Of a network's gradient."""
  # Torch adds up float32 squares in float32: of four million values its norm is
  # 1e-4 too small, which would hide what the gradients differ by.
  squares = [p.grad.double().square().sum() for p in net.parameters()]
  return torch.stack(squares).sum().sqrt().float()


def filter_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
  """Logits with -inf for all but the k largest."""
  kth = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
  return logits.masked_fill(logits < kth, -torch.inf)


def draw(log_p: torch.Tensor, temperature: float) -> torch.Tensor:
  """The most likely index at temperature 0, one by lot at 1."""
  # At temperature 1 this is how categorical variables are drawn.
  chance = torch.empty_like(log_p).exponential_().log_()
  return log_p.sub_(chance, alpha=temperature).argmax(-1)
