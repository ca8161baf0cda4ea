# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Files that others released: what a run needs of them, and whose they are.

Nothing here reaches for the network: files are asked for by name, all of a run
at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import os
import shlex
from typing import Any, Protocol

from etils import epath

from dd_jax import config as config_lib
from dd_jax.convert import readers

_VAR = 'FoundationVision/var on the Hugging Face Hub'
_DD = 'microsoft/distilled_decoding on the Hugging Face Hub'
_LLAMAGEN = 'FoundationVision/LlamaGen on the Hugging Face Hub'
_LLAMAGEN_T2I = 'peizesun/llamagen_t2i on the Hugging Face Hub'
_T5 = 'google/flan-t5-xl on the Hugging Face Hub'
_CLIP = 'openai/clip-vit-large-patch14 on the Hugging Face Hub'

# Where a file comes from, by its name, or that and its folder's.
RELEASES: Mapping[str, str] = {
    **{f'var_d{depth}.pth': _VAR for depth in (16, 20, 24, 30, 36)},
    'vae_ch160v4096z32.pth': _VAR,
    **{f'var-d{depth}.pth': f'{_DD}, folder VAR-DD' for depth in (16, 20, 24)},
    'vq_ds16_c2i.pt': _LLAMAGEN,
    **{f'c2i_{size}_256.pt': _LLAMAGEN for size in 'BL'},
    **{f'llamagen-{size}.pt': f'{_DD}, folder LlamaGen-DD' for size in 'BL'},
    'vq_ds16_t2i.pt': _LLAMAGEN_T2I,
    't2i_XL_stage1_256.pt': _LLAMAGEN_T2I,
    'flan-t5-xl/model.safetensors.index.json':
        f'{_T5}, with the files that it names',
    'flan-t5-xl/tokenizer.json': _T5,
    'clip-vit-large-patch14/model.safetensors': _CLIP,
    'clip-vit-large-patch14/tokenizer.json': _CLIP,
    'edm-imagenet-64x64-cond-adm.pkl':
        'NVlabs/edm on GitHub, pretrained networks',
    'imagenet-64x64.npz': 'NVlabs/edm on GitHub, fid-refs',
    'statistic.pth': f'{_DD}, folder ImageNet-256_FID_Statistic',
    'pt_inception-2015-12-05-6726825d.pth':
        'mseitzer/pytorch-fid on GitHub, release fid_weights',
    'vgg16-397923af.pth':
        'torchvision, the weights VGG16_Weights.IMAGENET1K_V1',
    'vgg.pth':
        'richzhang/PerceptualSimilarity on GitHub, folder lpips/weights/v0.1',
}
_SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
_SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _transformer(depth: int, **fields: Any) -> dict[str, Any]:
  return {
      'num_classes': 1000, 'depth': depth, 'width': 64 * depth, 'heads': depth,
      'patch_nums': _SIDES_256, 'vocab_size': 4096, 'code_dim': 32, **fields,
  }


def _gpt(size: str, **fields: Any) -> dict[str, Any]:
  return {
      'size': size, 'latent_size': 16, 'vocab_size': 16384,
      'num_classes': 1000, **fields,
  }


_VQ_16 = {
    'image_size': 256, 'ch': 128, 'ch_mult': (1, 1, 2, 2, 4),
    'z_channels': 256, 'code_dim': 8, 'vocab_size': 16384,
}


# Fields of the networks' configs by file, as the converter reads them from the
# tensors: a run can be planned before its files are there.
SIZES: Mapping[str, Mapping[str, Any]] = {
    **{f'var_d{depth}.pth': _transformer(depth) for depth in (16, 20, 24, 30)},
    'var_d36.pth': _transformer(36, patch_nums=_SIDES_512, shared_aln=True),
    **{f'var-d{depth}.pth': _transformer(depth) for depth in (16, 20, 24)},
    'vae_ch160v4096z32.pth': {
        'ch': 160, 'ch_mult': (1, 1, 2, 2, 4), 'z_channels': 32,
        'vocab_size': 4096, 'patch_nums': _SIDES_256,
    },
    **{f'c2i_{size}_256.pt': _gpt(size) for size in 'BL'},
    **{f'llamagen-{size}.pt': _gpt(size) for size in 'BL'},
    't2i_XL_stage1_256.pt': _gpt(
        'XL', num_classes=0, caption_length=120, caption_dim=2048
    ),
    **{f'vq_ds16_{kind}.pt': _VQ_16 for kind in ('c2i', 't2i')},
    'flan-t5-xl/model.safetensors.index.json': {
        'vocab_size': 32128, 'width': 2048, 'depth': 24, 'heads': 32,
        'head_dim': 64, 'mlp_dim': 5120,
    },
    'clip-vit-large-patch14/model.safetensors': {
        'image_size': 224, 'patch_size': 14, 'image_width': 1024,
        'image_depth': 24, 'image_heads': 16, 'image_mlp_dim': 4096,
        'vocab_size': 49408, 'context_length': 77, 'text_width': 768,
        'text_depth': 12, 'text_heads': 12, 'text_mlp_dim': 3072,
        'projection_dim': 768,
    },
    'edm-imagenet-64x64-cond-adm.pkl': {
        'image_size': 64, 'num_classes': 1000,
    },
    'pt_inception-2015-12-05-6726825d.pth': {},
    'vgg.pth': {},
}
_OWN = 'you: no release that is known here has this name'
_PROMPTS = 'you: a line such as {"prompt": "a cat"} for each caption'
_STATISTICS = (
    'your images, by python -m dd_jax.tools.reference_stats --output={}'
)
_DATA = 'you: docs/bring_your_data.md says how images are laid out'
# Fields of a stage that name a file or folder, by its kind, and whose that is.
_FILES: Mapping[str, Mapping[str, str]] = {
    'train': {'data': _DATA, 'heldout': _DATA},
    'evaluate': {'reference': _DATA},
    'evaluate_denoiser': {'reference': _DATA},
    'fid': {'reference': _STATISTICS},
    'captions': {'tokenizer': _OWN, 'prompts': _PROMPTS},
    'clip_score': {'tokenizer': _OWN},
}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """A stage of kind 'convert'.

  Attributes:
    family: entry of `registry.TABLES['families']`.
    input: files that together have the weights, most often one.
    folder: where they are; '' for the working directory.
    config: fields of the model's config, before what the tensors tell.
    wrapper: keys to the weights in the file, such as 'trainer/var_wo_ddp';
      None finds them, averaged weights first.
  """

  family: str
  input: tuple[str, ...]
  folder: str = ''
  config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  wrapper: str | None = None

  @property
  def paths(self) -> tuple[str, ...]:
    return tuple(os.path.join(self.folder, name) for name in self.input)

  @property
  def keys(self) -> tuple[str, ...] | None:
    """The wrapper, key by key."""
    if self.wrapper is None:
      return None
    return tuple(k for k in self.wrapper.split('/') if k)


class _Stage(Protocol):
  name: str
  kind: str
  config: Mapping[str, Any]


def known_fields(config: ConvertConfig) -> dict[str, Any] | None:
  """Fields of the network's config, known without the files.

  Those of the stage's config stand before those of its released files. None
  where neither tells anything.
  """
  names = {name for path in config.paths if (name := _key(path, SIZES))}
  if not names and not config.config:
    return None
  fields = {k: v for name in names for k, v in SIZES[name].items()}
  fields |= config.config
  if {'ch_mult', 'patch_nums'} <= fields.keys():
    levels = len(fields['ch_mult'])
    fields.setdefault(
        'image_size', fields['patch_nums'][-1] * 2 ** (levels - 1)
    )
  return fields


def check(stages: Sequence[_Stage]) -> None:
  """Looks for the files of all stages that are about to run.

  Raises:
    FileNotFoundError: one message about all that are missing: what to get, from
      whose release, where to put it, and how to convert it by hand.
    ValueError: a stage of kind 'convert' that is not well formed.
  """
  missing: dict[str, str] = {}
  by_hand = []
  for stage in stages:
    lost = _lost(stage)
    missing |= lost
    if lost and stage.kind == 'convert':
      by_hand.append(command(convert_config(stage.config, stage.name)))
  if not missing:
    return
  lines = [
      f'{len(missing)} file(s) are missing; no stage was started. Put them '
      'here, or say where they are (released ones: --config.weights=...), and '
      'run the same command again:',
      *(f'  {path}\n      from {where}' for path, where in missing.items()),
  ]
  if by_hand:
    lines += [
        'The run converts them itself. By hand, to use them without it:',
        *(f'  {line}' for line in by_hand),
    ]
  raise FileNotFoundError('\n'.join(lines))


def _lost(stage: _Stage) -> dict[str, str]:
  """Files of a stage that are not there, and whose they are."""
  if stage.kind == 'convert':
    paths = dict.fromkeys(convert_config(stage.config, stage.name).paths, _OWN)
    # What an index names comes with it.
    paths |= {
        str(part): whose for path, whose in paths.items()
        if epath.Path(path).exists() for part in readers.expand([path])
    }
  else:
    paths = {}
    for name, whose in _FILES.get(stage.kind, {}).items():
      value = stage.config.get(name)
      path = value.get('path') if isinstance(value, Mapping) else value
      if isinstance(path, str) and path and not path.startswith('stage:'):
        paths[path] = whose.replace('{}', path)
  return {
      path: release_of(path) or whose
      for path, whose in paths.items()
      if not epath.Path(path).exists()
  }


def release_of(path: str) -> str | None:
  """Where a file comes from, None for one that is not known."""
  return RELEASES.get(_key(path, RELEASES))


def _key(path: str, known: Mapping[str, Any]) -> str | None:
  """The entry that a path ends with."""
  parts = epath.Path(path).parts
  names = '/'.join(parts[-2:]), parts[-1]
  return next((name for name in names if name in known), None)


def convert_config(values: Mapping[str, Any], name: str) -> ConvertConfig:
  """The checked config of a stage called `name`, without the run's seed."""
  return config_lib.make(
      ConvertConfig, {k: v for k, v in values.items() if k != 'seed'}, name
  )


def command(config: ConvertConfig) -> str:
  """The line that does what a stage of kind 'convert' does."""
  first = config.paths[0].removesuffix('.index.json')
  output = os.path.splitext(first)[0]
  words = [
      'python', '-m', 'dd_jax.tools.convert', f'--family={config.family}',
      f'--input={",".join(config.paths)}', f'--output={output}',
      *(f'--config={k}={_text(v)}' for k, v in config.config.items()),
  ]
  if config.wrapper is not None:
    words.append(f'--wrapper={config.wrapper}')
  return shlex.join(words)


def _text(value: Any) -> str:
  """A field's value as the converter's --config takes it."""
  if isinstance(value, (list, tuple)):
    return ','.join(map(str, value))
  return str(value)
