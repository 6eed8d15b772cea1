# SPDX-License-Identifier: Apache-2.0
"""Provenance: where results came from, read from the records of compiles and memoized calls."""
