# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the shared layers."""

from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.models import layers

RNG = np.random.default_rng(0)


def apply(module, params, x):
  return module.apply({'params': params}, jnp.asarray(x, jnp.float32))


def test_dense():
  x, kernel, bias = (RNG.normal(size=s) for s in [(2, 5, 3), (3, 4), (4,)])
  params = {'kernel': kernel, 'bias': bias}
  y = apply(layers.Dense(4), params, x)
  np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5, atol=1e-6)
  y = apply(layers.Dense(4, use_bias=False), {'kernel': kernel}, x)
  np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
  y = apply(layers.Dense(4, dtype=jnp.bfloat16), params, x)
  assert y.dtype == jnp.bfloat16
  a, b = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 4))
  dense = layers.Dense(4, precision=jax.lax.Precision.HIGHEST)
  traced = str(jax.make_jaxpr(lambda p: apply(dense, p, x))(
      params | {'kernel_a': a, 'kernel_b': b}
  ))
  assert traced.count('HIGHEST') == 2 * traced.count('dot_general') == 6


def test_dense_adds_its_adapter():
  x, kernel, bias = (RNG.normal(size=s) for s in [(2, 5, 3), (3, 4), (4,)])
  a, b = RNG.normal(size=(3, 2)), RNG.normal(size=(2, 4))
  y = apply(
      layers.Dense(4),
      {'kernel': kernel, 'bias': bias, 'kernel_a': a, 'kernel_b': b}, x,
  )
  np.testing.assert_allclose(
      y, x @ (kernel + a @ b) + bias, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('size, stride, padding, pads', [
    (3, 1, None, (1, 1)), (1, 1, None, (0, 0)), (3, 2, (0, 1), (0, 1)),
    (5, 1, (0, 0), (0, 0)),
])
def test_conv2d_matches_loops(size, stride, padding, pads):
  x = RNG.normal(size=(2, 6, 6, 3))
  kernel, bias = RNG.normal(size=(size, size, 3, 4)), RNG.normal(size=(4,))
  conv = layers.Conv2d(4, size=size, stride=stride, padding=padding)
  y = apply(conv, {'kernel': kernel, 'bias': bias}, x)
  padded = np.pad(x, ((0, 0), pads, pads, (0, 0)))
  side = (padded.shape[1] - size) // stride + 1
  assert y.shape == (2, side, side, 4)
  for i in range(side):
    for j in range(side):
      window = padded[:, i * stride :, j * stride :][:, :size, :size]
      expected = np.einsum('bhwi,hwio->bo', window, kernel) + bias
      np.testing.assert_allclose(y[:, i, j], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('channels, groups', [
    (64, 32), (96, 32), (32, 32), (12, 12), (40, 20), (33, 11), (1, 1),
])
def test_group_norm_matches_definition(channels, groups):
  x = RNG.normal(3.0, 2.0, size=(2, 4, 5, channels))
  scale, bias = RNG.normal(size=channels), RNG.normal(size=channels)
  y = apply(layers.GroupNorm(), {'scale': scale, 'bias': bias}, x)
  g = x.reshape(2, 4, 5, groups, -1)
  mean, var = (f((1, 2, 4), keepdims=True) for f in (g.mean, g.var))
  expected = ((g - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * scale + bias
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_group_norm_keeps_digits_and_types():
  x = jnp.asarray(RNG.normal(1000.0, 1.0, size=(1, 8, 8, 4)), jnp.float32)
  params = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
  y = apply(layers.GroupNorm(), params, x)
  np.testing.assert_allclose(y.std((1, 2)), 1, rtol=1e-3)
  y = layers.GroupNorm().apply({'params': params}, x.astype(jnp.bfloat16))
  assert y.dtype == jnp.bfloat16


class Layer(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return layers.Dense(x.shape[-1], ('embed', None), name='out')(x), None


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = layers.Conv2d(4, name='conv')(x)
    x = layers.GroupNorm(name='norm')(x)
    scan = nn.scan(
        Layer, variable_axes={'params': 0}, split_rngs={'params': True},
        length=3, metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = scan(name='layers')(x, None)
    return x * self.param('gain', nn.initializers.ones, ())


IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)


def test_pure_gives_plain_dicts():
  init, axes = layers.pure(Net(), IMAGE)
  params = init(jax.random.key(0))
  assert type(params) is dict and type(params['layers']['out']) is dict
  assert params['layers']['out']['kernel'].shape == (3, 4, 4)
  assert axes() == {
      'conv': {
          'kernel': ('kernel', 'kernel', 'conv_in', 'conv_out'),
          'bias': ('conv_out',),
      },
      'norm': {'scale': ('conv_out',), 'bias': ('conv_out',)},
      'layers': {
          'out': {'kernel': ('layers', 'embed', None), 'bias': ('layers', None)}
      },
      'gain': (),
  }
  jitted = jax.jit(init)(jax.random.key(0))
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, jitted
  )
  y = apply(Net(), params, np.ones(IMAGE.shape))
  assert y.shape == (1, 8, 8, 4)


def test_convolutions_keep_the_variance():
  conv = layers.Conv2d(64)
  image = jax.ShapeDtypeStruct((1, 8, 8, 32), jnp.float32)
  params = layers.pure(conv, image)[0](jax.random.key(0))
  assert params['kernel'].shape == (3, 3, 32, 64)
  variance = float(params['kernel'].var()) * 9 * 32
  np.testing.assert_allclose(variance, 1, rtol=0.05)
  assert not params['bias'].any()


def test_scanned_dense_takes_stacked_adapters():
  init, _ = layers.pure(Net(), IMAGE)
  params = init(jax.random.key(0))
  dense = params['layers']['out']
  a, b = RNG.normal(size=(3, 4, 2)), RNG.normal(size=(3, 2, 4))
  x = RNG.normal(size=IMAGE.shape)
  merged = params | {
      'layers': {'out': dense | {'kernel': dense['kernel'] + a @ b}}
  }
  beside = params | {
      'layers': {'out': dense | {'kernel_a': a, 'kernel_b': b}}
  }
  np.testing.assert_allclose(
      apply(Net(), beside, x), apply(Net(), merged, x), rtol=1e-3, atol=1e-3
  )


def test_count_flops():
  init, _ = layers.pure(Net(), IMAGE)
  params = jax.eval_shape(init, jax.random.key(0))

  def forward(params, x):
    return jax.checkpoint(Net().apply)({'params': params}, x)

  conv, dense = 64 * 9 * 2 * 4, 64 * 4 * 4
  assert layers.count_flops(forward, params, IMAGE) == 2 * (conv + 3 * dense)


def test_count_flops_of_control_flow():
  x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

  def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert layers.count_flops(branch, x) == 4 * 4**3

  def grouped(x):
    x = x.reshape(1, 2, 2, 4)
    return jax.lax.conv_general_dilated(
        x, jnp.ones((1, 1, 2, 6)), (1, 1), 'SAME', feature_group_count=2,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  assert layers.count_flops(grouped, x) == 2 * (4 * 6) * 2

  def loop(x):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

  with pytest.raises(ValueError, match='unknown length'):
    layers.count_flops(loop, x)
