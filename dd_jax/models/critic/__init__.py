# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""The denoiser and discriminator that learn what a student makes."""
