# SPDX-License-Identifier: Apache-2.0
"""Proves that what was compiled here serves there.

``python -m ci.elsewhere`` compiles programs in one place, carries the cache to others and asks for the programs again.
A place is a directory, a virtual environment and a user of its own; others have another Python. Every answer is held
against a fresh compile in the same place: a hit has to have the bytes and the log of that compile, and a miss has to
have other ones.
"""
