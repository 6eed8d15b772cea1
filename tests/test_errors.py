# SPDX-License-Identifier: Apache-2.0
"""The guarantees for callers that catch the package's errors and filter its warnings."""

from __future__ import annotations

import copy
import errno
import pickle
import traceback

import pytest

import cuda_progcache
from cuda_progcache import errors
from cuda_progcache.errors import ProgCacheError, ProgCacheWarning, ReadOnlyError, StoreError, UnsafeRootError

SAMPLES = [
    (errno.EACCES, "no", "/x"),
    (errno.EPERM, "no"),
    (errno.ENOENT, "gone", "/x"),
    (errno.EROFS, "read-only", "/x"),
    (errno.ENOSPC, "full", "/x"),
    (errno.ENOTDIR, "a file", None),
    (None, "who knows"),
    ("just text",),
    (),
]


@pytest.mark.parametrize("cls", [StoreError, ReadOnlyError, UnsafeRootError])
@pytest.mark.parametrize("args", SAMPLES)
def test_a_store_error_is_what_python_raises_for_its_errno(cls, args):
    native = OSError(*args)
    error = cls(*args)
    assert isinstance(error, (cls, ProgCacheError))
    assert isinstance(error, type(native))
    assert isinstance(error, PermissionError) == isinstance(native, PermissionError)
    assert isinstance(error, FileNotFoundError) == isinstance(native, FileNotFoundError)
    assert str(error) == str(native)
    assert (error.errno, error.strerror, error.filename) == (native.errno, native.strerror, native.filename)


def test_an_error_of_the_store_reads_as_one():
    with pytest.raises(PermissionError) as excinfo:
        raise StoreError(errno.EACCES, "can't store", "/x")
    shown = "".join(traceback.format_exception_only(excinfo.value))
    assert shown == "cuda_progcache.errors.StoreError: [Errno 13] can't store: '/x'\n"
    assert type(excinfo.value) is type(StoreError(errno.EPERM, "one class for both"))


@pytest.mark.parametrize("cls", [StoreError, ReadOnlyError, UnsafeRootError])
@pytest.mark.parametrize("args", SAMPLES)
@pytest.mark.parametrize("through", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_store_error_crosses_process_borders(cls, args, through):
    error = cls(*args)
    error.add_note("in the worker")
    other = through(error)
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert (other.errno, other.filename, other.__notes__) == (error.errno, error.filename, ["in the worker"])


def test_a_missing_directory_of_a_bundle_is_a_file_not_found(tmp_path):
    with cuda_progcache.FileStreamProgramCache(tmp_path / "cache") as store:
        with pytest.raises(FileNotFoundError) as excinfo:
            store.export(tmp_path / "no such directory" / "bundle")
        assert isinstance(excinfo.value, StoreError)
        assert excinfo.value.errno == errno.ENOENT


def test_warnings_can_be_filtered_by_their_category():
    assert cuda_progcache.ProgCacheWarning is ProgCacheWarning
    assert issubclass(ProgCacheWarning, RuntimeWarning), "as filters written before there was a category expect"


@pytest.mark.parametrize("kind", [n for n in vars(errors).values() if isinstance(n, type) and issubclass(n, Exception)])
def test_every_error_crosses_processes_as_cuda_cores_or_not(kind):
    """A class combined from ours and another library's is unpickled as ours."""

    class TheirError(Exception):  # like the bindings' errors, it takes only a status
        def __init__(self, status):
            self.status = status

        def __reduce__(self):
            return (type(self), (self.status,))

    for made in (kind, errors._also(kind, TheirError)) if issubclass(kind, errors.ProgCacheError) else (kind,):
        error = made.__new__(made, "what happened")
        error.note = 3
        for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(copied) is kind
            assert (copied.args, str(copied), copied.note) == (("what happened",), "what happened", 3)


def test_an_error_that_is_made_of_more_than_its_message_crosses_processes():
    error = pickle.loads(pickle.dumps(errors.AmbiguousDigestError("ab", ["abc", "abd"])))
    assert (error.prefix, error.matches, str(error).split(" (")[0]) == (
        "ab", ("abc", "abd"), "digest prefix 'ab' matches 2 entries",
    )  # fmt: skip
