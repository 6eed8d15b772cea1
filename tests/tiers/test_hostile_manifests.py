# SPDX-License-Identifier: Apache-2.0
"""Hostile header manifests: whatever a tier's manifest says, no lookup fails and no lookup is misled."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache import ProgramOptions
from cuda_progcache.keys.elsewhere import from_elsewhere
from cuda_progcache.keys.headers import HeaderSet, SearchPath, file_digest, holds
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.plain_text import alike
from cuda_progcache.keys.schema import base_key

EMPTY = hashlib.sha256().hexdigest()
VALUES_TRIED = (
    [-1, 0, 1, 2, 99, 10**30, 1e308 * 10, "", "\0", "a\0b", "\ud800", "\udc80", "x" * 300, EMPTY, "/dev", "..", None,
     True, [], {}, "A", "I", "N", "C", "P", "Q"]
)  # fmt: skip
VALUES = st.sampled_from(VALUES_TRIED)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with two headers, and a header set that was made before they changed."""
    folder = tmp_path_factory.mktemp("project")
    digests = []
    for name in ("a.h", "b.h"):
        (folder / name).write_text("// as it was\n")
        digests.append(file_digest(str(folder / name)))
        (folder / name).write_text(f"#define NOW_{name[0]}\n")
    made = {
        "headers": [[["I", 0, "a.h"], digests[0]], [["I", 0, "b.h"], digests[1]]],
        "absent": [["S", 0, "no.h"]],
        "perhaps": [[["C", 0, "a.h"], 0]],
        "present": [["I", 0, "a.h"]],
        "probes": ["<b.h> in a.h: there"],
        "mentions_file": 1,
        "paths": [["I", 0], ["N", 0]],
        "linked_paths": [["I", 0]],
        "columns": False,
        "links": [],
        "stamps": [],
        "entry": EMPTY,
        "source": "12 bytes",
        "plain": [EMPTY, EMPTY],
        "stands_for": "",
    }
    return folder, made


@pytest.fixture(scope="module")
def base(project):
    options = ProgramOptions(arch="sm_80", include_path=[str(project[0])], name="k.cu")
    return base_key(
        normalize(
            code='#include "a.h"\n',
            code_type="c++",
            options=options,
            target_type="cubin",
            name_expressions=(),
            extra_digest=None,
        )
    )


def nodes(value, path=()):
    """Yield the paths of all values within a value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        yield from nodes(part, (*path, name))


@st.composite
def mutations(draw):
    return draw(st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from("sdax"), VALUES), min_size=1, max_size=3))


def mutated(made, steps):
    made = copy.deepcopy(made)
    for number, how, drawn in steps:
        value = copy.deepcopy(drawn)  # otherwise a value that is drawn twice could be put into itself
        places = [path for path in nodes(made) if path]
        if not places:
            break
        *above, last = places[number % len(places)]
        holder = made
        for name in above:
            holder = holder[name]
        if how == "d":
            del holder[last]
        elif how == "a" and isinstance(holder[last], list):
            holder[last].append(copy.deepcopy(holder[last][0]) if holder[last] else value)
        elif how == "x" and isinstance(holder[last], list):
            holder[last].append(value)
        else:
            holder[last] = value
    return made


def looked_up(project, base, steps, now):
    """Look up a mutated manifest; ``now`` gives it the digests of the current files, so that more of it is read."""
    folder, made = project
    was = HeaderSet.from_json(made).identity
    start = copy.deepcopy(made)
    if now:
        for one in start["headers"]:
            one[1] = file_digest(str(folder / one[0][2]))
    content = json.dumps({"format": 4, "sets": [mutated(start, steps)]}).encode()
    manifest = from_elsewhere(content)
    found = [manifest.match(base.search), *(alike(one, base.search) for one in manifest.sets)]
    for headers in filter(None, found):
        base.with_headers(headers)
        assert headers.stands_for or headers.identity != was
    assert json.loads(manifest.add(HeaderSet()))["sets"]


@pytest.mark.parametrize("now", [False, True])
def test_no_single_change_of_a_manifest_fails_or_misleads_a_lookup(project, base, now):
    places = sum(1 for path in nodes(project[1]) if path)
    for number in range(places):
        for how, value in [*(("s", value) for value in VALUES_TRIED), ("d", None), ("a", 0), ("x", "\0")]:
            looked_up(project, base, [(number, how, value)], now)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=mutations(), now=st.booleans())
def test_no_manifest_fails_or_misleads_a_lookup(project, base, steps, now):
    looked_up(project, base, steps, now)


@pytest.mark.parametrize("kind", ["fifo", "device", "huge"])
def test_what_is_no_regular_file_of_a_header_s_size_is_not_read(tmp_path, kind):
    path = "/dev/zero" if kind == "device" else str(tmp_path / kind)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    made = HeaderSet().to_json() | {"headers": [[["A", 0, path], EMPTY]]}
    (one,) = from_elsewhere(json.dumps({"format": 4, "sets": [made]}).encode()).sets
    answers = []
    asked = threading.Thread(target=lambda: answers.append(holds(one, SearchPath.of([], "k.cu", "/"))), daemon=True)
    asked.start()
    asked.join(300)
    assert answers == [False]


def test_a_manifest_has_a_few_sets_of_some_thousand_places():
    made = HeaderSet().to_json()
    few = from_elsewhere(json.dumps({"format": 4, "sets": [made] * 1000}).encode())
    assert len(few.sets) == 16
    many = made | {"absent": [["A", 0, "x"]] * 40_000}
    assert from_elsewhere(json.dumps({"format": 4, "sets": [many, made]}).encode()).sets == [HeaderSet()]
