# SPDX-License-Identifier: Apache-2.0
"""Our filters, tests and undefined values compared with Jinja2's: the same results, and the same errors."""

from __future__ import annotations

import decimal
import fractions
import itertools
import subprocess
import sys

import jinja2
import numpy as np
import pytest
from jinja2 import defaults
from markupsafe import Markup

from cuda_progcache.templates import names as builtins
from cuda_progcache.templates.names import FILTERS, TESTS, NameTable
from cuda_progcache.templates.undefined import StrictUndefined, Undefined

ENVIRONMENT = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
EVAL_CTX = jinja2.nodes.EvalContext(ENVIRONMENT)
MISSING = object()

VALUES = [
    *("", "a", "Tile m\n  b\n\n c\r\nd\n", "0x10", "7", " 1.5 ", "ABC", 0, 1, -3, 7, 2.5, float("inf"), 1e300, True),
    *(False, None, (), [3, 1, 2], ["b", "A", "c"], (1, 2.0), {"k": 1}, {4}, range(3), b"xy", 1 + 2j, MISSING),
    *(decimal.Decimal("1.5"), fractions.Fraction(1, 3), np.float32(0.5), np.int64(6), Markup("<b>"), [[1], [2]]),
    *(object, len),
]
ARGUMENTS = {
    "default": [(), (5,), (5, True)],
    "d": [(), ("x", True)],
    "float": [(), (9.0,)],
    "indent": [(), (2,), ("\t",), (3, True), (3, False, True), (1, True, True)],
    "int": [(), (5,), (5, 16)],
    "join": [(), (", ",), (1,), ("-", 0)],
    "max": [(), (True,)],
    "min": [(), (True,)],
    "replace": [("a", "b"), (1, 2), ("", "-", 2), ("b", "", 1)],
    "round": [(), (1,), (0, "ceil"), (1, "floor"), (0, "odd")],
    "sum": [(), (None, 10), (0,), (None, ())],
    "trim": [(), ("a",)],
}
OPERANDS = {"divisibleby", "in", "sameas", *TESTS} - {
    *("boolean", "callable", "defined", "even", "false", "float", "integer", "iterable", "lower", "none", "number"),
    *("odd", "string", "true", "undefined", "upper"),
}


def outcome(function, flags, value, arguments, undefined):
    given = undefined(name="x") if value is MISSING else value
    first = {None: (), "eval_context": (EVAL_CTX,), "environment": (ENVIRONMENT,)}[flags]
    try:
        result = function(*first, given, *arguments)
    except Exception as error:  # noqa: BLE001  (whatever it is, it has to be the same)
        return type(error), str(error)
    if isinstance(result, jinja2.Undefined):
        return "undefined", result._undefined_message
    return type(result), repr(result)


def passed(function):
    kind = getattr(function, "jinja_pass_arg", None)
    return None if kind is None else kind.name


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_filters_do_what_jinja2s_do(name):
    theirs = defaults.DEFAULT_FILTERS[name]
    for value, arguments in itertools.product(VALUES, ARGUMENTS.get(name, [()])):
        ours = outcome(FILTERS[name], passed(theirs), value, arguments, StrictUndefined)
        assert ours == outcome(theirs, passed(theirs), value, arguments, jinja2.StrictUndefined), (value, arguments)


@pytest.mark.parametrize("name", sorted(TESTS))
def test_tests_do_what_jinja2s_do(name):
    theirs = defaults.DEFAULT_TESTS[name]
    assert passed(theirs) is None
    for value, other in itertools.product(VALUES, VALUES if name in OPERANDS else [None]):
        arguments = () if name not in OPERANDS else (other if other is not MISSING else 3,)
        ours = outcome(TESTS[name], None, value, arguments, StrictUndefined)
        assert ours == outcome(theirs, None, value, arguments, jinja2.StrictUndefined), (value, other)


def test_other_names_are_jinja2s():
    filters, tests = NameTable("FILTERS", FILTERS, {"mine": len}), NameTable("TESTS", TESTS)
    assert filters["title"] is defaults.DEFAULT_FILTERS["title"]
    assert (filters["mine"], filters["abs"]) == (len, abs)
    assert tests["mapping"] is defaults.DEFAULT_TESTS["mapping"]
    with pytest.raises(KeyError):
        filters["nonesuch"]


USES = """
str(u) f'{u}' u+1 1+u u-1 1-u u*2 2*u u/2 2/u u//2 2//u u%2 2%u u**2 2**u -u +u ~u u|1 u() u.attribute u['item'] u<1
u<=1 u>1 u>=1 u==1 u!=1 bool(u) len(u) list(u) (1)in(u) int(u) float(u) complex(u) hash(u) {u} not(u) repr(u) '%d'%u
u.__html__ hasattr(u,'__html__') [1][u] abs(u) round(u) range(u) ''.join([u]) isinstance(u,jinja2.Undefined)
isinstance(u,jinja2.StrictUndefined) u.__class__
""".split()  # noqa: SIM905  (a list of them would be three times as long)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "tile"},
        {"name": "m", "obj": 3},
        {"name": 7, "obj": [1]},
        {"name": "x", "obj": None},
        {"name": "x", "obj": ENVIRONMENT},
        {"hint": "no such thing", "name": "x"},
        {"name": "x", "exc": jinja2.TemplateRuntimeError},
    ],
)
def test_undefined_values_fail_as_jinja2s(arguments):
    for use in USES:
        outcomes = []
        for kind in (StrictUndefined, jinja2.StrictUndefined, Undefined, jinja2.Undefined):
            try:
                outcomes.append(eval(use, {"u": kind(**arguments), "jinja2": jinja2}))
            except Exception as error:  # noqa: BLE001  (whatever it is, it has to be the same)
                outcomes.append((type(error), str(error).replace("jinja2.runtime.", "")))
        assert outcomes[0] == outcomes[1], use
        if use not in {"hash(u)", "u.__class__", "{u}"}:  # see the next test
            assert outcomes[2] == outcomes[3], use


def test_lenient_undefined_values():
    one, other = Undefined(name="a"), Undefined(name="b")
    assert one == other
    assert hash(one) == hash(other)
    assert {one} == {other}
    assert one != StrictUndefined(name="a").__class__
    assert one.__class__ is jinja2.Undefined


def test_undefined_values_know_themselves_before_and_after_jinja2_is_loaded():
    script = (
        "import sys; from cuda_progcache.templates.undefined import StrictUndefined\n"
        "from cuda_progcache.templates.names import TESTS\n"
        "u = StrictUndefined(name='x')\n"
        "assert TESTS['undefined'](u) and u.__class__ is StrictUndefined and 'jinja2' not in sys.modules\n"
        "import jinja2\n"
        "assert TESTS['undefined'](u) and isinstance(u, jinja2.StrictUndefined)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_test_of_all_names():
    assert builtins.FILTERS.keys() <= defaults.DEFAULT_FILTERS.keys()
    assert builtins.TESTS.keys() <= defaults.DEFAULT_TESTS.keys()
