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
        'captions': 'dd_jax.captions:run',
        'generate': 'dd_jax.generate:run',
        'evaluate': 'dd_jax.evaluate:run',
        'evaluate_denoiser': 'dd_jax.evaluate_denoiser:run',
        'evaluate_toy': 'dd_jax.evaluate_toy:run',
        'fid': 'dd_jax.evaluate_fid:run',
        'adm_npz': 'dd_jax.evaluate_fid:run_adm',
        'clip_score': 'dd_jax.evaluate_clip:run',
    },
    # Fields of a stage of a kind, checked before the first stage starts: a
    # config dataclass. A kind may do without.
    'configs': {
        'train': 'dd_jax.train:TrainConfig',
        'convert': 'dd_jax.released:ConvertConfig',
        'captions': 'dd_jax.captions:CaptionsConfig',
        'generate': 'dd_jax.generate:GenerateConfig',
        'evaluate': 'dd_jax.evaluate:EvaluateConfig',
        'evaluate_denoiser':
            'dd_jax.evaluate_denoiser:EvaluateDenoiserConfig',
        'evaluate_toy': 'dd_jax.evaluate_toy:EvaluateToyConfig',
        'fid': 'dd_jax.evaluate_fid:FidConfig',
        'adm_npz': 'dd_jax.evaluate_fid:AdmConfig',
        'clip_score': 'dd_jax.evaluate_clip:ClipScoreConfig',
    },
    # What a stage of a kind will run: (plan.Blueprint) -> plan.Planned.
    'planners': {
        'train': 'dd_jax.plan:plan_train',
        'convert': 'dd_jax.plan:plan_convert',
        'generate': 'dd_jax.plan:plan_generate',
        'captions': 'dd_jax.plan:plan_captions',
        'evaluate': 'dd_jax.plan:plan_evaluate',
        'evaluate_denoiser': 'dd_jax.plan:plan_evaluate_denoiser',
        'evaluate_toy': 'dd_jax.plan:plan_evaluate_toy',
        'fid': 'dd_jax.plan:plan_fid',
        'adm_npz': 'dd_jax.plan:plan_fid',
        'clip_score': 'dd_jax.plan:plan_fid',
    },
    # Method subclasses.
    'methods': {
        'vqvae': 'dd_jax.methods.vqvae:TrainVQVAE',
        'var': 'dd_jax.methods.var:TrainVAR',
        'llamagen': 'dd_jax.methods.llamagen:TrainLlamaGen',
        'classifier': 'dd_jax.methods.classifier:TrainClassifier',
        'edm': 'dd_jax.methods.edm:TrainEDM',
        'dmd2': 'dd_jax.methods.dmd2:DMD2',
        'distilled_decoding':
            'dd_jax.methods.distilled_decoding:DistilledDecoding',
    },
    # Builders: (config mapping) -> Model.
    'models': {
        'vqvae': 'dd_jax.models.vqvae.model:build',
        'var': 'dd_jax.models.var.model:build',
        'dd_var': 'dd_jax.models.var.student:build',
        'llamagen_vq': 'dd_jax.models.llamagen_vq.model:build',
        'llamagen': 'dd_jax.models.llamagen.model:build',
        'dd_llamagen': 'dd_jax.models.llamagen.student:build',
        't5': 'dd_jax.models.t5.model:build',
        'words': 'dd_jax.models.words.model:build',
        'clip': 'dd_jax.models.clip.model:build',
        'edm_unet': 'dd_jax.models.edm_unet.model:build',
        'discriminator': 'dd_jax.models.discriminator.model:build',
        'critic': 'dd_jax.build:build_critic',
        'patchgan': 'dd_jax.models.patchgan.model:build',
        'mlp': 'dd_jax.models.mlp.model:build',
        'mixture': 'dd_jax.models.mlp.exact:build',
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
        'llamagen': 'dd_jax.models.llamagen.convert:LLAMAGEN',
        'llamagen_vq': 'dd_jax.models.llamagen_vq.convert:LLAMAGEN_VQ',
        'dd_llamagen': 'dd_jax.models.llamagen.convert:STUDENT',
        't5': 'dd_jax.models.t5.convert:T5',
        'clip': 'dd_jax.models.clip.convert:CLIP',
        'edm_unet': 'dd_jax.models.edm_unet.convert:EDM_UNET',
        'dmd2_critic': 'dd_jax.models.critic.convert:CRITIC',
        'dmd2_fake_unet': 'dd_jax.models.edm_unet.convert:FAKE',
        'dmd2_real_unet': 'dd_jax.models.edm_unet.convert:REAL',
        'dmd2_head': 'dd_jax.models.discriminator.convert:HEAD',
        'inception': 'dd_jax.models.inception.convert:INCEPTION',
        'vgg': 'dd_jax.models.lpips.convert:VGG',
        'lpips': 'dd_jax.models.lpips.convert:LPIPS',
    },
    # Sources: (**config) -> Source.
    'sources': {
        'digits': 'dd_jax.data.sources:digits',
        'mnist5k': 'dd_jax.data.sources:mnist5k',
        'toy2d': 'dd_jax.data.toys:toy2d',
        'pairs': 'dd_jax.data.pairs:PairSource',
        'captions': 'dd_jax.data.captions:CaptionSource',
        'folder': 'dd_jax.data.images:FolderSource',
        'jsonl': 'dd_jax.data.images:JsonlSource',
        'tfds': 'dd_jax.data.tfds:by_name',
        'arrayrecord': 'dd_jax.data.tfds:from_folder',
    },
    # What records hold, of sources that need files: (**config) -> shape and
    # type by field.
    'records': {
        name: 'dd_jax.data.images:describe_records'
        for name in ('folder', 'jsonl', 'tfds', 'arrayrecord')
    },
    # Captions: (**config) -> data.prompts.Prompts.
    'prompts': {
        'digit_words': 'dd_jax.data.prompts:digit_words',
        'file': 'dd_jax.data.prompts:read',
        'jsonl': 'dd_jax.data.prompts:jsonl',
        'text': 'dd_jax.data.prompts:text',
    },
    # (**config) -> data.tokens.Tokenizer.
    'tokenizers': {
        't5': 'dd_jax.data.tokens:T5Tokenizer',
        'clip': 'dd_jax.data.tokens:ClipTokenizer',
        'words': 'dd_jax.data.tokens:WordTokenizer',
    },
    # Modules of sampling functions, by family of the teacher or student.
    'samplers': {
        'var': 'dd_jax.sampling.var',
        'dd_var': 'dd_jax.sampling.var',
        'llamagen': 'dd_jax.sampling.llamagen',
        'dd_llamagen': 'dd_jax.sampling.llamagen',
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
