# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""DMD2: matches what a few-step student makes to a diffusion model's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dd_jax.flow import process as process_lib
from dd_jax.method import Inputs, Method, Output, Update

# What randomness of an example is for; each has a stream of its own.
_WANTED, _START, _STEP, _MATCH, _JUDGED, _FIT, _FAKE, _REAL = range(8)


@dataclasses.dataclass(frozen=True)
class Config:
  """Clocks, noise levels and weights; the defaults are those of ImageNet-64.

  Levels are places in a grid of 1,000, least noise first.

  Attributes:
    ratio: updates of the critic for each one of the student.
    levels: of the student's steps, most noise first; one for a student of one
      step.
    simulate: a later step is trained on what the student's earlier steps made;
      otherwise on noisy data.
    wanted: the student is asked for classes drawn evenly, or for the labels or
      captions of the batch; for these alone where `simulate` is off and there
      are several levels.
    guidance: of the teacher; 1 for none. The student takes it in.
    first: least level at which teacher and critic are compared.
    last: greatest such level.
    floor: least mean distance of a sample to its denoised self that the
      gradient is divided by; without it, a sample that the teacher leaves alone
      would give infinity.
    gan: weight of the discriminator in the student's loss, 0 for none at all.
    critic_gan: weight of the discriminator's own loss in the critic's.
    process: 'edm' for networks that are told sigma and predict x0, 'vp' for
      those that are told the time and predict the noise.
  """

  ratio: int = 5
  levels: tuple[int, ...] = (process_lib.LEVELS - 1,)
  simulate: bool = True
  wanted: Literal['uniform', 'batch'] = 'uniform'
  guidance: float = 1.0
  first: int = 20
  last: int = 980
  floor: float = 1e-8
  gan: float = 3e-3
  critic_gan: float = 1e-2
  process: process_lib.Kind = 'edm'

  def __post_init__(self) -> None:
    if self.ratio < 1:
      raise ValueError(f'ratio={self.ratio} must be at least 1')
    top = process_lib.LEVELS - 1
    places = (*self.levels, self.first, self.last)
    if not self.levels or not all(0 <= i <= top for i in places):
      raise ValueError(
          f'levels={self.levels}, first={self.first}, last={self.last}: '
          f'expected places in [0, {top}]'
      )
    if list(self.levels) != sorted(set(self.levels), reverse=True):
      raise ValueError(f'levels={self.levels} must descend')
    if self.first > self.last:
      raise ValueError(f'first={self.first} must not exceed last={self.last}')
    if self.floor <= 0 or self.guidance < 1:
      raise ValueError(
          f'floor={self.floor} must be positive and guidance='
          f'{self.guidance} at least 1'
      )
    if min(self.gan, self.critic_gan) < 0 or self.gan and not self.critic_gan:
      raise ValueError(
          f'gan={self.gan} and critic_gan={self.critic_gan} must not be '
          'negative, and where the first is not 0 the discriminator must learn'
      )


class DMD2(Method):
  """Roles 'student' and 'critic', frozen 'teacher'; all begin as the teacher.

  The critic is trained at every step, the student at every `ratio`-th, before
  it: both see what the student made before the step. Reads `image` (B, ...),
  which may be latents, with `label` or captions.

  Source: arXiv 2405.14867, sections 4.1 to 4.5; the loss and its normaliser as
  in the released program.
  """

  Config = Config

  def __post_init__(self) -> None:
    self.check_parts(('student', 'critic'), ('teacher',))
    if self.config.gan and 'logits' not in self.roles['critic'].model.fns:
      raise ValueError(
          f'gan={self.config.gan} needs a critic with a discriminator: a '
          "model 'critic' with head=True"
      )
    if self.config.guidance > 1 and not self._null:
      raise ValueError(
          f'guidance={self.config.guidance} needs a network with classes'
      )

  @property
  def _classes(self) -> int:
    return self.roles['student'].model.config.num_classes

  @property
  def _null(self) -> bool:
    """Whether there is a condition that stands for none."""
    config = self.roles['student'].model.config
    return bool(config.num_classes or getattr(config, 'caption_length', 0))

  @functools.cached_property
  def process(self) -> process_lib.Process:
    """The grid of levels."""
    return process_lib.make(
        self.config.process, self.roles['student'].model.config
    )

  def updates(self, step: int) -> tuple[Update, ...]:
    critic = Update('critic', 'critic', self.critic_loss)
    if step % self.config.ratio:
      return (critic,)
    return (Update('student', 'student', self.student_loss), critic)

  def prepare(self, inputs: Inputs) -> Mapping[str, Any]:
    """What the student makes, and of what."""
    shape = inputs.batch['image'].shape[1:]
    if self.config.wanted == 'uniform' and self._classes:
      condition = jax.vmap(jax.random.randint, (0, None, None, None))(
          _keys(inputs, _WANTED), (), 0, self._classes
      )
    else:
      condition = self._given(inputs)
    start = _keys(inputs, _START)
    levels = self.config.levels
    denoise = self._student(inputs.params['student'], condition)

    def fresh(k: Any) -> jax.Array:
      fold = functools.partial(jax.random.fold_in, data=k)
      return _normal(jax.vmap(fold)(start), shape)

    if len(levels) == 1 or self.config.simulate:
      # One step for all examples, and on all hosts: no more of the sampler runs
      # than that step asks for.
      step = jax.random.randint(
          jax.random.fold_in(inputs.key, _STEP), (), 0, len(levels)
      )
      x = self.process.input_of_step(denoise, levels, step, fresh(0), fresh)
      steps = jnp.broadcast_to(step, x.shape[:1])
    else:
      steps = jax.vmap(jax.random.randint, (0, None, None, None))(
          _keys(inputs, _STEP), (), 0, len(levels)
      )
      x = self.process.diffuse(
          inputs.batch['image'], fresh(0), jnp.asarray(levels)[steps]
      )
      pure = self.process.start[levels[0]] * fresh(0)
      x = jnp.where(_wide(steps == 0, x), pure, x)
      condition = self._given(inputs)
    place = jnp.asarray(levels)[steps]
    denoise = self._student(inputs.params['student'], condition)
    return {
        'input': x, 'place': place, 'condition': condition,
        'fake': denoise(x, place),
    }

  def _student(self, params: Any, condition: Any) -> process_lib.Denoise:
    apply = self.roles['student'].model.apply
    return lambda x, place: self.process.denoise(
        apply, params, x, place, condition
    )

  def student_loss(self, params: Any, inputs: Inputs) -> Output:
    """Moves samples along the gradient of both terms, taken at the samples.

    Neither teacher nor critic is differentiated by its weights.
    """
    shared, config = inputs.shared, self.config
    fake, condition = shared['fake'], shared['condition']
    critic = inputs.params['critic']
    x, place = self._noisy(inputs, fake, _MATCH, config.first, config.last)
    teacher = process_lib.guided(
        self.frozen['teacher'].apply, config.guidance, self._classes
    )
    real = self.process.denoise(
        teacher, inputs.frozen['teacher'], x, place, condition
    )
    made = self.process.denoise(
        self.roles['critic'].model.apply, critic, x, place, condition
    )
    scale = jnp.abs(fake - real).reshape(fake.shape[0], -1).mean(-1)
    slope = (made - real) / _wide(jnp.maximum(scale, config.floor), fake)
    value = 0.5 * jnp.square(slope).mean()
    metrics = {
        'matching': value, 'slope': jnp.abs(slope).mean(),
    }
    slope /= fake.size
    if config.gan:
      gan, push = jax.value_and_grad(self._doubt)(fake, critic, inputs)
      push *= config.gan
      ours, theirs = _norm(slope), _norm(push)
      metrics |= {
          'gan': gan,
          # Both are zero where there is nothing left to learn.
          'gan_share': theirs / jnp.maximum(ours + theirs, config.floor),
      }
      value += config.gan * gan
      slope += push
    live = self._student(params, condition)(shared['input'], shared['place'])
    # The number of the loss, with this gradient at the samples exactly.
    value, slope = jax.lax.stop_gradient((value, slope))
    return Output(
        value + (slope * (live - jax.lax.stop_gradient(live))).sum(), metrics
    )

  def _doubt(
      self, fake: jax.Array, critic: Any, inputs: Inputs
  ) -> jax.Array:
    """How little the discriminator takes samples to be real."""
    logits = self._logits(
        inputs, critic, fake, inputs.shared['condition'], _JUDGED
    )
    return jax.nn.softplus(-logits).mean()

  def critic_loss(self, params: Any, inputs: Inputs) -> Output:
    """Denoises what the student made, and tells it from data."""
    shared, config = inputs.shared, self.config
    fake, condition = shared['fake'], shared['condition']
    x, place = self._noisy(inputs, fake, _FIT)
    x0 = self.process.denoise(
        self.roles['critic'].model.apply, params, x, place, condition
    )
    loss = self.process.error(x0, fake, place).mean()
    metrics = {
        'denoising': loss, 'sample_mean': fake.mean(),
        'sample_std': jnp.sqrt(jnp.square(fake - fake.mean()).mean()),
    }
    if config.gan:
      image = inputs.batch['image'].astype(jnp.float32)
      of_fake = self._logits(inputs, params, fake, condition, _FAKE)
      of_real = self._logits(
          inputs, params, image, self._given(inputs), _REAL
      )
      gan = (
          jax.nn.softplus(of_fake).mean() + jax.nn.softplus(-of_real).mean()
      )
      loss += config.critic_gan * gan
      metrics |= {
          'gan': gan,
          'accuracy_fake': (of_fake < 0).mean(dtype=jnp.float32),
          'accuracy_real': (of_real > 0).mean(dtype=jnp.float32),
      }
    return Output(loss, metrics)

  def _noisy(
      self, inputs: Inputs, x0: jax.Array, purpose: int, first: int = 0,
      last: int = process_lib.LEVELS - 1,
  ) -> tuple[jax.Array, jax.Array]:
    """Data at levels drawn evenly from first to last, and those levels."""
    level, noise = jnp.unstack(
        jax.vmap(jax.random.split)(_keys(inputs, purpose)), axis=1
    )
    place = jax.vmap(jax.random.randint, (0, None, None, None))(
        level, (), first, last + 1
    )
    noise = _normal(noise, x0.shape[1:])
    return self.process.diffuse(x0, noise, place), place

  def _logits(
      self, inputs: Inputs, params: Any, x0: jax.Array, condition: Any,
      purpose: int,
  ) -> jax.Array:
    x, place = self._noisy(inputs, x0, purpose)
    return self.roles['critic'].model.fns['logits'](
        params, x, self.process.level(place), condition
    )

  def _given(self, inputs: Inputs) -> Any:
    """Labels or captions of the batch; zeros for networks without classes.

    Raises:
      ValueError: a network with classes, and images without labels.
    """
    if {'label', 'features'} & inputs.batch.keys():
      return inputs.condition
    if self._classes:
      raise ValueError(
          f'the student has {self._classes} classes, but the data have no '
          'labels'
      )
    return jnp.zeros(inputs.batch['image'].shape[:1], jnp.int32)

  def flops(self, updates: tuple[Update, ...], batch_size: int) -> int:
    config, student = self.config, self.roles['student'].model.flops()
    teacher = self.frozen['teacher'].flops() * (2 if config.guidance > 1 else 1)
    critic = self.roles['critic'].model
    # With a discriminator, the critic's count is of a forward and of logits.
    judged = max(critic.flops() - student, 0) if config.gan else 0
    counts = {
        # Its forward is that of the samples, which the critic needs as well.
        'student': 2 * student + teacher + student + 2 * judged,
        'critic': 3 * student + 2 * 3 * judged,
    }
    calls = 1 + (len(config.levels) - 1) / 2 * config.simulate
    return int(batch_size * (
        calls * student + sum(counts[u.role] for u in updates)
    ))


def _keys(inputs: Inputs, purpose: int) -> jax.Array:
  """Keys (B,) of the examples, for one purpose."""
  fold: Callable[[jax.Array], jax.Array] = functools.partial(
      jax.random.fold_in, data=purpose
  )
  return jax.vmap(fold)(inputs.keys)


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _wide(values: jax.Array, x: jax.Array) -> jax.Array:
  """Values (B,) that go with (B, ...) arrays."""
  return values.reshape(-1, *[1] * (x.ndim - 1))


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.square(x).sum())
