# SPDX-License-Identifier: Apache-2.0
"""Modules that code imports: installed packages by their version, one's own by their source; nothing is imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterable
from hashlib import sha256

from cuda_progcache.memo.syntax import written


def _hash(*parts: str | bytes) -> bytes:
    state = sha256(usedforsecurity=False)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(b"%d:" % len(data) + data)
    return state.hexdigest().encode()


@functools.cache
def _package_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple({os.path.realpath(paths[name]) + os.sep for name in ("purelib", "platlib", "stdlib", "platstdlib")})


_versions: dict[str, str | None] = {}


def version_of(top: str) -> str | None:
    """Version of the installed package that has a top-level module; None if none has.

    Asked of the installed metadata and not of the module, which need not be loaded yet: the answer must be the same
    before the function's first run and after.
    """
    if top not in _versions:
        _versions[top] = _find_version(top)
    return _versions[top]


def _find_version(top: str) -> str | None:
    from importlib import metadata

    if top == __name__.partition(".")[0]:
        from cuda_progcache import __version__

        return __version__  # also where it is run from a source tree
    origin = _origin(top)
    if origin is None or not origin.startswith(_package_folders()):
        return None  # nowhere, or a module of one's own, though perhaps installed as editable
    try:
        return metadata.version(top)
    except metadata.PackageNotFoundError:
        names = metadata.packages_distributions().get(top, ())
        return metadata.version(names[0]) if names else "unknown"


def _origin(name: str) -> str | None:
    """The file or folder that a module comes from, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return None  # not there, or made by hand
    if spec is None:
        return None
    place = spec.origin if spec.has_location else next(iter(spec.submodule_search_locations or ()), None)
    return None if place is None else os.path.realpath(place)


_sources: dict[str, tuple[tuple[int, int, int], bytes, frozenset[str]]] = {}


def local_source(name: str) -> bytes:
    """Digest of the source of a module of one's own, and of those it imports, as they lie on disk."""
    found: dict[str, bytes] = {}
    pending = [name]
    while pending:
        module = pending.pop()
        if module in found or module.partition(".")[0] in sys.stdlib_module_names:
            continue
        origin = _origin(module)
        if origin is None:
            found[module] = b"missing"
            continue
        if origin.startswith(_package_folders()):
            found[module] = (version_of(module.partition(".")[0]) or "unknown").encode()
            continue
        found[module], imports = _source(origin, module)
        pending += imports
    return _hash(*(part for module, source in sorted(found.items()) for part in (module, source)))


def _source(path: str, module: str) -> tuple[bytes, frozenset[str]]:
    """Digest of a source file, without comments and layout, and the modules it imports."""
    try:
        status = os.stat(path)
        stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        known = _sources.get(path)
        if known is not None and known[0] == stamp:
            return known[1], known[2]
        with open(path, "rb") as file:
            content = file.read()
    except OSError:
        return b"unreadable", frozenset()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        made = (_hash("file", content), frozenset[str]())  # an extension module
    else:
        package = module if os.path.basename(path) == "__init__.py" else module.rpartition(".")[0]
        made = (_hash("file", written(tree)), frozenset(_statements(tree, package)))
    _sources[path] = (stamp, *made)
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
            yield from (f"{name}.{alias.name}" for alias in node.names if _origin(f"{name}.{alias.name}"))
