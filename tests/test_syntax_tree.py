# SPDX-License-Identifier: Apache-2.0
"""Parsing survives another parse in the middle of it."""

from __future__ import annotations

import ast
import gc
import sys

import pytest

from cuda_progcache._util.syntax_tree import parse

#: CPython's fault, mended in 3.11.8.
IS_UNSAFE = sys.version_info < (3, 11, 8)
TEXT = "\n".join(f"def f{i}(a, b=(1, [2, {{3: 4}}])):\n    return a + b[{i}] * (a - b)" for i in range(50))


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt the first parse by others, as a finalizer may, until CPython 3.11.7 fails."""
    attempts = []
    original = ast.parse

    def parsed(*arguments, **more):
        attempts.append(1)
        if len(attempts) > 1:
            return original(*arguments, **more)
        gc.callbacks.append(lambda *_: original("1"))
        gc.set_threshold(1)
        try:
            return original(*arguments, **more)
        finally:
            gc.set_threshold(*before)
            gc.callbacks.pop()

    before = gc.get_threshold()
    monkeypatch.setattr(ast, "parse", parsed)
    return attempts


def test_a_text_is_parsed_though_its_parse_is_interrupted(interrupted):
    tree = parse(TEXT)
    assert len(interrupted) == (2 if IS_UNSAFE else 1)
    assert ast.unparse(tree) == ast.unparse(parse(TEXT))


def test_what_is_wrong_with_a_text_is_raised():
    assert parse("a + b", mode="eval").body.op.__class__ is ast.Add
    with pytest.raises(SyntaxError):
        parse("a +")


def test_an_error_that_stays_is_raised(monkeypatch):
    monkeypatch.setattr(ast, "parse", lambda *_, **__: (_ for _ in ()).throw(SystemError("broken")))
    with pytest.raises(SystemError, match="broken"):
        parse("1")
