# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths on disks and addresses of buckets."""

from __future__ import annotations

import os

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
  """The same place in full; addresses such as gs://bucket stay as they are."""
  path = epath.Path(path)
  return path if '://' in os.fspath(path) else path.expanduser().resolve()
