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
from dd_jax.flow.noise import pair_noise
from dd_jax.model import Model, Params, condition_of

_FRESH = 1 << 20  # added to seeds: evaluation noise is never training noise

# (ids (B,), rows of conditions and labels) -> images (B, H, W, C) in [-1, 1].
Sampler = Callable[[np.ndarray, Mapping[str, np.ndarray]], Any]


def fresh_noise(model: Model, seed: int, ids: jax.Array) -> jax.Array:
  """Noise (B, L, C) of images by number; no pair of the same seed has it."""
  shape = (model.config.offsets[-1], model.config.code_dim)
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
  """Images of a rollout; `settings` are its cfg, top_k and top_p."""
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
