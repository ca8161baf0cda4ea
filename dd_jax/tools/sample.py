# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""A picture of samples, a row for each class or caption.

    python -m dd_jax.tools.sample --labels=3,7 --steps=1 --out=grid.png \\
        --export=runs/dd_var_digits/student/export/student-6000
    python -m dd_jax.tools.sample --prompts="a handwritten seven|eight" \\
        --export=runs/dd_llamagen_t2i_digits/student/export/student-20000

Captions are encoded as in the run of the export. Elsewhere, name a finished
stage of captions (--captions=<run>/captions), or a text encoder's export and
its tokenizer's file (--encoder, --tokenizer).
"""

from __future__ import annotations

from collections.abc import Sequence
import sys

from absl import app, flags, logging
from etils import epath
import numpy as np

from dd_jax import console, sample
from dd_jax.data import prompts

_EXPORT = flags.DEFINE_string(
    'export', None, 'Export folder of a teacher or a student.', required=True
)
_VAE = flags.DEFINE_string(
    'vae', None, 'Export folder of its tokenizer; default: found in the run.'
)
_LABELS = flags.DEFINE_list('labels', None, 'Classes.')
_PROMPTS = flags.DEFINE_string(
    'prompts', None, 'Captions with | between them, for a network of captions.'
)
_PROMPTS_FILE = flags.DEFINE_string(
    'prompts_file', None, 'File with a caption on each line.'
)
_CAPTIONS = flags.DEFINE_string(
    'captions', None, 'Folder of a stage of captions; default: found in the '
    'run.'
)
_ENCODER = flags.DEFINE_string(
    'encoder', None, 'Export folder of a text encoder, instead of --captions.'
)
_TOKENIZER = flags.DEFINE_string(
    'tokenizer', None, "File of the encoder's tokenizer."
)
_COUNT = flags.DEFINE_integer('count', 8, 'Images of each class or caption.')
_STEPS = flags.DEFINE_integer(
    'steps', None, 'Network calls; default: the fewest there are.'
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the noise.')
_OUT = flags.DEFINE_string('out', 'grid.png', 'PNG file to write.')
_CFG = flags.DEFINE_float('cfg', 0.0, 'Guidance of a teacher.')
_TEMPERATURE = flags.DEFINE_float(
    'temperature', 1.0, 'What the logits of a teacher are divided by.'
)
_TOP_K = flags.DEFINE_integer('top_k', 0, 'Codes of a teacher, 0 for all.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Probability of a teacher.')
_CFG_INTERVAL = flags.DEFINE_integer(
    'cfg_interval', -1, 'Where the guidance of a teacher ends, -1 for nowhere.'
)
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
  except (ValueError, OSError, ImportError) as e:
    console.fail(str(e))
    sys.exit(1)


def _run() -> None:
  # What is wrong with the flags shows before minutes are spent.
  wanted = _wanted()
  out = epath.Path(_OUT.value)
  if out.suffix.lower() != '.png':
    raise ValueError(f'--out={out}: expected the name of a .png file')
  if _COUNT.value < 1:
    raise ValueError(f'--count={_COUNT.value} must be at least 1')
  sampler = sample.load(
      _EXPORT.value, _VAE.value, captions=_CAPTIONS.value,
      encoder=_ENCODER.value, tokenizer=_TOKENIZER.value, split=_SPLIT.value,
      t_set=_T_SET.value and _integers('t_set', _T_SET.value),
  )
  rows = np.repeat(wanted, _COUNT.value).tolist()
  images = sampler(
      rows, steps=_STEPS.value, seed=_SEED.value, cfg=_CFG.value,
      temperature=_TEMPERATURE.value, top_k=_TOP_K.value, top_p=_TOP_P.value,
      cfg_interval=_CFG_INTERVAL.value,
  )
  out.parent.mkdir(parents=True, exist_ok=True)
  with out.open('wb') as f:
    sample.grid(images, rows).save(f, format='PNG')
  console.say(f'{len(images)} images: {out}')


def _wanted() -> Sequence[int] | Sequence[str]:
  """The classes or captions of the flags."""
  given = [
      f for f in (_LABELS, _PROMPTS, _PROMPTS_FILE) if f.value is not None
  ]
  if len(given) != 1:
    raise ValueError(
        'name either --labels, --prompts or --prompts_file; got '
        f'{" and ".join(f"--{f.name}" for f in given) or "none of them"}'
    )
  if _PROMPTS_FILE.value is not None:
    return prompts.text(_PROMPTS_FILE.value).texts
  if _PROMPTS.value is not None:
    texts = [text.strip() for text in _PROMPTS.value.split('|')]
    if not all(texts):
      raise ValueError(f'--prompts={_PROMPTS.value}: a prompt is empty')
    return texts
  labels = _integers('labels', _LABELS.value)
  if not labels:
    raise ValueError('--labels is empty: name at least one class')
  return labels


def _integers(name: str, values: Sequence[str]) -> list[int]:
  try:
    return [int(v) for v in values]
  except ValueError as e:
    raise ValueError(
        f'--{name}={",".join(values)}: expected integers between commas'
    ) from e


if __name__ == '__main__':
  app.run(main)
