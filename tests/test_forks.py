# SPDX-License-Identifier: Apache-2.0
"""Functions registered for forked children are called in the child, as long as their object is alive."""

from __future__ import annotations

import gc
import os
import sys

from cuda_progcache._util import forks


class Counting:
    def __init__(self, told, name):
        self.told, self.name = told, name
        forks.in_child(self.renew)
        forks.in_child(self.tell)

    def __eq__(self, other):
        """Make all instances equal and unhashable; neither may matter."""
        return isinstance(other, Counting)

    __hash__ = None

    def renew(self):
        self.told.append(f"{self.name} renewed")

    def tell(self):
        self.told.append(f"{self.name} told")
        if self.name == "broken":
            raise OSError("broken in the child")


def in_child(work):
    """Return the result of work() in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(writing, work().encode())
        os._exit(0)
    os.close(writing)
    assert os.waitpid(pid, 0)[1] == 0
    with open(reading) as answer:
        return answer.read()


def test_each_living_object_is_called_in_a_child_and_in_its_children(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: told.append(str(raised.exc_value.exceptions[0])))
    gc.collect()  # what other tests have left
    before = len(forks._methods)
    kept = [Counting(told, name) for name in ("broken", "gone", "whole")]
    del kept[1]
    gc.collect()
    each = ["broken renewed", "broken told", "whole renewed", "whole told", "broken in the child"]
    assert in_child(lambda: ", ".join(told)) == ", ".join(each)
    assert in_child(lambda: in_child(lambda: ", ".join(told))) == ", ".join(2 * each)
    assert told == []
    del kept
    gc.collect()
    assert len(forks._methods) == before
    assert in_child(lambda: ", ".join(told)) == ""
