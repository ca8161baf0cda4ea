# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of a folder of images, for FID, precision and recall.

    python -m dd_jax.tools.reference_stats --images=imagenet/train \\
        --inception=inception --image_size=256 --output=imagenet_256.npz

PyTorch-FID reads the result too.
"""

from __future__ import annotations

import dataclasses
import sys

from absl import app, flags, logging
from etils import epath

from dd_jax import checkpoint, console, evaluate_fid, sharding
from dd_jax.evals import fid

_IMAGES = flags.DEFINE_string(
    'images', None, 'Folder of PNG or JPEG files; sub-folders are searched.',
    required=True,
)
_INCEPTION = flags.DEFINE_string(
    'inception', None, 'Export folder of the Inception network.', required=True
)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'File to write, .npz.', required=True
)
_IMAGE_SIZE = flags.DEFINE_integer(
    'image_size', 0, 'Resize the shorter side to this and cut out the middle; '
    '0 takes images as they are, squares of one size.', lower_bound=0,
)
_BATCH_SIZE = flags.DEFINE_integer(
    'batch_size', 50, 'Images at once; more where the devices need it.',
    lower_bound=1
)
_FEATURES = flags.DEFINE_integer(
    'features', fid.MANIFOLD, 'Features that are kept for precision and '
    'recall, 0 for none.', lower_bound=0,
)


def main(argv: list[str]) -> None:
  """Measures, writes, and says what was written."""
  if argv[1:]:
    raise app.UsageError(f'unknown arguments {argv[1:]}')
  logging.set_verbosity(logging.FATAL)  # Orbax tells of what we tell
  try:
    console.say(_measure(epath.Path(_OUTPUT.value)))
  except (OSError, ValueError) as e:
    console.fail(str(e))
    sys.exit(1)


def _measure(output: epath.Path) -> str:
  if output.suffix != '.npz':
    raise ValueError(f'--output={output} must end in .npz')
  if not output.parent.is_dir():
    raise FileNotFoundError(f'{output.parent} is no folder')
  images = epath.Path(_IMAGES.value)
  if not images.is_dir():
    raise FileNotFoundError(f'--images={images} is no folder')
  meta = checkpoint.describe(_INCEPTION.value)
  if meta['family'] != 'inception':
    raise ValueError(
        f'{_INCEPTION.value} holds a {meta["family"]!r}, not an inception'
    )
  model, params = checkpoint.load(_INCEPTION.value)
  mesh = sharding.make_mesh({'data': -1})
  reference = evaluate_fid.measure_folder(
      images, evaluate_fid.on_mesh(model, params, mesh),
      image_size=_IMAGE_SIZE.value or None,
      batch_size=sharding.fit_batch(_BATCH_SIZE.value, mesh),
      keep=_FEATURES.value,
  )
  reference = dataclasses.replace(reference, meta={
      **reference.meta, 'inception': meta['hash'],
      'inception_config': meta['config'],
  })
  fid.write_reference(output, reference)
  count, size = (reference.meta[k] for k in ('images', 'image_size'))
  return f'{output}: {count} images of {size} x {size}'


if __name__ == '__main__':
  app.run(main)
