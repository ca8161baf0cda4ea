# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling programs that stages share: ids and conditions to images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import registry, sharding
from dd_jax.evals import baselines
from dd_jax.flow import edm, process
from dd_jax.flow.noise import pair_noise
from dd_jax.model import Model, Params, condition_of

_FRESH = 1 << 20  # added to seeds: evaluation noise is never training noise

# (ids (B,), rows of conditions and labels) -> images (B, H, W, C) in [-1, 1].
Sampler = Callable[[np.ndarray, Mapping[str, np.ndarray]], Any]


def fresh_noise(model: Model, seed: int, ids: jax.Array) -> jax.Array:
  """Noise (B, L, C) of images by number; no pair of the same seed has it."""
  return fresh_normal(
      (model.config.offsets[-1], model.config.code_dim), seed, ids
  )


def fresh_normal(
    shape: tuple[int, ...], seed: int, ids: jax.Array
) -> jax.Array:
  """Standard normal noise (B, *shape) of samples by number."""
  return pair_noise(jnp.full_like(ids, seed + _FRESH), ids, shape)


def fresh_keys(seed: int, ids: jax.Array) -> jax.Array:
  """Keys (B,) of images by number."""
  key = jax.random.key(seed + _FRESH)
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(ids)


def decode(
    family: str, vae: Model, vae_params: Params, indices: jax.Array
) -> jax.Array:
  """Images, NHWC in [-1, 1], of indices (B, L) of a teacher's family."""
  codes = vae.fns['codes'](vae_params, indices)
  return registry.get('samplers', family).images_from_codes(
      vae, vae_params, codes
  )


def teacher_images(
    teacher: Model, vae: Model, params: Params, vae_params: Params,
    condition: Any, choose: Callable[..., jax.Array],
    settings: Mapping[str, Any],
) -> jax.Array:
  """Images of a rollout; `settings` are `sampling.guidance.SETTINGS`."""
  lib = registry.get('samplers', teacher.family)
  return decode(teacher.family, vae, vae_params, lib.rollout(
      teacher, vae, params, vae_params, condition, choose, **settings,
  ))


def student_images(
    student: Model, vae: Model, params: Params, vae_params: Params,
    noise: jax.Array, condition: Any, *, t_list: Sequence[int], split: int,
) -> jax.Array:
  """Images of a student in `len(t_list)` steps; see `few_step`."""
  lib = registry.get('samplers', student.family)
  out = lib.few_step(
      student, vae, params, vae_params, noise, condition,
      t_list=tuple(t_list), split=split,
  )
  return lib.images_from_codes(vae, vae_params, out['codes'])


def involved_images(
    models: Mapping[str, Model], params: Mapping[str, Params],
    noise: jax.Array, condition: Any, keys: jax.Array, *,
    involved: tuple[int, int], split: int, options: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> jax.Array:
  """Images of a student some of whose steps its teacher makes, by lot.

  Args:
    models: 'student', 'teacher' and 'vae'.
    params: of the models.
    noise: see `teacher_involved`.
    condition: see `teacher_involved`.
    keys: (B,), of the teacher's draws.
    involved: `start` and `resume` of `teacher_involved`.
    split: see `few_step`.
    options: one of the sampler's `INVOLVED`.
    settings: `sampling.guidance.SETTINGS`.
  """
  lib = registry.get('samplers', models['student'].family)
  names = ('student', 'teacher', 'vae')
  start, resume = involved
  out = lib.teacher_involved(
      *(models[n] for n in names), *(params[n] for n in names), noise,
      condition, lib.categorical(keys), start=start, resume=resume, split=split,
      **options, **settings,
  )
  return lib.images_from_codes(models['vae'], params['vae'], out['codes'])


def skip_images(
    teacher: Model, vae: Model, params: Params, vae_params: Params,
    condition: Any, keys: jax.Array, cumulative: jax.Array | None, *,
    skip: int, settings: Mapping[str, Any],
) -> jax.Array:
  """Images of a teacher without its last steps; see `skip_n`.

  Args:
    teacher: a teacher.
    vae: its tokenizer.
    params: of the teacher.
    vae_params: of the vae.
    condition: see `skip_n`.
    keys: (B,), of the teacher's draws.
    cumulative: what the missing tokens are drawn from, see
      `evals.baselines.sample_last`; None for no tokens.
    skip: steps that are missing.
    settings: `sampling.guidance.SETTINGS`.
  """
  lib = registry.get('samplers', teacher.family)
  offsets = teacher.config.offsets
  end = len(offsets) - 1
  fill = None
  if cumulative is not None:
    fill = baselines.sample_last(  # a step of its own, after the last one
        jax.vmap(jax.random.fold_in, (0, None))(keys, end), cumulative,
        offsets[-1] - offsets[end - skip],
    )
  return lib.skip_n(
      teacher, vae, params, vae_params, condition, lib.categorical(keys),
      skip=skip, fill=fill, **settings,
  )


def is_denoiser(model: Model) -> bool:
  """Whether a network takes noisy data and their level, and needs no codes."""
  return hasattr(model.config, 'sigma_data')


def denoised(
    model: Model, params: Params, noise: jax.Array, condition: Any, *,
    steps: int, guidance: float = 1.0, kind: process.Kind = 'edm',
) -> jax.Array:
  """Data of a denoiser in `2 * steps - 1` calls, by Heun's method.

  Args:
    model: a denoiser.
    params: of the model.
    noise: standard normal (B, ...).
    condition: of every example.
    steps: noise levels that are visited.
    guidance: 1 for none; more doubles what a call costs.
    kind: of the network.

  Returns:
    (B, ...) float32, not clipped.
  """
  apply = process.guided(model.apply, guidance, model.config.num_classes)
  grid = process.make(kind, model.config)
  sigmas = grid.visited(steps)
  return edm.heun(
      lambda x, sigma: grid.denoise_ve(apply, params, x, sigma, condition),
      sigmas[0] * noise, sigmas,
  )


def few_step(
    model: Model, params: Params, noise: jax.Array, condition: Any,
    keys: jax.Array, *, levels: Sequence[int], kind: process.Kind = 'edm',
) -> jax.Array:
  """Data of a denoiser that was trained to need no more than a few calls.

  Args:
    model: a denoiser.
    params: of the model.
    noise: standard normal (B, ...), of the first step.
    condition: of every example.
    keys: (B,), of the noise of later steps.
    levels: of the steps; see `methods.dmd2.Config`.
    kind: of the network.

  Returns:
    (B, ...) float32, not clipped.
  """
  grid = process.make(kind, model.config)

  def fresh(k: Any) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(
        jax.random.fold_in(key, k), noise.shape[1:]
    ))(keys)

  return grid.sample(
      lambda x, place: grid.denoise(model.apply, params, x, place, condition),
      levels, noise, fresh,
  )


@dataclasses.dataclass(frozen=True)
class OnRows:
  """A pure `fn(trees, ids, condition)`, run on rows that every host knows."""

  fn: Callable[..., jax.Array]
  trees: Any
  mesh: Any

  @functools.cached_property
  def _jitted(self) -> Callable[..., jax.Array]:
    return jax.jit(self.fn, out_shardings=sharding.replicated(self.mesh))

  def __call__(
      self, ids: np.ndarray, batch: Mapping[str, np.ndarray]
  ) -> jax.Array:
    rows = sharding.place_rows({'id': ids, **batch}, self.mesh)
    return self._jitted(self.trees, rows['id'], condition_of(rows))

  def trace(self, rows: Mapping[str, Any]) -> Any:
    """The program for rows of these shapes, among them `id`."""
    return self._jitted.trace(self.trees, rows['id'], condition_of(rows))
