# SPDX-License-Identifier: Apache-2.0
"""The keys of compiles: source, options, headers and compiler, identified by content."""
