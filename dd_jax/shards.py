# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Stages whose artefact is a set of shards, on one host or on many.

Host 0 writes: what it sees on its disk is what all of them go by.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from dd_jax.data import files
from dd_jax.stages import Context

FOLDER = 'data'  # of the set, within the stage's


def pending(writer: files.Writer, manifest: files.Manifest) -> list[int]:
  """The shards that are still to be made, the same on every host."""
  missing = np.zeros(manifest.num_shards, bool)
  missing[writer.pending()] = True
  if jax.process_count() > 1:
    missing = multihost_utils.broadcast_one_to_all(missing)
  return np.flatnonzero(missing).tolist()


def finish(writer: files.Writer, context: Context) -> dict[str, Any]:
  """Completes the set.

  Returns:
    What the stage returns: `artefact`, the folder, and `hashes` of its
    manifest.
  """
  if jax.process_index() == 0:
    writer.finalize()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(context.name)
  text = (context.directory / FOLDER / files.MANIFEST).read_text()
  return {
      'artefact': FOLDER,
      'hashes': {'manifest': hashlib.sha256(text.encode()).hexdigest()},
  }
