# SPDX-License-Identifier: Apache-2.0
"""What a record says of a compile: each field of its own type, or absent.

A store keeps any JSON object beside an entry and gives it back as it was published: by this release or another, by
hand, or by anyone who may write to a shared tier. :class:`CompileRecord` reads the fields of a compile off such an
object, and nothing else does: what a field may hold is decided here. A value of another type counts as absent, at any
depth; an item of a list that isn't like the others is left out.
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

#: Seconds of the longest compile that is believed (30 years); JSON has numbers that no clock can hold.
_LONGEST = 1e9
#: The end of the year 9999, beyond which no date can be written.
_LATEST = 253_402_300_000.0
#: Beyond this no count is believed, and no JSON value is looked into deeper than so many levels.
_MOST, _DEEPEST = 1 << 63, 32


class File(NamedTuple):
    """A file that was read: a header, or a template."""

    name: str
    digest: str


class Tool(NamedTuple):
    """A compiler's file; its version is empty where that isn't known."""

    name: str
    digest: str
    version: str


class Kernel(NamedTuple):
    """What a library rendered a program's source from.

    Attributes
    ----------
    name : str
    module : str or None
        Which of the modules of a linked kernel; None: it is the kernel itself.
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
        """Read the JSON object that a record has of it; None where it has none."""
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
    """What a program was linked from: its entry's digest, and the SHA-256 of its bytes; None where that isn't known."""

    name: str
    target_type: str
    digest: str | None
    sha256: str | None


class Caller(NamedTuple):
    """A call that asked for a program; its name is empty where that isn't known."""

    key: str
    name: str


class CompileRecord:
    """The fields of a compile's record.

    Texts are empty where a field is absent, and lists and mappings are.

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
        """What it was made of: ``"c++"``, ``"ptx"``, ``"nvvm"``, or ``"link"``."""
        return self._text("code_type")

    @property
    def target_type(self) -> str:
        """What it is: ``"cubin"``, ``"ptx"`` or ``"ltoir"``."""
        return self._text("target_type")

    @property
    def arch(self) -> str:
        """What it is for."""
        return self._text("arch")

    @property
    def key(self) -> str:
        """Its key, hexadecimal."""
        return self._text("key")

    @property
    def log(self) -> str:
        """What the compiler said."""
        return self._text("log")

    @property
    def manifest(self) -> str:
        """The name of the header manifest that leads to it, a digest; a file is called so."""
        name = self._text("manifest")
        return name if is_digest(name) else ""

    @property
    def pch_status(self) -> str | None:
        """What became of a precompiled header; None where none was asked for."""
        return self._text("pch_status") or None

    @property
    def created(self) -> float | None:
        """When it was compiled, seconds since the epoch, to a second; None where that isn't known."""
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
        """What the compile took, in seconds; None where that isn't known."""
        value = self._record.get("duration")
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LONGEST:
            return float(value)
        return None

    @property
    def seconds(self) -> float:
        """What the compile took; 0 where that isn't known."""
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
        """What its key was made of, label and value; empty: how it was compiled isn't known."""
        return tuple(_pairs(self._record.get("components")))

    @property
    def is_compile(self) -> bool:
        """Whether it says how the program was compiled; what was put there by hand doesn't."""
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
        """The files that the log names, each with root, index and the rest of its path."""
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
        """What it was linked from."""
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
        """The calls that asked for it."""
        return tuple(
            Caller(part["key"], _text(part.get("name"))) for part in _objects(self._record.get("parents"), "key")
        )

    @kept_property
    def resource_usage(self) -> dict[str, dict[str, int | None]] | None:
        """What each kernel uses: figure to number, None where it isn't known; None where no kernel's use is."""
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

    # As people know it

    @property
    def title(self) -> str:
        """What people know the program by: the library kernel's name, else its own; ``"-"`` where it has none."""
        return (self.kernel and self.kernel.name) or self.name or "-"

    @property
    def variant(self) -> str:
        """What tells it from others of its name: parameters of a kernel; else name expressions and options."""
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
    """Whether a value is text, or what a file's name may be; JSON also has halves of characters."""
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
    """The objects of a list that have these texts."""
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
