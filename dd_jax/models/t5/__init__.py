# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The text encoder of T5 and its weight table."""
