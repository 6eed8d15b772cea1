# SPDX-License-Identifier: Apache-2.0
"""The record of a compile: every field has its declared type, whatever was published."""

from __future__ import annotations

import ast
import functools
import inspect
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cuda_progcache
from cuda_progcache import InMemoryProgramCache
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.store.compile_record import Caller, CompileRecord, File, Kernel, Linked, Tool

WHOLE = {
    "name": "dir/k.cu",
    "code_type": "c++",
    "target_type": "cubin",
    "arch": "sm_90",
    "key": "ab" * 16,
    "components": [["schema", "1"], ["option", "-arch=sm_90"], ["option", "-D\0X"], ["name_expression", "s:f<int>"]],
    "headers": [{"name": "a.h", "digest": "12"}],
    "toolchain": [{"name": "nvrtc", "digest": "build-id:1", "version": "13.5"}, {"name": "builtins", "digest": "2"}],
    "log": "k.cu(1): warning\n",
    "log_files": [["k.cu", ["N", 0, ""]]],
    "symbol_mapping": {"f<int>": "_Z1f"},
    "duration": 0.5,
    "created": "2026-01-31T12:00:00+00:00",
    "manifest": "cd" * 32,
    "resource_usage": {"_Z1f": {"registers": 8, "barriers": None}},
    "kernel": {"name": "softmax", "parameters": {"block": 256}, "templates": [{"name": "s.cu", "digest": "3"}]},
    "part_of": {"name": "softmax", "module": "m", "parameters": {}, "templates": []},
    "inputs": [{"name": "a", "target_type": "ltoir", "digest": None, "sha256": "4"}],
    "parents": [{"key": "5", "name": "caller"}],
}

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
scalars |= st.sampled_from(
    [10**400, -(10**400), 1e308, -1e308, 5e-324, "\ud800", "\udc80", "\x1b[2J", "[/]", "x" * 9999]
)
keys = st.sampled_from([*WHOLE, "digest", "version", "parameters", "templates", "module", "sha256"]) | st.text(
    max_size=3
)
junk = st.recursive(
    scalars, lambda one: st.lists(one, max_size=3) | st.dictionaries(keys, one, max_size=3), max_leaves=6
)


def properties(of: object) -> dict[str, Any]:
    """Return the public properties of an object and their values."""
    names = [name for name in dir(type(of)) if not name.startswith("_")]
    return {name: value for name in names if not inspect.ismethod(value := getattr(of, name))}


def has_type(value: object, wanted: Any) -> bool:
    """Return whether a value matches an annotation, at every level."""
    from collections.abc import Mapping
    from types import UnionType
    from typing import get_args, get_origin

    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True
    if origin is UnionType:
        return any(has_type(value, one) for one in inner)
    if origin is tuple and inner[-1] is not ...:
        return type(value) is tuple and all(map(has_type, value, inner)) and len(value) == len(inner)
    if origin in (tuple, list):
        return type(value) is origin and all(has_type(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        pairs = isinstance(value, dict) and value.items()
        return pairs is not False and all(has_type(k, inner[0]) and has_type(v, inner[1]) for k, v in pairs)
    if hasattr(wanted, "_fields"):
        return type(value) is wanted and all(map(has_type, value, hints(wanted).values()))
    return type(value) is wanted


SCOPE = {**vars(inspect.getmodule(CompileRecord)), "Any": Any}
hints = functools.cache(lambda of: get_type_hints(of, SCOPE))


def hint(name):
    """Return the annotated type of a record's property."""
    made = inspect.getattr_static(CompileRecord, name)
    return hints(made.fget if isinstance(made, property) else made._make)["return"]


def check(record):
    """Assert that each field has its type and that all text can be encoded; return the fields."""
    about = CompileRecord(record)
    found = properties(about)
    for name, value in found.items():
        assert has_type(value, hint(name)), (name, value)
    json.dumps({name: value for name, value in found.items() if name != "versions"}, allow_nan=False)
    repr(found).encode("utf-8", "surrogateescape")
    assert {name: about.symbol(name) for name in about.symbol_mapping} == about.symbol_mapping
    assert 0 <= about.seconds < 1e10
    return found


def test_a_record_as_a_compile_writes_it_is_read_whole():
    about = CompileRecord(WHOLE)
    found = check(WHOLE)
    same = ("name", "code_type", "target_type", "arch", "key", "log", "symbol_mapping", "duration")
    assert {name: found[name] for name in (*same, "manifest", "resource_usage")} == {
        name: WHOLE[name] for name in (*same, "manifest", "resource_usage")
    }
    assert about.created == datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp()
    assert about.expressions == {"_Z1f": "f<int>"}
    assert (about.symbol("f<int>"), about.symbol("g")) == ("_Z1f", None)
    assert about.versions == {("nvrtc", "build-id:1"): "13.5"}
    assert about.is_compile
    assert about.components == tuple(map(tuple, WHOLE["components"]))
    assert about.headers == (File("a.h", "12"),)
    assert about.toolchain == (Tool("nvrtc", "build-id:1", "13.5"), Tool("builtins", "2", ""))
    assert about.log_files == (("k.cu", ("N", 0, "")),)
    assert about.kernel == about.rendered == Kernel("softmax", None, {"block": 256}, (File("s.cu", "3"),))
    assert about.part_of == Kernel("softmax", "m", {}, ())
    assert about.inputs == (Linked("a", "ltoir", None, "4"),)
    assert about.parents == (Caller("5", "caller"),)
    assert (about.title, about.variant, about.seconds) == ("softmax", "block=256", 0.5)
    alone = CompileRecord({name: value for name, value in WHOLE.items() if name != "kernel"})
    assert (alone.title, alone.variant) == ("dir/k.cu", "module=m")
    source = CompileRecord({**WHOLE, "kernel": None, "part_of": None})
    assert (source.name_expressions, source.options, source.variant) == (["f<int>"], ["-D X"], "f<int> -D X")


def test_a_record_that_says_nothing():
    found = check({})
    assert {name: value for name, value in found.items() if value} == {"title": "-"}
    assert found["duration"] is found["kernel"] is found["part_of"] is None


@settings(max_examples=150, deadline=None)
@given(record=st.fixed_dictionaries({}, optional=dict.fromkeys(WHOLE, junk)))
def test_each_field_has_its_type_whatever_is_published(record):
    check(record)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_junk_anywhere_in_a_good_record_is_left_out(data):
    """Replacing any value, at any depth, leaves the other fields unchanged."""
    record = json.loads(json.dumps(WHOLE))
    field = data.draw(st.sampled_from(list(WHOLE)))
    place, at = record, field
    while isinstance(place[at], (dict, list)) and place[at] and data.draw(st.booleans()):
        place = place[at]
        at = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    place[at] = data.draw(junk)
    found, whole = check(record), properties(CompileRecord(WHOLE))
    derived = {"title", "variant", "rendered", "seconds", "options", "name_expressions"}
    derived |= {"expressions", "is_compile", "versions"}
    assert {name for name in found if found[name] != whole[name]} <= {field, *derived}


@pytest.mark.parametrize("seconds", [True, "1", -1, -0.5, 1e300, 10**400, -(10**400), [1], {}])
def test_what_no_compile_can_take_isnt_its_duration(seconds):
    assert CompileRecord({"duration": seconds}).duration is None


def test_what_nests_deeply_is_no_parameter():
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    kernel = CompileRecord({"kernel": {"name": "k", "parameters": {"deep": deep, "flat": [[1]]}}}).kernel
    assert kernel is not None
    assert kernel.parameters == {"flat": [[1]]}


@settings(max_examples=50, deadline=None)
@given(record=st.fixed_dictionaries({}, optional=dict.fromkeys(WHOLE, junk)))
def test_a_store_gives_a_record_back_as_it_was_published(record):
    cache = InMemoryProgramCache()
    cache.publish(b"k", b"data", record)
    entry = cache.load(b"k")
    assert entry.record == next(cache.entries()).record == record
    assert properties(entry.about) == properties(next(cache.entries()).about) == properties(CompileRecord(record))
    made = CompiledProgram(b"data", "cubin", "k", "sm_90", record=lambda: entry.record, hit=True)
    assert (made.log, made.record) == (entry.about.log, record)


def packages():
    """Return the syntax trees of the package's modules, by path."""
    root = Path(cuda_progcache.__file__).parent
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text("utf-8")) for path in root.rglob("*.py")}


def is_record(node):
    """Return whether an expression is a raw record: ``record``, ``x.record``, ``x.record()``."""
    if isinstance(node, ast.Call):
        node = node.func
    return isinstance(node, ast.Name | ast.Attribute) and "record" in {
        getattr(node, "id", ""),
        getattr(node, "attr", ""),
    }


def fields_read(tree):
    """Yield the lines that read a field of a raw record: ``record["name"]``, ``record.get("name")``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            of, field = node.value, node.slice
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            of, field = node.func.value, node.args[0]
        else:
            continue
        if is_record(of) and isinstance(field, ast.Constant) and isinstance(field.value, str):
            yield node.lineno


def records_taken(tree):
    """Yield the lines that take the raw record of an object, ``x.record``."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        # Exclude an object's own method and the ``recording`` module.
        others = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") not in {"self", "recording"}
        if others and node.attr == "record" and id(node) not in called:
            yield node.lineno


#: The modules, besides the stores, that take a record as it was published, to pass it on whole.
WHOLE_RECORDS = {
    "cli/entries.py",  # show --json prints it
    "compile/lookup.py",  # with the log in the caller's spelling
    "provenance/programs.py",  # transferring a call to another store includes its record
    "service/described.py",  # adds what the binary says
}


def test_nothing_else_reads_fields_off_a_record():
    """Other modules use ``about``, which gives each field its type; only the store contract reads what it wrote."""
    code = "a = x.record['name']; b = record.get('name'); c = v.record().get('name'); record['name'] = entry.record"
    assert len(list(fields_read(ast.parse(code)))) == 3
    assert len(list(records_taken(ast.parse(code)))) == 2
    modules = packages()
    assert {path for path, tree in modules.items() if list(fields_read(tree))} == {"testing/contract.py"}
    taken = {path for path, tree in modules.items() if list(records_taken(tree))}
    assert {path for path in taken if path.partition("/")[0] not in {"store", "testing"}} == WHOLE_RECORDS
