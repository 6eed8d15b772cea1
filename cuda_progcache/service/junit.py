# SPDX-License-Identifier: Apache-2.0
"""JUnit reports, the format that CI servers display (``<testsuite>`` and ``<testcase>``, as in Jenkins's schema)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple


class Case(NamedTuple):
    """The test case of one program.

    Attributes
    ----------
    suite, name : str
        The kernel; the parameters and architecture.
    seconds : float
    failure, skipped : str
        Why the program failed or was skipped; empty if it wasn't.
    """

    suite: str
    name: str
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""


def write(path: str | os.PathLike[str], name: str, cases: Sequence[Case]) -> None:
    """Write a report; raises OSError if that fails."""
    from xml.etree import ElementTree as ET

    suite = ET.Element(
        "testsuite",
        name=name,
        tests=str(len(cases)),
        failures=str(sum(bool(case.failure) for case in cases)),
        errors="0",
        skipped=str(sum(bool(case.skipped) for case in cases)),
        time=f"{sum(case.seconds for case in cases):.3f}",
    )
    for case in cases:
        made = ET.SubElement(
            suite, "testcase", classname=_plain(case.suite), name=_plain(case.name), time=f"{case.seconds:.3f}"
        )
        if case.failure:
            first = _plain(case.failure).strip().splitlines()[0]
            ET.SubElement(made, "failure", message=first).text = _plain(case.failure)
        elif case.skipped:
            ET.SubElement(made, "skipped", message=_plain(case.skipped))
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def _plain(text: str) -> str:
    """Return text with the characters that XML 1.0 doesn't allow replaced by U+FFFD."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
