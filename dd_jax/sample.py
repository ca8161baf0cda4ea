# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Images from an export in a few lines: a teacher's or a student's.

    from dd_jax import sample
    sampler = sample.load('runs/dd_var_digits/student/export/student-6000')
    labels = [3, 3, 3, 7, 7, 7]
    images = sampler(labels, steps=1, seed=0)
    sample.grid(images, labels).save('grid.png')
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any

from etils import epath
import jax
import numpy as np
from PIL import Image

from dd_jax import checkpoint, programs, registry
from dd_jax.evals import report
from dd_jax.model import Model, Params

_STUDENTS = {'dd_var': 'var'}  # family of a student -> that of its teacher
_VAE = 'vqvae'
_BATCH = 16  # images at once; decoding large ones takes memory


class Sampler:
  """A network and its tokenizer, ready to be sampled; made by `load`.

  Attributes:
    model: a teacher (`var`) or a student (`dd_var`).
    steps: numbers of network calls that it can be sampled with, the first of
      them by default.
  """

  def __init__(
      self, model: Model, params: Params, vae: Model, vae_params: Params,
      t_set: Sequence[int], split: int | None,
  ):
    self.model, self._vae = model, vae
    self._trees = jax.device_put((params, vae_params))
    self._is_student = model.family in _STUDENTS
    self._t_set = tuple(t_set)
    scales = len(model.config.patch_nums)
    self._split = scales if split is None else split
    self.steps = (
        tuple(range(1, len(self._t_set) + 1)) if self._is_student
        else (scales,)
    )
    self._programs: dict[Any, Callable[..., jax.Array]] = {}

  def __call__(
      self, labels: Sequence[int], *, steps: int | None = None, seed: int = 0,
      cfg: float = 0.0, top_k: int = 0, top_p: float = 1.0,
  ) -> np.ndarray:
    """Images of the given classes.

    An image depends on the seed, its label and its place among the labels;
    a student gives the same image from the same noise in each number of steps.

    Args:
      labels: N classes.
      steps: one of `self.steps`.
      seed: in [0, 2**31).
      cfg: guidance of a teacher; see `sampling.var.rollout`.
      top_k: codes that a teacher draws from, 0 for all.
      top_p: probability that a teacher draws from, 1 for all.

    Returns:
      float32 (N, H, W, C) in [-1, 1].

    Raises:
      ValueError: no labels or one that the network does not have, steps that
        it cannot do, or the settings of a teacher for a student.
    """
    classes = self.model.config.num_classes
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in 'iu':
      raise ValueError(f'labels must be a list of integers, got {labels}')
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
      raise ValueError(
          f'label {outside[0]}: the network has classes 0 to {classes - 1}'
      )
    steps = self.steps[0] if steps is None else steps
    if steps not in self.steps:
      who = 'student' if self._is_student else 'teacher'
      raise ValueError(
          f'steps={steps}: this {who} is sampled in '
          f'{" or ".join(map(str, self.steps))}'
      )
    if not 0 <= seed < 2**31:
      raise ValueError(f'seed={seed} must lie in [0, 2**31)')
    settings = cfg, top_k, top_p
    if self._is_student and settings != (0.0, 0, 1.0):
      raise ValueError('cfg, top_k and top_p are of a teacher; a student has '
                       'taken in those of its pairs')
    key = steps, *settings
    if key not in self._programs:
      self._programs[key] = jax.jit(functools.partial(self._run, key))
    program = self._programs[key]
    batch = min(_BATCH, len(labels))
    total = -(-len(labels) // batch) * batch
    ids = np.arange(total, dtype=np.uint32)
    padded = np.resize(labels, total).astype(np.int32)
    images = [
        np.asarray(program(
            *self._trees, np.uint32(seed), ids[i : i + batch],
            padded[i : i + batch],
        ))
        for i in range(0, total, batch)
    ]
    return np.concatenate(images)[: len(labels)]

  def _run(
      self, key: tuple[int, float, int, float], params: Params,
      vae_params: Params, seed: jax.Array, ids: jax.Array, labels: jax.Array,
  ) -> jax.Array:
    steps, cfg, top_k, top_p = key
    model, vae = self.model, self._vae
    if self._is_student:
      return programs.student_images(
          model, vae, params, vae_params,
          programs.fresh_noise(model, seed, ids), labels,
          t_list=self._t_set[:steps], split=self._split,
      )
    choose = registry.get('samplers', model.family).categorical(
        programs.fresh_keys(seed, ids)
    )
    return programs.teacher_images(
        model, vae, params, vae_params, labels, choose,
        dict(cfg=cfg, top_k=top_k, top_p=top_p),
    )


def load(
    export: epath.PathLike, vae: epath.PathLike | None = None, *,
    t_set: Sequence[int] | None = None, split: int | None = None,
) -> Sampler:
  """A sampler of an export and its tokenizer.

  Args:
    export: export folder of a teacher or a student.
    vae: export folder of its tokenizer; None looks in the run that `export`
      is of, and beside it.
    t_set: for a student, scales that are data when each of its steps begins;
      None for those that it was trained with, as its export says.
    split: for a student, scales whose codes come from its logits; None for
      all. See `sampling.var.few_step`.

  Raises:
    FileNotFoundError: no export there, or no tokenizer found.
    ValueError: an export of another kind, a tokenizer that is not its own,
      damaged files, or scales that are not there.
  """
  export = epath.Path(export)
  meta = _describe(export)
  family = meta['family']
  if family not in {*_STUDENTS, *_STUDENTS.values()}:
    raise ValueError(
        f'{export} holds a {family!r}; only a teacher '
        f'({", ".join(_STUDENTS.values())}) or a student '
        f'({", ".join(_STUDENTS)}) can be sampled'
    )
  if family not in _STUDENTS and (t_set is not None or split is not None):
    raise ValueError(f't_set and split are of a student; {export} is a '
                     'teacher')
  source = meta['source']
  wanted = source.get('frozen', {}).get('vae')
  vae = _find_vae(export, wanted) if vae is None else epath.Path(vae)
  vae_meta = _describe(vae)
  if vae_meta['family'] != _VAE:
    raise ValueError(f'{vae} holds a {vae_meta["family"]!r}, no tokenizer '
                     f'({_VAE})')
  if wanted not in (None, vae_meta['hash']):
    raise ValueError(
        f'{vae} is not the tokenizer that {export} was trained with; leave '
        'it out to find that one in the run'
    )
  if t_set is None:
    t_set = sorted(set(source.get('method', {}).get('t_set', (0,))))
  model, params = checkpoint.load(export)
  vae_model, vae_params = checkpoint.load(vae)
  c, v = model.config, vae_model.config
  for name, ours, theirs in (
      ('patch_nums', c.patch_nums, v.patch_nums),
      ('vocab_size', c.vocab_size, v.vocab_size),
      ('code_dim', c.code_dim, v.z_channels),
  ):
    if ours != theirs:
      raise ValueError(f'{vae} does not fit {export}: {name} is {theirs} there '
                       f'and {ours} here')
  scales = len(c.patch_nums)
  if list(t_set) != sorted({0, *t_set}) or t_set[-1] >= scales:
    raise ValueError(f't_set={list(t_set)} must start with 0, increase and '
                     f'stay below {scales}')
  if split is not None and not 0 <= split <= scales:
    raise ValueError(f'split={split} must lie in [0, {scales}]')
  return Sampler(model, params, vae_model, vae_params, t_set, split)


def grid(images: np.ndarray, labels: Sequence[int]) -> Image.Image:
  """A picture with a row for each class, in the order of their first images.

  Args:
    images: (N, H, W, C) in [-1, 1].
    labels: N classes.
  """
  labels = np.asarray(labels)
  return report.grid({
      str(c): images[labels == c] for c in dict.fromkeys(labels.tolist())
  })


def _describe(path: epath.Path) -> dict[str, Any]:
  """As `checkpoint.describe`, naming the exports that may have been meant."""
  try:
    return checkpoint.describe(path)
  except FileNotFoundError as e:
    found = [p for p in _exports(path) if p != path]
    hint = f'; exports there: {", ".join(map(str, found))}' if found else ''
    raise FileNotFoundError(f'{e}{hint}') from e


def _exports(path: epath.Path) -> Iterator[epath.Path]:
  """Exports in a folder, a stage or a run."""
  for pattern in ('*', 'export/*', '*/export/*'):
    for file in sorted(path.glob(f'{pattern}/model.json')):
      yield file.parent


def _find_vae(export: epath.Path, wanted: str | None) -> epath.Path:
  export = export.resolve()
  # <run>/<stage>/export/<role>-<step>, or exports side by side.
  near = dict.fromkeys(
      [*_exports(export.parent), *_exports(export.parent.parent.parent)]
  )
  found = []
  for path in near:
    meta = checkpoint.describe(path)
    if meta['family'] == _VAE and wanted in (None, meta['hash']):
      found.append(path)
  if not found:
    raise FileNotFoundError(
        f'the tokenizer of {export} is neither in its run nor beside it; say '
        'where it is (--vae)'
    )
  if len(found) > 1 and wanted is None:
    raise ValueError(
        f'{export} does not say which of these is its tokenizer: '
        f'{", ".join(map(str, found))}; choose one (--vae)'
    )
  return found[0]
