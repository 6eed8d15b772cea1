# SPDX-License-Identifier: Apache-2.0
"""Floor 0: files, locks, process liveness and other basics that know nothing of programs or caches."""
