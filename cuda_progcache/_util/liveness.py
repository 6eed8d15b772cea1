# SPDX-License-Identifier: Apache-2.0
"""Owners of files that were left behind, and whether their processes are still alive.

A process id alone isn't enough: ids are reused, machines and containers share a cache directory, and the directory
outlives reboots. An :class:`Owner` therefore also identifies the machine, the boot and the process's start time. Its
text is safe in file names, so that it can be part of the name of a staging file.
"""

from __future__ import annotations

import functools
import os
import sys
import time

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple

_UNKNOWN = "0"
#: The age in seconds at which a temporary file counts as left behind if it can't be known whether its owner is alive;
#: a live owner renames it within seconds.
LITTER_AGE = 3600.0


class Owner(NamedTuple):
    """The identity of a process, distinct from every other process that writes to the same directory.

    Attributes
    ----------
    host : str
        12 hex digits for machine and process-id namespace: containers on one machine don't see each other's processes.
    boot : str
        12 hex digits for the boot of the machine; ``"0"`` if unknown.
    pid : int
        Process id.
    start : int
        Start time in clock ticks since boot (``/proc/<pid>/stat``, field 22); 0 if unknown.
    """

    host: str
    boot: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host}-{self.boot}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Parse the text of ``str(owner)``; return None if it isn't one."""
        host, _, rest = text.partition("-")
        boot, _, rest = rest.partition("-")
        pid, _, start = rest.partition("-")
        if not (host and boot and pid.isdecimal() and start.isdecimal()):
            return None
        return cls(host, boot, int(pid), int(start))

    def is_alive(self) -> bool | None:
        """Return whether the process still runs; None if that can't be known (another machine, no ``/proc``)."""
        here = current_owner()
        if self == here:
            return True
        if self.host != here.host or _UNKNOWN in (self.boot, here.boot):
            return None
        if self.boot != here.boot:
            return False
        start = _start_time(self.pid)
        if start is not None:
            return start == self.start if self.start else None
        return None if _hidden(self.pid) else False


def is_left_behind(owner: str, status: os.stat_result) -> bool:
    """Return whether a file was left behind by a process that no longer runs.

    Parameters
    ----------
    owner : str
        The process that made the file, as the text of an :class:`Owner`.
    status : os.stat_result
        The status of the file.
    """
    known = Owner.parse(owner)
    alive = None if known is None else known.is_alive()
    if alive is None:
        return abs(time.time() - status.st_mtime) >= LITTER_AGE
    return not alive


def current_owner() -> Owner:
    """Return the identity of the current process; correct right after a fork, too."""
    return _owner(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> Owner:
    return Owner(_host(), _boot(), pid, _start_time(pid) or 0)


def _short(*parts: str) -> str:
    return sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _host() -> str:
    namespace = ""
    if sys.platform == "linux":
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:
            namespace = "unknown"  # no /proc: start times are unknown, too, and no process is considered dead
    name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return _short(name, _first_line("/etc/machine-id"), namespace)


def _boot() -> str:
    boot = _first_line("/proc/sys/kernel/random/boot_id")
    return _short(boot) if boot and os.path.exists("/proc/self/stat") else _UNKNOWN


def _first_line(path: str) -> str:
    try:
        with open(path, "rb") as file:  # text mode may import a codec, which chroot or `setuid` can make unreadable
            return file.readline().strip().decode("ascii", "replace")
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """Return the start time of a process in ticks since boot; None if there is no such process, -1 for a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name in parentheses may contain spaces and parentheses
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _hidden(pid: int) -> bool:
    """Return whether a process exists that ``/proc`` doesn't show (another user's, with ``hidepid``)."""
    try:
        os.kill(pid, 0)  # reached only if there is a /proc, so never on Windows, where it would kill the process
    except (ProcessLookupError, OverflowError):  # a number from a file name may be too large for a process id
        return False
    except OSError:
        return True
    return True
