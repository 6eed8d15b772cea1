# SPDX-License-Identifier: Apache-2.0
"""An on-disk cache of compiled templates, keyed by everything that determines a template's code.

Cached code is executed. For that reason, the directory and each file must belong to the current user, and nobody else
may write to them. A file's checksum is verified before its bytes are loaded as code (see
`cuda_progcache.templates.frames`).
"""

from __future__ import annotations

import errno
import os
import stat
import time

from cuda_progcache._util import modes
from cuda_progcache._util.digest import sha256
from cuda_progcache.templates.abi import MEMO, PYTHON_TAG, abi_tag
from cuda_progcache.templates.frames import Compiled, FrameError, frame, unframe

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import CodeType
    from typing import Any

    import jinja2
    from jinja2 import nodes

PATTERN = "__progcache_{version}_{name}_{hash}.pyc"

_READ = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"):
    _READ |= getattr(os, _flag, 0)
_POSIX = hasattr(os, "geteuid")
_DAY = 86400
#: The number of templates whose file names are kept in memory, so that their keys aren't hashed again.
_REMEMBERED = 1024
#: The file whose modification time is that of the last cleanup.
_CLEANED = "__progcache_cleaned"
#: The age in seconds at which a staging file is removed if nobody can tell whether its writer is alive.
_LITTER_AGE = 3600


class BytecodeCache:
    """A directory of compiled templates that many processes may share.

    I/O errors never stop a render: a file that can't be read is a miss, and a template that can't be written is not
    stored.

    Parameters
    ----------
    directory : path
        Created with mode 0700 if it doesn't exist.
    pattern : str
        The format of file names, with the fields ``version`` (Python and compiler), ``name`` (a safe form of the
        template's name) and ``hash`` (a digest of the whole key).
    mode : {"rw", "ro", "off", "frozen"}, optional
        The cache mode (:mod:`cuda_progcache._util.modes`). Only ``rw`` creates, writes or removes files in the
        directory; ``off`` doesn't read them either. None: the present value of ``CUDA_PROGCACHE``.

    Attributes
    ----------
    directory, mode : str
    hits, misses : int
        The numbers of this object's lookups that found a template and that didn't.
    rejected : int
        The number of misses because of a damaged or foreign file.
    failed : int
        The number of templates that couldn't be stored.

    Raises
    ------
    UnsafeRootError
        If the directory belongs to another user, or others may read or write it. Cached code is executed.
    StoreError
        If the directory can't be created.
    ValueError
        If the pattern has no ``{hash}`` or contains a directory.
    """

    def __init__(self, directory: str | os.PathLike[str], pattern: str = PATTERN, *, mode: str | None = None) -> None:
        if "{hash}" not in pattern or os.path.basename(pattern) != pattern:
            raise ValueError(f"a pattern for file names must contain {{hash}} and no directory, got {pattern!r}")
        self.directory = os.path.abspath(os.fspath(directory))
        self.pattern = pattern
        self.hits = self.misses = self.rejected = self.failed = 0
        self.mode = modes.chosen(mode)
        if self.mode == "rw" or (self.mode != "off" and os.path.lexists(self.directory)):
            _make_private(self.directory)
        self._places: dict[tuple[str, str, str | None], tuple[str, bytes]] = {}
        looked_at = None if self.mode == "off" else self.directory
        self._version = f"{PYTHON_TAG}-{abi_tag(looked_at, keep=self.mode == 'rw')}"

    def get(
        self, name: str, source_hash: str, *, context_hash: str | None = None
    ) -> tuple[CodeType, nodes.Template | None, list[Any] | None] | tuple[None, None, None]:
        """Return a template's code, syntax tree and precomputed values.

        Parameters
        ----------
        name : str
            The template's name.
        source_hash : str
            The `hash_source` of the template's text.
        context_hash : str, optional
            A digest of the environment's settings that affect the code; see `compile_context`.

        Returns
        -------
        tuple
            ``(code, ast, precomputed)``, where `ast` and `precomputed` are None if the entry has none;
            ``(None, None, None)`` on a miss.
        """
        found = self.load(name, source_hash, context_hash=context_hash)
        return (None, None, None) if found is None else (found.code, found.ast, found.precomputed)

    def load(self, name: str, source_hash: str, *, context_hash: str | None = None) -> Compiled | None:
        """Return what `get` returns, and the compiler's warnings, as one object; None on a miss."""
        if self.mode == "off":
            self.misses += 1
            return None
        path, key = self._place(name, source_hash, context_hash)
        status = None
        try:
            fd = os.open(path, _READ)
            try:
                status = os.fstat(fd)
                data = os.read(fd, status.st_size + 1) if _is_ours(status) else b""
            finally:
                os.close(fd)
            found = unframe(data, key)
        except OSError as error:  # mostly: there is no such file
            self.misses += 1
            if self.mode == "rw" and not isinstance(error, FileNotFoundError):
                self._remove_unless_file(path)
            return None
        except FrameError:
            self.misses += 1
            self.rejected += 1
            if self.mode == "rw":
                _remove(path, status)
            return None
        self.hits += 1
        if self.mode == "rw" and time.time() - status.st_mtime > _DAY:
            _touch(path)
        return found

    def has(self, name: str, source_hash: str, *, context_hash: str | None = None) -> bool:
        """Whether a file for this template exists; only `load` checks its content."""
        return self.mode != "off" and os.path.exists(self._place(name, source_hash, context_hash)[0])

    def set(
        self,
        name: str,
        source_hash: str,
        code: CodeType,
        *,
        context_hash: str | None = None,
        ast: nodes.Template | None = None,
        precomputed: list[Any] | None = None,
    ) -> None:
        """Store a template's code under the key that `get` takes; an existing entry is overwritten.

        A template isn't stored if its precomputed values are of classes that can't be unpickled safely; `failed` counts
        such a template.

        Raises
        ------
        TypeError
            If `ast` is not the syntax tree of a template.
        """
        if ast is not None:
            from jinja2 import nodes

            if not isinstance(ast, nodes.Template):
                raise TypeError(f"expected a jinja2.nodes.Template, got a {type(ast).__name__}")
        self.save(name, source_hash, Compiled(code, ast, precomputed), context_hash=context_hash)

    def save(self, name: str, source_hash: str, compiled: Compiled, *, context_hash: str | None = None) -> None:
        """Store a template as `set` does, with the compiler's warnings; do nothing in a mode other than ``rw``."""
        if self.mode != "rw":
            return
        from cuda_progcache._util.files import put_in_place
        from cuda_progcache._util.liveness import current_owner

        path, key = self._place(name, source_hash, context_hash)
        staged = f"{path}.{current_owner()}.{time.monotonic_ns():x}.tmp"
        try:
            data = frame(compiled, key)
            _make_private(self.directory)  # it may have been removed
            put_in_place(path, data, staged=staged, mode=0o600)
        except (OSError, FrameError) as error:
            self._not_kept(name, str(error))
            return
        try:
            self._clean_daily()
        except OSError as error:
            from cuda_progcache._util.warning import warn
            from cuda_progcache.errors import ProgCacheWarning

            warn(f"can't remove unused compiled templates from {self.directory}: {error}", ProgCacheWarning)

    def get_bucket(self, environment: jinja2.Environment, name: str, filename: str | None, source: str) -> Bucket:
        """Look up a template for one of Jinja2's loaders (the ``jinja2.BytecodeCache`` protocol).

        Our ``Environment`` and Jinja2's own both accept this cache as ``bytecode_cache``. The key covers everything in
        the environment that affects the code; if that can't be determined, nothing is stored.

        Returns
        -------
        Bucket
            Its ``code`` is None on a miss.
        """
        from cuda_progcache.templates.compile_context import environment_context, move

        bucket = Bucket(environment, name, hash_source(source), environment_context(environment))
        found = None
        if bucket.context_hash is not None:
            found = self.load(name, bucket.source_hash, context_hash=bucket.context_hash)
        if found is not None:
            move(found.code, filename or "<template>")
            bucket.code = found.code
        return bucket

    def set_bucket(self, bucket: Bucket) -> None:
        """Store the code that a loader has put into a bucket (the ``jinja2.BytecodeCache`` protocol)."""
        if bucket.context_hash is not None and bucket.code is not None:
            self.save(bucket.key, bucket.source_hash, Compiled(bucket.code), context_hash=bucket.context_hash)

    def clear(self, current_version_only: bool = False) -> int:  # noqa: FBT001, FBT002  (a name of the contract)
        """Remove the compiled templates, including those of other Pythons and compilers unless `current_version_only`.

        Returns
        -------
        int
            The number of files removed.

        Raises
        ------
        ReadOnlyError
            In a mode other than ``rw``.
        """
        self._check_writable()
        return sum(_remove(entry.path) for entry, _ in self._entries(self._version if current_version_only else ""))

    def cleanup(self, max_age_days: float = 30) -> int:
        """Remove templates that nobody has used for `max_age_days` days, and staging files of dead writers.

        Unused templates remain after a source was edited, or a compiler or Python replaced. A template's last use is
        recorded at most once a day. `set` calls this method once a day.

        Returns
        -------
        int
            The number of files removed.

        Raises
        ------
        ReadOnlyError
            In a mode other than ``rw``.
        """
        self._check_writable()
        now = time.time()
        removed = 0
        for entry, status in (*self._entries(), *self._others()):
            age = now - status.st_mtime
            if age > max_age_days * _DAY or _is_orphan(entry.name, age):
                removed += _remove(entry.path)
        return removed

    def stats(self) -> dict[str, int]:
        """Return ``{"file_count", "total_bytes"}`` of the compiled templates of all Pythons and compilers."""
        sizes = [status.st_size for _, status in self._entries()]
        return {"file_count": len(sizes), "total_bytes": sum(sizes)}

    def _make_path(self, name: str, source_hash: str, context_hash: str | None = None) -> Path:
        from pathlib import Path

        return Path(self._place(name, source_hash, context_hash)[0])

    def _place(self, name: str, source_hash: str, context_hash: str | None) -> tuple[str, bytes]:
        """Return a template's file and the key that its checksum covers; both are kept in memory."""
        place = self._places.get((name, source_hash, context_hash))
        if place is None:
            parts = [p.encode("utf-8", "surrogatepass") for p in (self._version, name, source_hash, context_hash or "")]
            key = b"".join(b"%d:%b" % (len(part), part) for part in parts)
            file_name = self.pattern.format(version=self._version, name=_safe(name), hash=sha256(key).hexdigest()[:32])
            place = f"{self.directory}{os.sep}{file_name}", key
            if len(self._places) >= _REMEMBERED:
                self._places.clear()
            self._places[name, source_hash, context_hash] = place
        return place

    def _entries(self, version: str = "") -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """Return the files that match the pattern, of one version or, if `version` is empty, of all versions."""
        fields = ("\0" if version == "" else version, "\0", "\0")
        start, *_, end = self.pattern.format(version=fields[0], name=fields[1], hash=fields[2]).split("\0")
        return (found for found in self._scan() if found[0].name.startswith(start) and found[0].name.endswith(end))

    def _check_writable(self) -> None:
        if self.mode != "rw":
            from cuda_progcache.errors import ReadOnlyError

            message = f"can't remove compiled templates in mode {self.mode!r}"
            raise ReadOnlyError(errno.EROFS, message, self.directory)

    def _clean_daily(self) -> None:
        marker = f"{self.directory}{os.sep}{_CLEANED}"
        try:
            due = time.time() - os.stat(marker).st_mtime > _DAY
        except FileNotFoundError:
            due = True
        if due:
            os.close(os.open(marker, os.O_WRONLY | os.O_CREAT, 0o600))
            os.utime(marker)
            self.cleanup()

    def _others(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        return (found for found in self._scan() if found[0].name.startswith(MEMO) or found[0].name.endswith(".tmp"))

    def _scan(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        try:
            with os.scandir(self.directory) as entries:
                present = list(entries)
        except FileNotFoundError:
            return
        for entry in present:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue  # removed meanwhile
            if not stat.S_ISDIR(status.st_mode):
                yield entry, status

    def _remove_unless_file(self, path: str) -> None:
        """Remove a link or other special file from a template's path; leave a regular file that can't be opened now."""
        try:
            status = os.lstat(path)
        except OSError:
            return
        if not stat.S_ISREG(status.st_mode):
            self.rejected += 1
            _remove(path, status)

    def _not_kept(self, name: str, reason: str) -> None:
        from cuda_progcache.events import Event, emit, wanted

        self.failed += 1
        if wanted("drop"):
            emit(Event("drop", name, "bytecode", "", reasons=(f"compiled template not kept: {reason}",)))

    def __repr__(self) -> str:
        return f"BytecodeCache({self.directory!r})"


class Bucket:
    """A template that one of Jinja2's loaders exchanges with the cache.

    Attributes
    ----------
    code : types.CodeType or None
        The cached code; None on a miss, until the loader has compiled the template.
    """

    def __init__(self, environment: jinja2.Environment, key: str, source_hash: str, context_hash: str | None) -> None:
        self.environment = environment
        self.key = key
        self.source_hash = source_hash
        self.context_hash = context_hash
        self.code: CodeType | None = None


def default_directory() -> str | None:
    """Return the default directory for the compiled templates of kernel libraries; None if they aren't stored.

    The directory is the value of ``CUDA_PROGCACHE_TEMPLATES`` (``off``: None). If that isn't set, the directory is
    ``cuda-progcache/templates`` in the user's cache directory. It is never below ``CUDA_PROGCACHE_DIR``, which may be
    shared: compiled templates are executed.
    """
    chosen = os.environ.get("CUDA_PROGCACHE_TEMPLATES")
    if chosen:
        return None if chosen == "off" else os.path.abspath(os.path.expanduser(chosen))
    from cuda_progcache._util.user_dirs import user_cache_dir

    try:
        return os.path.join(user_cache_dir(), "cuda-progcache", "templates")
    except OSError:
        return None  # the user's home directory is unknown


def hash_source(source: str) -> str:
    """Return the SHA-256 of a template's text as 64 hex digits."""
    return sha256(source.encode("utf-8", "surrogatepass")).hexdigest()


def _safe(name: str) -> str:
    """Return the end of a template's name in characters that every file system accepts, for people to recognize."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-.") else "_" for c in name[-80:])


def _make_private(directory: str) -> None:
    try:
        _make_directories(directory)
        status = os.stat(directory)
    except OSError as error:
        message = f"can't create the directory for compiled templates: {error.strerror}"
        raise _store_error(directory, error.errno, message) from error
    if not stat.S_ISDIR(status.st_mode):
        raise _store_error(directory, errno.ENOTDIR, "compiled templates need a directory, but this is not one")
    if not _POSIX:
        return
    if status.st_uid != os.geteuid():
        wrong = f"belongs to user id {status.st_uid}, not to you; choose another directory"
    elif status.st_mode & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        wrong = f"is open to others (mode {mode}); run `chmod 700` on it or choose another directory"
    else:
        return
    from cuda_progcache.errors import UnsafeRootError

    raise UnsafeRootError(errno.EPERM, f"compiled templates are executed, but this directory {wrong}", directory)


def _store_error(directory: str, number: int | None, message: str) -> Exception:
    from cuda_progcache.errors import StoreError  # only needed after an error

    return StoreError(number, message, directory)


def _make_directories(directory: str) -> None:
    """Create a directory and its missing parents with mode 0700: a store may share the parents."""
    if os.path.isdir(directory):
        return
    above = os.path.dirname(directory)
    if above != directory:
        _make_directories(above)
    from contextlib import suppress

    with suppress(FileExistsError):  # another process has just created it, or it is a file: the caller checks
        os.mkdir(directory, 0o700)


def _is_ours(status: os.stat_result) -> bool:
    if not stat.S_ISREG(status.st_mode):
        return False
    return not _POSIX or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _touch(path: str) -> None:
    try:
        os.utime(path)
    except OSError:
        return  # read-only or removed: at worst the template is compiled again one day


def _remove(path: str, seen: os.stat_result | None = None) -> bool:
    """Remove a file if it is still the one that `seen` describes; return whether it was removed."""
    from cuda_progcache._util.files import identity, remove_if_same, unlink_quietly

    if seen is None:
        return unlink_quietly(path)
    try:
        return remove_if_same(path, identity(seen))
    except OSError:
        return False


def _is_orphan(name: str, age: float) -> bool:
    """Whether a file is the staging file of a writer that no longer runs."""
    if not name.endswith(".tmp"):
        return False
    from cuda_progcache._util.liveness import Owner

    owner = Owner.parse(name.split(".")[-3]) if name.count(".") >= 3 else None
    alive = None if owner is None else owner.is_alive()
    return age > _LITTER_AGE if alive is None else not alive
