# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against ``cuda.core``'s own program cache: ``python -m ci.bench``.

Each benchmark names its sides. They run in one process, in turns, with the garbage collector off, and their medians are
compared with a goal. ``--only PATTERN`` chooses benchmarks; ``--json FILE`` writes the results.
"""
