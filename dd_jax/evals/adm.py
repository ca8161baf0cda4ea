# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Samples for the evaluator of ADM (arXiv 2105.05233), which is run elsewhere.

Its figures come from another Inception network and other rounding than those
of `evals.fid`: they must not stand beside these.
"""

from __future__ import annotations

from collections.abc import Iterable
import zipfile

from etils import epath
import numpy as np

PROTOCOL = 'adm'


def to_uint8(images: np.ndarray) -> np.ndarray:
  """Images in [-1, 1] to 256 levels, rounded down as ADM's sampler does.

  Raises:
    ValueError: an image holds NaN or infinity.
  """
  images = np.asarray(images, np.float32)
  if not np.isfinite(images).all():
    raise ValueError('images hold NaN or infinity')
  return np.clip((images + 1.0) * 127.5, 0, 255).astype(np.uint8)


def write_npz(
    file: epath.PathLike, batches: Iterable[np.ndarray],
    shape: tuple[int, int, int, int],
) -> None:
  """Writes `arr_0`, uint8 (N, H, W, 3), a batch at a time.

  Args:
    file: written whole or not at all; the same images give the same bytes.
    batches: uint8 (n, H, W, 3).
    shape: of all batches together.

  Raises:
    ValueError: a batch of another shape or type, or not N images.
  """
  file = epath.Path(file)
  temporary = file.with_name(f'{file.name}.tmp')
  member, count = zipfile.ZipInfo('arr_0.npy'), 0  # the time of it is fixed
  header = {'descr': '|u1', 'fortran_order': False, 'shape': tuple(shape)}
  try:
    with temporary.open('wb') as raw, zipfile.ZipFile(raw, 'w') as archive:
      with archive.open(member, 'w', force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, header)
        for pixels in batches:
          if pixels.dtype != np.uint8 or pixels.shape[1:] != shape[1:]:
            raise ValueError(
                f'a batch is {pixels.dtype}{list(pixels.shape)}; need uint8 '
                f'(n, {", ".join(map(str, shape[1:]))})'
            )
          count += len(pixels)
          out.write(np.ascontiguousarray(pixels).data)
      if count != shape[0]:
        raise ValueError(f'{count} images came, not {shape[0]}')
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)
