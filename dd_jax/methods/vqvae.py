# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Training of image tokenizers, with usage and revival of codes."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dd_jax.method import Inputs, Method, Output, Update
from dd_jax.methods import losses

_LEAST = 1e-8  # of a gradient's length, where another is measured by it


@dataclasses.dataclass(frozen=True)
class Config:
  """Loss weights and codebook upkeep.

  Attributes:
    reconstruction: 'l1' or 'l2' distance of pixels.
    commitment: weight of the quantizer's loss.
    perceptual: weight of the frozen network 'perceptual', if there is one.
    adversarial: what the role 'discriminator', if there is one, says against
      reconstructions: the size of its gradient at each of them, as a share of
      that of the distances.
    adversarial_from: step from which on there is such a loss, and the
      discriminator is trained: what it says of blurred images is of no use.
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

  reconstruction: Literal['l1', 'l2'] = 'l2'
  commitment: float = 1.0
  perceptual: float = 0.0
  adversarial: float = 0.5
  adversarial_from: int = 0
  usage_decay: float = 0.98
  revive_every: int = 20
  revive_below: float = 0.05
  revive_until: int = 1 << 30
  scale_dropout: float = 0.0

  def __post_init__(self) -> None:
    if not 0.0 <= self.adversarial < float('inf') or self.adversarial_from < 0:
      raise ValueError(
          f'adversarial={self.adversarial}, adversarial_from='
          f'{self.adversarial_from}: expected numbers of at least 0'
      )


class TrainVQVAE(Method):
  """Role 'tokenizer': pixels, commitment (and perceptual) loss.

  With a role 'discriminator' the tokenizer is charged for what that tells from
  images, too, and the discriminator learns from the same reconstructions.

  Source: VAR, models/quant.py; arXiv 2404.02905, section 3.2; LlamaGen,
  tokenizer/tokenizer_image/vq_loss.py. Of its choices ours are hinge losses and
  the balance of gradients, which is after arXiv 2012.09841, section 3.1, but
  taken at each image instead of the decoder's last layer: no example's share
  depends on what else is in its batch.
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
    if 'discriminator' in self.roles:
      family = self.roles['discriminator'].model.family
      if family != 'patchgan':
        raise ValueError(
            f"the role 'discriminator' is a {family}; it must be a patchgan"
        )
      shapes = [
          (c.image_size, c.image_channels) for c in (
              self.roles[name].model.config
              for name in ('tokenizer', 'discriminator')
          )
      ]
      if shapes[0] != shapes[1]:
        raise ValueError(
            f'the discriminator looks at images of (image_size, '
            f'image_channels)={shapes[1]}, those of the tokenizer are '
            f'{shapes[0]}'
        )

  @property
  def _scales(self) -> int:
    config = self.roles['tokenizer'].model.config
    return len(getattr(config, 'patch_nums', (1,)))

  def updates(self, step: int) -> tuple[Update, ...]:
    waits = step < self.config.adversarial_from
    if waits or 'discriminator' not in self.roles:
      return (Update('tokenizer', 'tokenizer', self.loss),)
    return (
        Update(
            'tokenizer', 'tokenizer', self.loss, (('adversarial', True),)
        ),
        Update('discriminator', 'discriminator', self.discriminator_loss),
    )

  def init_aux(self) -> dict[str, jax.Array]:
    vocab = self.roles['tokenizer'].model.config.vocab_size
    return {'usage': jnp.full((vocab,), 1.0 / vocab)}

  def prepare(self, inputs: Inputs) -> Mapping[str, Any]:
    if 'discriminator' not in self.roles:
      return {}
    # What the tokenizer is charged for, not what its update makes of it.
    out = self._forward(inputs.params['tokenizer'], inputs)
    return {'reconstruction': out['reconstruction']}

  def _forward(self, params: Any, inputs: Inputs) -> Mapping[str, Any]:
    scales = ()
    if self.config.scale_dropout and inputs.training:
      scales = (jax.vmap(self._draw_scales)(inputs.keys),)
    return self.roles['tokenizer'].model.fns['forward'](
        params, inputs.batch['image'], *scales
    )

  def loss(
      self, params: Any, inputs: Inputs, adversarial: bool = False
  ) -> Output:
    """What reconstructions and quantization cost the tokenizer."""
    config = self.config
    out = self._forward(params, inputs)
    made = out['reconstruction']
    distance, metrics = self._distance(made, inputs)
    loss = distance + config.commitment * out['commitment']
    metrics['commitment'] = out['commitment']
    if adversarial:
      fixed = jax.lax.stop_gradient(made)
      pull, _ = jax.grad(self._distance, has_aux=True)(fixed, inputs)
      push, doubts = jax.grad(self._doubt, has_aux=True)(fixed, inputs)
      weights = config.adversarial * _lengths(pull) / jnp.maximum(
          _lengths(push), _LEAST
      )
      # The number of that loss, with its gradient at the reconstructions.
      slopes = (push * (made - fixed)).sum(axis=(1, 2, 3))
      loss += (weights * doubts).mean() + (weights * slopes).sum()
      metrics |= {
          'adversarial': doubts.mean(), 'adversarial_weight': weights.mean()
      }
    usage = inputs.aux['usage']
    metrics['codes_in_use'] = jnp.mean(
        usage * usage.size > config.revive_below
    )
    return Output(loss, metrics, {k: out[k] for k in ('counts', 'targets')})

  def _distance(
      self, made: jax.Array, inputs: Inputs
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Distance of reconstructions from their images, and its parts."""
    config, image = self.config, inputs.batch['image']
    pixels = losses.pixel_distance(made, image, config.reconstruction).mean()
    if 'perceptual' not in self.frozen:
      return pixels, {'pixels': pixels}
    distance = self.frozen['perceptual'].fns['distance'](
        inputs.frozen['perceptual'], made, image
    ).mean()
    return pixels + config.perceptual * distance, {
        'pixels': pixels, 'perceptual': distance,
    }

  def _doubt(
      self, made: jax.Array, inputs: Inputs
  ) -> tuple[jax.Array, jax.Array]:
    """How little reconstructions are taken for images: mean, and each."""
    logits = self._judge(inputs.params['discriminator'], made)
    doubts = -logits.mean(axis=1)
    return doubts.mean(), doubts

  def discriminator_loss(self, params: Any, inputs: Inputs) -> Output:
    """How badly images are told from their reconstructions: hinge loss."""
    of_real = self._judge(params, inputs.batch['image'])
    of_made = self._judge(params, inputs.shared['reconstruction'])
    loss = 0.5 * (
        jax.nn.relu(1.0 - of_real).mean() + jax.nn.relu(1.0 + of_made).mean()
    )
    return Output(loss, {
        'accuracy_real': (of_real > 0).mean(dtype=jnp.float32),
        'accuracy_made': (of_made < 0).mean(dtype=jnp.float32),
    })

  def _judge(self, params: Any, image: jax.Array) -> jax.Array:
    return self.roles['discriminator'].model.apply(params, image)

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

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    total = super().flops(updates, batch_size)
    if len(updates) == 1:
      return total
    # The discriminator has been counted for one of its two images, and not at
    # all for the way through it to the tokenizer's reconstruction and back.
    judged = self.roles['discriminator'].model.flops()
    return total + batch_size * (3 + 2) * judged


def _lengths(gradient: jax.Array) -> jax.Array:
  """Euclidean lengths of images: (B, H, W, C) -> (B,)."""
  return jnp.sqrt(jnp.square(gradient).sum(axis=(1, 2, 3)))
