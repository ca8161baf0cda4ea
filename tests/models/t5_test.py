# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of T5's encoder: parity, masks, sizes, conversion both ways."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dd_jax import checkpoint, conversion
from dd_jax.convert import readers, table
from dd_jax.models.t5 import convert, model
from tests.golden import golden_cases

ALIAS = 'encoder.embed_tokens.weight'


@functools.cache
def golden(**fields):
  case = golden_cases.load('t5_tiny')
  built = model.build(case.config | fields)
  params = table.convert(convert.TABLE, case.tensors(), built.abstract())
  return case, built, params


def golden_inputs(case):
  tokens = jnp.asarray(case.arrays['tokens'])
  lengths = jnp.asarray(case.arrays['lengths'])
  return tokens, jnp.arange(tokens.shape[1])[None] < lengths[:, None]


def decoder(rng):
  """Some tensors of a decoder, by Hugging Face's names."""
  names = [
      'lm_head.weight', 'decoder.embed_tokens.weight',
      'decoder.final_layer_norm.weight',
      'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
      'decoder.block.1.layer.1.EncDecAttention.q.weight',
      'decoder.block.1.layer.2.DenseReluDense.wi_0.weight',
      'decoder.block.1.layer.2.layer_norm.weight',
  ]
  return {name: rng.normal(size=(3, 4)).astype(np.float32) for name in names}


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


def test_golden():
  """150 tokens: some are further apart than classes of positions reach."""
  case, built, params = golden()
  tokens, mask = golden_inputs(case)
  y = np.asarray(jax.jit(built.fns['encode'])(params, tokens, mask))
  assert y.dtype == np.float32 and y.shape == (3, 150, 24)
  for found, name in (
      (y[0, ::3], 'full'), (y[1, :37], 'part'), (y[2, :1], 'one')
  ):
    np.testing.assert_allclose(
        found, case.arrays[f'features_{name}'], rtol=1e-4, atol=1e-4
    )
  assert not y[1, 37:].any() and not y[2, 1:].any()


def test_parity_with_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(0)
  theirs = transformers.T5EncoderModel(transformers.T5Config(
      vocab_size=70, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_heads=5,
      feed_forward_proj='gated-gelu', initializer_factor=1.5,
  )).eval()
  tensors = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
  np.testing.assert_array_equal(tensors.pop(ALIAS), tensors['shared.weight'])
  built = model.build(convert.T5.infer(tensors, {}))
  params = table.convert(convert.TABLE, tensors, built.abstract())
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 70, (2, 200))
  mask = np.arange(200)[None] < np.array([[200], [9]])
  with torch.no_grad():
    want = theirs(
        input_ids=torch.from_numpy(tokens),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
    ).last_hidden_state.numpy()
  found = jax.jit(built.fns['encode'])(
      params, tokens.astype(np.int32), mask
  )
  np.testing.assert_allclose(
      found, np.where(mask[..., None], want, 0), rtol=1e-4, atol=1e-4
  )


def test_padding_changes_nothing():
  case, built, params = golden()
  tokens, mask = golden_inputs(case)
  encode = jax.jit(built.fns['encode'])
  want = encode(params, tokens[1:2, :37], mask[1:2, :37])
  found = encode(params, tokens[1:2].at[:, 37:].set(5), mask[1:2])
  np.testing.assert_allclose(found[:, :37], want, rtol=1e-5, atol=1e-5)


def test_tokens_see_each_other_on_both_sides():
  case, built, params = golden()
  tokens, mask = golden_inputs(case)
  tokens, mask = tokens[:1, :20], mask[:1, :20]
  encode = jax.jit(built.fns['encode'])
  change = np.abs(
      encode(params, tokens, mask)
      - encode(params, tokens.at[0, 10].add(1), mask)
  ).max(-1)[0]
  assert (change > 1e-4).all()


def test_bfloat16_stays_near():
  case, built, params = golden()
  half = golden(dtype='bfloat16')[1]
  inputs = golden_inputs(case)
  want = np.asarray(jax.jit(built.apply)(params, *inputs))
  found = np.asarray(jax.jit(half.apply)(params, *inputs))
  assert found.dtype == np.float32
  assert np.abs(found - want).max() < 0.1 * np.abs(want).max()
  assert np.abs(found - want).max() > 0
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  cast_found = np.asarray(jax.jit(half.apply)(cast, *inputs))
  assert cast_found.dtype == np.float32
  assert np.abs(cast_found - want).max() < 0.1 * np.abs(want).max()


def test_buckets():
  found = model.buckets(300, 32, 128)
  assert found.shape == (300, 300) and found.min() == 0 and found.max() == 31
  np.testing.assert_array_equal(found[0, :10], [0, *range(17, 24), 24, 24])
  np.testing.assert_array_equal(found[:8, 0], range(8))
  np.testing.assert_array_equal(found[299, :171], 15)
  # Borders of the shared classes, which rounding could move.
  np.testing.assert_array_equal(
      found[[15, 16, 31, 32, 63, 64], 0], [9, 10, 11, 12, 13, 14]
  )


def test_axes_name_every_dimension():
  _, built, params = golden()
  names = jax.tree.map(
      len, built.axes(), is_leaf=lambda x: isinstance(x, tuple)
  )
  assert names == jax.tree.map(lambda x: x.ndim, params)
  drawn = built.init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, params)
  assert abs(float(np.std(drawn['layers']['k']['kernel'])) * 24**0.5 - 1) < 0.1


def test_published_sizes():
  counts = {
      name: sum(x.size for x in jax.tree.leaves(model.build(s).abstract()))
      for name, s in model.SIZES.items() if name in ('base', 'xl')
  }
  assert counts == {'base': 109_628_544, 'xl': 1_223_527_424}
  xl = model.build(model.SIZES['xl'])
  # Two a weight and token, without the embedding; attention on top.
  dense = 2 * 120 * (counts['xl'] - 32128 * 2048)
  assert 1 < xl.flops() / dense < 1.02


@pytest.mark.parametrize('whole', [False, True])
@pytest.mark.parametrize('alias', [False, True])
def test_there_and_back(whole, alias, tmp_path):
  case, built, params = golden()
  tensors = case.tensors()
  if alias:
    tensors[ALIAS] = tensors['shared.weight']
  extra = decoder(np.random.default_rng(0)) if whole else {}
  source = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors | extra, source)
  work = conversion.plan('t5', [source])
  assert sorted(work.dropped) == sorted(extra)
  assert work.model.config == built.config
  conversion.write(work, tmp_path / 'export', {})
  _, found = checkpoint.load(tmp_path / 'export')
  jax.tree.map(np.testing.assert_array_equal, found, params)
  conversion.restore(tmp_path / 'export', [tmp_path / 'back.safetensors'])
  assert_same(load(tmp_path / 'back.safetensors'), tensors)


def test_several_files_by_their_index(tmp_path):
  tensors = golden_cases.load('t5_tiny').tensors()
  tensors[ALIAS] = tensors['shared.weight']
  names = sorted(tensors)
  parts = {
      f'model-0000{i + 1}-of-00002.safetensors': names[i::2] for i in (0, 1)
  }
  for file, members in parts.items():
    safetensors.numpy.save_file(
        {k: tensors[k] for k in members}, tmp_path / file
    )
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': {
      k: file for file, members in parts.items() for k in members
  }}))
  work = conversion.plan('t5', [index])
  conversion.write(work, tmp_path / 'export', {})
  assert sorted(conversion.file_hashes([index])) == sorted(parts)
  outputs = [tmp_path / f'back/{i}.safetensors' for i in (0, 1)]
  for _ in range(2):  # the same again replaces them
    conversion.restore(tmp_path / 'export', outputs)
  for output, members in zip(outputs, parts.values(), strict=True):
    assert_same(load(output), {k: tensors[k] for k in members})
  again = tmp_path / 'back' / index.name
  meta = json.loads(again.read_text())
  assert meta['weight_map'] == {
      k: f'{i}.safetensors'
      for i, members in enumerate(parts.values()) for k in members
  }
  assert meta['metadata'] == {
      'total_size': sum(v.nbytes for v in tensors.values())
  }
  assert readers.expand([again]) == tuple(outputs)
  # The index of others is not replaced, nor anything written beside it.
  with pytest.raises(ValueError, match='index.json names other files; remove'):
    conversion.restore(
        tmp_path / 'export', [tmp_path / f'{i}.safetensors' for i in (0, 1)]
    )
  assert not (tmp_path / '0.safetensors').exists()
  # None where files are not side by side, or one by one.
  apart = [tmp_path / f'{i}/{i}.safetensors' for i in (0, 1)]
  conversion.restore(tmp_path / 'export', apart)
  assert not list(tmp_path.glob('[01]/*.json'))
  (tmp_path / list(parts)[1]).unlink()
  with pytest.raises(ValueError, match='00002-of-00002.*No such file'):
    conversion.plan('t5', [index])
  with pytest.raises(ValueError, match='there is no tensor'):
    conversion.plan('t5', [tmp_path / list(parts)[0]])
  index.write_text('{}')
  with pytest.raises(ValueError, match='not an index of weight files'):
    conversion.plan('t5', [index])


def test_what_was_trained_here_is_laid_out_as_released(tmp_path):
  case, built, params = golden()
  checkpoint.export(tmp_path / 'export', built, params, {})
  conversion.restore(tmp_path / 'export', [tmp_path / 'a.safetensors'])
  assert_same(load(tmp_path / 'a.safetensors'), case.tensors())


def test_files_that_do_not_fit(tmp_path):
  tensors = golden_cases.load('t5_tiny').tensors()
  source = tmp_path / 'model.safetensors'

  def problem(changes):
    made = {k: v for k, v in (tensors | changes).items() if v is not None}
    safetensors.numpy.save_file(made, source)
    with pytest.raises(ValueError) as info:
      conversion.plan('t5', [source])
    assert str(source) in str(info.value)
    return str(info.value)

  some = np.ones((64, 24), np.float32)
  assert f"{ALIAS!r} should repeat 'shared.weight'" in problem({ALIAS: some})
  # Not one of the decoder's names: T5 1.0 has no gates.
  wi = 'decoder.block.0.layer.2.DenseReluDense.wi.weight'
  assert f'{wi!r} matches no row' in problem({wi: some})
  q = 'encoder.block.1.layer.0.SelfAttention.q.weight'
  assert 'its layers have shapes [(24, 30), (24, 64)]' in problem({q: some})
  assert 'there is no tensor' in problem({'shared.weight': None})


@pytest.mark.parametrize('fields, message', [
    ({'heads': 0}, 'must be at least 1'),
    ({'buckets': 6}, 'buckets=6 must be a multiple of 4'),
    ({'max_distance': 8}, 'max_distance=8 must be over a quarter'),
    ({'dtype': 'float16'}, "'dtype' must be one of"),
    ({'layers': 3}, "unknown field 'layers'"),
])
def test_bad_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    model.build(golden_cases.load('t5_tiny').config | fields)
