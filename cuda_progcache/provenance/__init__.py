# SPDX-License-Identifier: Apache-2.0
"""Where results came from: readers of what compiles and memoized calls recorded."""
