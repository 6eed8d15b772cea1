# SPDX-License-Identifier: Apache-2.0
"""A service in memory that fails on demand, in ways that no real server does."""

from __future__ import annotations

import threading

from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.tiers.engine import Engine

CUBIN = b"\x7fELF" + bytes(range(256))


class Shelf(Engine):
    """Objects in memory, with a switch for the trouble that a service can be in."""

    keeps_time = True

    def __init__(self, name="shelf://here"):
        self.name = name
        self.objects = {}
        self.calls = []
        self.trouble = None

    def _asked(self, what, names, until):
        self.calls.append((what, threading.current_thread().name))
        if callable(self.trouble):
            self.trouble(until)
        elif self.trouble is not None:
            raise self.trouble

    def get(self, name, *, limit, until):
        self._asked("get", [name], until)
        return self.objects.get(name)

    def put(self, name, data, *, until):
        self._asked("put", [name], until)
        self.objects[name] = data

    def delete(self, names, *, until):
        self._asked("delete", names, until)
        for name in names:
            self.objects.pop(name, None)

    def list(self, prefix, *, until):
        return iter(())

    def close(self):
        pass


def name_of(key):
    digest = entry_digest(key)
    return f"v1/programs/{digest[:2]}/{digest[2:]}"
