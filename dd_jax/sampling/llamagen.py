# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling from LlamaGen, from its few-step student, and from both together."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.model import Model, Params
from dd_jax.sampling import guidance, steps

greedy = steps.greedy
categorical = steps.categorical
INVOLVED = {'causal': {}}  # ways to run `teacher_involved`, by name
FILLS = True  # whether `skip_n` has something stand for what is missing


def rollout(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    condition: Any,
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
) -> jax.Array:
  """Runs the teacher token by token, in one loop.

  Logits are guided, divided by the temperature, filtered by top-k, then by
  top-p, and normalised: `choose` sees the log-probabilities of exactly what
  ordinary sampling draws from, -inf outside of the support.

  Args:
    teacher: a `llamagen` model.
    vae: the `llamagen_vq` whose tokens it predicts.
    teacher_params: of the teacher.
    vae_params: of the vae.
    condition: labels (B,) int32, or captions as the teacher takes them.
    choose: picks a token, n = 1, given the traced number of it: `greedy`,
      `categorical(keys)`, or a flow from noise.
    cfg: guidance of every token; up to 1 runs the conditional network alone.
    top_k: codes kept; 0 keeps all.
    top_p: probability kept; 1 keeps all.
    cfg_interval: tokens after the one that follows it are not guided; -1
      guides all.
    temperature: divides the logits; 1 leaves them as they are.
    stop: tokens in the result; None for all.
    prefix: (B, n) int32, the first `start` tokens; further columns are not
      read.
    start: first token to generate.

  Returns:
    (B, stop) int32 tokens: of the prefix, then what was chosen.

  Raises:
    ValueError: unless 0 <= start <= stop <= L, 0 < stop, and the prefix is
      long enough; a setting out of range; or the vae is not the teacher's.

  Source: LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py.
  """
  stop = steps.check_span(teacher.config, start, stop, prefix)
  codebook = steps.codebook_for(teacher, vae, vae_params)
  batch = jax.tree.leaves(condition)[0].shape[0]
  prefix = jnp.zeros((batch, 0), jnp.int32) if not start else prefix[:, :start]
  if start == stop:
    return prefix
  guided = cfg > 1

  def rows(x: jax.Array) -> jax.Array:
    return jnp.repeat(x, 2, axis=0) if guided else x

  if guided:
    condition = steps.with_null(teacher, teacher_params, condition)

  def pick(logits: jax.Array, i: jax.Array) -> jax.Array:
    """Token i (B,), given logits of all rows."""
    if guided:
      pairs = logits.reshape(batch, 2, -1)
      scale = jnp.where(guidance.is_guided(i, cfg_interval), cfg - 1, 0.0)
      logits = guidance.guide(pairs[:, 0], pairs[:, 1], scale)
    log_p = guidance.log_probs(
        logits, temperature, top_k, top_p, descending=True
    )
    return choose(log_p[:, None], i, codebook)[:, 0]

  def body(
      carry: tuple[Any, jax.Array], i: jax.Array
  ) -> tuple[tuple[Any, jax.Array], jax.Array]:
    cache, logits = carry
    index = pick(logits, i)
    logits, cache = teacher.fns['step'](teacher_params, cache, rows(index), i)
    return (cache, logits), index

  cache = teacher.fns['init_cache'](teacher_params, len(rows(prefix)))
  logits, cache = teacher.fns['prefill'](
      teacher_params, cache, condition, rows(prefix)
  )
  (_, logits), tokens = jax.lax.scan(
      body, (cache, logits), jnp.arange(start, stop - 1)
  )
  # The network does not run on the last token.
  last = pick(logits, jnp.asarray(stop - 1))
  return jnp.concatenate([prefix, tokens.T, last[:, None]], axis=1)


few_step = steps.few_step
teacher_involved = functools.partial(steps.teacher_involved, rollout)
images_from_codes = steps.images_from_codes
count_steps = steps.count_steps


def skip_n(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    condition: Any,
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
  """Images of the teacher without its last tokens, DD1's baseline "skip-n".

  Arguments are those of `rollout`, skip < L, and `fill`: (B, n >= skip) int32
  of which the last columns stand for what is missing, such as draws from the
  frequencies of each place; None stands for vectors of zeros. DD1 does not say
  what it used. Images are NHWC in [-1, 1].
  """
  length = teacher.config.offsets[-1]
  indices = rollout(
      teacher, vae, teacher_params, vae_params, condition, choose, cfg=cfg,
      top_k=top_k, top_p=top_p, cfg_interval=cfg_interval,
      temperature=temperature, stop=length - skip,
  )
  codes = vae.fns['codes'](vae_params, indices)
  rest = jnp.zeros((len(codes), skip, codes.shape[-1]))
  if fill is not None:
    rest = vae.fns['codes'](vae_params, fill[:, fill.shape[1] - skip :])
  return images_from_codes(
      vae, vae_params, jnp.concatenate([codes, rest], axis=1)
  )
