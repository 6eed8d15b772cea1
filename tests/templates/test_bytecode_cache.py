# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import hashlib
import json
import marshal
import os
import pathlib
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import jinja2
import numpy as np
import platformdirs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import nodes

from cuda_progcache.errors import ProgCacheError, ProgCacheWarning, StoreError, UnsafeRootError
from cuda_progcache.events import subscribe
from cuda_progcache.templates import Environment, abi, bytecode_cache, patch_jinja2, unpatch_jinja2
from cuda_progcache.templates.bytecode_cache import BytecodeCache, default_directory, hash_source
from cuda_progcache.templates.frames import V2, V3, V4, V5, Compiled, FrameError, frame, read_older, unframe

MISS = (None, None, None)
SOURCE = hash_source("{{ x }}")


def code(text="answer = 42"):
    return compile(text, "k.j2", "exec")


def run(made, name="answer"):
    space = {}
    exec(made, space)
    return space[name]


def tree(text="{% for i in (1, 2) %}{{ i|upper }}{% endfor %}"):
    return jinja2.Environment().parse(text)


@pytest.fixture
def cache(tmp_path):
    return BytecodeCache(tmp_path / "cache")


def test_what_was_set_is_got(cache):
    assert cache.get("k.j2", SOURCE) == MISS
    cache.set("k.j2", SOURCE, code())
    found, ast, precomputed = cache.get("k.j2", SOURCE)
    assert (run(found), ast, precomputed) == (42, None, None)
    assert found.co_filename == "k.j2"
    cache.set("k.j2", SOURCE, code("answer = 43"))
    assert run(cache.get("k.j2", SOURCE)[0]) == 43
    assert (cache.hits, cache.misses, cache.rejected, cache.failed) == (2, 1, 0, 0)
    assert stat.S_IMODE(os.stat(cache._make_path("k.j2", SOURCE)).st_mode) == 0o600


def test_hash_source_is_sha256():
    assert hash_source("µ\n") == hashlib.sha256("µ\n".encode()).hexdigest()
    assert len(hash_source("\ud800")) == 64  # any Python text is accepted, even a lone surrogate


def test_every_part_of_the_key_counts(cache):
    keys = [
        (name, hash_source(source), context)
        for name in ("a/b.j2", "a_b.j2", "b.j2", "é.j2", "x" * 500)
        for source in ("1", "2")
        for context in (None, "c", "d")
    ]
    for number, (name, source, context) in enumerate(keys):
        cache.set(name, source, code(f"answer = {number}"), context_hash=context)
    for number, (name, source, context) in enumerate(keys):
        assert run(cache.get(name, source, context_hash=context)[0]) == number
    assert len({cache._make_path(*key) for key in keys}) == len(keys) == cache.stats()["file_count"]


def test_the_file_name_has_python_and_compiler(cache):
    path = cache._make_path("dir/k.cu.j2", SOURCE)
    assert path.parent == type(path)(cache.directory)
    start = f"__progcache_{sys.implementation.cache_tag}-{abi.abi_tag(cache.directory)}_dir_k.cu.j2_"
    assert path.name.startswith(start)
    assert path.suffix == ".pyc"
    assert len(cache._make_path("é" * 400, SOURCE, "c").name) < 200


def test_a_pattern_of_ones_own(tmp_path):
    ours = BytecodeCache(tmp_path / "c", pattern="{hash}.{name}.bin")
    ours.set("k.j2", SOURCE, code())
    assert ours._make_path("k.j2", SOURCE).name.endswith(".k.j2.bin")
    assert ours.stats()["file_count"] == 1
    assert run(ours.get("k.j2", SOURCE)[0]) == 42
    assert ours.clear() == 1
    for wrong in ("{name}.pyc", "../{hash}"):
        with pytest.raises(ValueError, match=r"must contain \{hash\}"):
            BytecodeCache(tmp_path / "c", pattern=wrong)


class Arch(enum.Enum):
    SM_90 = 90


@dataclasses.dataclass
class Tile:
    m: int


def test_precomputed_values_and_ast_come_back(cache):
    values = [
        {"a": (1, 2.5, None)},
        {3, 4},
        range(3),
        1 + 2j,
        collections.OrderedDict(a=1),
        dt.date(2026, 1, 2),
        decimal.Decimal("0.1"),
        np.float16(1.5),
        np.dtype("float32"),
    ]
    before = tree()
    cache.set("k.j2", SOURCE, code(), ast=before, precomputed=values)
    found, ast, precomputed = cache.get("k.j2", SOURCE)
    assert run(found) == 42
    assert precomputed == values
    assert [type(value) for value in precomputed] == [type(value) for value in values]
    assert ast == before
    cache.set("k.j2", SOURCE, code(), precomputed=(1, 2))
    assert cache.get("k.j2", SOURCE)[2] == [1, 2]
    assert ast.environment is None  # the environment isn't stored: its loader and filters aren't data
    environment = jinja2.Environment()
    assert environment.from_string(ast.set_environment(environment)).render() == "12"


def test_classes_of_data_that_are_loaded_come_back(monkeypatch, cache):
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    cache.set("k.j2", SOURCE, code(), precomputed=[Arch.SM_90, Tile(64)])
    assert cache.get("k.j2", SOURCE)[2] == [Arch.SM_90, Tile(64)]


def _this_module():
    module = type(sys)(__name__)
    module.Arch, module.Tile = Arch, Tile
    return module


class Opaque:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("value", [print, Opaque(), lambda: 0, sys], ids=["function", "reduce", "lambda", "module"])
def test_what_is_no_data_is_not_kept(cache, value):
    events = []
    unsubscribe = subscribe(events.append)
    cache.set("k.j2", SOURCE, code(), precomputed=[value])
    unsubscribe()
    assert cache.get("k.j2", SOURCE) == MISS
    assert cache.failed == 1
    assert cache.stats()["file_count"] == 0
    assert [(event.kind, event.name) for event in events] == [("drop", "k.j2")]
    assert "compiled template not kept" in str(events[0])


def test_warnings_travel_along(cache):
    warned = {"code": "shadowed", "message": "x hides x", "line": 3, "suggestion": None}
    cache.save("k.j2", SOURCE, Compiled(code(), warnings=[warned]))
    assert cache.load("k.j2", SOURCE).warnings == (warned,)
    assert run(cache.get("k.j2", SOURCE)[0]) == 42
    cache.save("w.j2", SOURCE, Compiled(code(), warnings=[{"message": object()}]))
    assert cache.load("w.j2", SOURCE) is None
    assert cache.failed == 1


# Frames


def counted(*parts):
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


CODE, AST, VALUES, WARNINGS = marshal.dumps(code()), pickle.dumps(None), pickle.dumps([1, {2}]), b'[{"line": 1}]'


def pickled_tree():
    bare = tree()
    for node in (bare, *bare.find_all(nodes.Node)):
        node.environment = None
    return pickle.dumps(bare)


@pytest.mark.parametrize(
    ("data", "has_ast", "precomputed", "warnings"),
    [
        (CODE, False, None, ()),
        (V2 + counted(CODE), False, None, ()),
        (V2 + counted(CODE) + pickled_tree(), True, None, ()),
        (V3 + counted(CODE, VALUES), False, [1, {2}], ()),
        (V3 + counted(CODE, b"") + pickled_tree(), True, None, ()),
        (V4 + counted(CODE, VALUES, WARNINGS) + pickled_tree(), True, [1, {2}], ({"line": 1},)),
        (V4 + counted(CODE, b"", b""), False, None, ()),
    ],
    ids=["legacy", "v2", "v2+ast", "v3", "v3+ast", "v4", "v4 bare"],
)
def test_older_frames_are_read_when_they_are_handed_over(cache, data, has_ast, precomputed, warnings):
    found = read_older(data)
    assert run(found.code) == 42
    assert (found.ast == tree()) is has_ast
    assert (found.precomputed, found.warnings) == (precomputed, warnings)
    path = cache._make_path("k.j2", SOURCE)
    path.write_bytes(data)  # an older frame isn't trusted, even in the place of a new one
    assert cache.load("k.j2", SOURCE) is None
    cache.set("k.j2", SOURCE, code())
    assert path.read_bytes().startswith(V5)


def test_the_newest_frame_is_as_documented():
    data = frame(Compiled(code(), precomputed=[7], warnings=[{"line": 1}]), b"key")
    assert data[:4] == V5
    assert data[4:36] == hashlib.sha256(b"key" + data[36:]).digest()
    lengths = [int.from_bytes(data[at : at + 4], "little") for at in range(36, 52, 4)]
    assert lengths[0] == len(marshal.dumps(code()))
    assert lengths[3] == 0
    assert 52 + sum(lengths) == len(data)
    assert json.loads(data[52 + lengths[0] + lengths[1] :]) == [{"line": 1}]


def hostile(marker):
    """Return pickles that, if loaded, would create the file `marker` or get around the check of allowed classes."""

    class Evil:
        def __init__(self, *reduction):
            self.reduction = reduction

        def __reduce__(self):
            return self.reduction

    python = f"open({str(marker)!r}, 'w').close()"
    return [
        pickle.dumps([Evil(exec, (python,))]),
        pickle.dumps([Evil(os.system, (f"touch {marker}",))]),
        pickle.dumps([Evil(subprocess.Popen, (["touch", str(marker)],))]),
        # Dotted names, which reach other objects through the module of an allowed class.
        b"\x80\x04\x8c\x08datetime\x8c\x13date.__init__.__str__\x93.",
        b"\x80\x04\x8c\x0bcollections\x8c\x13abc.sys.modules.get\x93.",
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_hostile_file_executes_nothing(cache, tmp_path, number):
    marker = tmp_path / "executed"
    payload = hostile(marker)[number]
    path = cache._make_path("k.j2", SOURCE)
    # An attacker can write a correct checksum, too.
    sealed = counted(CODE, payload, b"", b"")
    summed = b"".join(len(part).to_bytes(4, "little") for part in (CODE, payload, b"", b"")) + CODE + payload
    _, key = cache._place("k.j2", SOURCE, None)
    for data in (
        payload,
        V2 + counted(CODE) + payload,
        V3 + counted(CODE, payload),
        V3 + counted(CODE, b"") + payload,
        V4 + counted(CODE, payload, b""),
        V4 + counted(CODE, b"", b"[]") + payload,
        V5 + hashlib.sha256(key + summed).digest() + summed,
        V5 + bytes(32) + sealed,
    ):
        path.write_bytes(data)
        assert cache.get("k.j2", SOURCE) == MISS
        assert not path.exists()
    assert not marker.exists()
    assert cache.rejected == 8


def test_no_byte_is_unmarshalled_before_the_checksum_was_right(cache, monkeypatch):
    cache.set("k.j2", SOURCE, code(), precomputed=[1])
    path = cache._make_path("k.j2", SOURCE)
    good = path.read_bytes()
    seen = []
    monkeypatch.setattr(marshal, "loads", seen.append)
    monkeypatch.setattr(pickle, "Unpickler", seen.append)
    for at in range(0, len(good), 3):
        for bit in (1, 4, 128):
            path.write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
            path.chmod(0o600)
            assert cache.get("k.j2", SOURCE) == MISS
    assert seen == []


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_found(data):
    whole = frame(Compiled(code(), precomputed=[1, "two"], warnings=[{"line": 1}]), b"key")
    kind = data.draw(st.sampled_from(["cut", "flip", "grow", "garbage"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    elif kind == "grow":
        damaged = whole + data.draw(st.binary(min_size=1, max_size=8))
    else:
        damaged = V5 + data.draw(st.binary(max_size=200))
    with pytest.raises(FrameError, match=r"checksum|not a frame"):
        unframe(damaged, b"key")


@pytest.mark.parametrize("magic", [V2, V3, V4])
def test_older_frames_that_end_early(magic):
    whole = magic + counted(CODE, VALUES, WARNINGS)
    for end in range(4, 8 + len(CODE)):
        with pytest.raises(FrameError):
            read_older(whole[:end])


@pytest.mark.parametrize(
    "data", [b"", b"\xe3", marshal.dumps([1]), b"not a frame", V2 + counted(b""), V4 + counted(CODE, b"", b"{}")]
)
def test_what_is_no_code_is_a_miss_and_is_removed(cache, data):
    path = cache._make_path("k.j2", SOURCE)
    path.write_bytes(data)
    assert cache.get("k.j2", SOURCE) == MISS
    assert not path.exists()
    cache.set("k.j2", SOURCE, code())
    assert run(cache.get("k.j2", SOURCE)[0]) == 42


def test_a_file_under_another_key_is_not_served(cache):
    cache.set("k.j2", SOURCE, code())
    other = cache._make_path("other.j2", SOURCE)
    os.rename(cache._make_path("k.j2", SOURCE), other)
    assert cache.get("other.j2", SOURCE) == MISS
    assert not other.exists()


def test_an_ast_whose_nodes_changed_is_a_miss(cache, monkeypatch):
    cache.set("k.j2", SOURCE, code(), ast=tree())
    data = cache._make_path("k.j2", SOURCE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(nodes.For, "fields", (*nodes.For.fields, "parallel"))
        assert cache.get("k.j2", SOURCE) == MISS
    cache._make_path("k.j2", SOURCE).write_bytes(data)
    os.chmod(cache._make_path("k.j2", SOURCE), 0o600)
    assert cache.get("k.j2", SOURCE)[1] == tree()
    with monkeypatch.context() as patch:
        patch.setattr(nodes.Filter, "fields", nodes.Filter.fields[1:])
        assert cache.get("k.j2", SOURCE) == MISS


# The directory


def test_the_directory_is_made_for_us_alone(tmp_path):
    old = os.umask(0)
    try:
        cache = BytecodeCache(tmp_path / "a" / "b")
        cache.set("k.j2", SOURCE, code())
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(cache.directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(cache._make_path("k.j2", SOURCE)).st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o701, 0o750])
def test_a_directory_open_to_others_is_refused(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UnsafeRootError, match=rf"open to others \(mode {mode:04o}\); run `chmod 700`") as caught:
        BytecodeCache(folder)
    assert isinstance(caught.value, ProgCacheError)
    assert caught.value.filename == str(folder)
    folder.chmod(0o700)
    BytecodeCache(folder)


def test_a_directory_of_someone_else_is_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UnsafeRootError, match=f"belongs to user id {os.getuid()}, not to you"):
        BytecodeCache(tmp_path / "theirs")


def test_what_is_no_directory_or_can_not_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="this is not one"):
        BytecodeCache(tmp_path / "file")
    with pytest.raises(StoreError, match="can't create the directory"):
        BytecodeCache(tmp_path / "file" / "below")


@pytest.mark.parametrize("planted", ["link", "fifo", "directory", "writable"])
def test_what_others_could_have_planted_is_not_read(cache, tmp_path, planted):
    cache.set("k.j2", SOURCE, code())
    path = cache._make_path("k.j2", SOURCE)
    good = path.read_bytes()
    if planted != "writable":
        path.unlink()
    if planted == "link":
        (tmp_path / "target").write_bytes(good)
        path.symlink_to(tmp_path / "target")
    elif planted == "fifo":
        os.mkfifo(path)
    elif planted == "directory":
        path.mkdir()
    else:
        path.chmod(0o622)
    assert cache.get("k.j2", SOURCE) == MISS
    assert cache.rejected == 1
    assert path.exists() is (planted == "directory")


def test_trouble_when_writing_keeps_nothing_and_raises_nothing(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cuda_progcache._util.files.write_new", full)
    cache.set("k.j2", SOURCE, code())
    assert (cache.failed, cache.stats()["file_count"]) == (1, 0)


def test_a_directory_removed_under_us_is_made_again(cache):
    shutil.rmtree(cache.directory)
    assert cache.get("k.j2", SOURCE) == MISS
    assert cache.stats() == {"file_count": 0, "total_bytes": 0}
    assert cache.clear() == cache.cleanup() == 0
    cache.set("k.j2", SOURCE, code())
    assert run(cache.get("k.j2", SOURCE)[0]) == 42


# Maintenance


def test_clear_and_stats(cache, tmp_path):
    for name in ("a", "b"):
        cache.set(name, SOURCE, code())
    sizes = [os.path.getsize(cache._make_path(name, SOURCE)) for name in ("a", "b")]
    assert cache.stats() == {"file_count": 2, "total_bytes": sum(sizes)}
    foreign = tmp_path / "cache" / "notes.txt"
    foreign.touch()
    older = tmp_path / "cache" / "__progcache_cpython-39-0123456789abcdef_a_00.pyc"
    older.touch()
    assert cache.clear(current_version_only=True) == 2
    assert older.exists()
    assert cache.clear() == 1
    assert foreign.exists()
    assert cache.stats() == {"file_count": 0, "total_bytes": 0}


def test_cleanup_removes_what_is_not_used_any_more(cache):
    for name in ("old", "used", "new"):
        cache.set(name, SOURCE, code())
    long_ago = time.time() - 31 * 86400
    for name in ("old", "used"):
        os.utime(cache._make_path(name, SOURCE), (long_ago, long_ago))
    assert cache.get("used", SOURCE) != MISS
    assert cache.cleanup() == 1
    assert cache.get("old", SOURCE) == MISS
    assert cache.get("used", SOURCE) != MISS
    assert cache.cleanup(max_age_days=-1) >= 2
    assert os.listdir(cache.directory) == ["__progcache_cleaned"]


def test_setting_cleans_up_once_a_day(cache):
    cache.set("first", SOURCE, code())
    old = cache._make_path("first", SOURCE)
    long_ago = time.time() - 31 * 86400
    os.utime(old, (long_ago, long_ago))
    cache.set("second", SOURCE, code())
    assert old.exists()
    marker = old.with_name("__progcache_cleaned")
    os.utime(marker, (time.time() - 90000,) * 2)
    cache.set("third", SOURCE, code())
    assert not old.exists()
    assert time.time() - marker.stat().st_mtime < 3600
    assert cache.stats()["file_count"] == 2


def test_a_template_is_kept_though_nothing_can_be_cleaned_up(cache):
    cache.set("first", SOURCE, code())
    marker = pathlib.Path(cache.directory, "__progcache_cleaned")
    marker.unlink()
    marker.mkdir()
    os.utime(marker, (time.time() - 90000,) * 2)
    with pytest.warns(ProgCacheWarning, match=r"can't remove unused compiled templates from .*__progcache_cleaned"):
        cache.set("second", SOURCE, code())
    assert cache.get("second", SOURCE) is not None
    assert cache.failed == 0


def test_the_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", str(tmp_path / "chosen"))
    assert default_directory() == str(tmp_path / "chosen")
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    assert default_directory() is None
    monkeypatch.delenv("CUDA_PROGCACHE_TEMPLATES")
    for home, cache in ((None, None), (str(tmp_path), None), (str(tmp_path), str(tmp_path / "xdg"))):
        for name, value in (("HOME", home), ("XDG_CACHE_HOME", cache)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        assert default_directory() == os.path.join(platformdirs.user_cache_dir(), "cuda-progcache", "templates")


def test_directories_above_are_ours_alone_too(tmp_path):
    old = os.umask(0o002)
    try:
        BytecodeCache(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(old)
    assert [stat.S_IMODE(os.stat(tmp_path / path).st_mode) for path in ("a", "a/b", "a/b/c")] == [0o700] * 3


WRITER = """
    import sys, time
    from cuda_progcache._util import files
    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    cache = BytecodeCache(sys.argv[1])
    def stop(source, target):
        print(source, flush=True)
        time.sleep(600)
    files.replace = stop
    cache.set("k.j2", "0" * 64, compile("", "k", "exec"))
"""


def test_cleanup_removes_what_dead_writers_left(cache):
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), cache.directory], stdout=subprocess.PIPE, text=True
    )
    with writer:
        staged = writer.stdout.readline().strip()
        assert os.path.exists(staged)
        assert cache.cleanup() == 0  # the writer is still running
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert cache.get("k.j2", "0" * 64) == MISS
    assert cache.cleanup() == 1
    assert not os.path.exists(staged)


CROWD = """
    import random, sys
    from cuda_progcache.templates.bytecode_cache import BytecodeCache, hash_source
    cache = BytecodeCache(sys.argv[1])
    rng = random.Random(int(sys.argv[2]))
    seen = 0
    for _ in range(400):
        number = rng.randrange(8)
        source = hash_source(str(number))
        if rng.random() < 0.02:
            cache.clear()
        code, _, values = cache.get("k.j2", source)
        if code is None:
            cache.set("k.j2", source, compile(f"answer = {number!r} * 1000", "k", "exec"), precomputed=[number] * 5000)
        else:
            space = {}
            exec(code, space)
            assert space["answer"] == number * 1000 and values == [number] * 5000, (number, space["answer"])
            seen += 1
    assert seen and not cache.rejected and not cache.failed, (seen, cache.rejected, cache.failed)
"""


def test_many_processes_share_a_directory(cache):
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CROWD), cache.directory, str(n)], stderr=subprocess.PIPE
        )
        for n in range(4)
    ]
    outcomes = [(process.communicate()[1].decode(), process.returncode) for process in crowd]
    assert outcomes == [("", 0)] * 4
    assert [name for name in os.listdir(cache.directory) if name.endswith(".tmp")] == []


def test_threads_share_a_cache(cache):
    def use(number):
        source = hash_source(str(number % 5))
        cache.set("k.j2", source, code(f"answer = {number % 5}"))
        return run(cache.get("k.j2", source)[0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(200))) == [number % 5 for number in range(200)]


# Dependencies of the code besides its source


def test_another_compiler_is_another_version(tmp_path, monkeypatch):
    first = abi.abi_tag(str(tmp_path))
    assert len(first) == 16
    files = list(abi._files())
    names = [name for name, *_ in files]
    assert {"templates/frames.py", "templates/environment.py", "jinja2/lexer.py", "jinja2/parser.py"} <= set(names)
    for number in (0, len(files) - 1):
        name, path, *rest = files[number]
        changed = tmp_path / "changed.py"
        changed.write_bytes(pathlib.Path(path).read_bytes() + b"\n")
        altered = [*files]
        altered[number] = (name, str(changed), *rest)
        assert abi._digest(altered) != first
    assert abi._digest(files) == first


def test_the_tag_is_remembered_but_never_for_other_files(tmp_path, monkeypatch):
    monkeypatch.setattr(abi, "_tag", "")
    tag = abi.abi_tag(str(tmp_path))
    (memo,) = tmp_path.iterdir()
    assert memo.read_text() == tag
    monkeypatch.setattr(abi, "_tag", "")
    monkeypatch.setattr(abi, "_digest", lambda files: pytest.fail("computed again"))
    assert abi.abi_tag(str(tmp_path)) == tag
    monkeypatch.setattr(abi, "_digest", lambda files: "f" * 16)
    memo.write_text("torn")
    monkeypatch.setattr(abi, "_tag", "")
    assert abi.abi_tag(str(tmp_path)) == "f" * 16
    real = list(abi._files())
    monkeypatch.setattr(abi, "_files", lambda: [(*real[0][:2], 1, 2, 3, 4), *real[1:]])
    monkeypatch.setattr(abi, "_tag", "")
    monkeypatch.setattr(abi, "_digest", lambda files: "e" * 16)
    assert abi.abi_tag(str(tmp_path)) == "e" * 16


def test_packages_that_are_no_files_count_by_their_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(abi, "_tag", "")
    monkeypatch.setattr(abi, "_jinja2_folder", lambda: str(tmp_path / "jinja2.zip"))
    assert len(abi.abi_tag(str(tmp_path))) == 16


def test_another_version_is_a_miss(cache, tmp_path, monkeypatch):
    cache.set("k.j2", SOURCE, code())
    monkeypatch.setattr(bytecode_cache, "abi_tag", lambda directory, *, keep: "0" * 16)
    other = BytecodeCache(cache.directory)
    assert other.get("k.j2", SOURCE) == MISS
    monkeypatch.setattr(bytecode_cache, "abi_tag", abi.abi_tag)
    monkeypatch.setattr(bytecode_cache, "PYTHON_TAG", "cpython-399")
    assert BytecodeCache(cache.directory).get("k.j2", SOURCE) == MISS
    assert cache.get("k.j2", SOURCE) != MISS


def test_a_hit_imports_next_to_nothing(cache):
    cache.set("k.j2", SOURCE, code())
    script = (
        "import sys; before = set(sys.modules)\n"
        "from cuda_progcache.templates.bytecode_cache import BytecodeCache\n"
        f"assert BytecodeCache({cache.directory!r}).get('k.j2', {SOURCE!r})[0] is not None\n"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('cuda_progcache')))"
    )
    for _ in range(2):  # the first process computes the compiler's tag for the directory
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"re", "typing", "dataclasses", "pickle", "hashlib", "pathlib", "json", "jinja2", "enum", "contextlib"}
    assert not heavy & set(done.stdout.split())


# The cache under Jinja2's loaders


@pytest.mark.parametrize("kind", [jinja2.Environment, Environment])
def test_an_environment_takes_the_cache(tmp_path, kind):
    (tmp_path / "base.html").write_text("<{% block b %}{% endblock %}>")
    (tmp_path / "k.html").write_text("{% extends 'base.html' %}{% block b %}{{ x|mine }}{{ 2|mine }}{% endblock %}")

    def made(by, **options):
        loader = jinja2.FileSystemLoader(tmp_path)
        environment = kind(loader=loader, bytecode_cache=BytecodeCache(tmp_path / "cache"), **options)
        environment.filters["mine"] = lambda value: value * by
        return environment

    for number, (by, options, expected, hits) in enumerate(
        [
            (2, {}, "<84>", 0),
            (2, {}, "<84>", 2),
            (3, {}, "<126>", 0),
            (2, {"autoescape": True}, "<84>", 0),
            (3, {}, "<126>", 2),
        ]
    ):
        environment = made(by, **options)
        assert environment.get_template("k.html").render(x=4) == expected, number
        ours = kind is Environment and number == 2  # our code doesn't depend on what a user's filter does
        assert environment.bytecode_cache.hits == (2 if ours else hits), number


def test_static_values_travel_with_the_code(tmp_path):
    (tmp_path / "k.txt").write_text("{{ arch.name }}{{ sizes }}{{ sizes|length }}{{ when }}")
    for _ in range(2):
        environment = Environment(
            loader=jinja2.FileSystemLoader(tmp_path),
            bytecode_cache=BytecodeCache(tmp_path / "cache"),
            static_context={"arch": {"name": "sm_90"}, "sizes": [1, 2], "when": dt.date(2026, 1, 2)},
        )
        assert environment.get_template("k.txt").render() == "sm_90[1, 2]22026-01-02"
    assert environment.bytecode_cache.hits == 1


def test_an_environment_that_can_not_be_told_keeps_nothing(tmp_path):
    (tmp_path / "k.txt").write_text("{{ 1 if hidden }}")
    hidden = object()
    for _ in range(2):
        environment = Environment(
            loader=jinja2.FileSystemLoader(tmp_path),
            bytecode_cache=BytecodeCache(tmp_path / "cache"),
            static_context={"hidden": hidden},
        )
        assert environment.get_template("k.txt").render() == "1"
    assert environment.bytecode_cache.stats()["file_count"] == 0


def test_patched_and_stock_jinja2_keep_apart(tmp_path):
    (tmp_path / "k.txt").write_text("{{ x }}")

    def render():
        cache = BytecodeCache(tmp_path / "cache")
        loader = jinja2.FileSystemLoader(tmp_path)
        return jinja2.Environment(loader=loader, bytecode_cache=cache).get_template("k.txt").render(x=1), cache.hits

    outcomes = [render()]
    patch_jinja2()
    try:
        outcomes += [render(), render()]
    finally:
        unpatch_jinja2()
    outcomes.append(render())
    assert outcomes == [("1", 0), ("1", 0), ("1", 1), ("1", 1)]
