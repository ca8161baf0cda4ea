# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""CLIP: images and captions in one space, and its weight table."""
