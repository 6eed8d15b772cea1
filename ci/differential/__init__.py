# SPDX-License-Identifier: Apache-2.0
"""Stock Jinja2 beside every way in which this package renders a template: ``python -m ci.differential``.

The templates are made at random from a grammar (`grammar`), and written for one feature of Jinja2 each, and for the
shapes that real generators of source code have (`features`). Each is rendered three times with the same template
object and other variables (`values`), in all ways (`ways`). Text and errors have to be stock Jinja2's.
"""
