# SPDX-License-Identifier: Apache-2.0
"""The variables of a render: what templates of the grammar and of the features read.

Round 0 and round 2 are alike, round 1 has other values: what a render keeps for the next shows.
"""

from __future__ import annotations

from typing import Any

import jinja2
from markupsafe import Markup

ROUNDS = 3


class Thing:
    """Has attributes, items, and a text of its own."""

    def __init__(self, number: int) -> None:
        self.a = f"<a{number}>"
        self.b = number

    def __getitem__(self, key: Any) -> Any:
        return f"item {key}" if isinstance(key, str) else [10, 20, 30][key]

    def __str__(self) -> str:
        return "thing & co"

    def __repr__(self) -> str:
        return "Thing"

    def __format__(self, spec: str) -> str:
        return "formatted"

    def method(self, *args: Any) -> str:
        """Say what it was given."""
        return f"method{args}"


class Whole(int):
    """An int that isn't quite one."""

    def __str__(self) -> str:
        return "<whole>"


class Node:
    """A node of a tree."""

    def __init__(self, name: str, *children: Node) -> None:
        self.name, self.children = name, children


class Called:
    """Has instances that are called."""

    def __call__(self, *args: Any) -> str:
        """Say what it was given."""
        return f"called{args}"


@jinja2.pass_context
def sees(context: Any, name: str = "x") -> str:
    """Say what the context has under a name."""
    return str(context.get(name, "nothing"))


@jinja2.pass_context
def changes(context: Any, name: str = "x") -> str:
    """Change the context."""
    context.vars[name] = "changed"
    return "!"


@jinja2.pass_eval_context
def escaping(eval_context: Any) -> bool:
    """Say whether output is escaped."""
    return bool(eval_context.autoescape)


@jinja2.pass_environment
def with_environment(environment: Any, *args: Any) -> str:
    """Use the environment."""
    made = environment.from_string("[{{ q }}]").render(q=1) + environment.from_string("{{ q }}").render({"q": 2})
    known = environment.filters.get("title") is not None and environment.filters.get("nosuch") is None
    return f"{made}{known}{isinstance(environment, jinja2.Environment)}{args}"


@jinja2.pass_context
def looks(context: Any) -> str:
    """Say what the context is."""
    kinds = isinstance(context, jinja2.runtime.Context), isinstance(context.environment, jinja2.Environment)
    return f"{kinds}{'x' in context}{context.resolve('x')}{sorted(context.get_exported())}"


def stops() -> None:
    """Raise StopIteration."""
    raise StopIteration


def fails() -> None:
    """Raise."""
    raise ValueError("failed")


def produced(number: int) -> Any:
    """Give numbers one by one."""
    yield from (n * n for n in range(number + 3))


THEIRS = jinja2.Environment().from_string("{% macro theirs(a, b=2) %}[{{ a }}{{ b }}]{% endmacro %}").module.theirs  # type: ignore[attr-defined]


def variables(number: int) -> dict[str, Any]:
    """Return fresh variables for a round: generators are used up."""
    odd = number % 2
    return {
        "x": 3 + odd,
        "y": "<z>" if odd else "<y>",
        "n": 7 - odd,
        "s": "Tile size",
        "items": [1, "b", {"a": "in <dict>", "b": 5}, Markup("<m>")] + [4] * odd,
        "numbers": range(4 + odd),
        "xs": [3, 1, 2 + odd],
        "empty": [],
        "lists": [[], [1], [odd, 2]],
        "pairs": [(1, "one"), (2 + odd, "two")],
        "d": {"a": "A", "items": "shadowed", "n": {"a": 7 + odd}, "k": 1},
        "rows": [{"k": 1, "g": "u"}, {"k": 2 + odd, "g": "v"}, {"k": 3, "g": "u"}],
        "tree": [Node("a", Node("b", Node("c")), Node("d")), Node("e")],
        "thing": Thing(number % 2),
        "whole": Whole(7 + odd),
        "flag": not odd,
        "none": None,
        "produced": produced(odd),
        "f": lambda *args, **kwargs: f"f{args}{sorted(kwargs.items())}",
        "apply": lambda function, *args: function(*args),
        "show": lambda loop: f"{loop.index}{loop.depth}",
        "called": Called(),
        "stops": stops,
        "fails": fails,
        "sees": sees,
        "looks": looks,
        "changes": changes,
        "escaping": escaping,
        "with_environment": with_environment,
        "theirs": THEIRS,
        "undefd": jinja2.StrictUndefined(name="undefd"),
        "their_namespace": jinja2.utils.Namespace(q=odd),
        "which": "loop.j2" if odd else "uses.j2",
        "which_base": "base.j2",
    }
