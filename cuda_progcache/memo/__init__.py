# SPDX-License-Identifier: Apache-2.0
"""Memoized calls on disk, and where every result came from."""

from cuda_progcache.memo import code as code  # it tells cuda_progcache.memo.digest how functions are digested
