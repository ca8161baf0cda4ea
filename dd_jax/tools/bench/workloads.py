# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be timed: networks by size, workloads by name.

A workload is a row here, a function in each side's module that makes its
`program.Program`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

FRAMEWORKS = ('jax', 'torch')


@dataclasses.dataclass(frozen=True)
class Size:
  """The networks of one `--model`.

  Attributes:
    teacher: fields of a `var` model, and of its `dd_var` student.
    vae: fields of a `vqvae` model.
    sampling: settings of the teacher's rollout.
    split: of the student's step.
    tolerance: largest difference of the two sides, relative to the largest
      value where that is above 1.
  """

  teacher: Mapping[str, Any]
  vae: Mapping[str, Any]
  sampling: Mapping[str, Any]
  split: int
  tolerance: float


@dataclasses.dataclass(frozen=True)
class Workload:
  """A row of the table.

  Attributes:
    title: what a call does.
    networks: whose weights it needs.
    modules: by framework, where `make(row, case)` builds its program.
    variants: by framework, the ways that it is run in.
  """

  title: str
  networks: tuple[str, ...]
  modules: Mapping[str, str]
  variants: Mapping[str, tuple[str, ...]]


def _size(
    depth: int, width: int, heads: int, classes: int, codes: tuple[int, int],
    patch_nums: tuple[int, ...], ch: int, ch_mult: tuple[int, ...],
    sampling: tuple[int, float], split: int, tolerance: float,
) -> Size:
  shared = {'patch_nums': patch_nums, 'vocab_size': codes[0]}
  return Size(
      teacher=shared | {
          'num_classes': classes, 'depth': depth, 'width': width,
          'heads': heads, 'code_dim': codes[1],
      },
      vae=shared | {
          'image_size': patch_nums[-1] * 2 ** (len(ch_mult) - 1), 'ch': ch,
          'ch_mult': ch_mult, 'z_channels': codes[1],
      },
      sampling={'cfg': 2.0, 'top_k': sampling[0], 'top_p': sampling[1]},
      split=split, tolerance=tolerance,
  )


SIZES: Mapping[str, Size] = {
    # To see that the tool works.
    'var_smoke': _size(
        depth=2, width=64, heads=2, classes=10, codes=(64, 8),
        patch_nums=(1, 2, 3), ch=32, ch_mult=(1, 2), sampling=(16, 0.95),
        split=1, tolerance=2e-5,
    ),
    'var_tiny': _size(
        depth=4, width=256, heads=4, classes=10, codes=(512, 16),
        patch_nums=(1, 2, 3, 4, 5, 6, 8), ch=32, ch_mult=(1, 1, 2, 2),
        sampling=(100, 0.95), split=3, tolerance=2e-5,
    ),
    # VAR-d16 at 256x256 with the settings of DD1.
    'var_d16': _size(
        depth=16, width=1024, heads=16, classes=1000, codes=(4096, 32),
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), ch=160,
        ch_mult=(1, 1, 2, 2, 4), sampling=(900, 0.95), split=5, tolerance=1e-4,
    ),
}

_BLOCKS = {'jax': ('scan', 'unrolled'), 'torch': ('eager', 'compile')}
_WHOLE = {'jax': ('jit',), 'torch': ('eager', 'compile')}
_VAR = {
    'jax': 'dd_jax.tools.bench.jax_var',
    'torch': 'dd_jax.tools.bench.torch_var',
}

WORKLOADS: Mapping[str, Workload] = {
    'teacher': Workload(
        'teacher sampling: guidance, cache, filters, draws',
        ('teacher', 'vae'), _VAR, _BLOCKS,
    ),
    'student': Workload(
        'student, one step: noise to codes', ('student', 'vae'), _VAR, _BLOCKS
    ),
    'decode': Workload('codes to image', ('vae',), _VAR, _WHOLE),
    'train': Workload(
        'student, one training step: forward, backward, AdamW',
        ('student', 'vae'), _VAR, _BLOCKS,
    ),
    'transformer': Workload(
        "the teacher's network calls of one sampling, alone", ('teacher',),
        _VAR, {'jax': _BLOCKS['jax']},
    ),
    'ode_50': Workload(
        'flow map of all tokens, 50 steps', ('vae',), _VAR,
        {'jax': _WHOLE['jax']},
    ),
    'ode_100': Workload(
        'flow map of all tokens, 100 steps', ('vae',), _VAR,
        {'jax': _WHOLE['jax']},
    ),
}
VARIANTS = tuple(dict.fromkeys(
    v for w in WORKLOADS.values() for vs in w.variants.values() for v in vs
))
# Rows whose time is told as a share of another's.
SHARES = {'ode_50': 'transformer', 'ode_100': 'transformer'}

