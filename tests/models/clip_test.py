# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of CLIP: parity, sizes, conversion both ways, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import checkpoint, conversion
from dd_jax.convert import readers, table, writers
from dd_jax.models.clip import convert, model
from tests.golden import golden_cases

HEADS = {'image_heads': 3, 'text_heads': 2}


@functools.cache
def golden(**fields):
  case = golden_cases.load('clip_tiny')
  built = model.build(case.config | fields)
  params = table.convert(
      convert.clip_table(built.config), case.tensors(), built.abstract()
  )
  return case, built, params


def golden_inputs(case):
  image = 2 * case.uniform('image', 3, 3, 32, 32).transpose(0, 2, 3, 1)
  return jnp.asarray(image), jnp.asarray(case.arrays['tokens'])


def save(path, tensors):
  specs = {k: (v.shape, v.dtype) for k, v in tensors.items()}
  writers.write(path, specs, tensors.items())
  return path


def load(path):
  return {
      k: np.asarray(v)
      for k, v in readers.select(path, readers.read(path).tree).tensors.items()
  }


def assert_same(ours, theirs):
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    assert ours[name].dtype == value.dtype
    np.testing.assert_array_equal(ours[name], value)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_golden():
  case, built, params = golden()
  image, tokens = golden_inputs(case)
  features = {
      'image': jax.jit(built.fns['encode_image'])(params, image),
      'text': jax.jit(built.fns['encode_text'])(params, tokens),
  }
  for name, found in features.items():
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, case.arrays[f'{name}_features'], rtol=1e-4, atol=1e-4
    )
  logits = jax.jit(built.apply)(params, image, tokens)
  np.testing.assert_allclose(
      logits, case.arrays['logits'], rtol=1e-4, atol=1e-4
  )
  cosines = jax.jit(built.fns['similarity'])(params, image, tokens)
  np.testing.assert_allclose(
      cosines, (unit(case.arrays['image_features'])
                * unit(case.arrays['text_features'])).sum(-1),
      rtol=1e-4, atol=1e-5,
  )


@pytest.mark.parametrize('activation', ['quick_gelu', 'gelu'])
def test_parity_with_transformers(activation):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  towers = dict(num_hidden_layers=3, hidden_act=activation)
  theirs = transformers.CLIPModel(transformers.CLIPConfig(
      vision_config=dict(towers, hidden_size=30, intermediate_size=44,
                         num_attention_heads=5, image_size=24, patch_size=6),
      text_config=dict(towers, hidden_size=28, intermediate_size=32,
                       num_attention_heads=4, vocab_size=60, bos_token_id=58,
                       eos_token_id=59, max_position_embeddings=13),
      projection_dim=14, initializer_factor=20.0,
  )).eval()
  tensors = {
      k: v.detach().numpy() for k, v in theirs.state_dict().items()
      if not k.endswith('position_ids')
  }
  given = {'image_heads': 5, 'text_heads': 4, 'activation': activation}
  built = model.build(convert.CLIP.infer(tensors, given) | given)
  params = table.convert(
      convert.clip_table(built.config), tensors, built.abstract()
  )
  rng = np.random.default_rng(0)
  image = rng.normal(size=(4, 24, 24, 3)).astype(np.float32)
  tokens = rng.integers(0, 58, (4, 13))
  tokens[np.arange(4), [3, 12, 5, 7]] = 59
  with torch.no_grad():
    want = theirs(
        input_ids=torch.from_numpy(tokens),
        pixel_values=torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
    )
  found = jax.jit(built.apply)(params, image, tokens.astype(np.int32))
  np.testing.assert_allclose(
      found, want.logits_per_image.numpy(), rtol=1e-4, atol=2e-4
  )
  assert np.std(np.asarray(found)) > 0.1


def test_text_behind_the_end_does_not_count():
  case, built, params = golden()
  _, tokens = golden_inputs(case)
  encode = jax.jit(built.fns['encode_text'])
  want = encode(params, tokens)
  found = encode(params, tokens.at[0, 5:].set(jnp.array([7, 3, 2, 9, 49, 1])))
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
  short = encode(params, tokens[:1, :5])
  np.testing.assert_allclose(short, want[:1], rtol=1e-5, atol=1e-5)
  assert np.abs(encode(params, tokens.at[0, 2].set(8)) - want)[0].max() > 1e-3


def test_bfloat16_stays_near():
  case, built, params = golden()
  half = golden(dtype='bfloat16')[1]
  inputs = golden_inputs(case)
  want, found = (
      np.asarray(jax.jit(m.fns['similarity'])(params, *inputs))
      for m in (built, half)
  )
  assert found.dtype == np.float32
  assert 0 < np.abs(found - want).max() < 0.05
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  again = jax.jit(half.fns['similarity'])(cast, *inputs)
  assert again.dtype == jnp.float32
  assert np.abs(again - want).max() < 0.05


def test_axes_name_every_dimension():
  _, built, params = golden()
  names = jax.tree.map(
      len, built.axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert names == jax.tree.map(lambda x: x.ndim, params)


def test_published_sizes():
  counts = {
      name: sum(x.size for x in jax.tree.leaves(model.build(s).abstract()))
      for name, s in model.SIZES.items()
  }
  assert counts == {
      'b32': 151_277_313, 'b16': 149_620_737, 'l14': 427_616_513
  }
  # ViT-B/32: 4.4 billion multiply-adds of an image, 2.9 of a caption.
  assert abs(model.build(model.SIZES['b32']).flops() / 14.7e9 - 1) < 0.05


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
@pytest.mark.parametrize('buffers', [False, True])
def test_there_and_back(suffix, buffers, tmp_path):
  case, built, params = golden()
  tensors = case.tensors()
  if buffers:
    tensors |= convert.CLIP.buffers(built.config)
  source = save(tmp_path / f'a{suffix}', tensors)
  work = conversion.plan('clip', [source], given=HEADS)
  assert work.model.config == built.config and not work.dropped
  conversion.write(work, tmp_path / 'export', {})
  _, found = checkpoint.load(tmp_path / 'export')
  jax.tree.map(np.testing.assert_array_equal, found, params)
  conversion.restore(tmp_path / 'export', [tmp_path / f'b{suffix}'])
  assert_same(load(tmp_path / f'b{suffix}'), tensors)


def test_published_sizes_are_read_from_the_tensors():
  for fields in model.SIZES.values():
    built = model.build(fields)
    tensors = {
        k: jax.ShapeDtypeStruct(shape, group.dtype)
        for group in table.plan_inverse(
            convert.clip_table(built.config), built.abstract()
        ) for k, shape in group.shapes.items()
    }
    assert model.build(convert.CLIP.infer(tensors, {})).config == built.config
    assert conversion.guess(tensors) == 'clip'


def test_files_that_do_not_fit(tmp_path):
  tensors = golden_cases.load('clip_tiny').tensors()

  def problem(changes, given=HEADS):
    made = {k: v for k, v in (tensors | changes).items() if v is not None}
    with pytest.raises(ValueError) as info:
      conversion.plan('clip', [save(tmp_path / 'a.pth', made)], given=given)
    return str(info.value)

  assert '--config=image_heads=' in problem({}, {})
  assert "'text_projection.bias' matches no row" in problem(
      {'text_projection.bias': np.zeros(12, np.float32)}
  )
  name = 'vision_model.post_layernorm.bias'
  assert f'there is no tensor {name!r}' in problem({name: None})
  name = 'vision_model.embeddings.position_embedding.weight'
  assert 'no values' in problem(
      {name: np.zeros((0, tensors[name].shape[1]), np.float32)}
  )
  name = 'text_model.embeddings.position_ids'
  assert f'buffer {name!r} is not what' in problem(
      {name: np.arange(11)[None, ::-1].copy()}
  )


@pytest.mark.parametrize('fields, message', [
    ({'text_depth': 0}, 'must be at least 1'),
    ({'patch_size': 5}, 'image_size=32 is not a multiple of patch_size=5'),
    ({'text_heads': 3}, 'text_width=20 is not a multiple of text_heads=3'),
    ({'activation': 'relu'}, "'activation' must be one of"),
])
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    model.build(golden_cases.load('clip_tiny').config | fields)


def test_bad_inputs():
  case, built, params = golden()
  image, tokens = golden_inputs(case)
  with pytest.raises(ValueError, match=r'images are \(31, 32, 3\), not'):
    built.fns['encode_image'](params, image[:, 1:])
  with pytest.raises(ValueError, match='12 tokens are more than context_len'):
    built.fns['encode_text'](params, jnp.pad(tokens, ((0, 0), (0, 1))))
