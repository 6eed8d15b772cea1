# SPDX-License-Identifier: Apache-2.0
"""Who owns a file that was left behind, and whether that process still lives.

A process id alone says little: ids are reused, a cache directory is shared by machines and containers, and it outlives
reboots. An :class:`Owner` therefore also names the machine, the boot and the process's start time. The names are
file-name safe, so that they can stand in the name of a staging file.
"""

from __future__ import annotations

import functools
import os
import sys
import time

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple

_UNKNOWN = "0"
#: What is written and renamed within seconds, was left behind when it is older than this (in seconds) and its owner
#: can't be asked after.
LITTER_AGE = 3600.0


class Owner(NamedTuple):
    """A process, told apart from every other one that writes to the same directory.

    Attributes
    ----------
    host : str
        12 hex digits for machine and process-id namespace: containers on one machine don't see each other's processes.
    boot : str
        12 hex digits for this boot of it, ``"0"`` where the system doesn't tell.
    pid : int
        Process id.
    start : int
        Start time in clock ticks since boot (``/proc/<pid>/stat``, field 22), 0 where the system doesn't tell.
    """

    host: str
    boot: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.host}-{self.boot}-{self.pid}-{self.start}"

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """The owner that ``str(owner)`` named, ``None`` where ``text`` isn't one."""
        host, _, rest = text.partition("-")
        boot, _, rest = rest.partition("-")
        pid, _, start = rest.partition("-")
        if not (host and boot and pid.isdecimal() and start.isdecimal()):
            return None
        return cls(host, boot, int(pid), int(start))

    def is_alive(self) -> bool | None:
        """Whether the process still runs; ``None`` where that can't be known (another machine, no ``/proc``)."""
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
    """Whether a file lies there because the process that made it is gone.

    Parameters
    ----------
    owner : str
        Who made it, as ``str(owner)`` says.
    status : os.stat_result
        Of the file.
    """
    known = Owner.parse(owner)
    alive = None if known is None else known.is_alive()
    if alive is None:
        return abs(time.time() - status.st_mtime) >= LITTER_AGE
    return not alive


def current_owner() -> Owner:
    """Name the process that calls, also right after a fork."""
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
            namespace = "unknown"  # no /proc: then no process's start time is known either, and nothing is called dead
    name = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    return _short(name, _first_line("/etc/machine-id"), namespace)


def _boot() -> str:
    boot = _first_line("/proc/sys/kernel/random/boot_id")
    return _short(boot) if boot and os.path.exists("/proc/self/stat") else _UNKNOWN


def _first_line(path: str) -> str:
    try:
        with open(path, "rb") as file:  # as text it could need a codec's module, which a chroot or `setuid` can hide
            return file.readline().strip().decode("ascii", "replace")
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """Start time of a process in ticks since boot; ``None`` if there is no such process, -1 for a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            stat = file.read()
    except OSError:
        return None
    fields = stat[stat.rindex(b")") + 2 :].split()  # the name in parentheses may hold blanks and parentheses
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _hidden(pid: int) -> bool:
    """Whether a process that ``/proc`` doesn't show is there all the same (another user's, ``hidepid``)."""
    try:
        os.kill(pid, 0)  # only reached where /proc is, so never on Windows, where this would kill
    except (ProcessLookupError, OverflowError):  # a file name's number may be none that a process can have
        return False
    except OSError:
        return True
    return True
