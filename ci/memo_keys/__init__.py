# SPDX-License-Identifier: Apache-2.0
"""Whether a memoized function's key can be trusted: programs that are edited, and pairs of values that differ."""
