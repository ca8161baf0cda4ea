# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Utilisation from analytic FLOPs.

XLA's own count sees the body of a loop once, so it is wrong by the depth for
scanned layers; models count their own multiply-adds instead.
"""

from __future__ import annotations

import jax

# Dense bfloat16 peak of one chip in FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 2307e12,
    'NVIDIA A100': 312e12,
    'NVIDIA H100': 989e12,
    'NVIDIA H200': 989e12,
}


def peak_flops(device: jax.Device) -> float | None:
  """Peak of a device, or None where the table has no such kind."""
  kind = device.device_kind
  matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None


def utilisation(
    flops_per_step: float, seconds_per_step: float,
    devices: list[jax.Device],
) -> float | None:
  """Model FLOPs utilisation in [0, 1]; None on devices of unknown peak."""
  peak = peak_flops(devices[0])
  if peak is None:
    return None
  return flops_per_step / seconds_per_step / (peak * len(devices))
