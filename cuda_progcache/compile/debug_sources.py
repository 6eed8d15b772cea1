# SPDX-License-Identifier: Apache-2.0
"""Source files for debuggers, for debug builds of unnamed programs.

Each file is named after its content, so it is never stale. It is written if it is missing, also on a hit.
"""

from __future__ import annotations

import contextlib
import os
import threading

from cuda_progcache._util.warning import warn
from cuda_progcache.errors import ProgCacheWarning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.keys.inputs import CompileInputs

#: The maximum number of files, and how many of the least recently used are removed when it is exceeded.
_KEPT, _REMOVED = 1024, 128
_told: set[str] = set()


def keep_debug_source(inputs: CompileInputs) -> None:
    """Write the source to the file that the output names, if it names one. Warn if that fails."""
    path = inputs.debug_source
    if path is None:
        return
    code = inputs.code
    try:
        try:
            if os.path.getsize(path) == len(code):
                os.utime(path)
                return
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            _trim(os.path.dirname(path))
        staged = f"{path}.{os.getpid()}.{threading.get_ident()}"
        with open(staged, "wb") as file:
            file.write(code)
        os.replace(staged, path)
    except OSError as error:
        folder = os.path.dirname(path)
        if folder not in _told:
            _told.add(folder)
            warn(
                f"the source of a debug build can't be written to {folder} ({error.strerror}), so a debugger won't "
                f"show it; give the program the name of a file that has its source",
                ProgCacheWarning,
            )


def _trim(folder: str) -> None:
    with os.scandir(folder) as found:
        names = [item.path for item in found]
    if len(names) < _KEPT:
        return
    ages = []
    for name in names:
        with contextlib.suppress(OSError):  # another process was faster
            ages.append((os.lstat(name).st_mtime_ns, name))
    for _, name in sorted(ages)[:_REMOVED]:
        with contextlib.suppress(OSError):
            os.unlink(name)
