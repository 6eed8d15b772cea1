# SPDX-License-Identifier: Apache-2.0
"""Benchmarks beside ``cuda.core``'s own program cache: ``python -m ci.bench``.

Each benchmark names its sides; they run in one process, in turns, with the garbage collector off, and medians are
compared with the figure to reach. ``--only PATTERN`` chooses, ``--json FILE`` writes what was measured.
"""
