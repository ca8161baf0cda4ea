# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""How well each solver agrees with a fine float64 solution, as a table.

  python -m dd_jax.tools.flow_table --tokens=5000
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from dd_jax import console
from dd_jax.flow import agreement

_TOKENS = flags.DEFINE_integer(
    'tokens', 5000, 'Tokens per problem.', lower_bound=1
)
_SEED = flags.DEFINE_integer('seed', 0, 'Seed of the problems.')


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  for problem in agreement.PROBLEMS:
    table = agreement.measure(problem, _TOKENS.value, _SEED.value)
    console.table(
        f'{problem.name} (V={problem.vocab_size}, C={problem.code_dim}): '
        f'agreement with {agreement.REFERENCE_STEPS} steps, {_TOKENS.value} '
        'tokens',
        ('steps', *agreement.SOLVERS),
        [
            [n, *(table[n, solver] for solver in agreement.SOLVERS)]
            for n in agreement.STEPS
        ],
    )


if __name__ == '__main__':
  app.run(main)
