# SPDX-License-Identifier: Apache-2.0
"""``cache_file`` in one process: which results are reused, which aren't, and what the decorator accepts."""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import random
import re
import shutil
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest

from cuda_progcache.errors import OptionError, ProgCacheError
from cuda_progcache.memo import cache_file as module
from cuda_progcache.memo.cache_file import cache_file, cache_tree_reset, load_config, track_file


@pytest.fixture(autouse=True)
def _fresh():
    cache_tree_reset()
    module._file_state_cache.clear()
    yield
    cache_tree_reset()
    module._file_state_cache.clear()


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def log(tmp_path):
    """The path of a file that functions append to when they run; a string, so that their closures don't change."""
    return str(tmp_path / "runs.log")


def ran(log):
    return len(Path(log).read_text()) if os.path.exists(log) else 0


def entries(store):
    return sorted(p.name for p in Path(store).glob("*.pkl"))


# Reuse


def test_a_result_is_reused_and_other_arguments_are_another_call(store, log):
    @cache_file(store)
    def double(x):
        with open(log, "a") as file:
            file.write(".")
        return {"is": x * 2}

    assert double(4) == {"is": 8} == double(4)
    assert ran(log) == 1
    assert double(5) == {"is": 10}
    assert ran(log) == 2 == len(entries(store))


def test_none_is_a_result(store, log):
    @cache_file(store)
    def nothing(x):
        with open(log, "a") as file:
            file.write(".")

    assert nothing(1) is None is nothing(1)
    assert ran(log) == 1


def test_positional_keyword_and_default_forms_are_one_call(store):
    @cache_file(store)
    def f(a, b=10, *rest, c=3, **more):
        return (a, b, rest, c, more)

    for call in (f(1), f(a=1), f(1, 10), f(1, b=10, c=3), f(c=3, a=1)):
        assert call == (1, 10, (), 3, {})
    assert len(entries(store)) == 1
    f(1, x=1, y=2)
    f(1, y=2, x=1)
    assert len(entries(store)) == 2
    f(1, x=1)
    f(1, 10, 11)
    assert len(entries(store)) == 4


def test_equal_values_of_different_types_are_different_calls(store):
    @cache_file(store)
    def kind(x):
        return type(x).__name__

    assert [kind(x) for x in (1, 1.0, True, "1", (1,), [1], -1.0, -2.0)] == [
        "int", "float", "bool", "str", "tuple", "list", "float", "float",
    ]  # fmt: skip
    assert len(entries(store)) == 8


def test_order_of_dicts_and_sets_makes_no_odds(store):
    @cache_file(store)
    def size(x):
        return len(x)

    size({"a": 1, "b": {"c", "d", "e"}})
    size({"b": {"e", "c", "d"}, "a": 1})
    assert len(entries(store)) == 1


def test_control_arguments_never_enter_the_key(store, log):
    @cache_file(store)
    def f(x):
        with open(log, "a") as file:
            file.write(".")
        return x

    f(1, _skip_save=True)
    assert entries(store) == []
    f(1)
    f(1, _load=True, _force=False, _skip_save=False)
    assert (ran(log), len(entries(store))) == (2, 1)
    f(1, _force=True)
    f(1, _load=False)
    f(1, _force=True, _skip_save=True)
    assert (ran(log), len(entries(store))) == (5, 1)


def test_a_parameter_of_that_name_is_the_functions_own(store):
    @cache_file(store)
    def f(x, _force=1):
        return (x, _force)

    assert f(1, _force=5) == (1, 5)
    assert f(1, _force=6) == (1, 6)


def test_the_decorator_in_its_three_forms(store):
    cached = cache_file(store)

    @cached
    def one(x):
        return x

    @cached(version="2")
    def two(x):
        return x

    def three(x):
        return x

    wrapped = cached(three)
    assert (one(1), two(1), wrapped(1)) == (1, 1, 1)
    assert [name.split(".")[0] for name in entries(store)] == ["one", "three", "two"]
    assert (wrapped.__name__, wrapped.__wrapped__) == ("three", three)
    with pytest.raises(TypeError, match="verbos'; valid: cache_dir"):
        cached(verbos=True)
    for backend in ("parquet", "rds", "qs"):
        with pytest.raises(OptionError, match=f"backend='{backend}' isn't known; valid: pickle"):
            cache_file(store, backend=backend)
    with pytest.raises(ProgCacheError, match="valid: xxhash64, sha256"):
        cache_file(store, algo="md5")
    with pytest.raises(TypeError, match="coroutine or generator"):

        @cached
        async def later(x):
            return x


def test_an_exception_is_raised_and_not_kept(store, log):
    @cache_file(store)
    def fails(x):
        with open(log, "a") as file:
            file.write(".")
        raise ValueError("on purpose")

    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            fails(1)
    assert ran(log) == 2
    assert os.listdir(store) == []


def test_recursion(store, log):
    @cache_file(store)
    def fib(n):
        with open(log, "a") as file:
            file.write(".")
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    assert fib(15) == 610
    assert ran(log) == 16 == len(entries(store))
    assert len(module._cache_tree_call_stack) == 0


def test_methods_and_bound_state(store):
    class Scaler:
        def __init__(self, factor):
            self.factor = factor

        @cache_file(store)
        def apply(self, x):
            return x * self.factor

    assert (Scaler(2).apply(3), Scaler(5).apply(3), Scaler(2).apply(3)) == (6, 15, 6)
    assert len(entries(store)) == 2


# The contents of the key


def test_body_defaults_and_closures_count(store):
    def make(step, scale):
        @cache_file(store)
        def f(x):
            return x * scale + step

        return f

    assert (make(1, 2)(5), make(1, 3)(5), make(2, 2)(5), make(1, 2)(5)) == (11, 16, 12, 11)
    assert len(entries(store)) == 3


def test_helpers_and_data_they_refer_to_count(store):
    names = types.SimpleNamespace(config={"depth": {"of": 1}})
    names.helper = lambda x: x + names.config["depth"]["of"]

    @cache_file(store)
    def f(x):
        return names.helper(x)

    assert f(1) == 2
    names.config["depth"]["of"] = 10
    assert f(1) == 11
    names.helper = lambda x: -x
    assert f(1) == -1


def test_what_a_cached_helper_was_told_counts_for_its_callers(store):
    def build(**options):
        @cache_file(store, **options)
        def inner(x):
            return x

        @cache_file(store)
        def outer(x):
            return inner(x)

        return outer(1)

    for options in ({}, {"version": "1"}, {"version": "2"}, {"depends_on_vars": {"a": 1}}, {}):
        build(**options)
    assert sum(name.startswith("outer.") for name in entries(store)) == 4


def test_what_a_memoized_helper_refers_to_counts_for_its_callers(store):
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.memoize import memoize
    from cuda_progcache.memo.storage import CallMemory, ValueMemory

    names = types.SimpleNamespace(deep=lambda x: x + 1)

    @memoize(Cache(ValueMemory({}), CallMemory({})))
    def inner(x):
        return names.deep(x)

    @cache_file(store)
    def outer(x):
        return inner.__wrapped__(x)

    assert outer(1) == 2
    names.deep = lambda x: x + 10
    assert outer(1) == 11


def test_version_and_variables(store):
    def make(**options):
        @cache_file(store, **options)
        def f(x):
            return x

        return f(1)

    for options in (
        {},
        {"version": "1"},
        {"version": "2"},
        {"depends_on_vars": {"s": 1}},
        {"depends_on_vars": {"s": 2}},
    ):
        make(**options)
        make(**options)
    assert len(entries(store)) == 5


def test_environment_variables_count_where_declared(store, monkeypatch):
    @cache_file(store, env_vars=["MODE"])
    def declared():
        return os.environ["MODE"]

    @cache_file(store)
    def undeclared():
        return os.environ["MODE"]

    @cache_file(store)
    def caller():
        return declared()

    monkeypatch.setenv("MODE", "a")
    assert (declared(), undeclared(), caller()) == ("a", "a", "a")
    monkeypatch.setenv("MODE", "b")
    assert (declared(), undeclared(), caller()) == ("b", "b", "b"), "what the code reads by name counts anyhow"


def test_ignored_arguments_dont_count(store):
    @cache_file(store, ignore_args=["progress"])
    def f(x, progress=None):
        return x

    f(1, progress=print)
    f(1)
    assert len(entries(store)) == 1


def test_package_versions_count(store, monkeypatch):
    made = types.ModuleType("made_for_this_test")
    made.__version__ = "1.0"
    monkeypatch.setitem(sys.modules, made.__name__, made)

    @cache_file(store)
    def f(x):
        import made_for_this_test

        return made_for_this_test.__version__

    assert f(1) == "1.0"
    info = module.cache_info(store / entries(store)[0])
    assert info["meta"]["pkgs"] == {"made_for_this_test": "1.0"}
    made.__version__ = "1.1"
    assert f(1) == "1.1"


def test_a_package_imported_at_the_first_run_is_the_same_at_the_second(store, tmp_path, monkeypatch, log):
    (tmp_path / "imported_late.py").write_text("__version__ = '3.1'\nVALUE = 5\n")
    monkeypatch.syspath_prepend(tmp_path)

    @cache_file(store)
    def f(x):
        import imported_late

        with open(log, "a") as file:
            file.write(".")
        return imported_late.VALUE * x

    assert "imported_late" not in sys.modules
    assert (f(2), f(2), ran(log)) == (10, 10, 1)
    (tmp_path / "imported_late.py").write_text("__version__ = '3.1'\nVALUE = 66\n")
    assert (f(2), ran(log)) == (10, 1), "what was loaded counts, not what lies on disk now"
    sys.modules["imported_late"].VALUE = 7
    assert (f(2), ran(log)) == (14, 2)
    sys.modules.pop("imported_late")
    importlib.invalidate_caches()
    assert (f(2), f(2), ran(log)) == (132, 132, 3), "as in another process"
    sys.modules.pop("imported_late")


# Files


def test_contents_of_declared_files_count_by_real_path(store, tmp_path):
    target, link = tmp_path / "data.txt", tmp_path / "link.txt"
    target.write_text("AAAA")
    link.symlink_to(target)

    @cache_file(store, file_args=["path"])
    def read(path):
        return Path(path).read_text()

    assert (read(str(target)), read(str(link)), read(target)) == ("AAAA",) * 3
    assert len(entries(store)) == 1
    target.write_text("BBBB")
    assert read(str(link)) == "BBBB"
    os.utime(target)
    assert read(str(link)) == "BBBB"
    assert len(entries(store)) == 2


def test_an_edit_that_keeps_size_and_mtime_is_seen(store, tmp_path, monkeypatch):
    from cuda_progcache.memo import files

    # Make the file seem old, so that its digest is remembered and only its ctime reveals the edit.
    monkeypatch.setattr(files.time, "time_ns", lambda real=time.time_ns: real() + 10**10)
    path = tmp_path / "data.bin"
    path.write_bytes(b"a" * 100)
    os.utime(path, ns=(10**18, 10**18))

    @cache_file(store)
    def read(path):
        return path.read_bytes()[:1]

    assert read(path) == b"a"
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.write_bytes(b"b" * 100)
        os.utime(path, ns=(10**18, 10**18))
    assert read(path) == b"b"


def test_an_edit_in_the_middle_of_a_large_file_is_seen(store, tmp_path):
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(9_000_000))

    @cache_file(store)
    def total(path):
        return sum(path.read_bytes())

    assert total(path) == 0
    with path.open("r+b") as file:
        file.seek(4_444_444)
        file.write(b"\x07")
    assert total(path) == 7


def test_directories_count_by_names_and_contents(store, tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.csv").write_text("1")

    @cache_file(store, file_args=["folder"])
    def names(folder):
        return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*"))

    def told():
        names(str(folder))
        return len(entries(store))

    assert (told(), told()) == (1, 1)
    (folder / "deep" / "b.csv").write_text("")
    assert told() == 2
    (folder / "deep" / "b.csv").rename(folder / "deep" / "c.csv")
    assert told() == 3
    (folder / "a.csv").write_text("2")
    assert told() == 4
    (folder / "empty").mkdir()
    assert told() == 5


@pytest.mark.parametrize("pattern", ["*.csv", r"\.csv$", re.compile("csv")])
def test_a_pattern_filters_the_files_of_a_directory(store, tmp_path, pattern):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.csv").write_text("1")

    @cache_file(store, file_pattern=pattern)
    def read(folder):
        return (folder / "a.csv").read_text()

    read(folder)
    (folder / "notes.txt").write_text("of no account")
    read(folder)
    assert len(entries(store)) == 1
    (folder / "a.csv").write_text("2")
    assert read(folder) == "2"


def test_strings_that_name_something_count_as_files_unless_others_are_declared(store, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("1")

    @cache_file(store)
    def guessed(what):
        return Path(what[0]["at"]).read_text()

    @cache_file(store, file_args=["other"])
    def told(what, other=()):
        return Path(what).read_text()

    assert (guessed([{"at": str(path)}]), told(str(path)), told(path)) == ("1", "1", "1")
    path.write_text("2")
    assert (guessed([{"at": str(path)}]), told(str(path)), told(path)) == ("2", "1", "2")


def test_a_long_source_text_is_no_path(store):
    source = "// saxpy\n" + "__global__ void k(float *a) { a[0] = 1; } /* a/b */\n" * 300

    @cache_file(store)
    def size(text):
        return len(text)

    assert len(source) > 10_000
    assert size(source) == len(source) == size(source)
    assert size("/" + "x" * 5000) == 5001
    assert size("a/\0b") == 4
    assert len(entries(store)) == 3


def test_text_of_several_lines_is_no_path_even_where_a_file_has_that_name(store, tmp_path):
    path = tmp_path / "two\nlines"
    path.write_text("1")

    @cache_file(store)
    def read(text):
        return Path(text).read_text()

    assert read(str(path)) == "1"
    path.write_text("2")
    assert read(str(path)) == "1"


def test_the_place_of_a_file_counts_or_not(store, tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "data.txt").write_text("same")

    def make(folder, *, places):
        @cache_file(folder, hash_file_paths=places, file_args=["path"])
        def read(path):
            return Path(path).read_text()

        for place in ("one", "two"):
            read(str(tmp_path / place / "data.txt"))
        return len(entries(folder))

    assert make(store / "a", places=True) == 2
    assert make(store / "b", places=False) == 1


def test_files_that_the_source_names_and_declared_ones(store, tmp_path):
    table, other = tmp_path / "table.txt", tmp_path / "other.txt"
    table.write_text("1")
    other.write_text("1")
    TABLE = str(table)  # noqa: N806 - a constant of the function below

    @cache_file(store, depends_on_files=[other])
    def read():
        with open(TABLE) as file:
            return file.read() + other.read_text()

    assert read() == "11"
    table.write_text("2")
    assert read() == "21"
    other.write_text("3")
    assert read() == "23"


def test_tracked_files_are_looked_at_before_a_result_is_reused(store, tmp_path, log):
    found, missing = tmp_path / "found.txt", tmp_path / "missing.txt"
    found.write_text("1")

    @cache_file(store)
    def inner(x):
        assert track_file(found) == found.resolve()
        return found.read_text() + str(track_file(missing).exists())

    @cache_file(store)
    def outer(x):
        with open(log, "a") as file:
            file.write(".")
        return inner(x) + "!"

    assert (outer(1), outer(1), ran(log)) == ("1False!", "1False!", 1)
    found.write_text("2")
    assert (outer(1), inner(1)) == ("2False!", "2False")
    missing.write_text("")
    assert (outer(1), outer(1), ran(log)) == ("2True!", "2True!", 3)


def test_a_file_that_changes_during_the_run_warns_and_the_result_isnt_saved(store, tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("before")

    @cache_file(store, file_args=["path"])
    def rewrites(path):
        Path(path).write_text("after, and longer")
        return "done"

    with pytest.warns(UserWarning, match=r"input\.txt was modified while it ran"):
        assert rewrites(str(path)) == "done"
    assert entries(store) == []


# Failures


def test_trouble_never_costs_a_result(store, tmp_path):
    @cache_file(tmp_path / "a file" / "below")
    def unsaved(x):
        return x + 1

    shutil.rmtree(tmp_path / "a file")
    (tmp_path / "a file").write_text("")
    with pytest.warns(RuntimeWarning, match="can't be saved in"):
        assert unsaved(1) == 2
    assert unsaved(1) == 2  # the warning is issued once

    @cache_file(store)
    def unpicklable(x):
        return lambda: x

    with pytest.warns(RuntimeWarning, match="of type function can't be saved"):
        assert unpicklable(3)() == 3

    @cache_file(store)
    def indigestible(x):
        return next(x)

    with pytest.warns(RuntimeWarning, match="isn't cached: can't digest a builtins.generator"):
        assert indigestible(i for i in (7, 8)) == 7
    assert list(store.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"CORRUPT", None, "half"])
def test_a_damaged_file_is_a_miss_and_set_aside(store, damage):
    @cache_file(store)
    def f(x):
        return list(range(x))

    f(1000)
    path = store / entries(store)[0]
    whole = path.read_bytes()
    if damage is None:
        damage = whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]
    path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    with pytest.warns(RuntimeWarning, match="is ignored"):
        assert f(1000) == list(range(1000))
    assert path.read_bytes()[:100] == whole[:100]
    assert path.with_name(path.name + ".corrupt").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert f(1000) == list(range(1000))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs Unix permissions")
def test_what_others_could_have_written_isnt_unpickled(store, log):
    class Attack:
        def __reduce__(self):
            return (open, (log, "w"))

    @cache_file(store)
    def f(x):
        return x

    f(1)
    path = store / entries(store)[0]
    path.write_bytes(pickle.dumps({"dat": Attack(), "meta": {}}))
    path.chmod(0o666)
    with pytest.warns(RuntimeWarning, match="others can write it"):
        assert f(1) == 1
    assert not os.path.exists(log)
    path.unlink(missing_ok=True)
    f(1)
    store.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="chmod go-w"):
        assert cache_file(store)(f.__wrapped__)(1) == 1


def test_the_global_random_state_is_left_alone(store, tmp_path):
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(6_000_000))
    random.seed(5)
    expected = [random.random() for _ in range(2)]
    random.seed(5)

    @cache_file(store)
    def size(path):
        return path.stat().st_size

    first = random.random()
    size(path)
    assert [first, random.random()] == expected


def test_an_xxh64_collision_is_a_miss(store, monkeypatch):
    from cuda_progcache.memo import cache_dir

    monkeypatch.setattr(cache_dir.DirectoryCache, "short", lambda *_: "0123456789abcdef")

    @cache_file(store)
    def f(x):
        return x

    assert (f(1), f(2), f(1)) == (1, 2, 1)
    assert len(entries(store)) == 1


def test_the_hashes_are_what_they_say(store, tmp_path):
    import hashlib

    import xxhash

    path = tmp_path / "data"
    path.write_bytes(b"content")
    assert module.fast_file_hash(path) == xxhash.xxh64_hexdigest(b"content") == module.probabilistic_file_hash(path)
    assert module.fast_file_hash(path, "sha256") == hashlib.sha256(b"content").hexdigest()
    assert module.fast_file_hash(tmp_path / "none") is None is module.probabilistic_file_hash(tmp_path / "none")
    for algo, length in (("xxhash64", 16), ("sha256", 64)):

        @cache_file(store / algo, algo=algo)
        def f(x):
            return x

        f(1)
        assert len(entries(store / algo)[0].split(".")[1]) == length


# Messages, figures and configuration


def test_verbose_says_what_changed(store, tmp_path, caplog, monkeypatch):
    path = tmp_path / "data.txt"
    path.write_text("1")

    def make(**options):
        @cache_file(store, env_vars=["MODE"], **options)
        def f(x, path=path):
            return x

        return f

    monkeypatch.setenv("MODE", "a")
    f = make(verbose=True)
    said = []

    def tell(call):
        caplog.clear()
        call()
        said.append(caplog.text)

    with caplog.at_level(logging.INFO):
        tell(lambda: f(1))
        tell(lambda: f(1))
        tell(lambda: f(2))
        tell(lambda: f(2, _force=True))
        path.write_text("2")
        tell(lambda: f(2))
        monkeypatch.setenv("MODE", "b")
        tell(lambda: f(2))
        tell(lambda: make(verbose=True, version="2")(2))
        tell(lambda: make()(7))
    expected = [
        "first execution", "cache hit", "argument x 1 → 2", "forced", "data.txt changed",
        "environment variable MODE 'a' → 'b'", "version None → '2'",
    ]  # fmt: skip
    for text, part in zip(said, expected, strict=False):
        assert part in text
    assert said[-1] == ""


def test_names_that_programs_of_the_design_it_follows_import(store, tmp_path):
    import math

    assert module._digest_obj([1, "a"]) == module._digest_obj([1, "a"]) != module._digest_obj([1, "b"])
    assert module._get_package_versions(lambda x: pytest.raises(x, match="")) == {"pytest": pytest.__version__}
    assert module._detect_import_names(lambda x: pytest.raises(math.sqrt(x))) == {"pytest"}
    assert module._cache_tree_current_node() is None
    assert isinstance(module.logger, logging.Logger)

    @cache_file(store)
    def f(x):
        return module._cache_tree_current_node()

    assert f(1) == f"f:{entries(store)[0].split('.')[1]}"
    assert f(1) in module.cache_tree_nodes()
    assert module.cache_tree_save(tmp_path / "tree.pkl") == tmp_path / "tree.pkl"
    path = store / entries(store)[0]
    figures = module.cache_stats(store)
    assert figures == {
        "n_entries": 1, "total_size_mb": path.stat().st_size / 2**20, "oldest": path.stat().st_mtime,
        "newest": path.stat().st_mtime,
        "by_function": [{"fname": "f", "n_files": 1, "total_size_mb": path.stat().st_size / 2**20}],
    }  # fmt: skip


def test_memory_of_file_digests(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FILE_STATE_CACHE_LIMIT", 5)
    for index in range(10):
        path = tmp_path / f"{index}.txt"
        path.write_text(str(index))
        module.fast_file_hash(path)
    info = module.cache_file_state_info()
    assert info["n_entries"] == 5 == len(info["paths"])
    assert module.cache_file_state_clear() == 5
    assert module.cache_file_state_clear() == 0


def test_a_remembered_digest_isnt_read_again_and_a_fresh_file_is(tmp_path, monkeypatch):
    from cuda_progcache.memo import files

    path = tmp_path / "data"
    path.write_bytes(b"1")
    reads = []
    monkeypatch.setattr(files, "hash_file", lambda *a, real=files.hash_file: (reads.append(a), real(*a))[1])
    written = path.stat().st_ctime_ns
    monkeypatch.setattr(files.time, "time_ns", lambda: written + 10**7)
    module.fast_file_hash(path)
    module.fast_file_hash(path)
    assert len(reads) == 2  # the file is so new that its ctime might not reveal an edit
    monkeypatch.setattr(files.time, "time_ns", lambda: written + 10**10)
    module.fast_file_hash(path)
    module.fast_file_hash(path)
    assert len(reads) == 3


def test_config(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "cachepy.yml"
    path.write_text("cache_dir: /somewhere\nbackend: pickle\nverbose: true\nenv_vars: [HOME, PATH]\n")
    assert load_config(path)["env_vars"] == ["HOME", "PATH"]
    assert load_config(path, existing={"backend": "rds"}) == {
        "cache_dir": "/somewhere", "backend": "rds", "verbose": True, "env_vars": ["HOME", "PATH"],
    }  # fmt: skip
    path.write_text("- a list\n")
    with pytest.raises(ProgCacheError, match="contains a list"):
        load_config(path)
    path.write_text("a: [\n")
    with pytest.raises(ProgCacheError, match="is not YAML"):
        load_config(path)
    path.write_text("")
    assert load_config(path) == {}


def test_default_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("CACHER_DIR", str(tmp_path / "chosen"))

    @cache_file()
    def f(x):
        return x

    f(1)
    assert module.cache_default_dir() == tmp_path / "chosen"
    assert len(entries(tmp_path / "chosen")) == 1


# Threads


def test_threads_that_ask_at_once_run_it_once(store, log):
    ready = threading.Barrier(8)
    results = []

    @cache_file(store)
    def slow(x):
        with open(log, "a") as file:
            file.write(".")
        time.sleep(0.2)
        return [x]

    def ask():
        ready.wait(300)
        results.append(slow(1))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert results == [[1]] * 8
    assert ran(log) == 1
    assert len(os.listdir(store)) == 1


def test_an_interrupted_thread_leaves_the_others_their_turn(store, log):
    started, waiting = threading.Event(), threading.Event()
    results = []

    @cache_file(store)
    def f(x):
        with open(log, "a") as file:
            file.write(".")
        if ran(log) == 1:
            started.set()
            assert waiting.wait(300)
            time.sleep(0.1)
            raise KeyboardInterrupt
        return x

    def lead():
        with pytest.raises(KeyboardInterrupt):
            f(1)

    def follow():
        waiting.set()
        results.append(f(1))

    threads = [threading.Thread(target=lead), threading.Thread(target=follow)]
    threads[0].start()
    assert started.wait(300)
    threads[1].start()
    for thread in threads:
        thread.join(300)
    assert results == [1]
    assert ran(log) == 2


def test_trouble_in_an_arguments_digest_never_fails_a_call(store):
    class Odd:
        def __digest__(self):
            raise ZeroDivisionError("odd")

    @cache_file(store)
    def f(x):
        return 7

    with pytest.warns(RuntimeWarning, match="isn't cached"):
        assert f(Odd()) == 7
    with pytest.raises(TypeError, match="missing 1 required"):
        f()
