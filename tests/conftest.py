# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Test set-up: eight CPU devices, strict broadcasting, no network."""

import os
import socket

from tests.command import COMPILE_FAST

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + f' {COMPILE_FAST}'
)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from absl import flags
import jax
import pytest

flags.FLAGS.mark_as_parsed()
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Fails any test that reaches beyond this machine."""
  connect = socket.socket.connect

  def guarded(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6):
      if address[0] not in ('127.0.0.1', '::1', 'localhost'):
        raise AssertionError(f'a test reached for the network: {address}')
    return connect(self, address)

  monkeypatch.setattr(socket.socket, 'connect', guarded)


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
  """Compiled programs, for all processes of all workers."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  (folder / 'cache').mkdir(exist_ok=True)
  return folder / 'cache'
