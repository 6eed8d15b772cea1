# SPDX-License-Identifier: Apache-2.0
"""Memoized calls on disk, with the provenance of every result."""

from cuda_progcache.memo import code as code  # registers with cuda_progcache.memo.digest how functions are digested
