# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes pickled networks that bring their source, good ones and bad ones."""

from __future__ import annotations

import collections
import pathlib
import pickle
import tempfile
from typing import Any

import numpy as np

from tests.convert import torch_files
from tests.convert.torch_files import Storage

_FAKES = {
    names: torch_files._function(*names) for names in (
        ('torch_utils.persistence', '_reconstruct_persistent_obj'),
        ('torch.storage', '_load_from_bytes'),
        ('torch._utils', '_rebuild_parameter'),
        ('torch._utils', '_rebuild_tensor_v2'),
        ('torch.nn.modules.container', 'ModuleDict'),
        ('dnnlib.util', 'EasyDict'),
    )
}


class Blob:
  """A storage as torch.save writes it, within the pickle."""

  def __init__(self, values: np.ndarray):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'f'
      torch_files.save_legacy(path, Storage(values))
      self.data = path.read_bytes()

  def __reduce__(self):
    return _FAKES['torch.storage', '_load_from_bytes'], (self.data,)


class Parameter:
  """A trainable tensor, or with `plain` a buffer."""

  def __init__(self, values: np.ndarray, plain: bool = False):
    self.blob, self.shape, self.plain = Blob(values), values.shape, plain

  def __reduce__(self):
    if not self.plain:
      data = Parameter.__new__(Parameter)
      data.blob, data.shape, data.plain = self.blob, self.shape, True
      return _FAKES['torch._utils', '_rebuild_parameter'], (
          data, True, collections.OrderedDict()
      )
    strides = tuple(np.cumprod((1, *self.shape[:0:-1]))[::-1].tolist())
    return _FAKES['torch._utils', '_rebuild_tensor_v2'], (
        self.blob, 0, self.shape, strides[: len(self.shape)], False,
        collections.OrderedDict(),
    )


class Network:
  """A call that would execute `source` when it is unpickled."""

  def __init__(
      self, name: str, state: dict[str, Any], source: str, kind: str = 'class'
  ):
    self.meta = {
        'type': kind, 'version': 6, 'module_src': source, 'class_name': name,
        'state': state,
    }

  def __reduce__(self):
    function = _FAKES['torch_utils.persistence', '_reconstruct_persistent_obj']
    return function, (self.meta,)


class Container:
  """A module whose class comes with PyTorch."""

  def __init__(self, state: dict[str, Any]):
    self.state = state

  def __reduce__(self):
    return _FAKES['torch.nn.modules.container', 'ModuleDict'], (), self.state


class Easy:
  """A dict of a class of its own."""

  def __init__(self, **values: Any):
    self.values = values

  def __reduce__(self):
    return (
        _FAKES['dnnlib.util', 'EasyDict'], (), None, None,
        iter(self.values.items()),
    )


def state(parameters=(), buffers=(), modules=()) -> dict[str, Any]:
  """The attributes of a module."""
  return {
      'training': False, '_parameters': collections.OrderedDict(parameters),
      '_buffers': collections.OrderedDict(buffers),
      '_backward_hooks': collections.OrderedDict(),
      '_non_persistent_buffers_set': set(),
      '_modules': collections.OrderedDict(modules),
  }


def network(tensors: dict[str, np.ndarray], source: str = '') -> Network:
  """Modules nested as EDM's denoiser has them, with tensors by dotted name."""

  def build(names: dict[str, np.ndarray], path: str) -> Any:
    own = {k: v for k, v in names.items() if '.' not in k}
    groups: dict[str, dict[str, np.ndarray]] = {}
    for k, v in names.items():
      if '.' in k:
        first, rest = k.split('.', 1)
        groups.setdefault(first, {})[rest] = v
    made = state(
        {k: Parameter(v) for k, v in own.items() if 'filter' not in k},
        {k: Parameter(v, True) for k, v in own.items() if 'filter' in k}
        or {'unused': None},
        {k: build(v, f'{path}.{k}') for k, v in groups.items()},
    )
    if path in ('.model.enc', '.model.dec'):
      return Container(made)
    made |= {'_init_args': (), '_init_kwargs': Easy(sigma_data=0.5)}
    return Network('Module', made, source)

  return build(tensors, '')


def save(path, tree: Any, protocol: int = 4) -> None:
  with torch_files.installed(torch_files.FAKES | _FAKES):
    path.write_bytes(pickle.dumps(tree, protocol))
