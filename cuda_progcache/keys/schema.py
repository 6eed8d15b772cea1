# SPDX-License-Identifier: Apache-2.0
"""The key of a compile: an ordered list of labelled components, and the SHA-256 over them.

Each component is hashed as its label, the payload's length in 8 bytes (big
endian) and the payload, so that no two lists of components give the same
stream. ``schema`` comes first. Any change in what is keyed, or how, increments
it; ``tests/keys/test_golden_keys.py`` ensures that such a change is deliberate.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.errors import UncacheableError
from cuda_progcache.keys.flags import BUNDLED_HEADERS, INCLUDE_PATH, PRE_INCLUDE, facts, read_flags
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet, SearchPath
from cuda_progcache.keys.inputs import CompileInputs, working_directory
from cuda_progcache.keys.toolchain import ToolFile, environment, toolchain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import _Hash

SCHEMA = "4"


class Component(NamedTuple):
    """One of the inputs that determine a compile's output."""

    label: str
    payload: bytes

    @property
    def printable(self) -> str:
        """The payload as text: hex if it is binary, or its length and digest if it is long."""
        if len(self.payload) <= 400:
            try:
                return self.payload.decode().replace("\0", " ")
            except UnicodeDecodeError:
                return self.payload.hex()
        return f"{len(self.payload)} bytes, sha256:{sha256(self.payload).hexdigest()}"


def digest(components: Sequence[Component]) -> bytes:
    """Return the SHA-256 over labelled, length-prefixed components (32 bytes)."""
    return sha256(_stream(components)).digest()


def _stream(components: Iterable[Component]) -> bytes:
    return b"".join([_hashed(label, payload) for label, payload in components])


def _hashed(label: str, payload: bytes) -> bytes:
    return label.encode() + len(payload).to_bytes(8, "big") + payload


class ProgramKey:
    """A key with its components.

    Parameters
    ----------
    digest : bytes
        The key itself, 32 bytes.
    components : iterable of Component, or callable
        The components in hashing order, or a function that returns them, since a hit doesn't need them.
    headers : HeaderSet
        The headers among the components.
    toolchain : tuple of ToolFile
        The compiler files among the components.
    """

    def __init__(
        self,
        digest: bytes,
        components: Iterable[Component] | Callable[[], Iterable[Component]],
        headers: HeaderSet = NO_HEADERS,
        toolchain: tuple[ToolFile, ...] = (),
    ) -> None:
        self.digest = digest
        self.headers = headers
        self.toolchain = toolchain
        self._components = components

    @property
    def components(self) -> tuple[Component, ...]:
        """The components in the order in which they were hashed."""
        found = self._components
        if not isinstance(found, tuple):
            found = self._components = tuple(found() if callable(found) else found)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProgramKey) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<ProgramKey {self.digest.hex()}>"

    def printable(self) -> list[list[str]]:
        """Return ``[[label, text], ...]`` for records and for display."""
        return [[c.label, c.printable] for c in self.components]

    def explain(self, other: ProgramKey) -> list[str]:
        """Return one sentence per difference from another key; an empty list if the keys are equal."""
        from cuda_progcache.keys.explain import explain

        mine, theirs = ({h.name: h.digest for h in key.headers.headers} for key in (self, other))
        return explain(self.printable(), other.printable(), mine, theirs)


class BaseKey:
    """All components of a key except the headers: those that are known without running the compiler.

    Attributes
    ----------
    inputs : CompileInputs
    plain : bytes
        The digest of these components. It is the key if there are no headers and no path reaches the output.
    toolchain : tuple of ToolFile
    """

    def __init__(self, inputs: CompileInputs, recipe: _Recipe, tools: tuple[ToolFile, ...]) -> None:
        self.inputs = inputs
        self.toolchain = tools
        self._recipe = recipe
        self._state = self._after("code", inputs.source.identity)
        self.plain = self._state.digest()

    def _after(self, label: str, source: bytes) -> _Hash:
        """Return the state of the hash after the source."""
        state = self._recipe.state.copy()
        state.update(_hashed(label, source))
        return state

    def _components(self, source: bytes) -> Iterator[Component]:
        yield from self._recipe.components
        yield Component("code", source)

    @kept_property
    def search(self) -> SearchPath:
        """Where the compiler searches for headers."""
        return self.inputs.search_path(self.cwd)

    @kept_property
    def cwd(self) -> str:
        """The working directory at the first access of this property; empty if it no longer exists."""
        return working_directory()

    def cwd_trouble(self) -> str | None:
        """Return why the output may not belong to the working directory in the key; None if it does."""
        inputs = self.inputs
        if not inputs.reads_headers and not self._paths_reach(inputs.target_type):
            return None
        if not self.cwd:
            return "the working directory is gone"
        if working_directory() == self.cwd:
            return None
        return "the working directory was changed while it was being compiled"

    def _digest(self, more: Sequence[Component], source: str = "") -> bytes:
        """Return the digest of the key's own components, or those with another source, followed by ``more``."""
        if not more and not source:
            return self.plain
        state = self._after("code", source.encode()) if source else self._state.copy()
        state.update(_stream(more))
        return state.digest()

    @kept_property
    def manifest_id(self) -> str:
        """The header manifest's name (hex): the same for equal source, options and compiler, in any directory."""
        return self._digest((self._roots,)).hex()

    @property
    def _roots(self) -> Component:
        return Component("include_roots", str(len(self.inputs.include_dirs)).encode())

    @kept_property
    def plain_id(self) -> str:
        """Like :attr:`manifest_id`, but the same for all sources of one normal form."""
        from cuda_progcache.keys.plain_text import plain_digest

        code = self.inputs.code
        state = self._after("plain code", plain_digest(sha256(code).hexdigest(), code).encode())
        state.update(_stream((self._roots,)))
        return state.hexdigest()

    @property
    def shows_text(self) -> bool:
        """Whether comments and white space may show in the output, through columns or in a debugger."""
        said = self.inputs.facts
        return self.inputs.code_type != "c++" or said.debug or said.lineinfo

    @property
    def flight(self) -> str:
        """The name of a compile in progress (hex): equal only if two compiles read the same headers and paths."""
        return self._digest(self._paths()).hex()

    def _paths(self) -> list[Component]:
        """Return the components of the working directory and of every path, as it was given."""
        where = [Component("cwd", os.fsencode(self.cwd))]
        if (name := _name_of_cwd(self.cwd)) is not None:
            where.append(Component("pwd", os.fsencode(name)))
        if "/" in self.inputs.name:
            where.append(Component("name_path", os.fsencode(self.inputs.name)))
        if (source := self.inputs.debug_source) is not None:
            where.append(Component("debug_source", os.fsencode(source)))
        return where + [Component("include_path", os.fsencode(d)) for d in self.inputs.include_dirs]

    def _spelled(self, roots: Iterable[tuple[str, int]]) -> list[Component]:
        """Return the components of those roots that have a spelling."""
        spelled = ((kind, index, self.inputs.spelled((kind, index))) for kind, index in sorted(roots))
        return [
            Component(_ROOTS[kind], os.fsencode(f"{index} {text}" if kind in "IP" else text))
            for kind, index, text in spelled
            if text
        ]

    def with_headers(self, headers: HeaderSet, *, output: str | None = None) -> ProgramKey:
        """Return the key for the headers that the compiler reads.

        Parameters
        ----------
        headers : HeaderSet
            The headers that a compile would read now.
        output : str, optional
            The target type that is finally kept, if it isn't this compile's own: the working directory in LTO-IR
            doesn't reach a cubin that is linked from it.
        """
        more = self._more(headers, output or self.inputs.target_type)
        source = headers.source.encode() or self.inputs.source.identity
        digest = self._digest(more, headers.source)
        return ProgramKey(digest, lambda: chain(self._components(source), more), headers, self.toolchain)

    def digest(self, headers: HeaderSet) -> bytes:
        """Return only the digest of :meth:`with_headers`."""
        return self._digest(self._more(headers, self.inputs.target_type), headers.source)

    def _more(self, headers: HeaderSet, output: str) -> list[Component]:
        inputs = self.inputs
        more = [Component("headers", headers.identity.encode())] if headers.headers else []
        more += [Component("has_include", os.fsencode(probe)) for probe in headers.probes]
        if inputs.code_type != "c++":
            return more
        reached = headers.paths if output == inputs.target_type else headers.linked_paths
        everywhere = self._paths_reach(output)
        hermetic = inputs.header_policy.hermetic and bool(headers.headers)
        if everywhere:
            more += self._paths()
        elif not hermetic:
            more += self._spelled(reached)
        if everywhere or ("A", 0) in reached:
            outside = (header.name for header in headers.headers if header.place[0] == "A")
            more += [Component("path", os.fsencode(path)) for path in outside]
        if hermetic and (everywhere or reached):
            more.append(Component("hermetic", b""))  # the paths of headers from memory are their names
        if not headers.headers and not everywhere and "/" in inputs.name and inputs.source.mentions_file:
            more.append(Component("name_path", os.fsencode(inputs.name)))
        return more

    def _paths_reach(self, output: str) -> bool:
        """Return whether the working directory and all paths reach the output, whatever the headers are."""
        if self.inputs.code_type != "c++":
            return False
        said = self.inputs.facts
        return output == "ltoir" or said.debug or said.lineinfo or said.mention_file


# Labels of the components of roots.
_ROOTS = {"I": "include_path", "B": "bundled_headers", "P": "pre_include", "S": "source_folder", "N": "name_path"}


def base_key(inputs: CompileInputs) -> BaseKey:
    """Return the part of the key that doesn't depend on headers.

    Raises
    ------
    UncacheableError
        An option has an effect that a hit wouldn't have; the message says which. (It is a ``ValueError``.)
    ToolchainError
        The compiler isn't installed.
    """
    libdevice = False
    extra_sources: tuple[tuple[str, bytes], ...] = ()
    if inputs.code_type == "nvvm":
        options = inputs.options
        libdevice = bool(getattr(options, "use_libdevice", None))
        if options.extra_sources:
            extra_sources = tuple((n, s.encode() if isinstance(s, str) else bytes(s)) for n, s in options.extra_sources)
    tools = toolchain(inputs.code_type, libdevice=libdevice)
    name = os.path.basename(inputs.name) if inputs.code_type == "c++" else inputs.name
    recipe = _recipe(inputs[1:3], name, inputs[6], inputs[8:11], extra_sources, tools, environment())
    return BaseKey(inputs, recipe, tools)


def _name_of_cwd(cwd: str) -> str | None:
    """Return ``$PWD`` if it is another name of the working directory (through a link), since NVRTC then writes it."""
    name = os.environ.get("PWD")
    if name is None or name == cwd:
        return None
    try:
        return name if os.path.samefile(name, cwd) else None
    except OSError:
        return None


class _Recipe(NamedTuple):
    """The components of a key before its source, and the state of the hash after them."""

    components: tuple[Component, ...]
    state: _Hash


def refuse_side_effects(flags: tuple[str, ...], code_type: str) -> None:
    """Raise UncacheableError for options that write a file, since a hit wouldn't write it."""
    if found := facts(flags, code_type).writes:
        raise UncacheableError(
            f"a program with {', '.join(found)} can't be cached: such options write a file as a side effect, "
            f"which a hit would not. Unset them, or compile without cache=."
        )


@functools.lru_cache(maxsize=256)
def _recipe(
    types: tuple[str, str],
    name: str,
    flags: tuple[str, ...],
    rest: tuple[tuple[str | bytes, ...], bytes | None, tuple[tuple[str, str], ...]],
    extra_sources: tuple[tuple[str, bytes], ...],
    tools: tuple[ToolFile, ...],
    variables: tuple[str, ...],
) -> _Recipe:
    """Return the recipe of a compile; cached, since many sources are compiled with the same options."""
    code_type, target_type = types
    name_expressions, extra_digest, unknown_fields = rest
    refuse_side_effects(flags, code_type)
    components = [Component("schema", SCHEMA.encode())]
    components += [Component(f"tool {tool.name}", tool.identity.encode()) for tool in tools]
    components += [Component("environment", os.fsencode(variable)) for variable in variables]
    components += [
        Component("code_type", code_type.encode()),
        Component("target_type", target_type.encode()),
        Component("name", name.encode()),
    ]
    for flag in read_flags(flags):
        if flag.name == PRE_INCLUDE and (flag.value or "").startswith("/"):  # its folder is a root of the search path
            components.append(Component("option", os.fsencode(f"--pre-include={os.path.basename(flag.value or '')}")))
        elif flag.name == BUNDLED_HEADERS:
            components.append(Component("option", b"--use-bundled-headers"))  # the content is keyed
        elif flag.name != INCLUDE_PATH:
            components.append(Component("option", "\0".join(flag.words).encode()))
    components += [Component(f"option {field}", value.encode()) for field, value in unknown_fields]
    tagged = (b"b:" + e if isinstance(e, bytes) else b"s:" + e.encode() for e in name_expressions)
    components += [Component("name_expression", tag) for tag in sorted(set(tagged))]
    for module_name, module in extra_sources:
        components += [Component("extra_source_name", module_name.encode()), Component("extra_source", module)]
    if extra_digest is not None:
        components.append(Component("extra_digest", extra_digest))
    return _Recipe(tuple(components), sha256(_stream(components)))
