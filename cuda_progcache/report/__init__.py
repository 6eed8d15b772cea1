# SPDX-License-Identifier: Apache-2.0
"""A cache as one HTML file, to be read without network.

:mod:`.data` says what is shown, :mod:`.listings` and :mod:`.plots` add to it, and :mod:`.page` writes it.
"""
