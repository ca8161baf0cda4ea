# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the weight-table engine."""

import jax
import ml_dtypes
import numpy as np
import pytest

from dd_jax.convert import table
from dd_jax.convert.table import Row

TABLE = (
    Row('embed.weight', 'embedding'),
    Row('layers.{i}.attn.qkv.weight',
        ('layers/q/kernel', 'layers/k/kernel', 'layers/v/kernel'),
        table.Chain(table.TRANSPOSE, table.Split(3, axis=1))),
    Row(('layers.{i}.mlp.w1.weight', 'layers.{i}.mlp.w3.weight'),
        'layers/gate/kernel',
        table.Chain(table.TRANSPOSE, table.Join(2, axis=1))),
    Row('layers.{i}.norm.scale_11H', 'layers/norm/scale',
        table.Reshape((1, 1, -1), (-1,))),
    Row('stem.{b}.conv.weight', 'stem_{b}/kernel', table.CONV),
    Row('stem.{b}.skip.weight', 'stem_{b}/skip', table.CONV, optional=True),
    Row('temperature', 'temperature'),
)


def tensors():
  rng = np.random.default_rng(0)
  shapes = {
      'embed.weight': (5, 4), 'stem.0.conv.weight': (6, 3, 2, 1),
      'stem.1.conv.weight': (6, 6, 3, 3), 'stem.1.skip.weight': (6, 6, 1, 1),
      'temperature': (),
  }
  for i in range(11):  # two digits: 10 comes after 2
    shapes |= {
        f'layers.{i}.attn.qkv.weight': (12, 4),
        f'layers.{i}.mlp.w1.weight': (7, 4),
        f'layers.{i}.mlp.w3.weight': (7, 4),
        f'layers.{i}.norm.scale_11H': (1, 1, 4),
    }
  return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def target():
  def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)

  return {
      'embedding': leaf(5, 4),
      'layers': {
          'q': {'kernel': leaf(11, 4, 4)},
          'k': {'kernel': leaf(11, 4, 4)},
          'v': {'kernel': leaf(11, 4, 4)},
          'gate': {'kernel': leaf(11, 4, 14)},
          'norm': {'scale': leaf(11, 4)},
      },
      'stem_0': {'kernel': leaf(2, 1, 3, 6)},
      'stem_1': {'kernel': leaf(3, 3, 6, 6), 'skip': leaf(1, 1, 6, 6)},
      'temperature': leaf(),
  }


def problems(fn, *args, **kwargs):
  with pytest.raises(table.ConversionError) as info:
    fn(*args, **kwargs)
  assert all(p in str(info.value) for p in info.value.problems)
  return info.value.problems


def test_a_layer_of_any_number_costs_nothing():
  source = tensors()
  for leaf in 'attn.qkv.weight', 'norm.scale_11H':
    source[f'layers.{10**15}.{leaf}'] = source[f'layers.0.{leaf}']
  assert "row 'layers.{i}.attn.qkv.weight' lacks layers [11]" in problems(
      table.convert, TABLE, source, target()
  )


def test_values_land_where_they_belong():
  source = tensors()
  params = table.convert(TABLE, source, target())
  for i in range(11):
    np.testing.assert_array_equal(
        params['layers']['k']['kernel'][i],
        source[f'layers.{i}.attn.qkv.weight'][4:8].T,
    )
    np.testing.assert_array_equal(
        params['layers']['gate']['kernel'][i, :, 7:],
        source[f'layers.{i}.mlp.w3.weight'].T,
    )
  kernel = params['stem_0']['kernel']
  assert kernel[1, 0, 2, 5] == source['stem.0.conv.weight'][5, 2, 1, 0]
  assert jax.tree.structure(params) == jax.tree.structure(target())


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_inverse_is_identity(dtype):
  source = {k: v.astype(dtype) for k, v in tensors().items()}
  back = table.invert(TABLE, table.convert(TABLE, source, target()))
  assert back.keys() == source.keys()
  for name, value in source.items():
    assert back[name].dtype == dtype
    assert back[name].flags.c_contiguous
    np.testing.assert_array_equal(back[name], value)


def test_ignored_names():
  extra = {'layers.3.mask': np.zeros(2), 'layers.10.mask': np.zeros(2)}
  ignore = ('layers.{i}.mask', 'absent')
  table.convert(TABLE, tensors() | extra, target(), ignore=ignore)
  assert problems(table.convert, TABLE, tensors() | extra, target()) == (
      "tensor 'layers.3.mask' matches no row",
      "tensor 'layers.10.mask' matches no row",
  )


def test_all_problems_are_reported_together():
  source = tensors()
  source['embed.weight'] = source['embed.weight'][:4]
  source['stray'] = np.zeros(1)
  source['layers.0.norm.scale_11H'] = np.zeros(4)
  source['stem.7.conv.weight'] = np.zeros((6, 6, 3, 3))
  del source['temperature'], source['layers.2.attn.qkv.weight']
  del source['layers.5.mlp.w3.weight']
  found = problems(table.convert, TABLE, source, target())
  for expected in (
      "target 'embedding' has shape (5, 4), but tensor 'embed.weight' gives "
      '(4, 4)',
      "tensor 'stray' matches no row",
      "tensor 'layers.0.norm.scale_11H' does not fit its row: shape (4,) is "
      'not (1, 1, -1)',
      "target 'stem_7/kernel' of tensor 'stem.7.conv.weight' does not exist",
      "target 'temperature' is not filled: there is no tensor 'temperature'",
      "row 'layers.{i}.attn.qkv.weight' lacks layers [2]",
      "['layers.5.mlp.w3.weight'] must stand beside 'layers.5.mlp.w1.weight'",
  ):
    assert expected in found


def test_absent_layers_name_the_tensors():
  source = {k: v for k, v in tensors().items() if 'norm' not in k}
  assert problems(table.convert, TABLE, source, target()) == (
      "target 'layers/norm/scale' is not filled: there is no tensor "
      "'layers.{i}.norm.scale_11H'",
  )


def test_target_without_row():
  wanted = target() | {'new': jax.ShapeDtypeStruct((1,), np.float32)}
  assert problems(table.convert, TABLE, tensors(), wanted) == (
      "target 'new' is not filled: no row makes it",
  )


def test_two_matches_are_an_error():
  twice = (*TABLE, Row('stem.{n}.conv.weight', 'other_{n}'))
  found = problems(table.convert, twice, tensors(), target())
  assert (
      "tensor 'stem.0.conv.weight' matches row 'stem.{b}.conv.weight' and row "
      "'stem.{n}.conv.weight'" in found
  )
  found = problems(
      table.convert, TABLE, tensors(), target(), ignore=('temperature',)
  )
  assert found == (
      "tensor 'temperature' matches row 'temperature' and ignored "
      "'temperature'",
  )


def test_scalars_do_not_split():
  rows = (Row('a', ('x', 'y'), table.Split(2)),)
  wanted = {'x': np.zeros(1), 'y': np.zeros(1)}
  (found,) = problems(table.convert, rows, {'a': np.zeros(())}, wanted)
  assert found.startswith("tensor 'a' does not fit its row")


def test_two_tensors_for_one_target():
  rows = (Row('a', 'x'), Row('b', 'x'))
  source = {'a': np.zeros(2), 'b': np.ones(2)}
  found = problems(table.convert, rows, source, {'x': np.zeros(2)})
  assert found == ("target 'x' is filled twice",)
  found = problems(table.invert, rows, {'x': np.zeros(2)})
  assert found == ("parameter 'x' matches row 'x' and row 'x'",)


def test_invert_reports_all_problems():
  params = table.convert(TABLE, tensors(), target())
  del params['embedding'], params['layers']['v']
  del params['stem_1']['skip']  # optional: accepted
  params['layers']['norm']['scale'] = params['layers']['norm']['scale'][0, 0]
  params['stray'] = np.zeros(1)
  found = problems(table.invert, TABLE, params)
  assert len(found) == 4
  for expected in (
      "parameter 'stray' matches no row",
      "no parameter matches row 'embedding'",
      "['layers/v/kernel'] must stand beside 'layers/q/kernel'",
      "parameter 'layers/norm/scale' does not fit its row: there is no axis "
      'of layers',
  ):
    assert expected in found


def test_numbers_of_names_have_no_leading_zeros():
  found = problems(
      table.convert, (Row('a.{i}', 'a_{i}'),), {'a.01': np.zeros(1)}, {}
  )
  assert found == ("tensor 'a.01' matches no row",)


def test_repeated_number_must_be_the_same():
  rows = (Row('a.{i}.b{i}', 'a_{i}'),)
  wanted = {'a_2': np.zeros(1)}
  table.convert(rows, {'a.2.b2': np.zeros(1)}, wanted)
  assert problems(table.convert, rows, {'a.2.b3': np.zeros(1)}, wanted)


@pytest.mark.parametrize('src, dst', [
    ('a.{i}.{j}', 'a'), ('a', 'a_{i}'), (('a.{i}', 'b'), 'a'),
])
def test_rows_that_cannot_be_inverted_are_refused(src, dst):
  with pytest.raises(ValueError, match='must name'):
    Row(src, dst)


@pytest.mark.parametrize('transform, shapes', [
    (table.Identity(), [(2, 3)]),
    (table.TRANSPOSE, [(2, 3), (4, 5)]),
    (table.CONV, [(2, 3, 4, 5)]),
    (table.Permute((2, 0, 1)), [(2, 3, 4)]),
    (table.Reshape((1, -1, 6), (-1, 2, 3)), [(1, 4, 6)]),
    (table.Split(3, axis=1), [(2, 6)]),
    (table.Join(2, axis=0), [(2, 3), (2, 3)]),
    (table.Chain(table.Split(2), table.TRANSPOSE), [(4, 3)]),
])
def test_transforms_invert(transform, shapes):
  arrays = tuple(
      np.arange(np.prod(s)).reshape(s) + 100 * i for i, s in enumerate(shapes)
  )
  back = transform.inverse(transform.forward(arrays))
  assert len(back) == len(arrays)
  for a, b in zip(arrays, back, strict=True):
    np.testing.assert_array_equal(a, b)
