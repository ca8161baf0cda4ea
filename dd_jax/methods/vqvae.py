# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of image tokenizers, with usage and revival of codes."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses


@dataclasses.dataclass(frozen=True)
class Config:
  """Loss weights and codebook upkeep.

  Attributes:
    reconstruction: 'l1' or 'l2' distance of pixels.
    commitment: weight of the quantizer's loss.
    perceptual: weight of the frozen network 'perceptual', if there is one.
    usage_decay: decay of the moving frequency of each code, which is the mean
      of its frequencies in each scale: the few tokens of the coarse scales
      count as much as the many of the fine ones.
    revive_every: steps between revivals, 0 for none.
    revive_below: a code is dead when its frequency is below this fraction of
      the uniform one.
    revive_until: no revival after this step, so that the codes settle.
    scale_dropout: share of the images that are decoded without the scales
      behind a random one; for tokenizers with scales. The coarse codes then say
      more of an image, and the fine ones, which VAR draws independently of each
      other, have less to agree upon. After arXiv 2107.03312, which drops
      quantizers of sound in this way.
  """

  reconstruction: str = 'l2'
  commitment: float = 1.0
  perceptual: float = 0.0
  usage_decay: float = 0.98
  revive_every: int = 20
  revive_below: float = 0.05
  revive_until: int = 1 << 30
  scale_dropout: float = 0.0


class TrainVQVAE(Method):
  """Role 'tokenizer': pixels + commitment (+ perceptual) loss.

  Source: VAR, models/quant.py; arXiv 2404.02905, section 3.2. The release
  also trains against a discriminator, which is not part of this method.
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('tokenizer',))
    share = self.config.scale_dropout
    losses.check_share('scale_dropout', share)
    if self.config.perceptual and 'perceptual' not in self.frozen:
      raise ValueError(
          f'perceptual={self.config.perceptual} needs a frozen network '
          "'perceptual'"
      )
    if share and self._scales < 2:
      family = self.roles['tokenizer'].model.family
      raise ValueError(
          f'scale_dropout={share}: this {family} has no scales to leave out; '
          'set it to 0'
      )

  @property
  def _scales(self) -> int:
    config = self.roles['tokenizer'].model.config
    return len(getattr(config, 'patch_nums', (1,)))

  def updates(self, step: int) -> tuple[Update, ...]:
    return (Update('tokenizer', 'tokenizer', self.loss),)

  def init_aux(self) -> dict[str, jax.Array]:
    vocab = self.roles['tokenizer'].model.config.vocab_size
    return {'usage': jnp.full((vocab,), 1.0 / vocab)}

  def loss(self, params: Any, inputs: Inputs) -> Output:
    config = self.config
    image = inputs.batch['image']
    scales = ()
    if config.scale_dropout and inputs.training:
      scales = (jax.vmap(self._draw_scales)(inputs.keys),)
    out = self.roles['tokenizer'].model.fns['forward'](params, image, *scales)
    pixels = losses.pixel_distance(
        out['reconstruction'], image, config.reconstruction
    ).mean()
    loss = pixels + config.commitment * out['commitment']
    metrics = {'pixels': pixels, 'commitment': out['commitment']}
    if 'perceptual' in self.frozen:
      distance = self.frozen['perceptual'].fns['distance'](
          inputs.frozen['perceptual'], out['reconstruction'], image
      ).mean()
      loss += config.perceptual * distance
      metrics['perceptual'] = distance
    usage = inputs.aux['usage']
    metrics['codes_in_use'] = jnp.mean(
        usage * usage.size > config.revive_below
    )
    return Output(loss, metrics, {k: out[k] for k in ('counts', 'targets')})

  def _draw_scales(self, key: jax.Array) -> jax.Array:
    """How many scales one image is decoded from."""
    drop, cut = jax.random.split(key)
    dropped = jax.random.bernoulli(drop, self.config.scale_dropout)
    return jnp.where(
        dropped, jax.random.randint(cut, (), 1, self._scales), self._scales
    )

  def after(self, state: Any, outputs: Mapping[str, Any]) -> Any:
    """Moves the usage, and dead codes onto what this batch quantized.

    Every scale gets as many of the revived codes. If they went where most
    tokens are, the coarse scales would be left with none that are near to their
    small residuals, and would soon say the same of all images. A revived code
    starts with the uniform frequency, so that it gets time to find its place.
    """
    config, extras = self.config, outputs['tokenizer']
    counts = extras['counts'].sum(axis=0).astype(jnp.float32)
    share = (counts / counts.sum(axis=1, keepdims=True)).mean(axis=0)
    usage = (
        config.usage_decay * state.aux['usage']
        + (1.0 - config.usage_decay) * share
    )
    if not config.revive_every:
      return state.replace(aux={'usage': usage})
    due = (state.step % config.revive_every == 0) & (
        state.step <= config.revive_until
    )
    dead = due & (usage * usage.size < config.revive_below)
    key = jax.random.fold_in(
        jax.random.wrap_key_data(state.key), state.step
    )
    drawn = []  # one target of every scale for each code
    for targets in extras['targets']:
      flat = targets.reshape(-1, targets.shape[-1])
      drawn.append(flat[jax.random.randint(key, usage.shape, 0, len(flat))])
    scale = jax.random.randint(
        jax.random.fold_in(key, 1), usage.shape, 0, len(drawn)
    )
    revived = jnp.stack(drawn)[scale, jnp.arange(usage.size)]
    params = state.params['tokenizer']
    embedding = jnp.where(dead[:, None], revived, params['embedding'])
    return state.replace(
        aux={'usage': jnp.where(dead, 1.0 / usage.size, usage)},
        params=state.params | {
            'tokenizer': params | {'embedding': embedding}
        },
    )
