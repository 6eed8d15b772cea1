# SPDX-License-Identifier: Apache-2.0
"""A fork at any moment: no child of a process that hits, misses and waits finds anything locked."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Threads look up, compile and wait for each other's compiles, in memory and on disk, with headers and failures that are
# remembered; the main thread forks all the while. A child does one of these things itself, within its time.
STRESS = """
import faulthandler, os, sys, threading, time, warnings
import cuda_progcache as cp

warnings.simplefilter("ignore")  # Python 3.12 and later warn of forks beside threads
folder, wanted, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
os.chdir(folder)
with open("value.h", "w") as file:
    file.write("#define VALUE 1\\n")
os.utime("value.h", (1, 1))
options = cp.ProgramOptions(arch="sm_80")
stores = [cp.InMemoryProgramCache(), cp.FileStreamProgramCache("cache", durability="none")]
services = [cp.CompileService(store, keep_failures=600) for store in stores]
WITH_HEADER = '#include "value.h"\\nextern "C" __global__ void k(int *p) { *p = VALUE; }'
NEW = '#include "value.h"\\nextern "C" __global__ void k(int *p) { *p = VALUE + %d; }'

def hit(n):
    assert services[n % 2].compile(WITH_HEADER, options=options).hit

def fail(n):
    try:
        services[n % 2].compile("__global__ void k( {", options=options)
    except cp.CompileError:
        return
    raise AssertionError("it compiles")

def miss(n):
    assert services[n % 2].compile(NEW % n, options=options).data

for service in services:
    service.compile(WITH_HEADER, options=options)
for n in range(2):
    hit(n), fail(n)
miss(0)
stop = threading.Event()
troubles = []

def again(act, first, step):
    try:
        n = first
        while not stop.is_set():
            act(n)
            n += step
    except BaseException as error:
        troubles.append(repr(error))

jobs = [(hit, 0, 1), (hit, 1, 1), (fail, 0, 1), (miss, 1, 1), (miss, 1, 1), (miss, 2, 2)]
threads = [threading.Thread(target=again, args=job, daemon=True) for job in jobs]
for thread in threads:
    thread.start()
forks = hung = failed = 0
children = {}
while forks < wanted or children:
    if forks < wanted and len(children) < 4:
        child = os.fork()
        if not child:
            status = 1
            try:
                faulthandler.dump_traceback_later(patience * 0.9)
                (hit, fail, hit, fail, hit, fail, hit, miss)[forks % 8](forks + 1_000_000)
                status = 0
            finally:
                os._exit(status)
        children[child] = time.monotonic() + patience
        forks += 1
    for child, latest in list(children.items()):
        pid, status = os.waitpid(child, os.WNOHANG)
        if not pid and time.monotonic() > latest:
            hung += 1
            os.kill(child, 9)
            os.waitpid(child, 0)
        elif not pid:
            continue
        elif status:
            failed += 1
        del children[child]
    time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join(patience)
    hung += thread.is_alive()
print(forks, hung, failed, troubles)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_forks_at_any_moment(tmp_path):
    command = [sys.executable, "-c", STRESS, str(tmp_path), "48", "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["48", "0", "0", "[]"], done.stdout + done.stderr
