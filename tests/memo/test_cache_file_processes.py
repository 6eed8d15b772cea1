# SPDX-License-Identifier: Apache-2.0
"""``cache_file`` in several processes: the same key in each, one run at a time, and no wait for a dead process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cuda_progcache
from cuda_progcache._util.liveness import current_owner
from cuda_progcache.memo.cache_file import cache_file

JOB = '''
import dataclasses, enum, functools, operator, re, sys
from cuda_progcache.memo.cache_file import cache_file

WORDS = {"alpha", "beta", "gamma", "delta"}
CONFIG = {"sizes": frozenset(["x", "yy", "zzz"]), "scale": 1.5, "pattern": re.compile("a+b", re.I)}

class Mode(enum.Enum):
    FAST = "fast"

@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    tags: frozenset = frozenset()
    def shifted(self, by=1):
        return self.x + by

@functools.lru_cache
def helper(x):
    return x + len(WORDS) + sum(len(w) for w in WORDS if w != "beta")

@cache_file(sys.argv[1], algo="sha256")
def job(x, key=lambda v: v * 2, *, point=Point(1), mode=Mode.FAST):
    """Comments and layout don't count."""
    squares = [i * i for i in range(3)]
    pick = (lambda a: a + 1, lambda a: a + 2)
    def inner(y):
        return helper(y) + CONFIG["scale"]
    if CONFIG["pattern"].match("ab"):
        x = operator.add(x, 0)
    with open(sys.argv[2], "a") as file:
        file.write(".")
    return inner(x) + sum(squares) + pick[1](1) + point.shifted()

job(1, point=Point(3, frozenset("abc")))
job({"b": 1, "a": {"q", "w", "e"}}["b"])
'''


def interpreters():
    """Return interpreters by version: the current one, and those of 3.11 to 3.13 beside it or on the PATH.

    They may have no packages installed.
    """
    found = {sys.version_info[:2]: sys.executable}
    folders = {os.path.dirname(os.path.realpath(sys.executable)), *os.environ.get("PATH", "").split(os.pathsep)}
    folders |= {str(p) for f in list(folders) for p in Path(f).parent.parent.glob("3.*/bin")}
    for minor in (11, 12, 13):
        for folder in sorted(folders):
            path = shutil.which(f"python3.{minor}", path=folder)
            works = path and subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode == 0
            if works:
                found.setdefault((3, minor), path)
    return found


def run(job, store, log, *, python=sys.executable, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(cuda_progcache.__file__).parents[1]), **options.pop("env", {})}
    done = subprocess.run(
        [python, str(job), str(store), str(log)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return sorted(p.name for p in Path(store).iterdir())


@pytest.fixture
def place(tmp_path):
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path / "job.py", tmp_path / "store", tmp_path / "runs.log"


def test_hash_seed_working_directory_place_and_layout_of_the_source_make_no_odds(place, tmp_path):
    job, store, log = place
    for seed, folder in (("0", "a"), ("12345", "b")):
        (tmp_path / folder).mkdir()
        names = run(job, store, log, env={"PYTHONHASHSEED": seed}, cwd=tmp_path / folder)
        assert len(names) == 2
    assert log.read_text() == ".."
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "renamed.py").write_text(
        "# moved\n\n\n" + JOB.replace("squares = [", "squares = [  # a comment\n        ")
    )
    assert run(other / "renamed.py", store, log) == names
    assert log.read_text() == ".."
    (other / "renamed.py").write_text(JOB.replace("i * i", "i + i"))
    assert len(run(other / "renamed.py", store, log)) == 4


def test_every_interpreter_has_the_same_keys(place):
    job, _, _ = place
    pythons = interpreters()
    if len(pythons) < 2:
        pytest.skip("there is one interpreter here")
    # Compare only digests: they need no packages, unlike entries on disk, and the interpreters may have none.
    job.write_text(
        "from cuda_progcache.memo.code import argument_digest, get_recursive_closure_hash\n"
        + JOB.replace("from cuda_progcache.memo.cache_file import cache_file\n", "")
        .replace('@cache_file(sys.argv[1], algo="sha256")\n', "")
        .rpartition("\njob(1,")[0]
        + "\nprint(get_recursive_closure_hash(job), argument_digest(Point(3, frozenset('abc'))))\n"
    )
    said = set()
    for python in pythons.values():
        environment = {**os.environ, "PYTHONPATH": str(Path(cuda_progcache.__file__).parents[1])}
        done = subprocess.run([python, str(job)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1


SLOW = """
import os, sys, time
from cuda_progcache.memo.cache_file import cache_file

@cache_file(sys.argv[1])
def slow(x):
    with open(sys.argv[2], "a") as file:
        file.write(".")
    while not os.path.exists(sys.argv[2] + ".go"):
        time.sleep(0.005)
    return ["result", x]

children = []
for _ in sys.argv[3:]:
    children.append(os.fork())
    if not children[-1]:
        children.clear()
        break
assert slow(1) == ["result", 1]
assert not any(os.waitpid(child, 0)[1] for child in children)
"""


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    started = []

    def start(*forks):
        command = [sys.executable, str(tmp_path / "slow.py"), str(tmp_path / "store"), str(tmp_path / "runs"), *forks]
        started.append(subprocess.Popen(command))
        return started[-1]

    yield start
    (tmp_path / "runs.go").touch()
    for process in started:
        process.kill()
        process.wait(300)


def until(what, limit=300):
    end = time.monotonic() + limit
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def runs(tmp_path):
    path = tmp_path / "runs"
    return len(path.read_text()) if path.exists() else 0


def test_processes_that_ask_at_once_run_it_once(slow, tmp_path):
    process = slow("one", "two", "three")
    until(lambda: runs(tmp_path) == 1)
    until(lambda: list((tmp_path / "store").glob("*.pkl.computing")))
    (tmp_path / "runs.go").touch()
    assert process.wait(300) == 0
    assert runs(tmp_path) == 1
    assert [p.suffix for p in (tmp_path / "store").iterdir()] == [".pkl"]


def test_a_waiter_takes_over_from_a_dead_holder(slow, tmp_path):
    holder = slow()
    until(lambda: runs(tmp_path) == 1)
    waiter = slow()
    holder.send_signal(signal.SIGKILL)
    holder.wait(300)
    until(lambda: runs(tmp_path) == 2)  # without the wait of 300 s for a live holder
    (tmp_path / "runs.go").touch()
    assert waiter.wait(300) == 0


def test_an_exception_frees_the_waiters(tmp_path):
    store, log = tmp_path / "store", str(tmp_path / "runs")

    @cache_file(store)
    def fails(x):
        with open(log, "a") as file:
            file.write(".")
        raise ValueError(x)

    for _ in range(2):
        with pytest.raises(ValueError, match="1"):
            fails(1)
    assert list(store.iterdir()) == []


def test_anothers_result_is_taken_when_it_comes(tmp_path):
    import pickle
    import threading

    store, log = tmp_path / "store", str(tmp_path / "runs")

    @cache_file(store)
    def f(x):
        with open(log, "a") as file:
            file.write(".")
        return x * 10

    f(5)
    (path,) = store.glob("f.*.pkl")
    path.unlink()
    sentinel = path.with_name(path.name + ".computing")
    sentinel.write_text(str(current_owner()))

    def finish():
        staged = path.with_name("staged")
        staged.write_bytes(pickle.dumps({"dat": "from another tool", "meta": {}}))
        staged.rename(path)
        sentinel.unlink()

    timer = threading.Timer(0.05, finish)
    timer.start()
    assert f(5) == "from another tool"
    timer.join(300)
    assert Path(log).read_text() == "."


def test_force_waits_for_nobody(tmp_path):
    store = tmp_path / "store"

    @cache_file(store)
    def f(x):
        return x + 1

    f(1)
    (path,) = store.glob("f.*.pkl")
    path.unlink()
    path.with_name(path.name + ".computing").write_text(str(current_owner()))  # held, and never released
    assert f(1, _force=True) == 2


def test_waiting_for_anothers_sentinel(tmp_path):
    import threading

    from cuda_progcache.memo.cache_file import _wait_for_sentinel

    sentinel, out = tmp_path / "f.pkl.computing", tmp_path / "f.pkl"
    assert _wait_for_sentinel(sentinel, out, Path.read_text, "f") is None
    sentinel.touch()
    assert _wait_for_sentinel(sentinel, out, Path.read_text, "f", timeout=0.05) is None
    os.utime(sentinel, (1, 1))
    assert _wait_for_sentinel(sentinel, out, Path.read_text, "f") is None
    sentinel.touch()

    def finish():
        (tmp_path / "staged").write_text("made")
        (tmp_path / "staged").rename(out)

    timer = threading.Timer(0.1, finish)
    timer.start()
    assert _wait_for_sentinel(sentinel, out, Path.read_text, "f") == "made"
    timer.join(300)
    out.unlink()
    timer = threading.Timer(0.1, sentinel.unlink)
    timer.start()
    assert _wait_for_sentinel(sentinel, out, Path.read_text, "f") is None
    timer.join(300)
