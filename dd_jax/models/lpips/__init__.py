# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The perceptual distance LPIPS on the features of VGG16."""
