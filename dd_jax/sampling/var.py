# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling from VAR, from its few-step student, and from both together."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from dd_jax.model import Model, Params
from dd_jax.sampling import guidance, steps

greedy = steps.greedy
categorical = steps.categorical
# Ways to run `teacher_involved`, by name: the teacher's view of its prefix.
INVOLVED = {mask: {'prefill_mask': mask} for mask in ('causal', 'full')}
FILLS = False  # whether `skip_n` has something stand for what is missing


def rollout(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    labels: jax.Array,
    choose: steps.Choose,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    stop: int | None = None,
    prefix: jax.Array | None = None,
    start: int = 0,
    prefill_mask: Literal['causal', 'full'] = 'causal',
) -> jax.Array:
  """Runs the teacher scale by scale.

  At scale k of K the logits are guided by cfg * k / (K - 1), divided by the
  temperature, filtered by top-k, then by top-p, and normalised: `choose` sees
  the log-probabilities of exactly what ordinary sampling draws from, -inf
  outside of the support.

  Args:
    teacher: a `var` model.
    vae: the `vqvae` whose tokens it predicts.
    teacher_params: of the teacher.
    vae_params: of the vae.
    labels: (B,) int32.
    choose: picks the tokens of a scale: `greedy`, `categorical(keys)`, or a
      flow from noise.
    cfg: guidance at the last scale; 0 runs the conditional network alone.
    top_k: codes kept; 0 keeps all.
    top_p: probability kept; 1 keeps all.
    cfg_interval: scales after the one that follows it are not guided; -1
      guides all.
    temperature: divides the logits; 1, as in VAR, leaves them as they are.
    stop: scales in the result; None for all.
    prefix: (B, n) int32 tokens of the first `start` scales; further columns are
      not read.
    start: first scale to generate.
    prefill_mask: 'full' lets scales up to `start` see each other both ways, as
      in the code released with DD1.

  Returns:
    (B, offsets[stop]) int32 tokens: of the prefix, then what was chosen.

  Raises:
    ValueError: unless 0 <= start <= stop <= K, 0 < stop, and the prefix is
      long enough; a setting out of range; or the vae is not the teacher's.
  """
  offsets = teacher.config.offsets
  stop = steps.check_span(teacher.config, start, stop, prefix)
  codebook = steps.codebook_for(teacher, vae, vae_params)
  rows = labels
  if cfg:
    rows = steps.with_null(teacher, teacher_params, labels)
  cache = teacher.fns['init_cache'](teacher_params, rows.shape[0])
  size = teacher.config.patch_nums[-1]
  f_hat = jnp.zeros((labels.shape[0], size, size, codebook.shape[1]))
  tokens, maps = [], []

  def advance(index: jax.Array, scale: int) -> None:
    nonlocal f_hat
    tokens.append(index)
    codes = vae.fns['codes'](vae_params, index)
    f_hat, following = vae.fns['advance'](vae_params, f_hat, codes, scale)
    if following is not None:
      maps.append(jnp.repeat(following, 2, axis=0) if cfg else following)

  for scale in range(start):
    advance(prefix[:, offsets[scale] : offsets[scale + 1]], scale)
  for scale in range(start, stop):
    if scale == start > 0:
      logits, cache = teacher.fns['prefill'](
          teacher_params, cache, rows, jnp.concatenate(maps, axis=1), start + 1,
          prefill_mask,
      )
      logits = logits[:, offsets[start] :]
    else:
      logits, cache = teacher.fns['step'](
          teacher_params, cache, rows, maps[-1] if maps else None, scale
      )
    if cfg:
      pairs = logits.reshape(-1, 2, *logits.shape[1:])
      ramp = cfg * scale / max(len(offsets) - 2, 1)
      ramp *= guidance.is_guided(scale, cfg_interval)
      logits = guidance.guide(pairs[:, 0], pairs[:, 1], ramp)
    log_p = guidance.log_probs(logits, temperature, top_k, top_p)
    advance(choose(log_p, scale, codebook), scale)
  return jnp.concatenate(tokens, axis=1)


few_step = steps.few_step
teacher_involved = functools.partial(steps.teacher_involved, rollout)
images_from_codes = steps.images_from_codes
count_steps = steps.count_steps


def skip_n(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    labels: jax.Array,
    choose: steps.Choose,
    *,
    skip: int,
    cfg: float,
    top_k: int,
    top_p: float,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    fill: jax.Array | None = None,
) -> jax.Array:
  """Images of the teacher without its last scales, DD1's baseline "skip-n".

  What the first K - skip scales add up to is decoded as it is: it needs none of
  `fill`, which LlamaGen's has. Arguments are those of `rollout`, and skip < K;
  images are NHWC in [-1, 1].
  """
  del fill
  offsets = teacher.config.offsets
  stop = len(offsets) - 1 - skip
  indices = rollout(
      teacher, vae, teacher_params, vae_params, labels, choose, cfg=cfg,
      top_k=top_k, top_p=top_p, cfg_interval=cfg_interval,
      temperature=temperature, stop=stop,
  )
  codes = vae.fns['codes'](vae_params, indices)
  size = teacher.config.patch_nums[-1]
  f_hat = jnp.zeros((labels.shape[0], size, size, codes.shape[-1]))
  # Not `accumulate` with zeros at the end: phi of zeros is its bias.
  for scale in range(stop):
    part = codes[:, offsets[scale] : offsets[scale + 1]]
    f_hat, _ = vae.fns['advance'](vae_params, f_hat, part, scale)
  return jnp.clip(vae.fns['decode'](vae_params, f_hat), -1, 1)
