# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""What the converter knows of one kind of released file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from dd_jax.convert import table

Tensors = Mapping[str, Any]  # arrays or lazy arrays by the file's names

# More than any network has. What is inferred from a file makes arrays and
# layers, of which a few bytes could ask for more than there is memory or time.
MAX_LAYERS = 128
MAX_BLOCKS = 16  # levels of a UNet or a tokenizer, and blocks of a level
MAX_SLOTS = 1 << 14  # tokens of an image or a caption
MAX_SCALES = 64


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of file; its tensors are weights, or one of three other things.

  Attributes:
    model: registry entry of the network that the file is for.
    signature: names that every such file has; the longest that fits tells
      which family a file is.
    infer: `(tensors, given) -> fields` of the model's config, read from shapes;
      `given` are the fields that the user set. Raises `Unknown` for one that
      the tensors do not tell.
    rows: `config -> table`.
    wrapper: keys around the weights in a released file.
    buffers: `config -> arrays` that the program makes itself and also saves.
      Those of a file must have these values, unless they are `kept`.
    kept: templates of tensors that nothing determines and the network does not
      need: they stay beside it and go back with it.
    dropped: templates of tensors that have no part in the network. Caches are
      dropped in every family.
    tied: names of tensors that a file may repeat, and the names of those whose
      values they have; they are compared, and go back where they were.
    under: what stands before the names of this network in a file of several;
      `signature` are full names, and the other networks are left out.
    beside: what stands before the names of other networks, where several of a
      file's are this one's parts.
  """

  model: str
  signature: tuple[str, ...]
  infer: Callable[[Tensors, Mapping[str, Any]], dict[str, Any]]
  rows: Callable[[Any], table.Table]
  wrapper: tuple[str, ...] = ()
  buffers: Callable[[Any], dict[str, np.ndarray]] = lambda config: {}
  kept: tuple[str, ...] = ()
  dropped: tuple[str, ...] = ()
  tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
  under: str = ''
  beside: tuple[str, ...] = ()

  def fits(self, names: Iterable[str]) -> bool:
    return set(self.signature) <= set(names)

  def pick(self, tensors: Tensors) -> dict[str, Any]:
    """What belongs to this network, by its names without `under`."""
    names = {k: k.removeprefix(self.under) for k in tensors}
    return {
        name: tensors[k] for k, name in names.items()
        if k.startswith(self.under) and not self.is_dropped(name)
    }

  def is_kept(self, name: str) -> bool:
    return table.matches(self.kept, name)

  def is_dropped(self, name: str) -> bool:
    return (
        'kv_cache' in name.split('.') or name.startswith(self.beside)
        or table.matches(self.dropped, name)
    )


class Unknown(ValueError):
  """A field of a config that the tensors do not tell."""

  def __init__(self, field: str, example: Any, reason: str):
    super().__init__(
        f'{field}: {reason}; give it, for example --config={field}={example}'
    )


def size(
    tensors: Tensors, name: str, axis: int, most: float = math.inf
) -> int:
  """The size of a tensor that must be there.

  Raises:
    ValueError: it is not, has too few axes or no values, or is larger than
      `most`.
  """
  if name not in tensors:
    raise ValueError(f'there is no tensor {name!r}, which tells the sizes')
  shape = tensors[name].shape
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f'tensor {name!r} has shape {tuple(shape)}: too few axes')
  if not math.prod(shape):  # the other axes cost nothing, and can be any number
    raise ValueError(f'tensor {name!r} has shape {tuple(shape)}: no values')
  if shape[axis] > most:
    raise ValueError(f'tensor {name!r} has shape {tuple(shape)}: too large')
  return shape[axis]


def count(tensors: Tensors, template: str, most: int = MAX_LAYERS) -> int:
  """How many numbers `{i}` of a template there are, counted from 0.

  Raises:
    ValueError: more than `most`.
  """
  number = 0
  while template.replace('{i}', str(number)) in tensors:
    number += 1
  if number > most:
    raise ValueError(f'there are {number} tensors {template!r}: too many')
  return number


# Token maps of the released networks, by their count and number of tokens.
_RELEASED = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 256 x 256
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 512 x 512
)


def patch_nums(scales: int, tokens: int | None = None) -> tuple[int, ...]:
  """Sides of the token maps of VAR.

  Args:
    scales: how many there are.
    tokens: of all maps together, if known.

  Raises:
    Unknown: several answers fit, or none.
  """
  if scales < 1:
    raise Unknown('patch_nums', '1,2,3,4', f'there are {scales} scales')
  for sides in _RELEASED:
    total = sum(n * n for n in sides)
    if len(sides) == scales and tokens in (None, total):
      return sides
  found = [] if tokens is None else _squares(scales, tokens, 1)
  if len(found) != 1:
    kind = 'several sequences' if found or tokens is None else 'no sequence'
    total = '' if tokens is None else f' with {tokens} tokens'
    raise Unknown(
        'patch_nums', ','.join(map(str, range(1, scales + 1))),
        f'{kind} of {scales} scales{total} fit'
    )
  return found[0]


def _squares(
    terms: int, total: int, least: int, limit: int = 2
) -> list[tuple[int, ...]]:
  """Increasing sequences from `least` whose squares sum to `total`."""
  rest = total - least * least
  if terms == 1 or rest <= 0:
    return [(least,)] if terms == 1 and rest == 0 else []
  found: list[tuple[int, ...]] = []
  following = least + 1
  while len(found) < limit and rest >= sum(
      (following + i) ** 2 for i in range(terms - 1)
  ):
    found += [
        (least, *tail) for tail in _squares(terms - 1, rest, following, limit)
    ]
    following += 1
  return found[:limit]
