# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What sampling has in common whatever a step of the sequence is.

A sequence of L tokens falls into steps, which `offsets` of a config delimits:
VAR's are scales, LlamaGen's single tokens. Conditions are what the networks
take: labels (B,), or a tree of arrays whose first axis is B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dd_jax.model import Model, Params, check_codes
from dd_jax.ops.vq import nearest_code

# (log_p (B, n, V), step, codebook (V, C)) -> int32 indices (B, n).
Choose = Callable[[jax.Array, int | jax.Array, jax.Array], jax.Array]


def greedy(
    log_p: jax.Array, step: int | jax.Array, codebook: jax.Array
) -> jax.Array:
  """A `Choose` that takes the most likely code, the first of equal ones."""
  del step, codebook
  return jnp.argmax(log_p, axis=-1).astype(jnp.int32)


def categorical(keys: jax.Array) -> Choose:
  """A `Choose` that draws each token; `keys` (B,) has one key per example."""

  def choose(
      log_p: jax.Array, step: int | jax.Array, codebook: jax.Array
  ) -> jax.Array:
    del codebook

    def draw(key: jax.Array, log_p: jax.Array) -> jax.Array:
      return jax.random.categorical(jax.random.fold_in(key, step), log_p)

    return jax.vmap(draw)(keys, log_p).astype(jnp.int32)

  return choose


def check_choice(
    config: Any, t_list: Sequence[int], split: int, name: str = 't_list'
) -> None:
  """Refuses steps that a student cannot be sampled with; see `few_step`.

  Args:
    config: of the student.
    t_list: see `few_step`.
    split: see `few_step`.
    name: what the caller calls `t_list`.

  Raises:
    ValueError: a `t_list` that does not start with 0, increase and stay below
      the end of the sequence, or a `split` beyond it.
  """
  end = len(config.offsets) - 1
  if list(t_list) != sorted({0, *t_list}) or t_list[-1] >= end:
    raise ValueError(f'{name}={list(t_list)} must start with 0, increase and '
                     f'stay below {end}')
  if not 0 <= split <= end:
    raise ValueError(f'split={split} must lie in [0, {end}]')


def check_span(
    config: Any, start: int, stop: int | None, prefix: jax.Array | None
) -> int:
  """Where a rollout from `start` ends; None is the end of the sequence.

  Raises:
    ValueError: unless 0 <= start <= stop <= steps, 0 < stop, and the prefix
      (B, n) has all tokens before `start`.
  """
  end = len(config.offsets) - 1
  stop = end if stop is None else stop
  if not 0 <= start <= stop <= end or not stop:
    raise ValueError(
        f'start={start}, stop={stop}: need 0 <= start <= stop <= {end} and '
        '0 < stop'
    )
  given = config.offsets[start]
  if start and (prefix is None or prefix.shape[1] < given):
    raise ValueError(f'start={start} needs a prefix of {given} tokens')
  return stop


def with_null(teacher: Model, params: Params, condition: Any) -> Any:
  """Conditions (2 * B, ...): each, and what the teacher has for none.

  An example's two rows stand side by side, so that they stay on its device when
  the batch is sharded.
  """
  return jax.tree.map(
      lambda x, y: jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:]),
      condition, teacher.fns['null'](params, condition),
  )


def check_involved(config: Any, involved: Sequence[int]) -> None:
  """Refuses steps that no teacher can make; see `teacher_involved`.

  Args:
    config: of the student.
    involved: `start` and `resume`.

  Raises:
    ValueError: not two, out of order, beyond the end of the sequence, or none
      between them.
  """
  end = len(config.offsets) - 1
  if len(involved) != 2 or not 0 <= involved[0] < involved[1] <= end:
    raise ValueError(
        f'involved={tuple(involved)}: expected (start, resume) with 0 <= start '
        f'< resume <= {end}: the teacher makes the steps from start up to '
        'resume'
    )


def check_skip(config: Any, skip: int, name: str = 'skip') -> None:
  """Refuses numbers of last steps that a teacher cannot leave out.

  Args:
    config: of the teacher.
    skip: see `skip_n` of its family.
    name: what the caller calls it.

  Raises:
    ValueError: none, or no step is left.
  """
  end = len(config.offsets) - 1
  if not 0 < skip < end:
    raise ValueError(
        f'{name}={skip} must lie in [1, {end - 1}]: it is left out of the '
        f'{end} steps of the teacher'
    )


def few_step(
    student: Model,
    vae: Model,
    student_params: Params,
    vae_params: Params,
    noise: jax.Array,
    condition: Any,
    *,
    t_list: Sequence[int],
    split: int,
) -> dict[str, jax.Array]:
  """Runs the student once per entry of `t_list`; a function of the noise.

  Args:
    student: a `dd_var` or `dd_llamagen` model.
    vae: the tokenizer whose codes it gives.
    student_params: of the student.
    vae_params: of the vae.
    noise: (B, L, C) standard Gaussian.
    condition: labels (B,) int32, or what else the student takes.
    t_list: number of leading steps of the sequence that are data when a step of
      the student begins; 0 first. Everything after them is the same noise
      again.
    split: steps whose codes come from the logits; the others come from the code
      head and are not quantized.

  Returns:
    codes: (B, L, C) float32 final sequence.
    indices: (B, L) int32 choice of the logits; of what was data in the last
      step, the nearest codes.

  Raises:
    ValueError: see `check_choice`; noise of another shape, or a vae that is not
      the student's.

  Source: DD1, sampling; `t_list` and `split` are its `t_list` and
  `loss_split_t`.
  """
  check_choice(student.config, t_list, split)
  x = indices = noise
  for t in t_list:
    x, indices = _student_step(
        student, vae, student_params, vae_params, x, noise, condition, t, split
    )
  return {'codes': x, 'indices': indices}


def teacher_involved(
    rollout: Callable[..., jax.Array],
    student: Model,
    teacher: Model,
    vae: Model,
    student_params: Params,
    teacher_params: Params,
    vae_params: Params,
    noise: jax.Array,
    condition: Any,
    choose: Choose,
    *,
    start: int,
    resume: int,
    split: int,
    **settings: Any,
) -> dict[str, jax.Array]:
  """The student, with its steps `start` to `resume` redone by the teacher.

  One student step gives the first `start` steps of the sequence, quantized to
  their nearest codes; the teacher goes on to `resume`; another student step
  from there gives the rest. `count_steps` says how many network calls that
  makes.

  Args:
    rollout: that of the teacher's family.
    student: a `dd_var` or `dd_llamagen` model.
    teacher: a `var` or `llamagen` model.
    vae: the tokenizer of both.
    student_params: of the student.
    teacher_params: of the teacher.
    vae_params: of the vae.
    noise: (B, L, C) standard Gaussian.
    condition: see `few_step`.
    choose: see `rollout`.
    start: steps taken from the student's first one; 0 leaves that out.
    resume: first step that the last student step makes; with all of them there
      is no such step.
    split: see `few_step`.
    **settings: of the rollout: `guidance.SETTINGS` and further ones.

  Returns:
    As `few_step`.

  Source: DD1, rows "pre-trained-n-m" of its tables.
  """
  check_choice(student.config, (0,), split)
  run = (student, vae, student_params, vae_params)
  prefix = None
  if start:
    x, _ = _student_step(*run, noise, noise, condition, 0, split)
    prefix = _quantize(vae, vae_params, x)
  prefix = rollout(
      teacher, vae, teacher_params, vae_params, condition, choose, stop=resume,
      prefix=prefix, start=start, **settings,
  )
  x = vae.fns['codes'](vae_params, prefix)
  if resume == len(student.config.offsets) - 1:
    return {'codes': x, 'indices': prefix}
  x = jnp.concatenate([x, noise[:, x.shape[1] :]], axis=1)
  x, indices = _student_step(*run, x, noise, condition, resume, split)
  return {'codes': x, 'indices': indices}


def images_from_codes(
    vae: Model, vae_params: Params, codes: jax.Array
) -> jax.Array:
  """Images, NHWC in [-1, 1], of (B, L, C) codes of the whole sequence."""
  latent = vae.fns['accumulate'](vae_params, codes)
  return jnp.clip(vae.fns['decode'](vae_params, latent), -1, 1)


def count_steps(start: int, resume: int, end: int) -> int:
  """Network calls of teacher-involved sampling, as DD1 counts them.

  Args:
    start: scales (or tokens) that the student's first step gives; 0 for none.
    resume: where the last student step takes over.
    end: scales (or tokens) in all.
  """
  return int(start > 0) + (resume - start) + int(resume < end)


def codebook_for(net: Model, vae: Model, vae_params: Params) -> jax.Array:
  """The codes (V, C) of a vae, if it is of the kind that a network predicts.

  Raises:
    ValueError: it has another number of codes, or codes of another size.
  """
  codebook = vae.fns['codebook'](vae_params)
  check_codes(net, vae, codebook.shape)
  return codebook


def _student_step(
    student: Model,
    vae: Model,
    student_params: Params,
    vae_params: Params,
    x: jax.Array,
    noise: jax.Array,
    condition: Any,
    t: int,
    split: int,
) -> tuple[jax.Array, jax.Array]:
  """Merged codes (B, L, C) and indices (B, L) of one step from t."""
  codebook_for(student, vae, vae_params)
  offsets = student.config.offsets
  shape = (offsets[-1], student.config.code_dim)
  if noise.shape[1:] != shape:
    raise ValueError(
        f'noise of shape {noise.shape}: expected (B, {shape[0]}, {shape[1]})'
    )
  offset, cut = offsets[t], offsets[split]
  data = x[:, :offset]
  x = jnp.concatenate([data, noise[:, offset:]], axis=1)
  out = student.fns['forward'](
      student_params, x, condition, jnp.full(len(x), offset, jnp.int32)
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
