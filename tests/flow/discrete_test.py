# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the discrete flow: golden parity, law, support, sharding."""

import functools

import jax
from jax.extend.core import jaxprs_in_params
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
import scipy.special
import scipy.stats

from dd_jax.flow import discrete
from tests.golden import golden_cases

HIGH_ORDER = ('heun', 'dpmpp_2m', 'deis')


def log(p):
  with np.errstate(divide='ignore'):
    return np.log(p)


def problem(n=37, v=24, c=6, seed=0):
  """Noise, log_p with a third of the codes cut, codes; float32."""
  rng = np.random.default_rng(seed)
  log_p = 2 * rng.normal(size=(n, v))
  log_p[rng.random((n, v)) < 1 / 3] = -np.inf
  log_p -= scipy.special.logsumexp(log_p, axis=1, keepdims=True)
  arrays = rng.normal(size=(n, c)), log_p, rng.normal(size=(v, c))
  return tuple(jnp.asarray(a, jnp.float32) for a in arrays)


@pytest.mark.parametrize('solver', HIGH_ORDER)
@pytest.mark.parametrize('steps, atol', [(50, 2e-2), (100, 6e-3)])
@pytest.mark.parametrize('case', ['case0', 'case1', 'case2'])
def test_golden_flow(case, steps, atol, solver):
  golden = golden_cases.load('discrete_flow')
  noise, codes, probs, index, x_at_t = (
      golden.arrays[f'{case}_{k}']
      for k in ('noise', 'codes', 'probs', 'index', 'x_at_t')
  )
  args = noise, log(probs), codes
  got = discrete.flow_map(*args, steps=steps, solver=solver)
  np.testing.assert_array_equal(got, index)
  states = discrete.path(*args, steps=steps, solver=solver)
  checked = 0
  for i, t in enumerate(golden.meta['cases'][case]['times']):
    if (t * steps).is_integer():
      x = states[int(t * steps)]
      np.testing.assert_allclose(x, x_at_t[:, i], atol=atol)
      checked += 1
  assert checked >= 2


@pytest.mark.parametrize('solver', HIGH_ORDER)
@pytest.mark.parametrize('steps', [50, 100])
def test_golden_flow_at_codebook_size(steps, solver):
  golden = golden_cases.load('discrete_flow_v4096')
  logits = golden.arrays['logits']
  top_k = golden.meta['top_k']
  cut = np.sort(logits, axis=1)[:, -top_k, None]
  log_p = jax.nn.log_softmax(jnp.where(logits < cut, -jnp.inf, logits))
  got = discrete.flow_map(
      golden.arrays['noise'], log_p, golden.arrays['codes'],
      steps=steps, solver=solver,
  )
  stable = golden.arrays['stable']
  assert stable.sum() > 40
  np.testing.assert_array_equal(got[stable], golden.arrays['index'][stable])


@pytest.mark.parametrize(
    'solver, order', [('euler', 1), ('heun', 2), ('dpmpp_2m', 2), ('deis', 2)]
)
def test_order_of_the_error(solver, order):
  golden = golden_cases.load('discrete_flow').arrays
  noise, probs, codes = (
      golden[f'case0_{k}'] for k in ('noise', 'probs', 'codes')
  )
  args = noise, log(probs), codes
  error = [
      np.abs(
          discrete.path(*args, steps=n, solver=solver)[n // 2]
          - golden['case0_x_at_t'][:, 1]
      ).mean()
      for n in (40, 80)
  ]
  assert order - 0.4 < np.log2(error[0] / error[1]) < order + 0.4


@pytest.mark.parametrize('case', ['case0', 'case1', 'case2'])
def test_deis_errs_less_than_dpmpp_2m(case):
  golden = golden_cases.load('discrete_flow').arrays
  noise, probs, codes = (
      golden[f'{case}_{k}'] for k in ('noise', 'probs', 'codes')
  )
  deis, dpmpp_2m = (
      np.abs(
          discrete.path(noise, log(probs), codes, steps=40, solver=solver)[30]
          - golden[f'{case}_x_at_t'][:, 2]
      ).mean()
      for solver in ('deis', 'dpmpp_2m')
  )
  assert deis < dpmpp_2m


def codes_and_p(name):
  rng = np.random.default_rng(0)
  if name == 'with a zero':
    return rng.normal(size=(5, 2)), np.array([0.4, 0, 0.3, 0.05, 0.25])
  if name == 'unit norm':
    codes = rng.normal(size=(32, 8))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    return codes, rng.dirichlet(np.ones(32))
  p = np.exp(3 * rng.normal(size=256))  # peaked: the largest is a third
  return rng.normal(size=(256, 8)), p / p.sum()


def chi_square(index, p):
  """Goodness of fit; cells that expect fewer than five are one cell."""
  expected = len(index) * p
  observed = np.bincount(index, minlength=len(p))
  assert not observed[p == 0].any()
  small = expected < 5
  cells = [
      np.append(a[~small], a[small].sum()) for a in (observed, expected)
  ]
  if cells[1][-1] < 5:
    cells = [np.append(a[:-2], a[-2:].sum()) for a in cells]
  return scipy.stats.chisquare(*cells).pvalue


@pytest.mark.parametrize('name', ['with a zero', 'unit norm', 'peaked'])
def test_draws_follow_p(name):
  codes, p = codes_and_p(name)
  n = 200_000
  noise = jax.random.normal(jax.random.key(0), (n, codes.shape[1]))
  log_p = jnp.broadcast_to(jnp.asarray(log(p), jnp.float32), (n, len(p)))
  default = discrete.flow_map(noise, log_p, codes, chunk=2000)
  assert chi_square(np.asarray(default), p) > 0.001
  coarse = discrete.flow_map(
      noise, log_p, codes, steps=10, solver='euler', chunk=2000
  )
  assert chi_square(np.asarray(coarse), p) < 0.001


@pytest.mark.parametrize('t', [0.1, 0.5, 0.9])
def test_velocity_is_that_of_the_mixture(t):
  x, log_p, codes = problem()
  got = discrete.velocity(x, t, codes, log_p)
  with jax.enable_x64(True):
    x, log_p, codes = (
        jnp.asarray(np.asarray(a), jnp.float64) for a in (x, log_p, codes)
    )

    def log_density(x, log_p):
      squares = jnp.square(x[None] - t * codes).sum(-1)
      return jax.nn.logsumexp(log_p - squares / (2 * (1 - t) ** 2))

    score = jax.vmap(jax.grad(log_density))(x, log_p)
    expected = (x + (1 - t) * score) / t
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_velocity_gives_the_score_of_reversed_time():
  x, log_p, codes = (np.asarray(a, np.float64) for a in problem())
  s = 0.4  # DD2 runs from data at 0 to noise at 1
  kernel = np.exp(log_p) * np.exp(
      -np.square(x[:, None] - (1 - s) * codes[None]).sum(-1) / (2 * s**2)
  )
  pull = np.einsum('nv,nvc->nc', kernel, x[:, None] - (1 - s) * codes[None])
  score = -pull / (s**2 * kernel.sum(1, keepdims=True))
  v = -discrete.velocity(jnp.asarray(x), 1 - s, jnp.asarray(codes),
                         jnp.asarray(log_p))
  np.testing.assert_allclose(-(x + (1 - s) * v) / s, score, rtol=1e-4,
                             atol=1e-4)


def test_time_may_differ_between_tokens():
  x, log_p, codes = problem(n=3)
  t = jnp.asarray([0.0, 0.3, 0.99])
  mixed = discrete.velocity(x, t, codes, log_p)
  for i in range(3):
    row = slice(i, i + 1)
    alone = discrete.velocity(x[row], float(t[i]), codes, log_p[row])
    np.testing.assert_allclose(mixed[row], alone, rtol=1e-4, atol=1e-4)


def test_at_time_zero_the_posterior_is_p():
  x, log_p, codes = problem()
  np.testing.assert_array_equal(
      discrete.posterior_logits(x, 0.0, codes, log_p), log_p
  )
  np.testing.assert_allclose(
      discrete.posterior_mean(x, 0.0, codes, log_p),
      np.exp(log_p) @ np.asarray(codes), rtol=1e-5, atol=1e-5,
  )


@pytest.mark.parametrize('solver', ['euler', *HIGH_ORDER])
def test_codes_outside_the_support_are_never_chosen(solver):
  noise, log_p, codes = problem(n=500)
  # Noise that lies on a code outside the support, far out.
  outside = jnp.argmin(log_p, axis=1)
  noise = 30 * codes[outside]
  index = discrete.flow_map(noise, log_p, codes, steps=20, solver=solver)
  assert np.isfinite(np.take_along_axis(log_p, index[:, None], axis=1)).all()
  states = discrete.path(noise, log_p, codes, steps=20, solver=solver)
  assert np.isfinite(states).all()


@pytest.mark.parametrize('solver', ['euler', *HIGH_ORDER])
def test_one_code_in_the_support_is_reached(solver):
  noise, log_p, codes = problem()
  only = jnp.arange(len(noise)) % len(codes)
  log_p = jnp.where(jax.nn.one_hot(only, len(codes)) > 0, 0.0, -jnp.inf)
  for steps in (1, 2, 3, 100):
    index = discrete.flow_map(noise, log_p, codes, steps=steps, solver=solver)
    np.testing.assert_array_equal(index, only)


def test_row_without_support_gives_zero_and_no_nan():
  noise, log_p, codes = problem()
  alone = discrete.flow_map(noise, log_p, codes)
  log_p = log_p.at[3].set(-jnp.inf)
  index = discrete.flow_map(noise, log_p, codes)
  np.testing.assert_array_equal(index, alone.at[3].set(0))
  assert np.isfinite(discrete.path(noise, log_p, codes)).all()


def test_ties_go_to_the_lowest_index():
  noise, log_p, codes = problem(n=200)
  once = discrete.flow_map(noise, log_p, codes)
  twice = discrete.flow_map(
      noise,
      jnp.concatenate([log_p, log_p], axis=1),
      jnp.concatenate([codes, codes]),
  )
  np.testing.assert_array_equal(once, twice)


def test_log_p_needs_no_normalisation():
  noise, log_p, codes = problem()
  np.testing.assert_array_equal(
      discrete.flow_map(noise, log_p + 5, codes),
      discrete.flow_map(noise, log_p, codes),
  )


def products(jaxpr):
  """Equations of all matrix products, those of inner programs too."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield eqn
    for inner in jaxprs_in_params(eqn.params):
      yield from products(inner)


@pytest.mark.parametrize('solver', ['euler', *HIGH_ORDER])
def test_all_products_have_full_precision(solver):
  # No value shows it here: CPUs know of no other precision.
  program = jax.make_jaxpr(
      functools.partial(discrete.flow_map, solver=solver, chunk=8)
  )(*problem())
  found = [eqn.params['precision'] for eqn in products(program.jaxpr)]
  # Two of an evaluation, in the loop, and one to choose the code.
  highest = jax.lax.Precision.HIGHEST
  evaluations = 2 if solver == 'heun' else 1
  assert found == [(highest, highest)] * (2 * evaluations + 1)


@pytest.mark.parametrize('chunk', [1, 8, 36, 37, 100])
def test_chunks_change_nothing(chunk):
  args = problem()
  np.testing.assert_array_equal(
      discrete.flow_map(*args, chunk=chunk), discrete.flow_map(*args)
  )


def test_sharded_equals_unsharded_without_communication():
  noise, log_p, codes = problem(n=64)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  everywhere = NamedSharding(mesh, PartitionSpec())
  sharded = jax.jit(
      lambda *args: discrete.flow_map(*args, chunk=16),
      in_shardings=(rows, rows, everywhere), out_shardings=rows,
  )
  np.testing.assert_array_equal(
      sharded(noise, log_p, codes), discrete.flow_map(noise, log_p, codes)
  )
  program = sharded.lower(noise, log_p, codes).compile().as_text()
  for collective in ('all-gather', 'all-reduce', 'all-to-all', 'permute'):
    assert collective not in program


def test_one_step_takes_the_likeliest_code():
  noise, log_p, codes = problem()
  np.testing.assert_array_equal(
      discrete.flow_map(noise, log_p, codes, steps=1), log_p.argmax(1)
  )


def test_the_path_starts_at_the_noise_and_has_one_state_per_step():
  noise, log_p, codes = problem()
  states = discrete.path(noise, log_p, codes, steps=7)
  assert states.shape == (7, *noise.shape)
  np.testing.assert_array_equal(states[0], noise)


@pytest.mark.parametrize('option, message', [
    ({'steps': 0}, 'steps is 0'),
    ({'solver': 'rk4'}, "unknown solver 'rk4'.*heun"),
    ({'chunk': 0}, 'chunk is 0'),
])
def test_bad_options_are_refused(option, message):
  with pytest.raises(ValueError, match=message):
    discrete.flow_map(*problem(), **option)
