# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""How well images fit the captions that they were made of, by CLIP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import time
from typing import Any

import jax
import numpy as np

from dd_jax import captions, console, scoring, sharding
from dd_jax import config as config_lib
from dd_jax.evals import clip_score, fid
from dd_jax.model import Model, Params
from dd_jax.stages import Context

PROTOCOL = 'clip-score'
_JUDGES = ('clip',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipScoreConfig(scoring.SamplesConfig):
  """A stage of kind 'clip_score'; figures are of one CLIP network.

  Attributes:
    clip: export folder of the CLIP network.
    tokenizer: `name`, an entry of `registry.TABLES['tokenizers']`, and its
      arguments; `length` is the network's if it is not there.
    samples: see `scoring.SamplesConfig`.
  """

  clip: str
  tokenizer: Mapping[str, Any]
  samples: int = 5000


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'clip_score'; `report/clip_score.json` is its result.

  Returns:
    `artefact`, the folder of the result, and `hashes` of it.

  Raises:
    ValueError: settings or sizes that do not fit, or a network of classes.
    Preempted: SIGTERM came; nothing is kept.
  """
  config = config_lib.make(ClipScoreConfig, context.config, context.name)
  if not config.captions:
    raise ValueError(
        f'{context.name}: a CLIP score is of captions; name a set of them '
        '(captions)'
    )
  began = time.monotonic()
  models, params, conditions = scoring.load(context, config, _JUDGES)
  clip = models['clip']
  if 'similarity' not in clip.fns:
    raise ValueError(
        f'{context.name}: clip={config.clip}: a {clip.family!r} does not '
        'compare images with captions'
    )
  tokenizer = captions.from_table(
      'tokenizers', 'name',
      {'length': clip.config.context_length, **config.tokenizer}, context,
  )
  for name, found, limit in (
      ('vocab_size', tokenizer.vocab_size, clip.config.vocab_size),
      ('context_length', tokenizer.length, clip.config.context_length),
  ):
    if found > limit:
      raise ValueError(
          f'{context.name}: the CLIP network has {name} {limit}, but that of '
          f'the tokenizer is {found}'
      )
  seen = hashlib.sha256()

  def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for pixels, numbers in scoring.samples(
        context, config, models, params, conditions, fid.to_uint8, seen
    ):
      texts = [conditions.text(i) for i in numbers.tolist()]
      yield pixels, tokenizer(texts, [f'caption {i}' for i in numbers])[0]

  program = make_similarity(clip, context.mesh)

  def similarity(images: np.ndarray, tokens: np.ndarray) -> Any:
    rows = {'image': images, 'tokens': tokens}
    return program(params['clip'], sharding.place_rows(rows, context.mesh))

  figures = clip_score.evaluate(
      pairs(), similarity, size=clip.config.image_size,
      batch_size=config.batch_size,
  )
  row = {
      'protocol': PROTOCOL,
      **figures,
      'seed': context.seed,
      'settings': scoring.plain(config),
      'clip_config': dataclasses.asdict(clip.config),
      'tokenizer': tokenizer.identity,
      'hashes': {
          **scoring.hashes_of(context, config, conditions, _JUDGES),
          'samples': seen.hexdigest(),
      },
      'environment': scoring.environment(),
  }
  if jax.process_index() == 0:
    file = context.directory / 'report' / 'clip_score.json'
    scoring.write_json(file, row)
    console.table('CLIP score', ('figure', 'value'), list(figures.items()))
    console.say(f'{context.name}: {time.monotonic() - began:.0f} s, {file}')
  return {
      'artefact': 'report', 'hashes': {'row': scoring.digest_of(row)}
  }


def make_similarity(clip: Model, mesh: Any) -> Callable[..., jax.Array]:
  """A jitted `(params, rows)` -> cosines (B,), whole on every host.

  Rows are `image` as `clip_score.preprocess` gives it and `tokens`.
  """

  def apply(params: Params, rows: Mapping[str, jax.Array]) -> jax.Array:
    return clip.fns['similarity'](params, rows['image'], rows['tokens'])

  return jax.jit(apply, out_shardings=sharding.replicated(mesh))
