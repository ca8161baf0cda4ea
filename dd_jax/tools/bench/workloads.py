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
    family: entry of `WORKLOADS`.
    teacher: fields of the teacher's model, and of its student's.
    vae: fields of their tokenizer.
    sampling: settings of the teacher's rollout.
    split: of the student's step.
    tolerance: largest difference of the two sides, relative to the largest
      value where that is above 1.
  """

  family: str
  teacher: Mapping[str, Any]
  vae: Mapping[str, Any]
  sampling: Mapping[str, Any]
  split: int
  tolerance: float


@dataclasses.dataclass(frozen=True)
class Denoisers:
  """The networks of one `--model` of DMD2: all are the same denoiser.

  Attributes:
    family: entry of `WORKLOADS`.
    denoiser: `name` in the registry and the fields of its config; the critic
      has a discriminator, too.
    tolerance: see `Size`.
  """

  family: str
  denoiser: Mapping[str, Any]
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


def _var(
    depth: int, width: int, heads: int, classes: int, codes: tuple[int, int],
    patch_nums: tuple[int, ...], ch: int, ch_mult: tuple[int, ...],
    sampling: tuple[int, float], split: int, tolerance: float,
) -> Size:
  shared = {'patch_nums': patch_nums, 'vocab_size': codes[0]}
  return Size(
      family='var',
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


def _llamagen(
    depth: int, width: int, heads: int, mlp_width: int, classes: int,
    codes: tuple[int, int], latent_size: int, z_channels: int, ch: int,
    ch_mult: tuple[int, ...], top_k: int, split: int, tolerance: float,
) -> Size:
  shared = {'vocab_size': codes[0], 'code_dim': codes[1]}
  return Size(
      family='llamagen',
      teacher=shared | {
          'num_classes': classes, 'depth': depth, 'width': width,
          'heads': heads, 'mlp_width': mlp_width, 'latent_size': latent_size,
      },
      vae=shared | {
          'image_size': latent_size * 2 ** (len(ch_mult) - 1), 'ch': ch,
          'ch_mult': ch_mult, 'z_channels': z_channels,
      },
      sampling={'cfg': 2.0, 'top_k': top_k, 'top_p': 1.0},
      split=split, tolerance=tolerance,
  )


def _dmd2(
    name: str, tolerance: float, **fields: Any
) -> Denoisers:
  denoiser = {'name': name, 'num_classes': 10, 'sigma_data': 0.5, **fields}
  return Denoisers(family='dmd2', denoiser=denoiser, tolerance=tolerance)


SIZES: Mapping[str, Size | Denoisers] = {
    # To see that the tool works.
    'var_smoke': _var(
        depth=2, width=64, heads=2, classes=10, codes=(64, 8),
        patch_nums=(1, 2, 3), ch=32, ch_mult=(1, 2), sampling=(16, 0.95),
        split=1, tolerance=2e-5,
    ),
    'var_tiny': _var(
        depth=4, width=256, heads=4, classes=10, codes=(512, 16),
        patch_nums=(1, 2, 3, 4, 5, 6, 8), ch=32, ch_mult=(1, 1, 2, 2),
        sampling=(100, 0.95), split=3, tolerance=2e-5,
    ),
    # VAR-d16 at 256x256 with the settings of DD1.
    'var_d16': _var(
        depth=16, width=1024, heads=16, classes=1000, codes=(4096, 32),
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16), ch=160,
        ch_mult=(1, 1, 2, 2, 4), sampling=(900, 0.95), split=5, tolerance=1e-4,
    ),
    'llamagen_smoke': _llamagen(
        depth=2, width=64, heads=2, mlp_width=128, classes=10, codes=(64, 8),
        latent_size=3, z_channels=16, ch=32, ch_mult=(1, 2), top_k=16, split=4,
        tolerance=2e-5,
    ),
    # LlamaGen-B at 256x256 with the settings of configs/dd_llamagen.py:b.
    'llamagen_b': _llamagen(
        depth=12, width=768, heads=12, mlp_width=2048, classes=1000,
        codes=(16384, 8), latent_size=16, z_channels=256, ch=128,
        ch_mult=(1, 1, 2, 2, 4), top_k=8000, split=80, tolerance=1e-4,
    ),
    # And LlamaGen-L, of configs/dd_llamagen.py:l.
    'llamagen_l': _llamagen(
        depth=24, width=1024, heads=16, mlp_width=2816, classes=1000,
        codes=(16384, 8), latent_size=16, z_channels=256, ch=128,
        ch_mult=(1, 1, 2, 2, 4), top_k=8000, split=130, tolerance=1e-4,
    ),
    'dmd2_smoke': _dmd2(
        'edm_unet', 2e-5, image_size=8, image_channels=1, ch=16,
        ch_mult=(1, 2), res_blocks=1, attention=(8,), head_dim=16,
    ),
    'dmd2_mlp_smoke': _dmd2(
        'mlp', 2e-5, shape=(4, 4, 1), width=16, blocks=2
    ),
    # Those of configs/dmd2_edm.py.
    'dmd2_digits': _dmd2('mlp', 1e-4, shape=(8, 8, 1), width=256, blocks=4),
    'dmd2_mnist5k_unet': _dmd2(
        'edm_unet', 1e-4, image_size=16, image_channels=1, ch=32,
        ch_mult=(1, 2, 2), res_blocks=1, attention=(), head_dim=32,
    ),
}

_BLOCKS = {'jax': ('scan', 'unrolled'), 'torch': ('eager', 'compile')}
_WHOLE = {'jax': ('jit',), 'torch': ('eager', 'compile')}
_JAX = 'dd_jax.tools.bench.jax_side'
_VAR = {'jax': _JAX, 'torch': 'dd_jax.tools.bench.torch_var'}
_LLAMAGEN = {'jax': _JAX, 'torch': 'dd_jax.tools.bench.torch_llamagen'}
_DMD2 = {
    'jax': 'dd_jax.tools.bench.jax_dmd2',
    'torch': 'dd_jax.tools.bench.torch_dmd2',
}

# By family and name.
WORKLOADS: Mapping[str, Mapping[str, Workload]] = {
    'var': {
        'teacher': Workload(
            'teacher sampling: guidance, cache, filters, draws',
            ('teacher', 'vae'), _VAR, _BLOCKS,
        ),
        'student': Workload(
            'student, one step: noise to codes', ('student', 'vae'), _VAR,
            _BLOCKS,
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
    },
    'llamagen': {
        'teacher': Workload(
            'teacher sampling, token by token: guidance, cache, filters, draws',
            ('teacher', 'vae'), _LLAMAGEN, _BLOCKS,
        ),
        'pairs': Workload(
            'the same with the flow map, 50 steps, in place of draws',
            ('teacher', 'vae'), _LLAMAGEN, {'jax': _BLOCKS['jax']},
        ),
        'student': Workload(
            'student, one step: noise to codes', ('student', 'vae'), _LLAMAGEN,
            {'jax': _BLOCKS['jax']},
        ),
        'decode': Workload(
            'codes to image', ('vae',), _LLAMAGEN, {'jax': _WHOLE['jax']}
        ),
    },
    'dmd2': {
        'critic': Workload(
            'critic, one update: samples, both losses, AdamW',
            ('student', 'critic'), _DMD2, _WHOLE,
        ),
        'student': Workload(
            'student, one update: samples, both gradients, AdamW',
            ('student', 'critic', 'teacher'), _DMD2, _WHOLE,
        ),
    },
}
VARIANTS = tuple(dict.fromkeys(
    v for rows in WORKLOADS.values() for w in rows.values()
    for vs in w.variants.values() for v in vs
))
# Rows whose time is told as a share of another's.
SHARES = {
    'ode_50': 'transformer', 'ode_100': 'transformer', 'student': 'teacher',
    'pairs': 'teacher',
}


def rows(model: str) -> Mapping[str, Workload]:
  """What can be timed of a model, by name."""
  return WORKLOADS[SIZES[model].family]

