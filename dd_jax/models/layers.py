# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Layers and the Linen boundary that families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp

from dd_jax.model import Axes, Model, Params, keep_rows

Array = jax.Array
Init = jax.nn.initializers.Initializer


class Dense(nn.Module):
  """Affine map of the last axis, with an optional low-rank adapter.

  `x_...xI -> y_...xO` in `dtype`; parameters are `kernel` (in, out) and `bias`
  (out,), float32. When the parameters also hold `kernel_a` (in, rank) and
  `kernel_b` (rank, out), which `init` never makes, `(x @ kernel_a) @ kernel_b`
  is added: any scale of the adapter is part of `kernel_b`.

  Attributes:
    features: size of the output axis.
    axes: logical names of the kernel's input and output axes.
    use_bias: whether there is a bias.
    kernel_init: initialiser of the kernel.
    bias_init: initialiser of the bias.
    dtype: type that the product is computed in.
    precision: of the products; None is the platform's default.
  """

  features: int
  axes: tuple[str | None, str | None] = ('embed', 'mlp')
  use_bias: bool = True
  kernel_init: Init = nn.initializers.lecun_normal()
  bias_init: Init = nn.initializers.zeros
  dtype: Any = jnp.float32
  precision: jax.lax.Precision | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(self.kernel_init, self.axes),
        (x.shape[-1], self.features),
    )
    x = keep_rows(x.astype(self.dtype))
    matmul = functools.partial(_matmul, precision=self.precision)
    y = keep_rows(matmul(x, kernel.astype(self.dtype)))
    if self.has_variable('params', 'kernel_a'):
      a = self.get_variable('params', 'kernel_a').astype(self.dtype)
      b = self.get_variable('params', 'kernel_b').astype(self.dtype)
      y += matmul(matmul(x, a), b)
    if self.use_bias:
      bias = self.param(
          'bias',
          nn.with_logical_partitioning(self.bias_init, self.axes[1:]),
          (self.features,),
      )
      y += jnp.broadcast_to(bias.astype(self.dtype), y.shape)
    return y


class Conv2d(nn.Module):
  """Two-dimensional convolution: NHWC in and out, HWIO kernel.

  `x_BxHxWxI -> y_BxH'xW'xO` in `dtype`.

  Attributes:
    features: number of output channels.
    size: side of the square window.
    stride: step of the window on both axes.
    padding: zeros (before, after) both axes; None keeps H and W at stride 1.
    dtype: type that the convolution is computed in.
    precision: of the products; None is the platform's default.
    kernel_init: initialiser of the kernel; None is Lecun normal.
    bias_init: initialiser of the bias.
  """

  features: int
  size: int = 3
  stride: int = 1
  padding: tuple[int, int] | None = None
  dtype: Any = jnp.float32
  precision: jax.lax.Precision | None = None
  kernel_init: Init | None = None
  bias_init: Init = nn.initializers.zeros

  @nn.compact
  def __call__(self, x_BxHxWxI: Array) -> Array:
    kernel = self.param(
        'kernel',
        nn.with_logical_partitioning(
            self.kernel_init or _flat_lecun_normal,
            ('kernel', 'kernel', 'conv_in', 'conv_out'),
        ),
        (self.size, self.size, x_BxHxWxI.shape[-1], self.features),
    )
    bias = self.param(
        'bias',
        nn.with_logical_partitioning(self.bias_init, ('conv_out',)),
        (self.features,),
    )
    padding = self.padding or ((self.size - 1) // 2, self.size // 2)
    y_BxHxWxO = jax.lax.conv_general_dilated(
        keep_rows(x_BxHxWxI.astype(self.dtype)),
        kernel.astype(self.dtype),
        window_strides=(self.stride, self.stride),
        padding=(padding, padding),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=self.precision,
    )
    return keep_rows(y_BxHxWxO) + bias.astype(self.dtype)[None, None, None]


class GroupNorm(nn.Module):
  """Normalises groups of channels over space, then scales and shifts.

  `x_BxHxWxC -> y_BxHxWxC` in the type of `x`; statistics are float32.

  Attributes:
    groups: upper limit; the largest divisor of C up to it is used, so that
      narrow networks keep as many groups as they can.
    epsilon: added to the variance.
  """

  groups: int = 32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x_BxHxWxC: Array) -> Array:
    batch, _, _, channels = x_BxHxWxC.shape
    scale, bias = (
        self.param(name, nn.with_logical_partitioning(init, ('conv_out',)),
                   (channels,))
        for name, init in (
            ('scale', nn.initializers.ones), ('bias', nn.initializers.zeros)
        )
    )
    groups = next(
        g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0
    )

    def mean(x_BxHxWxC: Array) -> Array:
      # Space first, then the channels of a group: splitting the channel axis of
      # the whole map instead doubles the time of a training step on CPU.
      x_BxGxI = x_BxHxWxC.mean((1, 2)).reshape(batch, groups, -1)
      x_BxGxI = jnp.broadcast_to(x_BxGxI.mean(-1, keepdims=True), x_BxGxI.shape)
      return x_BxGxI.reshape(batch, 1, 1, channels)

    x = x_BxHxWxC.astype(jnp.float32)
    x -= mean(x)
    # Two passes: E[x^2] - E[x]^2 would lose digits where the mean dominates.
    gain = jax.lax.rsqrt(mean(jnp.square(x)) + self.epsilon)
    y = x * (gain * scale[None, None, None]) + bias[None, None, None]
    return y.astype(x_BxHxWxC.dtype)


class CodeHead(nn.Module):
  """Code vectors, modulated by the condition's embedding as it is; float32.

  `x_BxLxW, cond_BxW -> codes_BxLxC`.

  Attributes:
    code_dim: size of a code vector.
    init_std: standard deviation of the initial kernel.

  Source: DD1 (arXiv 2412.17153), FinalLayer of its release.
  """

  code_dim: int
  init_std: float

  @nn.compact
  def __call__(self, x_BxLxW: Array, cond_BxW: Array) -> Array:
    width = x_BxLxW.shape[-1]
    shift_scale_2xW = self.param(
        'shift_scale',
        nn.with_logical_partitioning(
            nn.initializers.normal(width**-0.5), (None, 'embed')
        ),
        (2, width),
    )
    ada_Bx2xW = shift_scale_2xW[None] + cond_BxW[:, None]
    shift, scale = jnp.split(ada_Bx2xW, 2, axis=1)
    return Dense(
        self.code_dim, ('embed', 'code'), True,
        nn.initializers.normal(self.init_std), name='proj',
    )(modulate(x_BxLxW, scale, shift))


def modulate(x_BxNxW: Array, scale_Bx1xW: Array, shift_Bx1xW: Array) -> Array:
  """Layer normalisation without weights, then scale and shift; float32."""
  x = x_BxNxW.astype(jnp.float32)
  x -= x.mean(-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
  return x * (1.0 + scale_Bx1xW) + shift_Bx1xW


def unit(x: Array) -> Array:
  """Vectors of length 1 along the last axis, float32; zero stays zero."""
  x = x.astype(jnp.float32)
  square = jnp.square(x).sum(-1, keepdims=True)
  # The square is clamped, not its root: the root's gradient at 0 is infinite.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def embed(c: Any, count: int, name: str) -> nn.Embed:
  """A table of `count` vectors, of a config's `width` and `init_std`."""
  init = nn.initializers.normal(c.init_std)
  return nn.Embed(
      count, c.width, name=name,
      embedding_init=nn.with_logical_partitioning(init, (None, 'embed')),
  )


def rows(table_VxW: Array, indices: Array) -> Array:
  """Rows of a table, indices' shape + (W,); NaN for an index out of range."""
  # Unsigned, so that negative ones are out of range too.
  return jnp.take(
      table_VxW, indices.astype(jnp.uint32), axis=0, mode='fill',
      fill_value=jnp.nan,
  )


def pick_flag(rows_2xW: Array, is_data_BxS: Array) -> Array:
  """Row 1 where a slot holds data, else row 0: (B, S, W)."""
  # Mapping two rows and handing them out costs nothing beside mapping slots.
  noise, data = rows_2xW[:1, None], rows_2xW[1:, None]
  return jnp.where(is_data_BxS[..., None], data, noise)


def stack(
    block: type[nn.Module], c: Any, in_axes: tuple[Any, ...], unroll: bool
) -> Callable[..., nn.Module]:
  """Makes a module of all blocks out of one's class, parameters stacked.

  Args:
    block: its class; it maps what it carries, and further inputs.
    c: config, of which `depth` and `remat` are read.
    in_axes: of each further input, 0 where every block has its own.
    unroll: blocks one after the other instead of a loop.
  """
  if c.remat != 'none':
    policies = jax.checkpoint_policies
    block = nn.remat(
        block,
        policy={
            'dots': policies.dots_with_no_batch_dims_saveable, 'full': None
        }[c.remat],
        prevent_cse=unroll,  # a loop prevents it by itself
    )
  return nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=in_axes,
      length=c.depth,
      unroll=c.depth if unroll else 1,
      metadata_params={nn.PARTITION_NAME: 'layers'},
  )


def pure(
    module: nn.Module,
    *inputs: jax.ShapeDtypeStruct,
    method: str | None = None,
) -> tuple[Callable[[Array], Params], Callable[[], Axes]]:
  """Returns `init` and `axes` of a Linen module over plain dicts.

  Args:
    module: the network; every parameter is reached by calling it on `inputs`.
    inputs: shapes and types of example inputs; no values are computed.
    method: name of the method to call instead of `__call__`.

  Returns:
    `init(key) -> params`, a nested dict of arrays, and `axes() -> axes`, the
    same structure with a tuple of logical names (or None) per dimension.
  """

  leaves, structure = jax.tree.flatten(inputs)  # captions are of dicts
  boxed = functools.partial(
      _initialize, module, tuple(leaves), structure, method
  )

  def init(key: Array) -> Params:
    return nn.unbox(boxed(key))

  def axes() -> Axes:
    return jax.tree.map(
        lambda x: x.names if _is_box(x) else (None,) * x.ndim,
        jax.eval_shape(boxed, jax.random.key(0)),
        is_leaf=_is_box,
    )

  return init, axes


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _initialize(
    module: nn.Module, leaves: tuple[jax.ShapeDtypeStruct, ...],
    structure: jax.tree_util.PyTreeDef, method: str | None, key: Array,
) -> Any:
  """Fresh parameters in boxes; traced once for equal modules and inputs."""
  inputs = structure.unflatten(leaves)
  return module.lazy_init({'params': key}, *inputs, method=method)['params']


def functions(
    module: nn.Module, names: Sequence[str]
) -> dict[str, Callable[..., Any]]:
  """A module's methods as `(params, *inputs) -> outputs` by name."""

  def call(method: str, params: Params, *args: Any, **kwargs: Any) -> Any:
    return module.apply({'params': params}, *args, method=method, **kwargs)

  return {name: functools.partial(call, name) for name in names}


def counted(
    family: str, module: nn.Module, inputs: Sequence[jax.ShapeDtypeStruct],
    names: Sequence[str],
) -> Model:
  """A model of a module's methods, whose FLOPs are counted.

  Args:
    family: its name.
    module: the network, with its `config`.
    inputs: of its `forward`; see `pure`.
    names: of the methods, of which `forward` is one.
  """
  init, axes = pure(module, *inputs, method='forward')
  fns = functions(module, names)

  def flops() -> int:
    abstract = jax.eval_shape(init, jax.random.key(0))
    return count_flops(fns['forward'], abstract, *inputs)

  return Model(family, module.config, init, fns, axes, flops)


def count_flops(fn: Callable[..., Any], *inputs: Any) -> int:
  """Returns the FLOPs of the matrix products and convolutions of `fn`.

  Two per multiply-add, counted in the traced program: loops count once per
  iteration, of branches the dearest counts, other operations are free.

  Args:
    fn: a function of arrays, of which only shapes and types are used.
    *inputs: trees of arrays or `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: when `fn` holds a loop of unknown length.
  """
  return count_jaxpr(jax.make_jaxpr(fn)(*inputs).jaxpr)


def count_jaxpr(jaxpr: Any, passes: bool = False) -> int:
  """As `count_flops`, of a function that has been traced.

  Args:
    jaxpr: of the function.
    passes: counts products of higher precision as often as a matrix unit for
      bfloat16 has to run for them: 3 times for HIGH, 6 times for HIGHEST.
  """
  return sum(_count_equation(eqn, passes) for eqn in jaxpr.eqns)


def _flat_lecun_normal(key: Array, shape: tuple[int, ...]) -> Array:
  """Lecun normal of a convolution's kernel, drawn as a matrix.

  XLA compiles the random bits of a matrix in a third of the time that those of
  a four-dimensional array take.
  """
  matrix = (math.prod(shape[:-1]), shape[-1])
  return nn.initializers.lecun_normal()(key, matrix).reshape(shape)


def _matmul(
    x: Array, kernel: Array, precision: jax.lax.Precision | None
) -> Array:
  return jax.lax.dot_general(
      x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision
  )


def _runs(eqn: Any) -> int:
  """Passes of a matrix unit for bfloat16 that a product takes."""
  precision = eqn.params['precision']
  if isinstance(precision, tuple):
    precision = precision[0]
  if eqn.invars[0].aval.dtype != jnp.float32:
    return 1
  return {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}.get(
      precision, 1
  )


def _count_equation(eqn: Any, passes: bool) -> int:
  name, params = eqn.primitive.name, eqn.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(
        shape[i] for i in contracted
    ) * (_runs(eqn) if passes else 1)
  if name == 'conv_general_dilated':
    kernel = eqn.invars[1].aval
    features = kernel.shape[params['dimension_numbers'].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * kernel.size // features * (
        _runs(eqn) if passes else 1
    )
  inner = [count_jaxpr(j, passes) for j in jaxprs_in_params(params)]
  if name == 'scan':
    return params['length'] * sum(inner)
  if name == 'shard_map':  # of one device
    axes = params['manual_axes']
    return sum(inner) * math.prod(params['mesh'].shape[a] for a in axes)
  if name == 'pallas_call':  # of one block
    return sum(inner) * math.prod(params['grid_mapping'].grid)
  if name == 'while' and any(inner):
    raise ValueError('cannot count the FLOPs of a loop of unknown length')
  return max(inner) if name == 'cond' else sum(inner)


def _is_box(x: Any) -> bool:
  return isinstance(x, nn.Partitioned)
