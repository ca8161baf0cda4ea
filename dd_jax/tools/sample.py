# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of samples, a row for each class.

    python -m dd_jax.tools.sample --labels=207,360 --steps=1 --out=grid.png \
        --export=runs/dd_var_digits/student/export/student-6000
"""

from __future__ import annotations

from collections.abc import Sequence
import sys

from absl import app, flags, logging
from etils import epath
import numpy as np

from dd_jax import console, sample

_EXPORT = flags.DEFINE_string(
    'export', None, 'Export folder of a teacher or a student.', required=True
)
_VAE = flags.DEFINE_string(
    'vae', None, 'Export folder of its tokenizer; default: found in the run.'
)
_LABELS = flags.DEFINE_list('labels', None, 'Classes.', required=True)
_COUNT = flags.DEFINE_integer('count', 8, 'Images of each class.')
_STEPS = flags.DEFINE_integer(
    'steps', None, 'Network calls; default: the fewest there are.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise.')
_OUT = flags.DEFINE_string('out', 'grid.png', 'PNG file to write.')
_CFG = flags.DEFINE_float('cfg', 0.0, 'Guidance of a teacher.')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Codes of a teacher, 0 for all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Probability of a teacher.')
_T_SET = flags.DEFINE_list(
    't_set', None, 'Scales that are data when each step of a student begins; '
    'default: as it was trained.'
)
_SPLIT = flags.DEFINE_integer(
    'split', None, 'Scales that a student takes from its logits; default: all.'
)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)
  try:
    _run()
  except (ValueError, OSError) as e:
    console.fail(str(e))
    sys.exit(1)


def _run() -> None:
  # What is wrong with the flags shows before minutes are spent.
  labels = _integers('labels', _LABELS.value)
  if not labels:
    raise ValueError('--labels is empty: name at least one class')
  out = epath.Path(_OUT.value)
  if out.suffix.lower() != '.png':
    raise ValueError(f'--out={out}: expected the name of a .png file')
  if _COUNT.value < 1:
    raise ValueError(f'--count={_COUNT.value} must be at least 1')
  sampler = sample.load(
      _EXPORT.value, _VAE.value, split=_SPLIT.value,
      t_set=_T_SET.value and _integers('t_set', _T_SET.value),
  )
  rows = np.repeat(labels, _COUNT.value)
  images = sampler(
      rows, steps=_STEPS.value, seed=_SEED.value, cfg=_CFG.value,
      top_k=_TOP_K.value, top_p=_TOP_P.value,
  )
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open('wb') as f:
    sample.grid(images, rows).save(f, format='PNG')
  console.say(f'{len(images)} images: {out}')


def _integers(name: str, values: Sequence[str]) -> list[int]:
  try:
    return [int(v) for v in values]
  except ValueError as e:
    raise ValueError(
        f'--{name}={",".join(values)}: expected integers between commas'
    ) from e


if __name__ == '__main__':
  app.run(main)
