# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Optimizers and schedules, one chain per role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

CLOCKS = ('step', 'updates')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon, with a schedule that reads a named clock.

  Attributes:
    lr: peak learning rate.
    b1: decay of the first moment.
    b2: decay of the second moment.
    weight_decay: decoupled decay of kernels, and of nothing else.
    clip: largest global norm of the gradient, 0 for no clipping.
    warmup: fraction of `total` spent on a linear warm-up.
    decay: 'constant', 'linear' or 'cosine' after the warm-up.
    final: learning rate at the end, as a fraction of `lr`.
    clock: 'step' reads the run's step, 'updates' the role's own count.
    moment_dtype: dtype of the first moment.
    trainable: regex searched in '/'-joined parameter paths; others stay fixed.
    muon: regex searched in the paths of kernels; those found move by their
      orthogonalized momentum, all else by Adam with Nesterov's; '' for none.
  """

  lr: float = 1e-3
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.05
  clip: float = 1.0
  warmup: float = 0.02
  decay: str = 'linear'
  final: float = 0.1
  clock: str = 'updates'
  moment_dtype: str = 'float32'
  trainable: str = '.*'
  muon: str = ''

  def __post_init__(self) -> None:
    if self.clock not in CLOCKS:
      raise ValueError(
          f'optimizer.clock={self.clock!r}: expected one of {CLOCKS}'
      )
    if self.decay not in ('constant', 'linear', 'cosine'):
      raise ValueError(
          f"optimizer.decay={self.decay!r}: expected 'constant', 'linear' or "
          "'cosine'"
      )


def make_schedule(config: OptimizerConfig, total: int) -> optax.Schedule:
  """Warm-up, then decay, over `total` ticks of the clock."""
  warmup = int(config.warmup * total)
  rest = max(total - warmup, 1)
  main = {
      'constant': lambda: optax.constant_schedule(config.lr),
      'linear': lambda: optax.linear_schedule(
          config.lr, config.lr * config.final, rest
      ),
      'cosine': lambda: optax.cosine_decay_schedule(
          config.lr, rest, config.final
      ),
  }[config.decay]()
  ramp = optax.linear_schedule(config.lr / max(warmup, 1), config.lr, warmup)
  return optax.join_schedules([ramp, main], [warmup]) if warmup else main


def scale_by_clock(
    schedule: optax.Schedule, clock: str
) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the rate at the named clock, given as an argument.

  Keeping no count of its own, it cannot drift from the clock when a role is
  updated at some steps only.
  """

  def update(
      updates, state, params=None, *, clocks: Mapping[str, jax.Array], **_
  ):
    del params
    rate = -schedule(clocks[clock])
    return jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u,
                        updates), state

  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
  )


def _by_path(value: Callable[[str], Any]) -> Callable[[Any], Any]:
  """A function from a tree to the values of its leaves' '/'-joined paths."""
  return lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: value(
          jax.tree_util.keystr(path, simple=True, separator='/')
      ),
      params,
  )


def _precondition(config: OptimizerConfig) -> optax.GradientTransformation:
  """Gradients to steps of rate 1."""
  if not config.muon:
    return optax.scale_by_adam(
        config.b1, config.b2, mu_dtype=config.moment_dtype
    )
  # All axes but the last two, blocks for instance, are of matrices beside one
  # another.
  matrix = optax.contrib.MuonDimensionNumbers(-2, -1)

  def matrices(params):
    found = _by_path(
        lambda p: matrix if _is_kernel(p) and re.search(config.muon, p)
        else None
    )(params)
    # To find its way in a state, optax asks with an empty tree, too.
    if jax.tree.leaves(params) and not jax.tree.leaves(found):
      raise ValueError(
          f'optimizer.muon={config.muon!r}: found in the path of no kernel'
      )
    return found

  return optax.chain(
      optax.contrib.muon(
          learning_rate=1.0, weight_decay=0.0, adam_weight_decay=0.0,
          adam_b1=config.b1, adam_b2=config.b2, mu_dtype=config.moment_dtype,
          muon_weight_dimension_numbers=matrices,
          # The usual size of Adam's steps (arXiv 2502.16982, section 2.2), so
          # that one learning rate suits both.
          consistent_rms=0.2,
      ),
      optax.scale(-1.0),
  )


def _is_kernel(path: str) -> bool:
  return 'kernel' in path.split('/')[-1]


def make_optimizer(
    config: OptimizerConfig, total: int
) -> optax.GradientTransformationExtraArgs:
  """AdamW, or Muon, of one role; `update` takes `clocks={'step', 'updates'}`.

  Args:
    config: rates and masks.
    total: ticks of the clock over which the schedule runs.

  Raises:
    ValueError: by its `init`, where `muon` names no kernel or `trainable` no
      parameter.
  """
  tx = optax.chain(
      optax.clip_by_global_norm(config.clip) if config.clip
      else optax.identity(),
      _precondition(config),
      optax.add_decayed_weights(config.weight_decay, _by_path(_is_kernel)),
      scale_by_clock(make_schedule(config, total), config.clock),
  )
  if config.trainable == '.*':
    return tx

  def label(params):
    labels = _by_path(
        lambda p: 'moves' if re.search(config.trainable, p) else 'stays'
    )(params)
    # As for Muon, the tree may be an empty one.
    if jax.tree.leaves(params) and 'moves' not in jax.tree.leaves(labels):
      raise ValueError(
          f'optimizer.trainable={config.trainable!r}: found in the path of no '
          'parameter'
      )
    return labels

  return optax.transforms.partition(
      {'moves': tx, 'stays': optax.set_to_zero()}, label
  )
