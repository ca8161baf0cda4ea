# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A denoiser and a discriminator that looks at what its encoder makes."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.model import Axes, Model, Params
from dd_jax.models import layers
from dd_jax.models.discriminator import model as discriminator

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
  """What the critic is made of.

  Attributes:
    denoiser: `name` in the registry and the fields of its config.
    head: whether there is a discriminator; its sizes are the features'.
  """

  denoiser: Mapping[str, Any]
  head: bool = True


def compose(config: Config, denoiser: Model) -> Model:
  """One network of two; parameters are {'denoiser': ..., 'head': ...}.

  - forward(x, sigma_B, labels_B) -> x0, as of the denoiser
  - logits(x, sigma_B, labels_B) -> logits_B float32, positive for what it takes
    to be real; needs no more of the denoiser than its encoder
  - adopt(key, teacher_params) -> params: the denoiser is the teacher, or that
    of another critic; the head knows nothing

  FLOPs are those of one `forward` and one `logits`.

  Args:
    config: `denoiser` is not looked at.
    denoiser: its functions `forward` and `features`.

  Raises:
    ValueError: the denoiser has no features.

  Source: DMD2 (arXiv 2405.14867), section 4.3.
  """
  head = discriminator.build(_head(denoiser)) if config.head else None

  def init(key: Array) -> Params:
    keys = jax.random.split(key)
    return adopt(keys[1], denoiser.init(keys[0]))

  def adopt(key: Array, teacher: Params) -> Params:
    params = {'denoiser': _denoiser_of(teacher, denoiser)}
    return params | ({'head': head.init(key)} if head else {})

  def forward(params: Params, *inputs: Any, **kwargs: Any) -> Array:
    return denoiser.apply(params['denoiser'], *inputs, **kwargs)

  def logits(
      params: Params, x: Array, sigma_B: Array, labels_B: Array
  ) -> Array:
    features = denoiser.fns['features'](
        params['denoiser'], x, sigma_B, labels_B
    )
    return head.apply(params['head'], features)

  def axes() -> Axes:
    parts = {'denoiser': denoiser.axes()}
    return parts | ({'head': head.axes()} if head else {})

  fns = {'forward': forward, 'adopt': adopt}
  if head:
    fns['logits'] = logits

  def flops() -> int:
    if not head:
      return denoiser.flops()
    abstract = jax.eval_shape(init, jax.random.key(0))
    return denoiser.flops() + layers.count_flops(
        logits, abstract, *_inputs(denoiser)
    )

  return Model('critic', config, init, fns, axes, flops)


def _denoiser_of(teacher: Params, denoiser: Model) -> Params:
  """The teacher's weights, where they are those of such a denoiser."""
  teacher = teacher.get('denoiser', teacher)

  def shapes(tree: Params) -> Any:
    return jax.tree.map(lambda x: x.shape, tree)

  if shapes(teacher) != shapes(denoiser.abstract()):
    raise ValueError(
        f'the teacher has other weights than the denoiser {denoiser.config}'
    )
  return teacher


def _head(denoiser: Model) -> dict[str, int]:
  """The config of a discriminator for a denoiser's features."""
  if 'features' not in denoiser.fns:
    raise ValueError(
        f'denoiser {denoiser.family!r} has no features for a discriminator; '
        'set head=False'
    )
  shape = jax.eval_shape(
      denoiser.fns['features'], denoiser.abstract(), *_inputs(denoiser)
  ).shape
  return {'size': shape[1] if len(shape) == 4 else 0, 'channels': shape[-1]}


def _inputs(denoiser: Model) -> tuple[jax.ShapeDtypeStruct, ...]:
  return (
      jax.ShapeDtypeStruct((1, *denoiser.config.shape), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.int32),
  )
