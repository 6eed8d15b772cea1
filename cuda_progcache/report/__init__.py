# SPDX-License-Identifier: Apache-2.0
"""The report: a cache as one self-contained HTML file, which can be read without a network.

:mod:`.data` collects the values to show, :mod:`.listings` and :mod:`.plots` add to them, and :mod:`.page` writes the
file.
"""
