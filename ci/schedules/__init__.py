# SPDX-License-Identifier: Apache-2.0
"""Every schedule of the store's operations: on a disk in memory, call by call, in every order that can matter.

``python -m ci.schedules`` tries them at length and prints how many; ``tests/store/test_store_schedules.py`` tries a
bounded part of them.
"""
