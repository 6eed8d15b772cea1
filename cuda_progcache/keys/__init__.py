# SPDX-License-Identifier: Apache-2.0
"""What identifies a compile: source, options, headers and compiler, by content."""
