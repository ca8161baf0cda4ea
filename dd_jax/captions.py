# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Captions to features of a frozen text encoder: sharded, resumable.

Every program runs on the same number of rows of the same length, so that
features depend on their caption alone, and the data are the same bytes however
often the job was killed.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import functools
import hashlib
from typing import Any, Literal

import jax
from jax.sharding import Mesh
import numpy as np

from dd_jax import (
    build,
    checkpoint,
    console,
    hooks,
    registry,
    sharding,
    shards,
)
from dd_jax import config as config_lib
from dd_jax.data import captions as captions_lib
from dd_jax.data import tokens as tokens_lib
from dd_jax.model import Model, Params
from dd_jax.stages import Context

_MODEL = 'model'


@dataclasses.dataclass(frozen=True)
class CaptionsConfig:
  """A stage of kind 'captions'.

  Attributes:
    encoder: export folder or 'stage:name' of a text encoder, or the fields of
      `build.FrozenConfig`; or {'model': ...} with `name` and fields of one
      whose weights its config fixes, such as `words`.
    prompts: `source`, an entry of `registry.TABLES['prompts']`, and its
      arguments.
    tokenizer: `name`, an entry of `registry.TABLES['tokenizers']`, and its
      arguments.
    shard_size: captions a file; a kill loses at most one.
    batch_size: captions a program run, over all hosts.
    caption_length: most tokens of a caption; longer ones are refused.
    dtype: type in which features are stored.
  """

  encoder: str | Mapping[str, Any]
  prompts: Mapping[str, Any]
  tokenizer: Mapping[str, Any]
  shard_size: int
  batch_size: int
  caption_length: int = 120
  dtype: Literal['float16', 'bfloat16'] = 'float16'


def run(context: Context) -> dict[str, Any]:
  """Runs a stage of kind 'captions'; see `CaptionsConfig`.

  Returns:
    `artefact`, the folder of the captions, and `hashes` of their manifest.

  Raises:
    ValueError: sizes that do not fit the mesh or each other, or a caption that
      is empty or too long; names its file and line.
    Preempted: SIGTERM came between two shards.
  """
  config = config_lib.make(CaptionsConfig, context.config, context.name)
  mesh = context.mesh
  sharding.check_batch(config.batch_size, mesh)
  if config.shard_size % config.batch_size:
    raise ValueError(
        f'{context.name}: shard_size={config.shard_size} is not a multiple of '
        f'batch_size={config.batch_size}'
    )
  prompts = from_table('prompts', 'source', config.prompts, context)
  encoder = open_encoder(
      config.encoder, config.tokenizer, config.caption_length, context
  )
  # All of them at once: a bad line should not stop a long job late.
  tokens, mask = encoder.tokenizer(prompts.texts, prompts.where)
  manifest = captions_lib.Manifest(
      captions=len(prompts), shard_size=config.shard_size,
      width=encoder.model.config.width, caption_length=config.caption_length,
      dtype=config.dtype, num_classes=prompts.num_classes,
      provenance={
          'encoder': encoder.digest, 'prompts': prompts.sha256,
          'tokenizer': encoder.tokenizer.identity,
          'micro_batch': config.batch_size,
      },
  )
  writer = captions_lib.CaptionWriter(
      context.directory / shards.FOLDER, manifest
  )
  todo = shards.pending(writer, manifest)
  done = len(prompts) - sum(len(manifest.shard_ids(s)) for s in todo)
  with console.Progress(context.name, len(prompts), done) as bar:
    for shard in todo:
      hooks.raise_if_preempted(
          f'{context.name}: stopped by a signal with {done} of '
          f'{len(prompts)} captions written'
      )
      ids = manifest.shard_ids(shard)
      rows = slice(ids.start, ids.stop)
      features = encoder.encode(tokens[rows], mask[rows], config.batch_size)
      if jax.process_index() == 0:
        writer.write(
            shard, features=features, texts=prompts.texts[rows],
            labels=None if prompts.labels is None else prompts.labels[rows],
        )
      done += len(ids)
      bar.update(done)
  return shards.finish(writer, context)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """A tokenizer and the network that it is for.

  Attributes:
    tokenizer: captions to tokens.
    model: tokens to features.
    params: of the network, on the mesh.
    digest: tells encoders apart that give different features.
    mesh: where the network runs.
  """

  tokenizer: tokens_lib.Tokenizer
  model: Model
  params: Params
  digest: str
  mesh: Mesh

  @functools.cached_property
  def _program(self) -> Any:
    return jax.jit(
        self.model.fns['encode'],
        out_shardings=sharding.replicated(self.mesh),
    )

  def encode(
      self, tokens: np.ndarray, mask: np.ndarray, batch_size: int
  ) -> list[np.ndarray]:
    """Features (tokens, width) of each row's valid tokens."""
    throttle = hooks.Throttle()
    chunks = []
    for start in range(0, len(tokens), batch_size):
      rows = slice(start, start + batch_size)
      # The last batch may be short: it is filled up and cut.
      full = {
          name: np.resize(x[rows], (batch_size, x.shape[1]))
          for name, x in (('tokens', tokens), ('mask', mask))
      }
      batch = sharding.place_rows(full, self.mesh)
      chunks.append(
          self._program(self.params, batch['tokens'], batch['mask'])
      )
      throttle.add(chunks[-1])
    features = (row for chunk in chunks for row in np.asarray(chunk))
    return [x[valid] for x, valid in zip(features, mask, strict=False)]


def open_encoder(
    encoder: str | Mapping[str, Any], tokenizer: Mapping[str, Any],
    caption_length: int, context: Context,
) -> TextEncoder:
  """A text encoder with its tokenizer; see `CaptionsConfig`.

  Raises:
    ValueError: entries that are not well formed, or a tokenizer that the
      encoder is too small for.
  """
  words = from_table(
      'tokenizers', 'name', {'length': caption_length, **tokenizer}, context
  )
  model, params, digest = _encoder(encoder, context)
  for name, found, limit in (
      ('the encoder has vocab_size', words.vocab_size,
       model.config.vocab_size),
      ('caption_length is', words.length, caption_length),
  ):
    if found > limit:
      raise ValueError(
          f'{context.name}: {name} {limit}, but that of the tokenizer is '
          f'{found}'
      )
  return TextEncoder(words, model, params, digest, context.mesh)


def _encoder(
    entry: str | Mapping[str, Any], context: Context
) -> tuple[Model, Params, str]:
  """The encoder, its parameters on the mesh, and a hash of both."""
  if isinstance(entry, str) or _MODEL not in entry:
    models, params = build.load_frozen(
        {'encoder': entry}, context.resolve, context.mesh, context.rules
    )
    path = entry if isinstance(entry, str) else entry['path']
    digest = checkpoint.describe(context.resolve(path))['hash']
    model, tree = models['encoder'], params['encoder']
    if not isinstance(entry, str) and entry.get('dtype'):
      digest = f'{digest} as {entry["dtype"]}'
  else:
    model = build.build_model(entry[_MODEL])
    values = dataclasses.asdict(model.config)
    if 'seed' not in values:
      raise ValueError(
          f'{context.name}: the weights of a {model.family!r} are not fixed by '
          'its config; give an export'
      )
    tree = jax.device_put(
        model.init(jax.random.key(0)), sharding.replicated(context.mesh)
    )
    text = config_lib.canonical_json({'name': model.family, **values})
    digest = hashlib.sha256(text.encode()).hexdigest()
  if 'encode' not in model.fns:
    raise ValueError(
        f'{context.name}: a {model.family!r} does not encode captions'
    )
  return model, tree, digest


def from_table(
    table: str, key: str, values: Mapping[str, Any], context: Context
) -> Any:
  """What an entry of a registry table makes of its arguments."""
  fields = dict(values)
  if key not in fields:
    raise ValueError(f'{context.name}: {dict(values)} lacks {key!r}')
  make = registry.get(table, fields.pop(key))
  if 'path' in fields:
    fields['path'] = context.resolve(fields['path'])
  try:
    return make(**fields)
  except TypeError as e:
    raise ValueError(f'{context.name}: {dict(values)}: {e}') from e
