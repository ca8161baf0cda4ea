# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""dd_jax: expensive generative models made cheap, in JAX."""

__version__ = '0.1.0'
