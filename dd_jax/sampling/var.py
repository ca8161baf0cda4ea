# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Sampling from VAR, from its few-step student, and from both together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from dd_jax.model import Model, Params
from dd_jax.ops.vq import nearest_code
from dd_jax.sampling import guidance

# (log_p (B, n, V), scale, codebook (V, C)) -> int32 indices (B, n).
Choose = Callable[[jax.Array, int, jax.Array], jax.Array]


def greedy(log_p: jax.Array, scale: int, codebook: jax.Array) -> jax.Array:
  """A `Choose` that takes the most likely code, the first of equal ones."""
  del scale, codebook
  return jnp.argmax(log_p, axis=-1).astype(jnp.int32)


def categorical(keys: jax.Array) -> Choose:
  """A `Choose` that draws each token; `keys` (B,) has one key per example."""

  def choose(log_p: jax.Array, scale: int, codebook: jax.Array) -> jax.Array:
    del codebook

    def draw(key: jax.Array, log_p: jax.Array) -> jax.Array:
      return jax.random.categorical(jax.random.fold_in(key, scale), log_p)

    return jax.vmap(draw)(keys, log_p).astype(jnp.int32)

  return choose


def rollout(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    labels: jax.Array,
    choose: Choose,
    *,
    cfg: float,
    top_k: int,
    top_p: float,
    stop: int | None = None,
    prefix: jax.Array | None = None,
    start: int = 0,
    prefill_mask: Literal['causal', 'full'] = 'causal',
) -> jax.Array:
  """Runs the teacher scale by scale.

  At scale k of K the logits are guided by cfg * k / (K - 1), filtered by top-k,
  then by top-p, and normalised: `choose` sees the log-probabilities of exactly
  what ordinary sampling draws from, -inf outside of the support.

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
      long enough.
  """
  offsets = teacher.config.offsets
  scales = len(offsets) - 1
  stop = scales if stop is None else stop
  if not 0 <= start <= stop <= scales or not stop:
    raise ValueError(
        f'start={start}, stop={stop}: need 0 <= start <= stop <= {scales} and '
        '0 < stop'
    )
  if start and (prefix is None or prefix.shape[1] < offsets[start]):
    raise ValueError(f'start={start} needs a prefix of {offsets[start]} tokens')
  codebook = vae.fns['codebook'](vae_params)
  rows = labels
  if cfg:
    # Each example's two rows stand side by side, so that they stay on its
    # device when the batch is sharded.
    null = jnp.full_like(labels, teacher.config.num_classes)
    rows = jnp.stack([labels, null], axis=1).reshape(-1)
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
      ramp = cfg * scale / max(scales - 1, 1)
      logits = guidance.guide(pairs[:, 0], pairs[:, 1], ramp)
    logits = guidance.filter_top_k(logits, top_k)
    logits = guidance.filter_top_p(logits, top_p)
    advance(choose(jax.nn.log_softmax(logits), scale, codebook), scale)
  return jnp.concatenate(tokens, axis=1)


def few_step(
    student: Model,
    vae: Model,
    student_params: Params,
    vae_params: Params,
    noise: jax.Array,
    labels: jax.Array,
    *,
    t_list: Sequence[int],
    split: int,
) -> dict[str, jax.Array]:
  """Runs the student once per entry of `t_list`; a function of the noise.

  Args:
    student: a `dd_var` model.
    vae: the `vqvae` whose codes it gives.
    student_params: of the student.
    vae_params: of the vae.
    noise: (B, L, C) standard Gaussian.
    labels: (B,) int32.
    t_list: number of leading scales that are data when a step begins; 0 first.
      Everything after them is the same noise again.
    split: scales whose codes come from the logits; the others come from the
      code head and are not quantized.

  Returns:
    codes: (B, L, C) float32 final sequence.
    indices: (B, L) int32 choice of the logits; of scales that were data in the
      last step, their nearest codes.

  Raises:
    ValueError: a `t_list` that does not start with 0.

  Source: DD1, sampling; `t_list` and `split` are its `t_list` and
  `loss_split_t`.
  """
  if not t_list or t_list[0] != 0:
    raise ValueError(f't_list={list(t_list)} must start with 0: all is noise')
  x = indices = noise
  for t in t_list:
    x, indices = _student_step(
        student, vae, student_params, vae_params, x, noise, labels, t, split
    )
  return {'codes': x, 'indices': indices}


def teacher_involved(
    student: Model,
    teacher: Model,
    vae: Model,
    student_params: Params,
    teacher_params: Params,
    vae_params: Params,
    noise: jax.Array,
    labels: jax.Array,
    choose: Choose,
    *,
    start: int,
    resume: int,
    split: int,
    cfg: float,
    top_k: int,
    top_p: float,
    prefill_mask: Literal['causal', 'full'] = 'causal',
) -> dict[str, jax.Array]:
  """The student, with its scales `start` to `resume` redone by the teacher.

  One student step gives the first `start` scales, quantized to their nearest
  codes; the teacher goes on to scale `resume`; another student step from there
  gives the rest. `count_steps` says how many network calls that makes.

  Args:
    student: a `dd_var` model.
    teacher: a `var` model.
    vae: the `vqvae` of both.
    student_params: of the student.
    teacher_params: of the teacher.
    vae_params: of the vae.
    noise: (B, L, C) standard Gaussian.
    labels: (B,) int32.
    choose: see `rollout`.
    start: scales taken from the student's first step; 0 leaves that out.
    resume: first scale that the last student step makes; with all scales there
      is no such step.
    split: see `few_step`.
    cfg: see `rollout`; so are `top_k`, `top_p` and `prefill_mask`.

  Returns:
    As `few_step`.

  Source: DD1, rows "pre-trained-n-m" of its tables.
  """
  run = (student, vae, student_params, vae_params)
  prefix = None
  if start:
    x, _ = _student_step(*run, noise, noise, labels, 0, split)
    prefix = _quantize(vae, vae_params, x)
  prefix = rollout(
      teacher, vae, teacher_params, vae_params, labels, choose, cfg=cfg,
      top_k=top_k, top_p=top_p, stop=resume, prefix=prefix, start=start,
      prefill_mask=prefill_mask,
  )
  x = vae.fns['codes'](vae_params, prefix)
  if resume == len(student.config.patch_nums):
    return {'codes': x, 'indices': prefix}
  x = jnp.concatenate([x, noise[:, x.shape[1] :]], axis=1)
  x, indices = _student_step(*run, x, noise, labels, resume, split)
  return {'codes': x, 'indices': indices}


def skip_n(
    teacher: Model,
    vae: Model,
    teacher_params: Params,
    vae_params: Params,
    labels: jax.Array,
    choose: Choose,
    *,
    skip: int,
    cfg: float,
    top_k: int,
    top_p: float,
) -> jax.Array:
  """Images of the teacher without its last scales, DD1's baseline "skip-n".

  What the first K - skip scales add up to is decoded as it is. Arguments are
  those of `rollout`, and skip < K; images are NHWC in [-1, 1].
  """
  offsets = teacher.config.offsets
  stop = len(offsets) - 1 - skip
  indices = rollout(
      teacher, vae, teacher_params, vae_params, labels, choose, cfg=cfg,
      top_k=top_k, top_p=top_p, stop=stop,
  )
  codes = vae.fns['codes'](vae_params, indices)
  size = teacher.config.patch_nums[-1]
  f_hat = jnp.zeros((labels.shape[0], size, size, codes.shape[-1]))
  # Not `accumulate` with zeros at the end: phi of zeros is its bias.
  for scale in range(stop):
    part = codes[:, offsets[scale] : offsets[scale + 1]]
    f_hat, _ = vae.fns['advance'](vae_params, f_hat, part, scale)
  return jnp.clip(vae.fns['decode'](vae_params, f_hat), -1, 1)


def images_from_codes(
    vae: Model, vae_params: Params, codes: jax.Array
) -> jax.Array:
  """Images, NHWC in [-1, 1], of (B, L, C) codes of all scales."""
  f_hat = vae.fns['accumulate'](vae_params, codes)
  return jnp.clip(vae.fns['decode'](vae_params, f_hat), -1, 1)


def count_steps(start: int, resume: int, end: int) -> int:
  """Network calls of teacher-involved sampling, as DD1 counts them.

  Args:
    start: scales (or tokens) that the student's first step gives; 0 for none.
    resume: where the last student step takes over.
    end: scales (or tokens) in all.
  """
  return int(start > 0) + (resume - start) + int(resume < end)


def _student_step(
    student: Model,
    vae: Model,
    student_params: Params,
    vae_params: Params,
    x: jax.Array,
    noise: jax.Array,
    labels: jax.Array,
    t: int,
    split: int,
) -> tuple[jax.Array, jax.Array]:
  """Merged codes (B, L, C) and indices (B, L) of one step from scale t."""
  offset, cut = student.config.offsets[t], student.config.offsets[split]
  data = x[:, :offset]
  x = jnp.concatenate([data, noise[:, offset:]], axis=1)
  out = student.fns['forward'](
      student_params, x, labels, jnp.full_like(labels, offset)
  )
  indices = jnp.argmax(out['logits'][:, offset:], axis=-1).astype(jnp.int32)
  indices = jnp.concatenate([_quantize(vae, vae_params, data), indices], axis=1)
  codes = vae.fns['codes'](vae_params, indices[:, :cut])
  tail = jnp.concatenate([data, out['codes'][:, offset:]], axis=1)[:, cut:]
  return jnp.concatenate([codes, tail], axis=1), indices


def _quantize(
    vae: Model, vae_params: Params, codes: jax.Array
) -> jax.Array:
  """Nearest code of each vector, (B, L) int32."""
  index = nearest_code(
      codes.reshape(-1, codes.shape[-1]), vae.fns['codebook'](vae_params)
  )
  return index.reshape(codes.shape[:2])
