# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of conversion both ways: sizes, buffers, side records, refusals."""

from __future__ import annotations

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from dd_jax import checkpoint, conversion, registry
from dd_jax.convert import readers, table, writers
from tests.golden import golden_cases

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PATCH_NUMS_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
COUNTER = 'quantize.ema_vocab_hit_SV'
USED = 'quantize.codebook_used'
GRID = {'heads': 4, 'latent_size': 4}


def case_tensors(name):
  """Weights of a golden case and the buffers that its program saves."""
  case = golden_cases.load(name)
  tensors = case.tensors()
  for counter in {COUNTER, USED} & case.meta['buffers'].keys():
    shape = case.meta['buffers'][counter]
    tensors[counter] = np.arange(np.prod(shape), dtype=np.float32)
    tensors[counter] = tensors[counter].reshape(shape)
  return tensors


def save(path, tensors, wrapper=()):
  specs = {k: (v.shape, v.dtype) for k, v in tensors.items()}
  writers.write(path, specs, tensors.items(), wrapper)
  return path


def load(path):
  found = readers.select(path, readers.read(path).tree)
  return found, {k: np.asarray(v) for k, v in found.tensors.items()}


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert (ours[name].shape, ours[name].dtype) == (value.shape, value.dtype)
    assert ours[name].tobytes() == value.tobytes(), name


def problem(name, *paths, **kwargs):
  """What a conversion is refused with; the file is named."""
  with pytest.raises(ValueError) as info:
    conversion.plan(name, paths, **kwargs)
  assert str(paths[0]) in str(info.value)
  return str(info.value)


FAMILIES = {
    'var': ('var_transformer_tiny', {}),
    'dd_var': ('dd_var_tiny', {}),
    'var_vqvae': ('var_vqvae_tiny', {'patch_nums': (1, 2, 3, 4)}),
    'llamagen': ('llamagen_gpt_c2i_tiny', GRID),
    'dd_llamagen': ('dd_llamagen_tiny', GRID),
    'llamagen_vq': ('llamagen_vq_tiny', {'image_size': 64}),
}


@pytest.mark.parametrize('name', FAMILIES)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_there_and_back(name, suffix, dtype, tmp_path):
  case, given = FAMILIES[name]
  tensors = {
      f'module.{k}': v.astype(dtype) for k, v in case_tensors(case).items()
  }
  source = save(tmp_path / f'a{suffix}', tensors, ('trainer', 'var_wo_ddp'))
  work = conversion.plan(name, [source], given=given)
  digest = conversion.write(work, tmp_path / 'export', {'files': {}})
  model, params = checkpoint.load(tmp_path / 'export')
  assert model.family == registry.get('families', name).model
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(dtype)}
  assert checkpoint.describe(tmp_path / 'export')['hash'] == digest
  back = tmp_path / f'b{suffix}'
  conversion.restore(tmp_path / 'export', [back])
  found, arrays = load(back)
  assert found.prefix == 'module.'
  if suffix == '.pth':
    assert found.wrapper == ('trainer', 'var_wo_ddp')
    assert list(arrays) == [k.removeprefix('module.') for k in tensors]
  assert_same(
      arrays, {k.removeprefix('module.'): v for k, v in tensors.items()}
  )
  assert not list(tmp_path.glob('*.tmp*'))


@pytest.mark.parametrize('name', ['var', 'dd_var'])
def test_buffers_are_made_again(name, tmp_path):
  """Both wrappers of the same weights: with the program's buffers and not."""
  tensors = case_tensors(FAMILIES[name][0])
  work = conversion.plan(name, [save(tmp_path / 'a.pth', tensors)])
  family = registry.get('families', name)
  buffers = {
      k: v.astype(np.float16) if 'bias' in k else v
      for k, v in family.buffers(work.model.config).items()
  }
  assert buffers['attn_bias_for_masking'].shape[-1] in (30, 31)
  source = save(tmp_path / 'b.pth', buffers | tensors)
  conversion.write(conversion.plan(name, [source]), tmp_path / 'export', {})
  assert not (tmp_path / 'export' / conversion.KEPT).exists()
  conversion.restore(tmp_path / 'export', [str(tmp_path / 'c.pth')])
  assert_same(load(tmp_path / 'c.pth')[1], buffers | tensors)
  buffers['lvl_1L'] = buffers['lvl_1L'][:, ::-1]
  wrong = save(
      tmp_path / 'd.pth',
      tensors | {k: np.ascontiguousarray(v) for k, v in buffers.items()},
  )
  assert "buffer 'lvl_1L' is not what the config makes" in problem(name, wrong)


def test_counters_stay_and_caches_go(tmp_path):
  tensors = case_tensors('var_vqvae_tiny')
  cache = {'blocks.0.attn.kv_cache.k_cache': np.zeros(3, np.float32)}
  source = save(tmp_path / 'a.pth', tensors | cache)
  work = conversion.plan(
      'var_vqvae', [source], given={'patch_nums': (1, 2, 3, 4)}
  )
  assert list(work.kept) == [COUNTER] and list(work.dropped) == list(cache)
  conversion.write(work, tmp_path / 'export', {})
  kept = readers.read(tmp_path / 'export' / conversion.KEPT).tree
  np.testing.assert_array_equal(np.asarray(kept[COUNTER]), tensors[COUNTER])
  conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'])
  assert_same(load(tmp_path / 'b.pth')[1], tensors)


@pytest.mark.parametrize('name', FAMILIES)
def test_what_was_trained_here_is_laid_out_as_released(name, tmp_path):
  case, given = FAMILIES[name]
  tensors = case_tensors(case)
  work = conversion.plan(
      name, [save(tmp_path / 'a.pth', tensors)], given=given
  )
  params = table.nest(
      work.model.abstract(), {k: np.asarray(v) for k, v in work.leaves.items()}
  )
  checkpoint.export(tmp_path / 'export', work.model, params, {})
  conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'])
  found, arrays = load(tmp_path / 'b.pth')
  family = registry.get('families', name)
  assert found.wrapper == family.wrapper
  buffers = family.buffers(work.model.config)
  assert_same(arrays, tensors | buffers)


@pytest.mark.parametrize('wrapper', ['model', 'module', 'state_dict', None])
@pytest.mark.parametrize('kind', ['c2i', 't2i'])
def test_llamagen_by_any_wrapper(wrapper, kind, tmp_path):
  tensors = case_tensors(f'llamagen_gpt_{kind}_tiny')
  buffers = {
      'freqs_cis': np.zeros((17, 8, 2), np.float32),
      'causal_mask': np.zeros((4, 24, 24), bool),
      'layers.0.attention.kv_cache.k_cache': np.zeros(3, np.float32),
  }
  keys = (wrapper,) if wrapper else ()
  source = save(tmp_path / 'a.pt', tensors | buffers, keys)
  work = conversion.plan('llamagen', [source], given=GRID)
  assert work.model.config.num_classes == (10 if kind == 'c2i' else 0)
  assert sorted(work.dropped) == sorted(buffers) and not work.kept
  conversion.write(work, tmp_path / 'export', {})
  conversion.restore(tmp_path / 'export', [tmp_path / 'b.pt'])
  found, arrays = load(tmp_path / 'b.pt')
  assert found.wrapper == keys
  assert_same(arrays, tensors)


def test_codes_used_stay_beside_the_tokenizer(tmp_path):
  tensors = case_tensors('llamagen_vq_tiny')
  source = save(tmp_path / 'a.pt', tensors, ('model',))
  work = conversion.plan('llamagen_vq', [source], given={'image_size': 64})
  assert list(work.kept) == [USED] and not work.dropped
  conversion.write(work, tmp_path / 'export', {})
  kept = readers.read(tmp_path / 'export' / conversion.KEPT).tree
  np.testing.assert_array_equal(np.asarray(kept[USED]), tensors[USED])


@pytest.mark.parametrize('name, fields', [
    ('var', {'depth': 16}), ('var', {'depth': 20}), ('var', {'depth': 30}),
    ('var', {'depth': 36, 'shared_aln': True, 'patch_nums': PATCH_NUMS_512}),
    ('dd_var', {'depth': 16}), ('dd_var', {'depth': 24}),
    ('dd_var', {'depth': 4, 'layerwise_flags': False}),
    ('var', {'depth': 3, 'attn_l2_norm': False, 'mlp_ratio': 2}),
    ('var_vqvae', {}),
    ('var_vqvae', {'ch': 32, 'ch_mult': (1, 2), 'image_size': 32,
                   'attention': False, 'res_blocks': 1, 'phi_count': 2,
                   'image_channels': 1}),
    ('llamagen', {'size': 'B'}), ('llamagen', {'size': '3B'}),
    ('llamagen', {'size': 'XL', 'num_classes': 0}),
    ('dd_llamagen', {'size': 'L'}),
    ('dd_llamagen', {'size': 'XL', 'num_classes': 0, 'caption_length': 9}),
    ('llamagen_vq', {}),
    ('llamagen_vq', {'ch': 32, 'ch_mult': (1, 2), 'attention': False,
                     'res_blocks': 1, 'image_channels': 1, 'code_dim': 4}),
])
def test_sizes_are_read_from_the_tensors(name, fields):
  family = registry.get('families', name)
  given = {}
  if name == 'llamagen_vq':
    given = {'image_size': 256}
    config = given | fields
  elif 'llamagen' in name:
    given = {'latent_size': 16}
    config = {'num_classes': 1000} | fields
  elif name == 'var_vqvae':
    config = {
        'ch': 160, 'ch_mult': (1, 1, 2, 2, 4), 'image_size': 256,
        'z_channels': 32, 'vocab_size': 4096, 'patch_nums': PATCH_NUMS,
    } | fields
  else:
    config = {
        'num_classes': 1000, 'width': 64 * fields['depth'],
        'heads': fields['depth'], 'patch_nums': PATCH_NUMS,
        'vocab_size': 4096, 'code_dim': 32,
    } | fields
  model = registry.get('models', family.model)(config)
  tensors = family.buffers(model.config) | {
      k: jax.ShapeDtypeStruct(shape, group.dtype)
      for group in table.plan_inverse(
          family.rows(model.config), model.abstract()
      ) for k, shape in group.shapes.items()
  }
  found = family.infer(tensors, given) | given
  rebuilt = registry.get('models', family.model)(found)
  assert rebuilt.abstract() == model.abstract()
  told = dataclasses.asdict(rebuilt.config)
  if 'mlp_width' in told:  # what it is, or the rule that makes it
    told['mlp_width'] = model.config.mlp_width
  assert told == dataclasses.asdict(model.config)
  assert conversion.guess(tensors) == name


def test_sizes_that_no_tensor_tells(tmp_path):
  source = save(tmp_path / 'a.pth', case_tensors('var_vqvae_tiny_saln'))
  assert 'give it, for example --config=patch_nums=1,2,3' in problem(
      'var_vqvae', source
  )
  work = conversion.plan('var_vqvae', [source], given={'patch_nums': [1, 2, 4]})
  assert work.model.config.image_size == 64
  source = save(tmp_path / 'b.pth', case_tensors('dd_var_tiny_saln'))
  assert '--config=heads=' in problem('dd_var', source)
  assert "field 'heads' must be" in problem(
      'dd_var', source, given={'heads': 'x'}
  )
  assert "unknown field 'haeds': did you mean 'heads'" in problem(
      'dd_var', source, given={'haeds': 3, 'heads': 3}
  )
  work = conversion.plan('dd_var', [source], given={'heads': 3})
  config = work.model.config
  assert (config.heads, config.shared_aln, config.attn_l2_norm) == (
      3, True, False
  )
  assert config.patch_nums == (1, 2, 4)
  for name, fields, missing in (
      ('llamagen', {}, 'heads'), ('llamagen', {'heads': 4}, 'latent_size'),
      ('llamagen_vq', {}, 'image_size'),
  ):
    source = save(tmp_path / 'c.pt', case_tensors(FAMILIES[name][0]))
    assert f'--config={missing}=' in problem(name, source, given=fields)


SIZED = FAMILIES | {
    't2i': ('llamagen_gpt_t2i_tiny', GRID), 't5': ('t5_tiny', {}),
    'clip': ('clip_tiny', {'image_heads': 2, 'text_heads': 2}),
    'edm_unet': ('edm_unet_tiny', {}),
}


def sized(name):
  """A family, tensors that it reads, and what a user must tell of them."""
  case, given = SIZED[name]
  family = registry.get('families', {'t2i': 'llamagen'}.get(name, name))
  return family, golden_cases.load(case).tensors(), given


@pytest.mark.parametrize('name', SIZED)
def test_shapes_without_values_tell_no_sizes(name):
  """They take no bytes of a file, whatever their other axes are."""
  family, tensors, given = sized(name)
  expected = family.infer(tensors, given)
  for key, value in tensors.items():
    for axis in range(value.ndim):
      shape = [1 << 20] * value.ndim
      shape[axis] = 0
      hollow = {key: jax.ShapeDtypeStruct(shape, value.dtype)}
      try:
        assert family.infer(tensors | hollow, given) == expected
      except ValueError as e:
        assert key in str(e) and len(str(e)) < 200


@pytest.mark.parametrize('name, key, shape', [
    ('var', 'lvl_embed.weight', (65, 1)), ('var', 'pos_1LC', (1, 16385, 1)),
    ('dd_var', 'lvl_embed.weight', (65, 1)),
    ('dd_var', 'pos_1LC', (1, 16385, 1)),
    ('t2i', 'cls_embedding.uncond_embedding', (16385, 1)),
    ('clip', 'text_model.embeddings.position_embedding.weight', (16385, 1)),
    ('clip', 'vision_model.embeddings.position_embedding.weight', (16385, 1)),
])
def test_sizes_that_no_network_has(name, key, shape):
  family, tensors, given = sized(name)
  large = {key: jax.ShapeDtypeStruct(shape, np.float32)}
  with pytest.raises(ValueError, match=f'{key}.* too large'):
    family.infer(tensors | large, given)


@pytest.mark.parametrize('name, template, most', [
    ('var', 'blocks.{i}.attn.mat_qkv.weight', 128),
    ('llamagen', 'layers.{i}.attention.wqkv.weight', 128),
    ('var_vqvae', 'encoder.down.{i}.block.0.conv1.weight', 16),
    ('var_vqvae', 'encoder.down.0.block.{i}.conv1.weight', 16),
    ('llamagen_vq', 'encoder.conv_blocks.{i}.res.0.conv1.weight', 16),
    ('llamagen_vq', 'encoder.conv_blocks.0.res.{i}.conv1.weight', 16),
    ('edm_unet', 'model.enc.8x8_block{i}.conv0.weight', 16),
    ('edm_unet', 'model.enc.{i}x0_conv.weight', 16),
])
def test_more_layers_than_any_network_has(name, template, most):
  family, tensors, given = sized(name)
  one = jax.ShapeDtypeStruct((4, 4, 3, 3), np.float32)
  many = {template.replace('{i}', str(i)): one for i in range(most + 1)}
  with pytest.raises(ValueError, match='too many'):
    family.infer(tensors | many, given)


@pytest.mark.parametrize('error', [
    MemoryError(), OverflowError('too large'), RecursionError('too deep'),
], ids=repr)
def test_a_config_that_nothing_can_be_made_of(error, tmp_path, monkeypatch):
  def infer(tensors, given):
    raise error

  family = dataclasses.replace(registry.get('families', 'var'), infer=infer)
  monkeypatch.setattr('dd_jax.models.var.convert.VAR', family)
  source = save(tmp_path / 'a.pth', case_tensors('var_transformer_tiny'))
  assert (str(error) or 'MemoryError') in problem('var', source)


def test_everything_wrong_is_said_at_once(tmp_path):
  tensors = case_tensors('var_transformer_tiny')
  del tensors['head.bias'], tensors['blocks.1.ffn.fc2.weight']
  tensors['stray.weight'] = np.zeros(3, np.float32)
  tensors['word_embed.bias'] = np.zeros(65, np.float32)
  tensors['blocks.0.attn.q_bias'] = np.zeros(64, np.float16)
  text = problem('var', save(tmp_path / 'a.pth', tensors))
  for part in (
      '5 problem(s)', "there is no tensor 'head.bias'",
      "tensor 'stray.weight' matches no row",
      "'word_embed/bias' has shape (64,), but tensor 'word_embed.bias' gives "
      '(65,)',
      "'layers/fc2/kernel' has shape (2, 256, 64), but tensor "
      "'blocks.0.ffn.fc2.weight' gives (1, 256, 64)",
      "types ['float16', 'float32'] in one parameter",
  ):
    assert part in text


def test_files_of_another_family(tmp_path):
  vae = save(tmp_path / 'vae.pth', case_tensors('var_vqvae_tiny'))
  student = save(tmp_path / 'dd.pth', case_tensors('dd_var_tiny'))
  assert 'use --family=var_vqvae' in problem('var', vae)
  assert 'use --family=dd_var' in problem('var', student)
  assert 'use --family=dd_var' in problem('var_vqvae', student)
  for name, (case, _) in FAMILIES.items():
    if 'llamagen' in name:
      file = save(tmp_path / f'{name}.pt', case_tensors(case))
      for other in {'llamagen', 'dd_llamagen', 'llamagen_vq', 'var'} - {name}:
        assert f'use --family={name}' in problem(other, file)
  other = save(tmp_path / 'o.pth', {'w': np.zeros((2, 2), np.float32)})
  assert "with w, ...: there is no tensor 'pos_start'" in problem('var', other)
  empty = case_tensors('dd_var_tiny')
  empty['pos_start'] = np.zeros((1, 1, 0), np.float32)
  problem('dd_var', save(tmp_path / 'e.pth', empty))
  with pytest.raises(ValueError, match="did you mean 'dd_var'"):
    conversion.plan('ddvar', [student])


def test_weights_in_several_files(tmp_path):
  tensors = case_tensors('var_transformer_tiny')
  names = list(tensors)
  halves = [{k: tensors[k] for k in names[i::2]} for i in (0, 1)]
  files = [
      save(tmp_path / f'{i}.pth', half, ('model',) * i)
      for i, half in enumerate(halves)
  ]
  conversion.write(conversion.plan('var', files), tmp_path / 'export', {})
  outputs = [tmp_path / f'back{i}.pth' for i in (0, 1)]
  with pytest.raises(ValueError, match=r'from 2 file\(s\), but --output names'):
    conversion.restore(tmp_path / 'export', outputs[:1])
  conversion.restore(tmp_path / 'export', outputs)
  for i, (output, half) in enumerate(zip(outputs, halves, strict=True)):
    found, arrays = load(output)
    assert found.wrapper == ('model',) * i
    assert_same(arrays, half)
  with pytest.raises(ValueError, match='is in a file before it too'):
    conversion.plan('var', [files[0], files[0]])


def test_a_broken_export_writes_no_file(tmp_path):
  tensors = case_tensors('var_transformer_tiny')
  work = conversion.plan('var', [save(tmp_path / 'a.pth', tensors)])
  conversion.write(work, tmp_path / 'export', {})
  with pytest.raises(ValueError, match='no family dd_var is made of it'):
    conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'], 'dd_var')
  with pytest.raises(ValueError, match='must end with'):
    conversion.restore(tmp_path / 'export', [tmp_path / 'b.npz'])
  file = tmp_path / 'export' / 'model.json'
  meta = json.loads(file.read_text())
  meta['sha256']['head/logits/bias'] = '0'
  file.write_text(json.dumps(meta))
  with pytest.raises(ValueError, match='it was changed'):
    conversion.restore(tmp_path / 'export', [tmp_path / 'b.pth'])
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pth', 'export']
