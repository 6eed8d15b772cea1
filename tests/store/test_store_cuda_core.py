# SPDX-License-Identifier: Apache-2.0
"""Our stores under cuda.core, whichever is imported first; a store never imports cuda.core."""

from __future__ import annotations

import abc
import copy
import os
import pickle
import subprocess
import sys

import pytest

from cuda_progcache.store import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheResource

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

COMPILE = """
def compile_twice(cache):
    import warnings
    warnings.simplefilter("ignore")
    from cuda.core import ObjectCode, Program, ProgramOptions
    import cuda.core.utils
    assert isinstance(cache, cuda.core.utils.ProgramCacheResource)
    codes = []
    for _ in range(2):
        program = Program('extern "C" __global__ void k(int* a) { *a = 1; }', "c++", ProgramOptions(arch="sm_90"))
        code = program.compile("cubin", cache=cache)
        assert type(code) is ObjectCode
        codes.append(bytes(code.code))
    assert codes[0] == codes[1] and codes[0][:4] == b"\\x7fELF"
    stats = cache.stats()
    assert (stats.entries, stats.hits, stats.misses) == (1, 1, 1), stats
    (info,) = cache.entries()
    assert info.size == len(codes[0])
    print("ok")
"""


def python(script, *args):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STORES = {
    "file": "FileStreamProgramCache(sys.argv[1])",
    "memory": "InMemoryProgramCache()",
    "own": "type('Own', (InMemoryProgramCache,), {})()",
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES)
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_program_compile_takes_our_stores(tmp_path, first, make):
    ours = f"import sys\nfrom cuda_progcache.store import *\ncache = {make}\n"
    if first == "ours":
        script = ours + "assert 'cuda.core' not in sys.modules\n" + COMPILE + "compile_twice(cache)"
    else:
        script = "import cuda.core.utils\n" + ours + COMPILE + "compile_twice(cache)"
    assert python(script, tmp_path / "cache") == "ok\n"


def test_cuda_core_is_never_imported_by_a_store(tmp_path):
    script = """
import sys
from cuda_progcache.store import *
for cache in (FileStreamProgramCache(sys.argv[1], max_size_bytes=1000), InMemoryProgramCache()):
    cache[b"k"] = b"v"
    cache.publish(b"l", b"v", {"n": 1})
    cache.get(b"k"), cache.load(b"l"), len(cache), list(cache.entries()), cache.stats(), cache.clear()
    assert isinstance(cache, ProgramCacheResource)
    try:
        cache[b"k"] = object()
    except TypeError:
        pass
    assert register_with_cuda_core() is False
heavy = {"cuda", "cuda.core", "numpy", "jinja2", "rich", "click", "msgspec", "platformdirs", "importlib.metadata",
         "subprocess", "asyncio", "tempfile"}
print(sorted(heavy & set(sys.modules)))
"""
    assert python(script, tmp_path / "cache") == "[]\n"


def test_issubclass_after_register(tmp_path):
    script = """
from cuda_progcache.store import *
import cuda.core.utils
assert register_with_cuda_core() is True
assert issubclass(FileStreamProgramCache, cuda.core.utils.ProgramCacheResource)
assert not issubclass(dict, cuda.core.utils.ProgramCacheResource)
print("ok")
"""
    assert python(script) == "ok\n"


def test_the_class_property_tells_the_truth():
    store = InMemoryProgramCache()
    assert store.__class__ is InMemoryProgramCache is type(store)
    assert isinstance(store, InMemoryProgramCache)
    assert not isinstance(store, (FileStreamProgramCache, dict))
    assert type(copy.copy(ProgramCacheHolder(store)).store) is InMemoryProgramCache


class ProgramCacheHolder:
    def __init__(self, store):
        self.store = store


def test_the_abc():
    assert issubclass(ProgramCacheResource, abc.ABC)
    with pytest.raises(TypeError, match="abstract"):
        ProgramCacheResource()
    assert ProgramCacheResource.__abstractmethods__ == {
        "__getitem__", "__setitem__", "__delitem__", "__len__", "clear",
    }  # fmt: skip


class Minimal(ProgramCacheResource):
    """A user-defined store with only the five abstract methods."""

    def __init__(self):
        self.kept = {}

    def __getitem__(self, key):
        return self.kept[key]

    def __setitem__(self, key, value):
        if value == b"full":
            raise OSError("disk full")
        self.kept[key] = value

    def __delitem__(self, key):
        del self.kept[key]

    def __len__(self):
        return len(self.kept)

    def clear(self):
        self.kept.clear()


def test_a_store_of_ones_own():
    with Minimal() as store:
        assert store.get(b"k") is None
        assert store.load(b"k") is None
        assert store.publish(b"k", b"v", {"n": 1}) is True
        assert store.publish(b"l", b"full", {}) is False
        assert store.load(b"k") == (b"v", {})
        store.update({b"a": b"1"})
        assert store.get(b"a") == b"1"
        for call in (store.entries, store.stats, lambda: store.remove("0" * 64), lambda: store.resolve("0" * 4)):
            with pytest.raises(NotImplementedError, match="Minimal"):
                call()


def object_code(data):
    from cuda.core import ObjectCode

    return ObjectCode.from_cubin(data, name="k")


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_an_object_code_is_stored_as_its_bytes(tmp_path, kind):
    store = FileStreamProgramCache(tmp_path / "cache") if kind == "file" else InMemoryProgramCache()
    source = tmp_path / "k.cubin"
    source.write_bytes(b"from a file")
    store[b"bytes"] = object_code(b"in memory")
    store.publish(b"path", object_code(str(source)), {"n": 1})
    source.write_bytes(b"changed")
    assert store[b"bytes"] == b"in memory"
    assert store.load(b"path") == (b"from a file", {"n": 1})
    gone = object_code(str(source))
    source.unlink()
    for write in (lambda: store.__setitem__(b"gone", gone), lambda: store.publish(b"gone", gone, {})):
        with pytest.raises(FileNotFoundError, match="path-backed ObjectCode") as excinfo:
            write()
        assert str(source) in str(excinfo.value)


def test_the_same_names_as_cuda_core(tmp_path):
    """Every operation of cuda.core's stores has the same outcome with ours."""
    import cuda.core.utils as theirs

    pairs = [
        (FileStreamProgramCache(tmp_path / "ours"), theirs.FileStreamProgramCache(tmp_path / "theirs")),
        (InMemoryProgramCache(), theirs.InMemoryProgramCache()),
    ]
    for pair in pairs:
        public = {name for name in dir(theirs.ProgramCacheResource) if not name.startswith("_")}
        assert public <= set(dir(pair[0]))
        outcomes = []
        for store in pair:
            results = []
            for action in (
                lambda s: s.get(b"k"),
                lambda s: s.__setitem__("k", bytearray(b"v")),
                lambda s: s[b"k"],
                lambda s: s[bytearray(b"k")],
                lambda s: s[3],
                lambda s: s.get(None),
                lambda s: s.__setitem__(b"k", 3),
                lambda s: s.__setitem__(memoryview(b"k"), b"v"),
                lambda s: s.update([(b"a", memoryview(b"1")), (b"b", object_code(b"2"))]),
                len,
                lambda s: s.__delitem__("a"),
                lambda s: s.__delitem__("a"),
                lambda s: s[b"b"],
                lambda s: s.clear(),
                len,
                lambda s: s.close(),
            ):
                try:
                    results.append(action(store))
                except Exception as exc:  # noqa: BLE001 - the outcome is what is compared
                    results.append((type(exc), exc.args))
            outcomes.append(results)
        assert outcomes[0] == outcomes[1]


def test_records_survive_pickling_of_what_is_read(tmp_path):
    """prewarm sends Entry and EntryInfo between processes."""
    store = FileStreamProgramCache(tmp_path / "cache")
    store.publish(b"k", b"v", {"n": [1]})
    assert pickle.loads(pickle.dumps(store.load(b"k"))) == (b"v", {"n": [1]})
    (info,) = store.entries()
    assert pickle.loads(pickle.dumps(info)) == info
    assert pickle.loads(pickle.dumps(store.stats())) == store.stats()


def test_where_cuda_cores_store_says_an_entry_lies(tmp_path):
    with FileStreamProgramCache(tmp_path / "c") as store:
        store[b"k"] = store["other"] = b"\x7fELF"
        for key in (b"k", "other"):
            assert store._path_for_key(key).read_bytes() == b"\x7fELF"


@pytest.mark.parametrize("error", [PermissionError("denied"), PermissionError(13, "denied")], ids=["bare", "numbered"])
def test_a_denied_write_is_a_permission_error(tmp_path, monkeypatch, error):
    def denied(source, target):
        raise error

    with FileStreamProgramCache(tmp_path / "c", strict=True) as store:
        monkeypatch.setattr(os, "replace", denied)
        with pytest.raises(PermissionError, match="can't store a program in the cache: denied"):
            store[b"k"] = b"v"
        with pytest.warns(RuntimeWarning, match="denied"):
            assert not store.publish(b"k", b"v", {})
