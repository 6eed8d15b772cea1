# SPDX-License-Identifier: Apache-2.0
"""The owner of a file or module: the standard library, an installed package, or the user.

Code belongs to a package if the metadata of an installed distribution claims its file, in any directory of
``sys.path``: ``site-packages``, the user's site directory, or one on PYTHONPATH. Everything else is the user's own,
including editable installs. Nothing is imported to find out.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import importlib.util
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable
from hashlib import sha256
from typing import NamedTuple

from cuda_progcache._util.files import Signature, signature
from cuda_progcache._util.syntax_tree import parse
from cuda_progcache.memo.syntax import written


def hash_parts(*parts: str | bytes) -> bytes:
    """Return the SHA-256 of parts, each hashed with its length, as 64 hex digits in ASCII."""
    state = sha256(usedforsecurity=False)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(b"%d:" % len(data) + data)
    return state.hexdigest().encode()


class Package(NamedTuple):
    """The owner of a file that isn't the user's: a top-level module's name (empty: standard library) and version."""

    name: str
    version: str


STANDARD_LIBRARY = Package("", "")


@functools.cache
def _standard_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.realpath(paths[name]) + os.sep for name in ("stdlib", "platstdlib")})


_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_packages: dict[str, Package | None] = {}


def package_of_file(path: str) -> Package | None:
    """Return the package that owns a file; None if the file is the user's own."""
    if path not in _packages:
        _packages[path] = _find_package(path)
    return _packages[path]


def _find_package(path: str) -> Package | None:
    if path.startswith("<frozen "):
        return STANDARD_LIBRARY
    if not os.path.isabs(path):
        return None
    if path.startswith(_OURS):
        from cuda_progcache import __version__

        return Package(__name__.partition(".")[0], __version__)  # also if it runs from a source tree
    places = {form(place) for place in sys.path if place for form in (os.path.abspath, os.path.realpath)}
    for spelled in dict.fromkeys((os.path.abspath(path), os.path.realpath(path))):
        folder = os.path.dirname(spelled)
        while True:
            if folder in places and (claimed := _claimed(folder, os.path.relpath(spelled, folder))) is not None:
                return claimed
            above = os.path.dirname(folder)
            if above == folder:
                break
            folder = above
    real = os.path.realpath(path)
    inside = real.startswith(_standard_folders()) and not re.search(r"[/\\](site|dist)-packages[/\\]", real)
    return STANDARD_LIBRARY if inside else None


class _Claims(NamedTuple):
    """The files and the top-level names that distributions claim; None for a name that several distributions claim."""

    files: dict[str, Package]
    tops: dict[str, Package | None]


def _claimed(folder: str, path: str) -> Package | None:
    """Return the package of the distribution in ``folder`` that claims a file below the folder; None if none does."""
    top = path.partition(os.sep)[0]
    path = path.replace(os.sep, "/")
    namesake = _metadata(folder).get(_normalized(top.removesuffix(".py")))  # usually the one that claims the file
    if namesake is not None and f"\n{path}," in "\n" + _text(namesake, "RECORD"):
        return _package(namesake, top)
    claims = _claims(folder)
    return claims.files.get(path) or claims.tops.get(top)


@functools.lru_cache(maxsize=64)
def _metadata(folder: str) -> dict[str, str]:
    """Return the metadata directories in a folder, by the distribution's normalized name."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    found = {}
    for name in names:
        if name.endswith((".dist-info", ".egg-info")):
            found[_normalized(name.rpartition(".")[0].partition("-")[0])] = os.path.join(folder, name)
    return found


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _text(metadata: str, name: str) -> str:
    try:
        with open(os.path.join(metadata, name), encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


@functools.lru_cache(maxsize=4096)
def _package(metadata: str, top: str) -> Package:
    text = _text(metadata, "METADATA") or _text(metadata, "PKG-INFO")
    version = re.search(r"^Version:[ \t]*(\S+)", text, re.MULTILINE)
    return Package(top.removesuffix(".py").partition(".")[0], version[1] if version else "unknown")


@functools.lru_cache(maxsize=64)
def _claims(folder: str) -> _Claims:
    files: dict[str, Package] = {}
    tops: dict[str, Package | None] = {}
    for metadata in _metadata(folder).values():
        listed = [line.rpartition(",")[0].rpartition(",")[0] for line in _text(metadata, "RECORD").splitlines()]
        mine = set()
        for path in listed:
            top = path.partition("/")[0]
            if path and not path.startswith("..") and not top.endswith((".dist-info", ".pth", "__pycache__")):
                files[path] = _package(metadata, top)
                mine.add(top)
        if not listed:
            mine.update(_text(metadata, "top_level.txt").split())
        for top in mine:
            for name in (top, f"{top}.py") if not listed else (top,):
                tops[name] = _package(metadata, top) if name not in tops else None  # a namespace shared by several
    return _Claims(files, tops)


def package_of_module(name: str, module: types.ModuleType | None = None) -> Package | None:
    """Return the package that owns a module, loaded or not; None if it is the user's own or doesn't exist."""
    module = module if module is not None else sys.modules.get(name)
    spec = getattr(module, "__spec__", None) if module is not None else locate(name)
    if module is not None and spec is None:
        path = getattr(module, "__file__", None)
        if path is not None:
            return package_of_file(path)
        version = getattr(module, "__version__", None)  # created at run time, but declares a version
        if isinstance(version, str) and name != "__main__":
            return Package(name.partition(".")[0], version)
        return STANDARD_LIBRARY if name in sys.builtin_module_names else None
    if spec is None:
        return None
    if spec.origin in {"built-in", "frozen"}:
        return STANDARD_LIBRARY
    place = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), None)
    if place is None:
        return None
    if not spec.has_location:  # a namespace package belongs to the owner of its modules
        return package_of_file(os.path.join(place, "__init__.py"))
    return package_of_file(place)


def locate(name: str) -> importlib.machinery.ModuleSpec | None:
    """Return the spec of a module that isn't loaded, without importing the packages above it; None if there is none."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None  # missing, or created at run time
    for depth, _ in enumerate(rest, 2):
        if spec is None or spec.submodule_search_locations is None:
            return None
        full = ".".join([top, *rest][:depth])
        spec = importlib.machinery.PathFinder.find_spec(full, list(spec.submodule_search_locations))
    return spec


class Source(NamedTuple):
    """The source file of a user's module, and the modules that it may import."""

    digest: bytes
    imports: frozenset[str]
    path: str
    stamp: Signature


_sources: dict[str, Source] = {}


def stamp_of(path: str) -> Signature | None:
    """Return the signature of a file; None if the file is missing."""
    try:
        return signature(os.stat(path))
    except OSError:
        return None


def source_of(module: str, path: str) -> Source | None:
    """Read a source file and digest it without comments, layout and docstrings; None if it can't be read."""
    stamp = stamp_of(path)
    known = _sources.get(path)
    if known is not None and known.stamp == stamp:
        return known
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        return None
    if stamp is None:
        return None
    try:
        tree = parse(content)
    except (SyntaxError, ValueError):
        made = Source(hash_parts("file", content), frozenset(), path, stamp)  # an extension module
    else:
        package = module if os.path.basename(path) == "__init__.py" else module.rpartition(".")[0]
        made = Source(hash_parts("file", written(tree)), frozenset(_statements(tree, package)), path, stamp)
    _sources[path] = made
    return made


def _statements(tree: ast.Module, package: str) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level:
                try:
                    name = importlib.util.resolve_name("." * node.level + name, package)
                except ImportError:
                    continue
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names if alias.name != "*")
