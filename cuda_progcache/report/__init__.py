# SPDX-License-Identifier: Apache-2.0
"""A cache as one HTML file: :mod:`.data` says what is shown, :mod:`.listings` and :mod:`.plots` add to it,
:mod:`.page` writes it.
"""
