# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Released weights to an export, and an export back to released weights.

    python -m dd_jax.tools.convert --family=var --input=var_d16.pth \\
        --output=exports/var_d16
    python -m dd_jax.tools.convert --reverse --input=exports/var_d16 \\
        --output=var_d16.safetensors

Sizes are read from the tensors; --config=field=value, as often as needed, gives
those that no tensor tells. Nothing in a file is ever run.
"""

from __future__ import annotations

from collections.abc import Sequence
import json
import logging as std_logging
import sys
from typing import Any

from absl import app, flags, logging
from etils import epath

from dd_jax import checkpoint, console, conversion, registry

_FAMILY = flags.DEFINE_string(
    'family', None, f'Kind of file: {"|".join(registry.TABLES["families"])}.'
)
_INPUT = flags.DEFINE_list('input', None, 'File(s); with --reverse an export.')
_OUTPUT = flags.DEFINE_list(
    'output', None, 'Export folder; with --reverse file(s): .pth or '
    '.safetensors.'
)
_CONFIG = flags.DEFINE_multi_string(
    'config', [], 'field=value of the model, such as patch_nums=1,2,3,4; of a '
    'network in it, such as denoiser={"head_dim":32}.'
)
_WRAPPER = flags.DEFINE_string(
    'wrapper', None, 'Keys to the weights in the file, such as '
    'trainer/var_wo_ddp; default: found, averaged weights first.'
)
_INERT = flags.DEFINE_list(
    'inert', [], 'Names in a pickle to read past without importing them.'
)
_DRY_RUN = flags.DEFINE_boolean('dry_run', False, 'Check and show, no more.')
_REVERSE = flags.DEFINE_boolean('reverse', False, 'From an export to files.')
_OVERWRITE = flags.DEFINE_boolean('overwrite', False, 'Replace the output.')


def parse_field(text: str) -> tuple[str, Any]:
  """'a=1,2' to ('a', [1, 2]); values are JSON, or else text."""
  name, equals, value = text.partition('=')
  if not (name and equals):
    raise ValueError(f'--config={text}: must be field=value')
  if value.startswith(('{', '[')):
    return name, _value(value)
  parts = [_value(v) for v in value.split(',')]
  return name, parts if len(parts) > 1 else parts[0]


def _value(text: str) -> Any:
  try:
    return json.loads(text.lower() if text in ('True', 'False') else text)
  except ValueError:
    return text


def run() -> None:
  """What the flags say."""
  for path in [] if _DRY_RUN.value else _OUTPUT.value or []:
    if epath.Path(path).exists() and not _OVERWRITE.value:
      raise ValueError(f'{path} exists; --overwrite replaces it')
    if epath.Path(path).is_dir():
      checkpoint.describe(path)  # or a slip would empty somebody's folder
  if not _INPUT.value or not (_OUTPUT.value or _DRY_RUN.value):
    raise ValueError('--input and --output are needed')
  if _REVERSE.value:
    if _DRY_RUN.value or len(_INPUT.value) != 1:
      raise ValueError('--reverse takes one export and no --dry_run')
    conversion.restore(_INPUT.value[0], _OUTPUT.value, _FAMILY.value)
    console.say(f'written: {", ".join(_OUTPUT.value)}')
    return
  if _FAMILY.value is None:
    raise ValueError(
        f'--family is needed: one of {", ".join(registry.TABLES["families"])}; '
        f'python -m dd_jax.tools.inspect {_INPUT.value[0]} tells which'
    )
  if _OUTPUT.value and len(_OUTPUT.value) != 1:
    raise ValueError('--output must be one folder')
  work = conversion.plan(
      _FAMILY.value, _INPUT.value,
      given=dict(map(parse_field, _CONFIG.value)),
      wrapper=None if _WRAPPER.value is None
      else [k for k in _WRAPPER.value.split('/') if k],
      inert=_INERT.value,
  )
  if _DRY_RUN.value:
    conversion.show(work)
    return
  digest = conversion.write(work, _OUTPUT.value[0], {
      'files': conversion.file_hashes(_INPUT.value),
  })
  count = sum(leaf.size for leaf in work.leaves.values())
  console.say(
      f'written: {_OUTPUT.value[0]} ({work.model.family}, {count:,} '
      f'parameters, hash {digest[:12]})'
  )


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  logging.set_verbosity(logging.FATAL)  # Orbax tells of what we tell
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)
  try:
    run()
  except (ValueError, OSError) as e:
    console.fail(str(e))
    sys.exit(1)


if __name__ == '__main__':
  app.run(main)
