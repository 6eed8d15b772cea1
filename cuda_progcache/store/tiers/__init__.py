# SPDX-License-Identifier: Apache-2.0
"""Stores beyond this machine: Redis, HTTP servers, object stores and OCI registries, as levels of a stack."""
