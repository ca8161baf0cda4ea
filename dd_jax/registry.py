# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Every name that a config may use, and where its code lives.

Entries are 'module:attribute' and are imported on first use, so that a run
loads only what it needs. Adding a method, a model or a source is one line.
"""

from __future__ import annotations

import difflib
import importlib
from typing import Any

TABLES: dict[str, dict[str, str]] = {
    # Stage kinds: (context) -> outputs.
    'kinds': {
        'train': 'dd_jax.train:run',
        'convert': 'dd_jax.conversion:run',
        'generate': 'dd_jax.generate:run',
        'evaluate': 'dd_jax.evaluate:run',
        'fid': 'dd_jax.evaluate_fid:run',
        'adm_npz': 'dd_jax.evaluate_fid:run_adm',
    },
    # Method subclasses.
    'methods': {
        'vqvae': 'dd_jax.methods.vqvae:TrainVQVAE',
        'var': 'dd_jax.methods.var:TrainVAR',
        'classifier': 'dd_jax.methods.classifier:TrainClassifier',
        'distilled_decoding':
            'dd_jax.methods.distilled_decoding:DistilledDecoding',
    },
    # Builders: (config mapping) -> Model.
    'models': {
        'vqvae': 'dd_jax.models.vqvae.model:build',
        'var': 'dd_jax.models.var.model:build',
        'dd_var': 'dd_jax.models.var.student:build',
        'judge': 'dd_jax.models.judge.model:build',
        'inception': 'dd_jax.models.inception.model:build',
        'lpips': 'dd_jax.models.lpips.model:build',
        'vgg': 'dd_jax.models.lpips.model:build_vgg',
    },
    # Kinds of released files: convert.family.Family.
    'families': {
        'var': 'dd_jax.models.var.convert:VAR',
        'var_vqvae': 'dd_jax.models.vqvae.convert:VAR_VQVAE',
        'dd_var': 'dd_jax.models.var.convert:STUDENT',
        'inception': 'dd_jax.models.inception.convert:INCEPTION',
        'vgg': 'dd_jax.models.lpips.convert:VGG',
        'lpips': 'dd_jax.models.lpips.convert:LPIPS',
    },
    # Sources: (**config) -> Source.
    'sources': {
        'digits': 'dd_jax.data.sources:digits',
        'mnist5k': 'dd_jax.data.sources:mnist5k',
        'pairs': 'dd_jax.data.pairs:PairSource',
        'folder': 'dd_jax.data.images:FolderSource',
        'jsonl': 'dd_jax.data.images:JsonlSource',
        'tfds': 'dd_jax.data.tfds:by_name',
        'arrayrecord': 'dd_jax.data.tfds:from_folder',
    },
    # Modules of sampling functions, by family of the teacher or student.
    'samplers': {
        'var': 'dd_jax.sampling.var',
        'dd_var': 'dd_jax.sampling.var',
    },
}


def find(table: str, name: str) -> str:
  """Where the object behind a name lives, without importing it.

  Raises:
    ValueError: unknown name, with the closest known one.
  """
  names = TABLES[table]
  if name not in names:
    close = difflib.get_close_matches(str(name), names, 1)
    hint = f'did you mean {close[0]!r}?' if close else f'known: {list(names)}'
    raise ValueError(f'{table}: no entry {name!r}; {hint}')
  return names[name]


def get(table: str, name: str) -> Any:
  """The object or module behind a name; raises as `find` does."""
  module, _, attribute = find(table, name).partition(':')
  loaded = importlib.import_module(module)
  return getattr(loaded, attribute) if attribute else loaded
