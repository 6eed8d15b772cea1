# SPDX-License-Identifier: Apache-2.0
"""Floor 0: files, locks and liveness, with no idea of programs or caches."""
