# SPDX-License-Identifier: Apache-2.0
"""A process that does everything that writes to a cache, one after the other; see test_modes.py.

Called with a directory, below which all of its caches lie, and where it gets ``CUDA_PROGCACHE`` and the like from its
environment. It prints a JSON object: of each writer what came of it, and the files that changed while it worked.
"""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

PLACE = Path(sys.argv[1])
CACHES = tuple(str(PLACE / name) for name in ("cache", "first", "second", "templates", "calls", "files", "xdg"))
HEADER = "#define SIZE 4\n"
SOURCE = '#include "size.h"\nextern "C" __global__ void fill(int *p) { p[threadIdx.x] = SIZE; }\n'
OPTIONS = {"arch": "sm_90", "name": "fill.cu", "include_path": str(PLACE / "include")}

opened = []
started = []


def watch(event, args):
    if event in {"open", "os.scandir", "os.listdir"} and isinstance(args[0], str) and args[0].startswith(CACHES):
        opened.append(args[0])
    elif event == "subprocess.Popen":
        started.append(str(args[1]))


def tree():
    """Every file and folder below the place: what it is, how long, when it was written, and its content."""
    found = {}
    for folder, folders, files in os.walk(PLACE):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = ""
            if name in files:
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            found[os.path.relpath(path, PLACE)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def service(**more):
    from cuda_progcache import CompileService

    return CompileService(**more)


def program():
    return service().compile(SOURCE, options=OPTIONS).hit


def kernel():
    return service().kernel("axpby", arch="sm_90").hit


def analysis():
    done = service().kernel("axpby", arch="sm_90")
    return bool(done.resource_usage()) and done.hit


def linked():
    return service().kernel("saxpy_nvvm", arch="sm_90").hit


def not_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return service().compile(f"{SOURCE}__device__ const char *now = __TIME__;", options=OPTIONS).hit


def refused():
    from cuda_progcache import CompileError

    try:
        service(keep_failures=600).compile("nonsense", options=OPTIONS)
    except CompileError:
        return False
    return True


def prewarmed():
    report = service().prewarm(archs=["sm_90"], kernels=["transpose"], jobs=2)
    return {"hit"} == {item.status for item in report.items}


def peer():
    from cuda_progcache import FileStreamProgramCache

    with FileStreamProgramCache() as cache:
        return by_peer(cache)


def by_peer(cache):
    """Compile by cuda.core, which knows a store as a mapping; whether it was a hit."""
    import cuda.core

    made = cuda.core.Program('extern "C" __global__ void empty() {}', "c++", cuda.core.ProgramOptions(arch="sm_90"))
    made.compile("cubin", cache=cache)
    return cache.stats().hits == 1


def peer_levels():
    from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack

    return by_peer(ProgramCacheStack([InMemoryProgramCache(), FileStreamProgramCache()]))


def peer_layer():
    from cuda_progcache import ReadOnlyProgramCache

    return (PLACE / "cache").exists() and by_peer(ReadOnlyProgramCache(PLACE / "cache"))


def peer_memory():
    from cuda_progcache import InMemoryProgramCache

    return by_peer(InMemoryProgramCache())


def levels():
    from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack

    second = FileStreamProgramCache(PLACE / "second")
    hit = service(cache=second).compile(SOURCE, options=OPTIONS).hit
    stack = ProgramCacheStack([InMemoryProgramCache(), FileStreamProgramCache(PLACE / "first"), second])
    service(cache=stack).compile(SOURCE, options=OPTIONS)
    return hit


def layered():
    from cuda_progcache import Program, ReadOnlyProgramCache

    if not (PLACE / "cache").exists():
        return False
    return Program(SOURCE, "c++", OPTIONS).compiled("cubin", cache=ReadOnlyProgramCache(PLACE / "cache")).hit


def memoized():
    from cuda_progcache.memo.memoize import file_cache, memoize

    @memoize(cache=lambda: file_cache(PLACE / "calls"))
    def double(value):
        return 2 * value

    assert double(4) == 8
    return bool(double.counters["hits"])


def saved():
    from cuda_progcache.memo.cache_file import cache_file

    @cache_file(cache_dir=PLACE / "files")
    def double(value):
        return 2 * value

    assert double(4) == 8
    return bool(double.counters["hits"])


def saved_by_default():
    from cuda_progcache.memo.cache_file import cache_file

    @cache_file()
    def triple(value):
        return 3 * value

    assert triple(4) == 12
    return bool(triple.counters["hits"])


WRITERS = (
    program, kernel, analysis, linked, not_kept, refused, prewarmed, levels, layered, memoized, saved,
    saved_by_default, peer, peer_levels, peer_layer, peer_memory,
)  # fmt: skip


def compilers():
    maps = Path("/proc/self/maps")
    text = maps.read_text() if maps.exists() else ""
    return [name for name in ("libnvrtc", "libnvvm", "libnvJitLink") if name in text]


def main():
    wanted = sys.argv[2].split(",") if len(sys.argv) > 2 else [writer.__name__ for writer in WRITERS]
    sys.addaudithook(watch)
    told = {}
    for writer in WRITERS:
        if writer.__name__ not in wanted:
            continue
        before = tree()
        opened.clear()
        started.clear()
        try:
            outcome = writer()
        except Exception as error:  # noqa: BLE001 - told to the test
            outcome = f"{type(error).__name__}: {error}"
        read = sorted(set(opened))
        after = tree()
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        told[writer.__name__] = {
            "outcome": outcome, "changed": changed, "opened": read, "started": list(started), "compilers": compilers(),
        }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
