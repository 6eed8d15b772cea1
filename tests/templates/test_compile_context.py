# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import decimal
import enum
import functools
import math
import os
import subprocess
import sys
import textwrap

import jinja2
import numpy as np
import pytest
from jinja2.ext import Extension
from jinja2.sandbox import SandboxedEnvironment

from cuda_progcache.templates import Environment as Ours
from cuda_progcache.templates import patch_jinja2, unpatch_jinja2
from cuda_progcache.templates.compile_context import context_digest, environment_context


class Arch(enum.Enum):
    SM_80 = 80
    SM_90 = 90


@dataclasses.dataclass
class Tile:
    m: int
    n: int = 4


@dataclasses.dataclass
class Place:
    environment: str


class Scale:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x * self.by

    def method(self, x):
        return x + self.by


def scaled(by, offset=0):
    def scale(x, extra=offset):
        return x * by + extra

    return scale


def marked(function):
    return jinja2.pass_environment(scaled(1)) if function else scaled(1)


LISTED = [1]
LISTED.append(LISTED)

DISTINCT = [
    *(
        0,
        1,
        True,
        1.0,
        -0.0,
        0.0,
        1 + 0j,
        "1",
        b"1",
        None,
        ...,
        (),
        [],
        {},
        set(),
        frozenset(),
        (1,),
        [1],
        [[1]],
        [1, 1],
    ),
    *(
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {1},
        {"1"},
        range(3),
        range(4),
        Arch.SM_80,
        Arch.SM_90,
        Tile(1),
        Tile(2),
        Tile(1, 5),
        Place("staging"),
        Place("production"),
    ),
    *(
        len,
        abs,
        math.sqrt,
        "a".upper,
        "b".upper,
        scaled(1),
        scaled(2),
        scaled(1, 1),
        marked(1),
        lambda x: x,
        lambda x: -x,
    ),
    *(Scale(1), Scale(2), Scale(1).method, Scale(2).method, Scale, Tile, int, functools.partial(scaled(1), 2)),
    *(functools.partial(scaled(1), 3), decimal.Decimal(1), np.float32(1), np.float64(1), np.dtype("f4"), np.int32(1)),
    *(
        ("ab", "c"),
        ("a", "bc"),
        ["a", ["b"]],
        [["a"], "b"],
        LISTED,
        {"a": [1]},
        {"a": (1,)},
        float("inf"),
        float("nan"),
    ),
]


def test_what_is_different_has_different_digests():
    digests = [context_digest(value) for value in DISTINCT]
    assert None not in digests
    assert len(set(digests)) == len(DISTINCT)


def test_what_is_alike_has_one_digest():
    pairs = [(scaled(3), scaled(3)), (Scale(3), Scale(3)), (Tile(3), Tile(3)), ({1, 2, 30}, {30, 2, 1})]
    pairs += [({"a": 1, "b": 2}, {"b": 2, "a": 1}), (Arch(80), Arch.SM_80), (np.float32(0.5), np.float32(0.5))]
    for one, other in pairs:
        assert context_digest(one) == context_digest(other)
    assert context_digest(1, 2) != context_digest((1, 2))
    assert context_digest(1, 2) != context_digest(12)


@pytest.mark.parametrize("value", [object(), iter([1]), sys, [1, {"a": object()}], scaled(object())])
def test_what_can_not_be_told_has_none(value):
    assert context_digest(value) is None


def test_a_function_counts_with_its_module(tmp_path, monkeypatch):
    """A function's digest covers its module: folding a constant runs what the function calls there."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import filters\n"
        "from cuda_progcache.templates.compile_context import context_digest; print(context_digest(filters.twice))"
    )
    digests = []
    for factor in ("2", "2", "20"):
        file = tmp_path / "filters.py"
        file.write_text(f"def twice(x):\n    return inner(x)\n\n\ndef inner(x):\n    return x * {factor}\n")
        os.utime(file, ns=(10**18, 10**18))
        command = [sys.executable, "-B", "-c", script, str(tmp_path)]
        digests.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert digests[0] == digests[1] != digests[2]


def test_processes_agree(tmp_path):
    script = textwrap.dedent(
        """
        import jinja2.ext
        from cuda_progcache.templates.compile_context import context_digest, environment_context
        class Tag(jinja2.ext.Extension):
            tags = {"tag", "other"}
            def parse(self, parser): return []
        def f(x, *, y={1: "a", "b": {"c", "d", "e"}}): return x in {"a", "b", "c"}
        print(environment_context(jinja2.Environment(extensions=[Tag, "jinja2.ext.do"])), context_digest(f))
        """
    )
    (tmp_path / "script.py").write_text(script)
    outputs = set()
    for seed in ("1", "2"):  # sets iterate in another order
        done = subprocess.run(
            [sys.executable, str(tmp_path / "script.py")],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert "None" not in outputs.pop()


class Tag(Extension):
    tags = {"tag"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser):
        return []


class OtherTag(Extension):
    tags = {"tag"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser):
        return [parser.fail]


class Undefined(jinja2.Undefined):
    def __str__(self):
        return "?"


class Environment(jinja2.Environment):
    def getattr(self, obj, attribute):
        return super().getattr(obj, attribute)


OPTIONS = [
    {"block_start_string": "<%"},
    {"block_end_string": "%>"},
    {"variable_start_string": "${"},
    {"variable_end_string": "}$"},
    {"comment_start_string": "<#"},
    {"comment_end_string": "#>"},
    {"line_statement_prefix": "%"},
    {"line_comment_prefix": "##"},
    {"trim_blocks": True},
    {"lstrip_blocks": True},
    {"newline_sequence": "\r\n"},
    {"keep_trailing_newline": True},
    {"optimized": False},
    {"undefined": jinja2.StrictUndefined},
    {"undefined": Undefined},
    {"finalize": scaled(2)},
    {"finalize": scaled(3)},
    {"autoescape": True},
    {"autoescape": lambda name: True},
    {"enable_async": True},
    {"extensions": ["jinja2.ext.do"]},
    {"extensions": [Tag]},
    {"extensions": [OtherTag]},
]


def test_each_option_of_an_environment_counts():
    digests = [environment_context(jinja2.Environment(**options)) for options in ({}, *OPTIONS)]
    digests += [environment_context(kind()) for kind in (Environment, SandboxedEnvironment)]
    for table, name, function in [
        ("filters", "mine", scaled(1)),
        ("filters", "mine", scaled(2)),
        ("filters", "mine", marked(1)),
        ("filters", "upper", scaled(1)),
        ("tests", "mine", scaled(1)),
        ("policies", "truncate.leeway", 7),
    ]:
        environment = jinja2.Environment()
        getattr(environment, table)[name] = function
        digests.append(environment_context(environment))
    removed = jinja2.Environment()
    del removed.filters["upper"]
    digests.append(environment_context(removed))
    digests.append(environment_context(Ours(static_context={"tile": 4})))
    digests.append(environment_context(Ours(static_context={"tile": 5})))
    digests.append(environment_context(Ours()))
    patch_jinja2()
    try:
        digests.append(environment_context(jinja2.Environment()))
    finally:
        unpatch_jinja2()
    assert None not in digests
    assert len(set(digests)) == len(digests)
    assert environment_context(jinja2.Environment()) == environment_context(jinja2.Environment()) == digests[0]
    assert environment_context(Ours(static_context={"x": object()})) is None


@pytest.mark.parametrize("options", [options for options in OPTIONS if "extensions" not in options])
def test_an_option_that_is_set_later_counts_as_one_set_at_once(options):
    environment = jinja2.Environment()
    before = environment_context(environment)
    for name, value in options.items():
        setattr(environment, "is_async" if name == "enable_async" else name, value)
    assert before != environment_context(environment) == environment_context(jinja2.Environment(**options))


def test_a_filter_that_is_added_later_counts():
    environment = jinja2.Environment()
    before = environment_context(environment)
    assert environment_context(environment) == before
    environment.filters["upper"] = scaled(2)
    changed = environment_context(environment)
    assert changed != before
    environment.filters["upper"] = scaled(2)
    assert environment_context(environment) == changed
    environment.trim_blocks = True
    assert environment_context(environment) not in {before, changed}
