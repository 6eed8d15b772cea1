# SPDX-License-Identifier: Apache-2.0
"""The compile service, the kernel library and prewarming."""
