# SPDX-License-Identifier: Apache-2.0
"""A fleet of hosts that share a tier, simulated on one machine, whose lease holders and server are killed."""
