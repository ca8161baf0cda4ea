# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The small classifier that judges samples of the embedded data sets."""
