# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Chips, and how long a program takes on one at the least."""

from __future__ import annotations

import dataclasses

GIGA = 10**9

ASSUMPTIONS = (
    'compute: matrix products and convolutions at the peak for bfloat16; those '
    'asked for at float32 (HIGHEST) as six passes, at HIGH as three',
    'memory: every operand and result of a fused operation goes through HBM '
    'once, at its full bandwidth, unless the compiler keeps it on the chip',
    'collectives: rings over all links of a chip, one direction, not hidden '
    'behind compute',
    'time = max(compute, memory) + collectives, which is optimistic; MFU = '
    'model FLOPs / (time x chips x peak) is what is left to lose',
)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip of a slice.

  Attributes:
    peak_flops: dense bfloat16 FLOP/s.
    hbm_bytes: size of its memory; vendors' GB are taken as 10^9 bytes, which
      leaves some for the runtime.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s that a chip sends over all of its links.
  """

  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float


# Google Cloud TPU documentation, system architecture, one page per version:
# bf16 peak, HBM capacity, HBM bandwidth, and interchip interconnect in Gbit/s.
CHIPS = {
    'v4': Chip(275e12, 32 * GIGA, 1200 * GIGA, 2400 / 8 * GIGA),
    'v5e': Chip(197e12, 16 * GIGA, 800 * GIGA, 1600 / 8 * GIGA),
    'v5p': Chip(459e12, 95 * GIGA, 2765 * GIGA, 4800 / 8 * GIGA),
    'v6e': Chip(918e12, 32 * GIGA, 1600 * GIGA, 3200 / 8 * GIGA),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Seconds that parts of one run of a program take; see `ASSUMPTIONS`."""

  compute: float
  memory: float
  collectives: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.memory) + self.collectives

  @property
  def bound(self) -> str:
    """What takes longest."""
    parts = dataclasses.asdict(self)
    return max(parts, key=parts.__getitem__)


def estimate(
    chip: Chip, *, flops: float, hbm_bytes: float, sent_bytes: float
) -> Estimate:
  """The time of a program.

  Args:
    chip: see `CHIPS`.
    flops: per chip, products of high precision counted by their passes.
    hbm_bytes: per chip, read and written.
    sent_bytes: per chip, in rings.
  """
  return Estimate(
      flops / chip.peak_flops, hbm_bytes / chip.hbm_bandwidth,
      sent_bytes / chip.link_bandwidth,
  )


def utilisation(
    chip: Chip, model_flops: float, seconds: float, chips: int
) -> float:
  """Model FLOPs utilisation in [0, 1]."""
  return model_flops / (seconds * chips * chip.peak_flops)
