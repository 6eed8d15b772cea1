# SPDX-License-Identifier: Apache-2.0
"""The fields of a compile in an entry's record: each has its own type, or counts as absent.

A store keeps any JSON object beside an entry and gives it back as it was published: by this release or another, by
hand, or by anyone who may write to a shared tier. :class:`CompileRecord` reads the fields of a compile off such an
object, and nothing else does, so this module alone decides what a field may hold. A value of another type counts as
absent, at any depth. A list item of another shape is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.lazy import kept_property

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

#: The longest compile time that counts as valid, in seconds (30 years).
_LONGEST = 1e9
#: The end of the year 9999, beyond which no date can be written.
_LATEST = 253_402_300_000.0
#: Counts are below this, and JSON values are nested at most this many levels deep.
_MOST, _DEEPEST = 1 << 63, 32


class File(NamedTuple):
    """A header or template that was read."""

    name: str
    digest: str


class Tool(NamedTuple):
    """A compiler's file; its version is empty where that isn't known."""

    name: str
    digest: str
    version: str


class Kernel(NamedTuple):
    """The library kernel that a program's source was rendered from.

    Attributes
    ----------
    name : str
    module : str or None
        The module of a linked kernel; None for the kernel itself.
    parameters : mapping
        Any JSON values.
    templates : tuple of File
    """

    name: str
    module: str | None
    parameters: Mapping[str, Any]
    templates: tuple[File, ...]

    @classmethod
    def of(cls, value: object) -> Kernel | None:
        """Read it from its JSON object in a record; None if the record has none."""
        found = _object(value)
        if not (name := _text(found.get("name"))):
            return None
        parameters = {
            parameter: given
            for parameter, given in _object(found.get("parameters")).items()
            if _is_text(parameter) and _is_shallow(given, _DEEPEST)
        }
        return cls(name, _text(found.get("module")) or None, parameters, _files(found.get("templates")))


class Linked(NamedTuple):
    """An input of a link. Its entry's digest and the SHA-256 of its bytes are None if they aren't known."""

    name: str
    target_type: str
    digest: str | None
    sha256: str | None


class Caller(NamedTuple):
    """A call that requested a program. Its name is empty if it isn't known."""

    key: str
    name: str


class CompileRecord:
    """The fields of a compile's record.

    An absent text, list or mapping is empty.

    Parameters
    ----------
    record : mapping
        Any JSON object.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record = record

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._record!r})"

    def replaced(self, **fields: Any) -> CompileRecord:
        """The same with other values of some fields."""
        return CompileRecord({**self._record, **fields})

    @property
    def name(self) -> str:
        """The program's name, as it was given."""
        return self._text("name")

    @property
    def code_type(self) -> str:
        """The kind of its source: ``"c++"``, ``"ptx"``, ``"nvvm"``, or ``"link"``."""
        return self._text("code_type")

    @property
    def target_type(self) -> str:
        """The kind of its binary: ``"cubin"``, ``"ptx"`` or ``"ltoir"``."""
        return self._text("target_type")

    @property
    def arch(self) -> str:
        """The architecture, such as ``"sm_90"``."""
        return self._text("arch")

    @property
    def key(self) -> str:
        """Its key, hexadecimal."""
        return self._text("key")

    @property
    def log(self) -> str:
        """The compiler's log."""
        return self._text("log")

    @property
    def manifest(self) -> str:
        """The name of its header manifest, a digest, which is also the manifest's file name."""
        name = self._text("manifest")
        return name if is_digest(name) else ""

    @property
    def pch_status(self) -> str | None:
        """The outcome of its precompiled header; None if none was requested."""
        return self._text("pch_status") or None

    @property
    def created(self) -> float | None:
        """When it was compiled, in whole seconds since the epoch; None if it isn't known."""
        from datetime import datetime

        try:
            moment = datetime.fromisoformat(self._text("created")).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
        return moment if 0 <= moment < _LATEST else None

    def _text(self, field: str) -> str:
        return _text(self._record.get(field))

    @property
    def duration(self) -> float | None:
        """The time of the compile in seconds; None if it isn't known."""
        value = self._record.get("duration")
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LONGEST:
            return float(value)
        return None

    @property
    def seconds(self) -> float:
        """The time of the compile in seconds; 0 if it isn't known."""
        return self.duration or 0.0

    @kept_property
    def symbol_mapping(self) -> dict[str, str]:
        """Name expression to mangled name."""
        return {
            name: symbol
            for name, symbol in _object(self._record.get("symbol_mapping")).items()
            if _is_text(name) and _is_text(symbol)
        }

    def symbol(self, expression: str) -> str | None:
        """The mangled name of one name expression; None where the record doesn't have it."""
        found = _object(self._record.get("symbol_mapping")).get(expression)
        return found if _is_text(found) else None

    @property
    def expressions(self) -> dict[str, str]:
        """Mangled name to name expression."""
        return {symbol: name for name, symbol in self.symbol_mapping.items()}

    @kept_property
    def components(self) -> tuple[tuple[str, str], ...]:
        """Label and value of each component of its key; empty if it isn't known how it was compiled."""
        return tuple(_pairs(self._record.get("components")))

    @property
    def is_compile(self) -> bool:
        """Whether it says how the program was compiled. An entry stored by hand doesn't."""
        return any(True for _ in _pairs(self._record.get("components")))

    @kept_property
    def headers(self) -> tuple[File, ...]:
        """The headers that were read."""
        return _files(self._record.get("headers"))

    @kept_property
    def toolchain(self) -> tuple[Tool, ...]:
        """The compiler's files."""
        return tuple(
            Tool(part["name"], part["digest"], _text(part.get("version")))
            for part in _objects(self._record.get("toolchain"), "name", "digest")
        )

    @property
    def versions(self) -> dict[tuple[str, str], str]:
        """The versions of the compiler's files, by name and identity, where they are known."""
        return {(tool.name, tool.digest): tool.version for tool in self.toolchain if tool.version}

    @kept_property
    def log_files(self) -> tuple[tuple[str, tuple[str, int, str]], ...]:
        """Each file that the log names, with the root, index and rest of its path."""
        found = []
        for one in _list(self._record.get("log_files")):
            match one:
                case [str(path), [str(root), int(index), str(rest)]] if 0 <= index < _MOST:
                    found.append((path, (root, index, rest)))
        return tuple(found)

    @kept_property
    def kernel(self) -> Kernel | None:
        """The library kernel that the program is."""
        return Kernel.of(self._record.get("kernel"))

    @kept_property
    def part_of(self) -> Kernel | None:
        """The library kernel that the program is a module of."""
        return Kernel.of(self._record.get("part_of"))

    @property
    def rendered(self) -> Kernel | None:
        """The library kernel that the program is, or is a module of."""
        return self.kernel or self.part_of

    @kept_property
    def inputs(self) -> tuple[Linked, ...]:
        """The inputs that it was linked from."""
        return tuple(
            Linked(
                _text(part.get("name")),
                _text(part.get("target_type")),
                _text(part.get("digest")) or None,
                _text(part.get("sha256")) or None,
            )
            for part in _objects(self._record.get("inputs"))
        )

    @kept_property
    def parents(self) -> tuple[Caller, ...]:
        """The calls that requested it."""
        return tuple(
            Caller(part["key"], _text(part.get("name"))) for part in _objects(self._record.get("parents"), "key")
        )

    @kept_property
    def resource_usage(self) -> dict[str, dict[str, int | None]] | None:
        """The resources of each kernel: figure to number, None if it isn't known. None if no kernel's are known."""
        kernels = self._record.get("resource_usage")
        if not isinstance(kernels, Mapping):
            return None
        return {
            kernel: {
                figure: number for figure, number in _object(used).items() if _is_text(figure) and _is_count(number)
            }
            for kernel, used in kernels.items()
            if _is_text(kernel)
        }

    # For people to read

    @property
    def title(self) -> str:
        """The name to show for the program: the library kernel's, else its own; ``"-"`` if it has none."""
        return (self.kernel and self.kernel.name) or self.name or "-"

    @property
    def variant(self) -> str:
        """What distinguishes programs with one title: kernel parameters, else name expressions and options."""
        if (kernel := self.rendered) is not None:
            words = [f"{name}={value}" for name, value in kernel.parameters.items()]
            return " ".join([*words, *([] if kernel.module is None else [f"module={kernel.module}"])])
        return " ".join([*self.name_expressions, *self.options])

    @property
    def name_expressions(self) -> list[str]:
        """Its name expressions."""
        return [value.partition(":")[2] for value in self.labelled("name_expression")]

    @property
    def options(self) -> list[str]:
        """Its options as flags, without the architecture."""
        return [flag.replace("\0", " ") for flag in self.labelled("option") if not flag.startswith("-arch")]

    def labelled(self, label: str) -> list[str]:
        """The components of its key that have this label."""
        return [value for name, value in self.components if name == label]


def _is_text(value: object) -> bool:
    """Whether a value is text, or a file name that isn't UTF-8. Other lone surrogates, which JSON allows, are not."""
    if not isinstance(value, str):
        return False
    if not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return False
    return True


def _text(value: Any) -> str:
    return value if _is_text(value) else ""


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST)


def _list(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else ()


def _object(value: Any) -> Mapping[str, Any]:
    return value if type(value) is dict or isinstance(value, Mapping) else {}


def _objects(value: Any, *texts: str) -> Iterable[Mapping[str, Any]]:
    """The objects of a list that have a text in each of these fields."""
    return (one for one in _list(value) if isinstance(one, Mapping) and all(_text(one.get(name)) for name in texts))


def _pairs(value: Any) -> Iterable[tuple[str, str]]:
    return (
        (one[0], one[1])
        for one in _list(value)
        if isinstance(one, list | tuple) and len(one) == 2 and _is_text(one[0]) and _is_text(one[1])
    )


def _files(value: Any) -> tuple[File, ...]:
    return tuple(File(one["name"], one["digest"]) for one in _objects(value, "name", "digest"))


def _is_shallow(value: object, levels: int) -> bool:
    """Whether a JSON value can be written, compared and hashed by what goes through it recursively."""
    if isinstance(value, str):
        return _is_text(value)
    if isinstance(value, Mapping):
        return levels > 0 and all(_is_text(name) and _is_shallow(one, levels - 1) for name, one in value.items())
    if isinstance(value, list | tuple):
        return levels > 0 and all(_is_shallow(one, levels - 1) for one in value)
    return True
