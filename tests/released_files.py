# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Random weights in files of the names and layouts of the released ones."""

from __future__ import annotations

import json
import pathlib
import shutil
import types

import jax
import numpy as np

from dd_jax import registry
from dd_jax.convert import table, writers
from tests.convert import torch_files
from tests.golden import golden_cases, networks

GOLDEN = pathlib.Path(golden_cases.__file__).parent
PATCH_NUMS = (1, 2, 3, 4)  # of the small networks


def random(model, seed):
  """Weights of ordinary size without the time that `init` compiles."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(size=leaf.shape)
    if path[-1].key == 'kernel':
      values /= np.sqrt(np.prod(leaf.shape[:-1]) / 2)
    elif path[-1].key in ('var', 'scale') or path[-1].key[:4] == 'head':
      values = 1 + 0.1 * np.abs(values)
    else:
      values *= 0.1
    return values.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, model.abstract())


def save(path, tensors):
  specs = {k: (v.shape, v.dtype) for k, v in tensors.items()}
  writers.write(path, specs, tensors.items())


def laid_out(family, seed, **fields):
  """Random weights under the names and shapes of a released file."""
  entry = registry.get('families', family)
  model = registry.get('models', entry.model)(fields)
  return table.invert(entry.rows(model.config), random(model, seed))


def write_small(folder):
  """Small networks under the names of released files."""
  folder.mkdir()
  shutil.copy(GOLDEN / 'var_tiny.pth', folder / 'var_d16.pth')
  shutil.copy(GOLDEN / 'dd_var_tiny.pth', folder / 'var-d16.pth')
  save(folder / 'vae_ch160v4096z32.pth', laid_out(
      'var_vqvae', 3, image_size=16, ch=8, ch_mult=(1, 1, 2), res_blocks=1,
      z_channels=8, vocab_size=64, patch_nums=PATCH_NUMS,
  ) | {'quantize.ema_vocab_hit_SV': np.zeros((4, 64), np.float32)})
  _save_inception(folder)
  _save_lpips(folder)


def write_small_c2i(folder):
  """Small networks under the names that `b` and `b_released` read."""
  folder.mkdir()
  tensors = golden_cases.load('llamagen_gpt_c2i_tiny').tensors()
  torch_files.save_zip(folder / 'c2i_B_256.pt', {'model': {
      k: torch_files.tensor(v) for k, v in tensors.items()
  }})
  shutil.copy(GOLDEN / 'dd_llamagen_tiny.pt', folder / 'llamagen-B.pt')
  save(folder / 'vq_ds16_c2i.pt', _small_llamagen_vq())
  _save_inception(folder)
  _save_lpips(folder)


def _small_llamagen_vq():
  return laid_out(
      'llamagen_vq', 3, image_size=16, ch=8, ch_mult=(1, 1, 2), res_blocks=1,
      attention=False, z_channels=8, code_dim=8, vocab_size=64,
  )


def _save_inception(folder):
  """The network and statistics of its features."""
  save(folder / 'pt_inception-2015-12-05-6726825d.pth',
       laid_out('inception', 0, slim=16))
  features = np.random.default_rng(2).normal(size=(200, 2048 // 16))
  torch_files.save_zip(folder / 'statistic.pth', {
      'm': features.mean(0), 's': np.cov(features, rowvar=False),
  })


def _save_lpips(folder):
  lpips = laid_out('lpips', 1, slim=64)
  heads = {k: v for k, v in lpips.items() if k.startswith('lin')}
  save(folder / 'vgg.pth', heads)
  save(folder / 'vgg16-397923af.pth', {
      **{k: v for k, v in lpips.items() if k not in heads},
      'classifier.6.bias': np.zeros(3, np.float32),
  })


WORDS = ('a', 'cat', 'dog', 'red', 'blue', 'on', 'sofa', 'two')


def write_small_t2i(folder):
  """Small networks and tokenizers under the names that `t2i_xl` reads."""
  folder.mkdir()
  shutil.copy(
      GOLDEN / 'llamagen_gpt_t2i_tiny.pt', folder / 't2i_XL_stage1_256.pt'
  )
  save(folder / 'vq_ds16_t2i.pt', _small_llamagen_vq())
  _save_lpips(folder)
  t5, clip = folder / 'flan-t5-xl', folder / 'clip-vit-large-patch14'
  for part in t5, clip:
    part.mkdir()
  tensors = laid_out(
      't5', 5, vocab_size=16, width=24, depth=2, heads=2, head_dim=8,
      mlp_dim=16,
  )
  # The decoder of the released network is of no use here.
  tensors['lm_head.weight'] = np.zeros((16, 24), np.float32)
  names, weight_map = list(tensors), {}
  for i in range(2):
    file = f'model-{i + 1:05}-of-00002.safetensors'
    save(t5 / file, {k: tensors[k] for k in names[i::2]})
    weight_map |= dict.fromkeys(names[i::2], file)
  (t5 / 'model.safetensors.index.json').write_text(json.dumps(
      {'metadata': {}, 'weight_map': weight_map}
  ))
  _save_tokenizer(t5 / 'tokenizer.json', ('<pad>', '</s>'))
  save(clip / 'model.safetensors', laid_out(
      'clip', 6, image_size=8, patch_size=4, image_width=8, image_depth=1,
      image_heads=2, image_mlp_dim=8, vocab_size=16, context_length=9,
      text_width=8, text_depth=1, text_heads=2, text_mlp_dim=8,
      projection_dim=6,
  ))
  _save_tokenizer(
      clip / 'tokenizer.json', ('<|startoftext|>', '<|endoftext|>')
  )


def _save_tokenizer(file, special):
  """A tokenizer.json of whole words."""
  words = (*special, '<unk>', *WORDS)
  file.write_text(json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None,
      'added_tokens': [], 'normalizer': None,
      'pre_tokenizer': {'type': 'Whitespace'}, 'post_processor': None,
      'decoder': None, 'model': {
          'type': 'WordLevel', 'unk_token': '<unk>',
          'vocab': {word: i for i, word in enumerate(words)},
      },
  }))


class Tokenizer:
  """In the place of the library's, for the files above."""

  @classmethod
  def from_file(cls, path):
    made = cls()
    made._vocab = json.loads(pathlib.Path(path).read_text())['model']['vocab']
    return made

  def no_truncation(self):
    pass

  def no_padding(self):
    pass

  def get_vocab_size(self):
    return len(self._vocab)

  def token_to_id(self, token):
    return self._vocab.get(token)

  def encode(self, text, add_special_tokens):
    assert not add_special_tokens
    unknown = self._vocab['<unk>']
    return types.SimpleNamespace(
        ids=[self._vocab.get(word, unknown) for word in text.split()]
    )


def write_full(folder):
  """What the config `d16` reads, in full size and in the released formats."""
  folder.mkdir()
  case = golden_cases.load('var_transformer_d16')
  teacher = registry.get('models', 'var')(networks.transformer_fields(case))
  buffers = registry.get('families', 'var').buffers(teacher.config)
  save(folder / 'var_d16.pth', buffers | case.tensors())
  case = golden_cases.load('var_vqvae_d16')
  save(folder / 'vae_ch160v4096z32.pth', {
      **{k: v.astype(np.float32) for k, v in case.buffers().items()},
      **case.tensors(),
  })
  tensors = golden_cases.load('inception_fid').tensors()
  counters = {
      k.replace('running_var', 'num_batches_tracked'): np.int64(0)
      for k in tensors if k.endswith('running_var')
  }
  save(folder / 'pt_inception-2015-12-05-6726825d.pth', tensors | counters)
  # These two are from before torch 1.6.
  layers = {
      f'classifier.{i}.{leaf}': np.zeros(shape, np.float32)
      for i, n, m in ((0, 25088, 4096), (3, 4096, 4096), (6, 4096, 1000))
      for leaf, shape in (('weight', (m, n)), ('bias', (m,)))
  }
  trunk = golden_cases.load('lpips_vgg').tensors()
  with np.load(GOLDEN / 'lpips_vgg_heads.npz') as heads:
    for name, tensors in (
        ('vgg16-397923af', trunk | layers), ('vgg', dict(heads)),
    ):
      torch_files.save_legacy(folder / f'{name}.pth', {
          k: torch_files.tensor(v) for k, v in tensors.items()
      })
  # More rows than channels, so that the covariance has full rank.
  features = np.random.default_rng(2).normal(size=(2500, 2048))
  torch_files.save_zip(folder / 'statistic.pth', {
      'm': features.mean(0), 's': np.cov(features, rowvar=False),
  })
