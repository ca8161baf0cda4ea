# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Distilled Decoding: one network from noise to the whole sequence."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.flow.noise import pair_noise
from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses
from dd_jax.model import check_tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
  """Where the student starts and what it is charged for.

  Attributes:
    t_set: sequence timesteps that it is trained to finish from: steps of the
      teacher (scales of VAR, tokens of LlamaGen) that are given as data; each
      as often as it is named.
    split: step at which the perceptual path changes from the logits head to
      the continuous head.
    ce: weight of the logits head's cross-entropy.
    perceptual: weight of the image distance.
    embedding: weight of the continuous head's squared distance to the codes,
      the mean over the numbers of a code.
    loss_norm: image distance: 'network' (frozen network 'perceptual', LPIPS
      for instance), 'l1', 'l2' or 'none'.
    perceptual_batch: examples of a batch (with `micro_batches`, of each of
      them) that the image distance is taken on, 0 for all; spread evenly where
      it divides them, else the first ones. Decoding is most of a step's work.
  """

  t_set: tuple[int, ...] = (0,)
  split: int = 1
  ce: float = 1.0
  perceptual: float = 1.0
  embedding: float = 0.1
  loss_norm: str = 'l2'
  perceptual_batch: int = 0

  def __post_init__(self) -> None:
    norms = ('network', 'l1', 'l2', 'none')
    if self.loss_norm not in norms:
      raise ValueError(
          f'loss_norm={self.loss_norm!r}: expected one of {norms}'
      )
    if self.perceptual_batch < 0:
      raise ValueError(
          f'perceptual_batch={self.perceptual_batch} is negative; 0 is all'
      )


class DistilledDecoding(Method):
  """Role 'student', frozen 'vae' (and 'perceptual'), batches of pairs.

  Source: arXiv 2412.17153, section 4; the loss is inferred from the released
  sampling code (option loss_norm, the merge of the two heads).
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('student',), ('vae',))
    check_tokenizer(self.roles['student'].model, self.frozen['vae'])
    steps = len(self._offsets) - 1
    c = self.config
    if not c.t_set or not all(0 <= t < steps for t in c.t_set):
      raise ValueError(f't_set={c.t_set}: expected steps in [0, {steps})')
    if not 0 <= c.split <= steps:
      raise ValueError(f'split={c.split}: expected a step in [0, {steps}]')
    if c.loss_norm == 'network' and 'perceptual' not in self.frozen:
      raise ValueError(
          "loss_norm='network' needs a frozen network 'perceptual'"
      )

  @property
  def _offsets(self) -> tuple[int, ...]:
    return self.roles['student'].model.config.offsets

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('student', 'student', self.loss),)

  def prepare(self, inputs: Inputs) -> Mapping[str, jax.Array]:
    batch = inputs.batch
    vae, params = self.frozen['vae'].fns, inputs.frozen['vae']
    codes = vae['codes'](params, batch['indices'])
    noise = pair_noise(batch['seed'], batch['pair_id'], codes.shape[1:])
    starts = jnp.asarray([self._offsets[t] for t in self.config.t_set])
    pick = jax.vmap(jax.random.randint, (0, None, None, None))(
        inputs.keys, (), 0, len(self.config.t_set)
    )
    shared = {'codes': codes, 'noise': noise, 'offset': starts[pick]}
    if self.config.loss_norm != 'none':
      some = self._some(codes)
      shared['image'] = vae['decode'](params, vae['accumulate'](params, some))
    return shared

  def loss(self, params: Any, inputs: Inputs) -> Output:
    config, shared = self.config, inputs.shared
    model = self.roles['student'].model
    codes, offset = shared['codes'], shared['offset']
    position = jnp.arange(codes.shape[1])[None]
    given = position < offset[:, None]
    x = jnp.where(given[..., None], codes, shared['noise'])
    out = model.apply(params, x, inputs.condition, offset)
    targets = inputs.batch['indices']
    ce = losses.masked_mean(
        losses.cross_entropy(out['logits'], targets), ~given
    )
    embedding = losses.masked_mean(
        jnp.square(out['codes'] - codes).mean(axis=-1), ~given
    )
    hits = out['logits'].argmax(axis=-1) == targets
    loss = config.ce * ce + config.embedding * embedding
    metrics = {
        'cross_entropy': ce,
        'embedding': embedding,
        'accuracy': losses.masked_mean(hits.astype(jnp.float32), ~given),
    }
    if config.loss_norm != 'none':
      split = self._offsets[config.split]
      vae, vae_params = self.frozen['vae'].fns, inputs.frozen['vae']
      logits = jax.lax.stop_gradient(self._some(out['logits']))
      picked = vae['codes'](vae_params, logits.argmax(axis=-1))
      merged = jnp.where(
          (position < split)[..., None], picked, self._some(out['codes'])
      )
      merged = jnp.where(
          self._some(given)[..., None], self._some(codes), merged
      )
      image = vae['decode'](vae_params, vae['accumulate'](vae_params, merged))
      distance = self._distance(inputs, image, shared['image']).mean()
      loss += config.perceptual * distance
      metrics['perceptual'] = distance
    return Output(loss, metrics)

  def _some(self, rows: jax.Array) -> jax.Array:
    """The examples that the image distance is taken on.

    As many of each device's: the first ones would have to be sent to others.
    """
    count = self.config.perceptual_batch or len(rows)
    if len(rows) % count:
      return rows[:count]
    return rows.reshape(count, -1, *rows.shape[1:])[:, 0]

  def _distance(
      self, inputs: Inputs, a: jax.Array, b: jax.Array
  ) -> jax.Array:
    if self.config.loss_norm == 'network':
      return self.frozen['perceptual'].fns['distance'](
          inputs.frozen['perceptual'], a, b
      )
    return losses.pixel_distance(a, b, self.config.loss_norm)

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    images = min(self.config.perceptual_batch or batch_size, batch_size)
    total = super().flops(updates, batch_size)
    if self.config.loss_norm == 'none':
      return total
    # A decode is about half of the tokenizer's forward: one of the target,
    # and a forward and backward of the prediction.
    total += 4 * images * self.frozen['vae'].flops() // 2
    if self.config.loss_norm == 'network':
      # A forward of both images, and back through one of them.
      total += images * self.frozen['perceptual'].flops() * 3 // 2
    return total
