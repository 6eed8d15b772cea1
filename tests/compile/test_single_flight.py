# SPDX-License-Identifier: Apache-2.0
"""One compile per program, in threads and processes; and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, Program, ProgramOptions, subscribe
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.compile import miss, single_flight
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.errors import CompileError

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'
DEADLINE = 300.0


def never():
    raise AssertionError("must not be called")


def others_wait(count):
    """Return when so many other threads wait for a flight to land: a barrier that the waiters themselves can't have."""

    def waits(frame):
        asleep = frame.f_code.co_filename == threading.__file__
        while asleep and frame is not None:
            if frame.f_code is fly.__code__:
                return True
            frame = frame.f_back
        return False

    end = time.monotonic() + DEADLINE
    while True:
        frames = {thread: frame for thread, frame in sys._current_frames().items() if thread != threading.get_ident()}
        if sum(map(waits, frames.values())) == count:
            return
        assert time.monotonic() < end, "they don't wait"
        time.sleep(0.005)


class Compiler:
    """Counts its runs, and lands when so many threads wait for it; what it makes lies in a 'cache' afterwards."""

    def __init__(self, waiters=0, error=None):
        self.runs = 0
        self.made = None
        self.waiters = waiters
        self.error = error

    def compile(self):
        self.runs += 1
        others_wait(self.waiters)
        if self.error:
            raise self.error
        self.made = b"binary"
        return self.made

    def look_up(self):
        return self.made


@pytest.mark.parametrize("shared", [True, False])
def test_threads_share_one_compile(tmp_path, shared):
    compiler = Compiler(waiters=7)
    directory = str(tmp_path / "leases") if shared else None
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: fly("f", directory, compiler.compile, compiler.look_up), range(8)))
    assert made == [b"binary"] * 8
    assert compiler.runs == 1
    assert not shared or not os.listdir(directory)


def test_threads_share_an_error():
    compiler = Compiler(waiters=3, error=ValueError("refused"))

    def ask(_):
        with pytest.raises(ValueError, match="refused"):
            fly("f", None, compiler.compile, compiler.look_up)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert compiler.runs == 1
    compiler.error, compiler.waiters = None, 0
    assert fly("f", None, compiler.compile, compiler.look_up) == b"binary", "a later call is a flight of its own"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("shared", [True, False])
def test_a_waiter_takes_the_place_of_an_interrupted_thread(tmp_path, interrupt, shared):
    directory = str(tmp_path / "leases") if shared else None
    entered, waiting = threading.Event(), threading.Event()
    runs, raised = [], []

    def interrupted():
        entered.set()
        assert waiting.wait(DEADLINE)
        raise interrupt

    def lead():
        try:
            fly("f", directory, interrupted, lambda: None)
        except interrupt as error:
            raised.append(error)

    def compile_():
        if not runs:  # a follower may come when all has landed, and lead a flight of its own
            runs.append(1)
        return b"made"

    def follow(_):
        waiting.set()
        return fly("f", directory, compile_, lambda: b"made" if runs else None)

    leader = threading.Thread(target=lead)
    leader.start()
    assert entered.wait(DEADLINE)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(follow, range(4))) == [b"made"] * 4
    leader.join(DEADLINE)
    assert len(raised) == 1, "the interrupted thread has its interrupt"


def test_different_programs_do_not_wait_for_each_other(tmp_path):
    inside = threading.Barrier(2)

    def compile_():
        inside.wait(DEADLINE)  # both at once, or it breaks
        return b"x"

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda n: fly(f"f{n}", str(tmp_path), compile_, lambda: None), range(2))) == [b"x", b"x"]


def test_what_landed_between_look_and_lease_is_taken(tmp_path):
    assert fly("f", str(tmp_path), never, lambda: b"there already") == b"there already"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trouble", ["file in the way", "read-only"])
def test_without_leases_there_is_a_compile_too_many_and_nothing_worse(tmp_path, trouble):
    directory = tmp_path / "leases"
    if trouble == "file in the way":
        directory.write_text("")
    elif os.geteuid() == 0:
        directory = "/proc/leases"  # root may write anywhere but there
    else:
        tmp_path.chmod(0o500)
    assert fly("f", str(directory), lambda: b"made", lambda: None) == b"made"


HOLDER = """
import sys, time
from cuda_progcache.compile import single_flight
def compile_():
    print("holding", flush=True)
    time.sleep(float(sys.argv[2]))
    open(sys.argv[1] + ".made", "wb").write(b"from the holder")
    return b"from the holder"
single_flight.fly("f", sys.argv[1], compile_, lambda: None)
"""


@pytest.fixture
def patient(monkeypatch):
    """A lease that isn't touched is waited for: the machine may be busy, and its holder be kept from running."""
    monkeypatch.setattr(single_flight, "STANDSTILL", 10 * DEADLINE)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lease of flight "f" for a while."""
    directory = str(tmp_path / "leases")
    started = []

    def start(seconds):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, directory, str(seconds)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "holding\n"
        return process

    def look_up():
        try:
            with open(directory + ".made", "rb") as file:
                return file.read() or None
        except OSError:
            return None

    start.directory, start.look_up = directory, look_up
    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.usefixtures("patient")
def test_another_process_is_waited_for(holder):
    holder(0.5)
    assert fly("f", holder.directory, never, holder.look_up) == b"from the holder"


@pytest.mark.usefixtures("patient")
def test_a_killed_holder_is_replaced(holder):
    process = holder(2 * DEADLINE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fly, "f", holder.directory, lambda: b"ours", holder.look_up)
        time.sleep(0.1)
        assert not waiting.done()
        process.kill()
        process.wait()
        assert waiting.result(DEADLINE) == b"ours"
    assert not os.listdir(holder.directory), "and its lease is gone"


@pytest.mark.usefixtures("patient")
def test_a_killed_holder_has_one_successor(tmp_path, monkeypatch):
    """Three waiters find the holder dead before one of them does anything: one compiles, the others wait for it."""
    lease, waiters = tmp_path / "leases" / "f", 3
    lease.parent.mkdir()
    write = f"from cuda_progcache._util.liveness import current_owner as me; open({str(lease)!r}, 'w').write(str(me()))"
    child = subprocess.Popen([sys.executable, "-c", write])
    child.wait()
    all_found_it, met, turned_away, runs, made = threading.Barrier(waiters), set(), set(), [], []
    is_alive = Owner.is_alive

    def asked(owner):
        me = threading.get_ident()
        if owner.pid == child.pid and me not in met:
            met.add(me)
            all_found_it.wait(DEADLINE)
        elif owner.pid == os.getpid():
            turned_away.add(me)  # it waits for the successor
        return is_alive(owner)

    def compile_():
        runs.append(threading.get_ident())
        end = time.monotonic() + DEADLINE
        while len(runs) + len(turned_away) < waiters and time.monotonic() < end:
            time.sleep(0.001)
        made.append(b"made")
        return b"made"

    monkeypatch.setattr(Owner, "is_alive", asked)
    with ThreadPoolExecutor(waiters) as pool:  # below fly, where threads of a process are one waiter
        waiting = [
            pool.submit(
                single_flight._lead, "f", str(lease.parent), compile_, compile_, lambda: made[0] if made else None, 1e9
            )
            for _ in range(waiters)
        ]
        assert [each.result(DEADLINE) for each in waiting] == [b"made"] * waiters
    assert len(runs) == 1
    assert not os.listdir(lease.parent)


def test_a_stopped_holder_is_not_waited_for(holder):
    process = holder(2 * DEADLINE)
    process.send_signal(signal.SIGSTOP)
    assert fly("f", holder.directory, lambda: b"ours", holder.look_up) == b"ours"
    assert os.listdir(holder.directory) == ["f"], "it is alive: its lease stays"


@pytest.mark.usefixtures("patient")
def test_a_holder_that_fails_is_not_queued_for(tmp_path):
    """Its lease goes without a result: the waiters compile at once, side by side."""
    directory = tmp_path / "leases"
    directory.mkdir()
    lease = directory / "f"
    lease.write_text(str(current_owner()))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fly, "f", str(directory), lambda: b"ours", lambda: None)
        time.sleep(0.1)
        assert not waiting.done()
        lease.unlink()
        assert waiting.result(DEADLINE) == b"ours"


class TurnedClock:
    """The clock of the module under test, which goes on only while this thread sleeps."""

    def __init__(self, monkeypatch):
        self.now, self.sleeps, self._then = 0.0, [], None
        monkeypatch.setattr(single_flight, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def at_each_sleep(self, then):
        self._then = then

    def _sleep(self, seconds):
        if threading.current_thread() is not threading.main_thread():
            return time.sleep(seconds)  # a thread of an earlier test, which touches leases
        self.now += seconds
        self.sleeps.append(seconds)
        return self._then()


@pytest.mark.parametrize("content", ["otherhost-boot-1-1", "", "nonsense"])
def test_a_lease_of_another_machine_counts_while_it_is_touched(tmp_path, content, monkeypatch):
    lease = tmp_path / "f"
    lease.write_text(content)
    clock, until = TurnedClock(monkeypatch), 10 * single_flight.STANDSTILL

    @clock.at_each_sleep
    def touch():
        if clock.now < until:
            os.utime(lease, (clock.now, clock.now))

    made = fly("f", str(tmp_path), lambda: clock.now, lambda: None)
    assert until + 0.9 * single_flight.STANDSTILL < made < until + 2 * single_flight.STANDSTILL, (
        "waited for as long as the lease was touched"
    )


@pytest.mark.parametrize("content", ["ours", "otherhost-boot-1-1"])
def test_a_waiter_that_did_not_run_blames_nobody(tmp_path, content, monkeypatch):
    """As in a container that is paused: the holder, which is no quicker to run again, is waited for."""
    lease = tmp_path / "f"
    lease.write_text(str(current_owner()) if content == "ours" else content)
    clock = TurnedClock(monkeypatch)

    @clock.at_each_sleep
    def suspend():
        if len(clock.sleeps) in {1, 40}:
            clock.now += 100 * single_flight.STANDSTILL
        elif len(clock.sleeps) == 30:
            os.utime(lease, (clock.now, clock.now))
        elif len(clock.sleeps) == 70:
            lease.unlink()

    def look_up():
        return b"theirs" if len(clock.sleeps) == 70 else None

    assert fly("f", str(tmp_path), never, look_up, longest_wait=1e9) == b"theirs"


@pytest.mark.usefixtures("patient")
def test_a_waiter_gives_up_in_the_end(tmp_path):
    """The holder is alive and well (it is this process), and never lands."""
    lease = tmp_path / "f"
    lease.write_text(str(current_owner()))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fly, "f", str(tmp_path), lambda: b"ours", lambda: None, longest_wait=0.3)
        try:
            assert waiting.result(DEADLINE) == b"ours"
            assert lease.exists(), "it compiled beside its holder"
        finally:
            lease.unlink()  # else a waiter that doesn't give up would keep this test for ever


def test_a_thread_gives_up_on_another_thread_in_the_end():
    landed = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        leading = pool.submit(fly, "f", None, lambda: landed.wait(2 * DEADLINE), lambda: None)
        while not single_flight._here.flights:
            time.sleep(0.001)
        waiting = pool.submit(fly, "f", None, lambda: b"ours", lambda: None, longest_wait=0.3)
        try:
            assert waiting.result(DEADLINE) == b"ours"
            assert not leading.done()
        finally:
            landed.set()


def test_a_long_compile_keeps_its_lease_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(single_flight, "HEARTBEAT", 0.05)
    lease = tmp_path / "f"

    def compile_():
        first = lease.stat().st_mtime_ns
        end = time.monotonic() + DEADLINE
        while lease.stat().st_mtime_ns == first and time.monotonic() < end:
            time.sleep(0.01)
        return lease.stat().st_mtime_ns > first

    assert fly("f", str(tmp_path), compile_, lambda: None)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_flights_of_its_own(tmp_path):
    """The thread that leads isn't in the child: waiting for it would be for ever."""
    inside, go_on = threading.Event(), threading.Event()

    def compile_():
        inside.set()
        go_on.wait(DEADLINE)
        return b"parent"

    with ThreadPoolExecutor(1) as pool:
        leading = pool.submit(fly, "f", None, compile_, lambda: None)
        inside.wait(DEADLINE)
        child = os.fork()
        if child == 0:
            os._exit(0 if fly("f", None, lambda: b"child", lambda: None) == b"child" else 1)
        _, status = os.waitpid(child, 0)
        go_on.set()
        assert leading.result(DEADLINE) == b"parent"
    assert status == 0


def test_threads_compile_a_program_once(cache, compiler_runs):
    for store in (cache, InMemoryProgramCache()):
        compiler_runs.clear()
        barrier = threading.Barrier(8)

        def ask(_, store=store, barrier=barrier):
            barrier.wait()
            return Program(SOURCE, "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=store)

        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(ask, range(8)))
        assert len(compiler_runs) == 1
        assert len({m.data for m in made}) == 1


def test_threads_get_one_compile_error(cache, monkeypatch):
    compile_and_publish, runs = miss.compile_and_publish, []

    def when_all_wait(*arguments):
        runs.append(arguments)
        others_wait(3)
        return compile_and_publish(*arguments)

    monkeypatch.setattr(miss, "compile_and_publish", when_all_wait)

    def ask(_):
        with pytest.raises(CompileError, match="nope"):
            Program("int x = nope;", "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=cache)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert len(runs) == 1
    assert len(cache) == 0


def test_eight_processes_compile_a_program_once(tmp_path):
    root = str(tmp_path / "cache")
    code = (
        "import sys\n"
        "from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions\n"
        "from cuda_progcache.compile import single_flight\n"
        f"single_flight.STANDSTILL = {10 * DEADLINE}\n"  # of eight processes, one may be kept from running
        f"cache = FileStreamProgramCache({root!r})\n"
        "source = '#include <cuda/std/limits>\\n' + 'extern \"C\" __global__ void k(int *a) { *a = 1; }'\n"
        "from cuda_progcache.keys.toolchain import header_root\n"
        "options = ProgramOptions(arch='sm_80', include_path=[header_root('cuda'), header_root('cccl')])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(Program(source, 'c++', options).compiled('cubin', cache=cache).hit)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    hits = [process.communicate(timeout=DEADLINE)[0].strip() for process in processes]
    assert sorted(hits) == ["False"] + ["True"] * 7
    assert len(FileStreamProgramCache(root)) == 1


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_subscriber_that_compiles_the_same_program(tmp_path, in_memory):
    """Within its own event it would wait for its own thread."""
    cache = InMemoryProgramCache() if in_memory else FileStreamProgramCache(tmp_path / "c", durability="none")
    program = Program("__device__ const char *now = __DATE__;\n" + SOURCE, "c++", ProgramOptions(arch="sm_80"))
    inner = []

    def on(event):
        if event.kind == "drop" and not inner:
            inner.append(None)
            inner[0] = program.compiled("cubin", cache=cache)

    with subscribed(on):
        outer = in_time(lambda: program.compiled("cubin", cache=cache))
    assert inner[0].data == outer.data


def test_threads_whose_subscribers_want_each_others_programs():
    cache = InMemoryProgramCache()
    barrier = threading.Barrier(2, timeout=DEADLINE)
    programs = [
        Program(
            f"__device__ const char *now = __DATE__; // {n}\n{SOURCE}",
            "c++",
            ProgramOptions(arch="sm_80", name=f"p{n}"),
        )
        for n in "01"
    ]
    asked = set()

    def on(event):
        if event.kind == "drop" and event.name not in asked:
            asked.add(event.name)
            barrier.wait()
            programs[event.name == "p0"].compiled("cubin", cache=cache)

    with subscribed(on), ThreadPoolExecutor(2) as threads:
        made = [threads.submit(program.compiled, "cubin", cache=cache) for program in programs]
        assert all(one.result(DEADLINE).data for one in made)


def test_a_thread_that_leads_does_not_wait_for_another_process(tmp_path):
    """Which may wait for what it leads."""
    lease = tmp_path / "cache" / "leases" / "theirs"
    lease.parent.mkdir(parents=True)
    parent = subprocess.Popen([sys.executable, "-c", HOLD, str(lease)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert parent.stdout.readline()
        inner = Compiler()

        def compile_():
            return fly("theirs", str(lease.parent), inner.compile, inner.look_up)

        in_time(lambda: fly("mine", str(lease.parent), compile_, never_there))
        assert inner.runs == 1
        assert lease.exists()
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()


HOLD = """
import os, sys, time
from cuda_progcache._util.liveness import current_owner
with open(sys.argv[1], "w") as file:
    file.write(str(current_owner()))
print("held", flush=True)
while True:
    os.utime(sys.argv[1])
    time.sleep(0.1)
"""


def never_there():
    return None


@contextlib.contextmanager
def subscribed(on):
    unsubscribe = subscribe(on)
    try:
        yield
    finally:
        unsubscribe()


def in_time(act):
    """What ``act`` gives, in a thread: one that hangs is told of."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(act).result(DEADLINE)


def test_without_a_thread_to_touch_its_lease_it_compiles_all_the_same(tmp_path, monkeypatch):
    class Threading:
        def __getattr__(self, name):
            return getattr(threading, name)

        def Thread(self, **_):  # noqa: N802 - as the module has it
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(single_flight._here, "heart", None)
    monkeypatch.setattr(single_flight, "threading", Threading())
    assert fly("f", str(tmp_path / "leases"), lambda: b"made", lambda: None) == b"made"
    assert single_flight._here.heart is None
    assert not list((tmp_path / "leases").iterdir())
