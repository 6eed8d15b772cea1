# SPDX-License-Identifier: Apache-2.0
"""Which Python local a template variable is, by Jinja2's scoping rules.

A scope belongs to a template or block, a loop's body, a macro, ``{% with %}`` and the like. A name that a scope only
reads is the one of the nearest scope around it that has it; where none has, it is looked up in the context when the
scope is entered. A name that a scope sets is the scope's own: it starts as what the scope around has, or missing, or,
where only a branch of an ``{% if %}`` sets it or it is read before it is set, as what the context has.

The rules need to know only in which order a scope reads and sets a name and whether it is first set in a branch, so one
walk in the template's order notes them, whatever the depth; what the names come to is worked out when a scope is
entered, when all that is around it is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, field

READ, SET, BRANCH, PARAMETER = 1, 2, 4, 8

FROM_CONTEXT, FROM_OUTER, MISSING, GIVEN = "context", "outer", "missing", "given"
"""Where a scope's own name gets its first value."""

COUNTING = frozenset({"index", "index0", "first", "depth", "depth0"})
"""What ``loop`` has that a counter gives."""
SIZING = frozenset({"last", "length", "revindex", "revindex0"})
"""What ``loop`` has that the number of items gives, too."""


@dataclass(slots=True, eq=False)
class Function:
    """A Python function to be: the template's body, a block, a macro or a call block.

    Attributes
    ----------
    outer : Function or None
        What a macro is defined in.
    shows_context : bool
        Whether something in it may hand the context to code that isn't ours, which could change it.
    filters, tests : dict
        The names used, in order, for the template's and the blocks' functions (macros see those of their outer one).
    sets_in_loop : bool
        Whether a loop's body sets names.
    looks_up : bool
        Whether names are looked up in the context.
    hoisted : dict
        Names that may be looked up where the function begins, with their locals.
    used : set of str
        Those of them that the code needs: branches that are never taken are left out of it.
    reads : dict
        How often attributes of a name are read.
    special : set of str
        ``self`` and ``super``, if read; for a macro ``caller``, ``kwargs``, ``varargs``.
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
        """The template's or block's function around this one, or itself."""
        function = self
        while function.outer is not None:
            function = function.outer
        return function


@dataclass(slots=True, eq=False)
class FunctionState:
    """What the code generator knows at a point of a Python function; another function has another.

    Attributes
    ----------
    function : Function
    defined : set of str
        The locals that are sure to have a value here.
    trail : list of str
        Those of them that the blocks around the point have defined, in order.
    str_aliases, dict_aliases : dict
        Locals to those that hold their text, or the dict that they are.
    guard_output : bool
        Whether output is only that of a template without a parent.
    soft : bool
        Whether this may never be reached: then a filter that isn't there is no error of the template's.
    branch : int
        How many branches of an ``{% if %}`` are around, in this scope.
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
        The scope around it.
    function : Function
        The Python function it is part of.
    level : int
        How deep; part of the locals' names, so that scopes don't share them.
    toplevel, loop, block : bool
        Whether assignments in it are exported, or seen by functions that take the context.
    captured : bool
        Whether a macro, which may be called when the scope has been left, is defined in it.
    hoist : bool
        Whether names that it only reads are looked up where the function begins.
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
        """Note that the name is read here."""
        if name not in self.notes:
            self.notes[name] = READ

    def set(self, name: str, *, branch: bool) -> None:
        """Note that the name is set here, in a branch of an ``{% if %}`` or not."""
        self.assigned[name] = self.assigned.get(name, 0) + 1
        note = self.notes.get(name, 0)
        if not note & (SET | PARAMETER):
            self.notes[name] = note | SET | (BRANCH if branch else 0)

    def parameter(self, name: str) -> None:
        """Note that the name is given to the scope: a loop's target, a macro's argument."""
        self.notes[name] = self.notes.get(name, 0) | PARAMETER

    def resolve(self) -> dict[str, tuple[str, str, str | None]]:
        """Return the scope's own names: ``{name: (local, where its first value comes from, the outer local)}``."""
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
        """Return the local that holds the name, here or in a scope around; None if no scope has it."""
        own = self.resolve()
        if name in own:
            return own[name][0]
        if self.parent is None:
            return None
        if name not in self._found:
            self._found[name] = self.parent.find(name)
        return self._found[name]

    def owner(self, name: str) -> Scope | None:
        """Return the scope whose own name it is."""
        scope: Scope | None = self
        while scope is not None and name not in scope.resolve():
            scope = scope.parent
        return scope

    def exports(self) -> dict[str, str]:
        """Return the names set here and around, with their locals: what an included template sees."""
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
    """What is known of a ``{% for %}``.

    Attributes
    ----------
    attributes : set of str
        What of ``loop`` its body reads.
    needs_object : bool
        Whether the body needs ``loop`` itself.
    calls : bool
        Whether the body calls something, which could change the list that is being gone through.
    printed, dotted : dict
        How often the body puts out a target as it is, and reads an attribute of one; inside another loop counts double.
    """

    targets: frozenset[str]
    function: Function
    depth: int
    attributes: set[str] = field(default_factory=set)
    needs_object: bool = False
    calls: bool = False
    printed: dict[str, int] = field(default_factory=dict)
    dotted: dict[str, int] = field(default_factory=dict)
