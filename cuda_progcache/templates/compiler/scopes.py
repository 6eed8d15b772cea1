# SPDX-License-Identifier: Apache-2.0
"""Scopes: the mapping of template variables to Python locals, by Jinja2's scoping rules.

A scope belongs to a template, a block, a loop's body, a macro, ``{% with %}`` and the like. A name that a scope only
reads is that of the nearest enclosing scope that has the name; if there is none, the name is looked up in the context
when the scope is entered. A name that a scope sets is the scope's own. Its initial value is that of the enclosing
scope. If no enclosing scope has the name, the initial value is missing, or, if the name is first set in a branch of an
``{% if %}`` or read before it is set, the value in the context.

The rules depend only on the order in which a scope reads and sets a name, and on whether the name is first set in a
branch. One walk in the template's order records both, at any depth. Names are resolved when a scope is entered, because
the enclosing scopes are complete then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

READ, SET, BRANCH, PARAMETER = 1, 2, 4, 8

FROM_CONTEXT, FROM_OUTER, MISSING, GIVEN = "context", "outer", "missing", "given"
"""The sources of the initial value of a scope's own name."""

COUNTING = frozenset({"index", "index0", "first", "depth", "depth0"})
"""The attributes of ``loop`` that can be computed from a counter."""
SIZING = frozenset({"last", "length", "revindex", "revindex0"})
"""The attributes of ``loop`` that also need the number of items."""


@dataclass(slots=True, eq=False)
class Function:
    """The analysis of a Python function to generate: for the template's body, a block, a macro or a call block.

    Attributes
    ----------
    outer : Function or None
        The function that a macro is defined in.
    shows_context : bool
        Whether the function may pass the context to code that isn't ours, which could change the context.
    filters, tests : dict
        The filters and tests used, in order. Macros use those of their outermost function.
    sets_in_loop : bool
        Whether a loop's body sets names.
    looks_up : bool
        Whether names are looked up in the context.
    hoisted : dict
        The names that may be looked up at the start of the function, with their locals.
    used : set of str
        The names in `hoisted` that the code needs; branches that are never taken aren't part of the code.
    reads : dict
        The number of reads of attributes of a name.
    special : set of str
        The special names that are read: ``self`` and ``super`` for an outermost function, ``caller``, ``kwargs`` and
        ``varargs`` for a macro.
    hidden : set of str
        The special names that the template sets itself before it reads them.
    """

    outer: Function | None = None
    shows_context: bool = False
    filters: dict[str, None] = field(default_factory=dict)
    tests: dict[str, None] = field(default_factory=dict)
    special: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)
    sets_in_loop: bool = False
    looks_up: bool = False
    hoisted: dict[str, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    reads: dict[str, int] = field(default_factory=dict)

    @property
    def outermost(self) -> Function:
        """The enclosing function of the template or block, or the function itself."""
        function = self
        while function.outer is not None:
            function = function.outer
        return function


@dataclass(slots=True, eq=False)
class FunctionState:
    """The state of the code generator at a point of a Python function.

    Attributes
    ----------
    function : Function
    defined : set of str
        The locals that certainly have a value at this point.
    trail : list of str
        The locals in `defined`, in the order in which the enclosing blocks defined them.
    str_aliases, dict_aliases : dict
        The locals with the text of a local, and with the local if it is a dict, by local.
    guard_output : bool
        Whether output is put out only if the template has no parent.
    soft : bool
        Whether this point may never be reached; a missing filter or test is then not an error at compile time.
    branch : int
        The number of enclosing branches of an ``{% if %}`` in the current scope.
    """

    function: Function
    defined: set[str] = field(default_factory=set)
    trail: list[str] = field(default_factory=list)
    str_aliases: dict[str, str] = field(default_factory=dict)
    dict_aliases: dict[str, str] = field(default_factory=dict)
    guard_output: bool = False
    soft: bool = False
    branch: int = 0


@dataclass(slots=True, eq=False)
class Scope:
    """The names of a part of a template.

    Attributes
    ----------
    parent : Scope or None
        The enclosing scope.
    function : Function
        The Python function that the scope is part of.
    level : int
        The depth of the scope. It is part of the names of locals, so that nested scopes have different ones.
    toplevel, loop, block : bool
        Whether assignments in the scope are exported (`toplevel`), or seen by functions that take the context.
    captured : bool
        Whether a macro is defined in the scope, which may be called after the scope has been left.
    hoist : bool
        Whether names that the scope only reads are looked up at the start of the function.
    """

    parent: Scope | None
    function: Function
    level: int = 0
    toplevel: bool = False
    loop: bool = False
    block: bool = False
    notes: dict[str, int] = field(default_factory=dict)
    assigned: dict[str, int] = field(default_factory=dict)
    captured: bool = False
    hoist: bool = False
    hoist_inner: bool = False
    own: dict[str, tuple[str, str, str | None]] | None = None
    _found: dict[str, str | None] = field(default_factory=dict)

    def read(self, name: str) -> None:
        """Record that the scope reads a name."""
        if name not in self.notes:
            self.notes[name] = READ

    def set(self, name: str, *, branch: bool) -> None:
        """Record that the scope sets a name; `branch` says whether in a branch of an ``{% if %}``."""
        self.assigned[name] = self.assigned.get(name, 0) + 1
        note = self.notes.get(name, 0)
        if not note & (SET | PARAMETER):
            self.notes[name] = note | SET | (BRANCH if branch else 0)

    def parameter(self, name: str) -> None:
        """Record that a name is given to the scope, as a loop's target or a macro's argument."""
        self.notes[name] = self.notes.get(name, 0) | PARAMETER

    def resolve(self) -> dict[str, tuple[str, str, str | None]]:
        """Return the scope's own names: ``{name: (local, source of the initial value, outer local)}``."""
        if self.own is not None:
            return self.own
        own: dict[str, tuple[str, str, str | None]] = {}
        self.own = own
        for name, note in self.notes.items():
            local = f"l_{self.level}_{name}"
            if note & PARAMETER:
                own[name] = (local, GIVEN, None)
                continue
            outer = self.parent.find(name) if self.parent is not None else None
            if outer is not None:
                if note & SET:
                    own[name] = (local, FROM_OUTER, outer)
            elif note & SET and not note & (READ | BRANCH):
                own[name] = (local, MISSING, None)
            elif self.hoist and note == READ:
                local = self.function.hoisted[name] = f"c_{name}"
                own[name] = (local, FROM_CONTEXT, None)
            else:
                own[name] = (local, FROM_CONTEXT, None)
        return own

    def find(self, name: str) -> str | None:
        """Return the local of a name in this scope or an enclosing one; None if no scope has the name."""
        own = self.resolve()
        if name in own:
            return own[name][0]
        if self.parent is None:
            return None
        if name not in self._found:
            self._found[name] = self.parent.find(name)
        return self._found[name]

    def owner(self, name: str) -> Scope | None:
        """Return the scope, this one or the nearest enclosing one, whose own name it is; None if there is none."""
        scope: Scope | None = self
        while scope is not None and name not in scope.resolve():
            scope = scope.parent
        return scope

    def exports(self) -> dict[str, str]:
        """Return the names set in this scope and the enclosing ones, with their locals, for included templates."""
        names: dict[str, str] = {}
        scope: Scope | None = self
        while scope is not None:
            for name in sorted(name for name, note in scope.notes.items() if note & (SET | PARAMETER)):
                if name not in names:
                    local = self.find(name)
                    if local is not None:
                        names[name] = local
            scope = scope.parent
        return names


@dataclass(slots=True, eq=False)
class Loop:
    """The analysis of a ``{% for %}``.

    Attributes
    ----------
    targets : frozenset of str
        The names that the items are assigned to.
    function : Function
        The Python function that the loop is part of.
    depth : int
        The depth of the loop, from 1.
    attributes : set of str
        The attributes of ``loop`` that the body reads; with an empty string if ``loop`` itself may be read.
    needs_object : bool
        Whether the body needs ``loop`` as an object.
    calls : bool
        Whether the body calls a function, which could change the list that the loop iterates over.
    printed, dotted : dict
        The numbers of times that the body puts out a target directly, and reads an attribute of one, by target. Those
        inside an inner loop count double.
    """

    targets: frozenset[str]
    function: Function
    depth: int
    attributes: set[str] = field(default_factory=set)
    needs_object: bool = False
    calls: bool = False
    printed: dict[str, int] = field(default_factory=dict)
    dotted: dict[str, int] = field(default_factory=dict)
