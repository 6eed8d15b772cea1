# SPDX-License-Identifier: Apache-2.0
"""Floor 3: memoized calls, and where every result came from."""
