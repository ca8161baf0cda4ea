# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Our programs against PyTorch's on the same weights; see `__main__`."""
