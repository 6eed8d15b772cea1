# SPDX-License-Identifier: Apache-2.0
"""Memoized calls on disk, and where every result came from."""
