# SPDX-License-Identifier: Apache-2.0
"""Source to binary: NVRTC, libNVVM and nvJitLink, through a cache."""
