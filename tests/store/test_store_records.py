# SPDX-License-Identifier: Apache-2.0
"""The format of record files: golden bytes, and no damage goes undetected."""

from __future__ import annotations

import contextlib
import gc
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_progcache import FileStreamProgramCache
from cuda_progcache.store.records import (
    MAX_VERSIONS,
    DamagedRecordError,
    Version,
    checksum,
    decode,
    encode,
    encode_record,
    replacing,
)

DIGEST = "ab" * 32
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)
records = st.dictionaries(st.text(max_size=8), json_values, max_size=4)


def version(data=b"data", record=None, created=1.5):
    return Version.of(data, encode_record(record or {}), created)


def test_golden():
    """The format on disk. A change needs a new FORMAT; otherwise every entry of an old cache is a miss."""
    sidecar = encode(DIGEST, [version(record={"name": "k"}), version(b"old")])
    assert sidecar.decode() == (
        '{"format":1,"digest":"abababababababababababababababababababababababababababababababab","versions":[\n'
        '{"length":4,"checksum":"c044be4073bb71f1340036b3f23aa86d","created":1.5,'
        '"record_length":12,"record_checksum":"f707a87d67766783c0709057d7343e60","record":\n'
        '{"name":"k"}},\n'
        '{"length":3,"checksum":"1bcbfc1be90c1b300f3ca07a8cc8bf40","created":1.5,'
        '"record_length":2,"record_checksum":"dc7048f8f8747f561349cde127705c16","record":\n'
        "{}}\n"
        "]}\n"
    )
    assert json.loads(sidecar)["versions"][0]["record"] == {"name": "k"}


@given(st.lists(st.tuples(st.binary(max_size=50), records, st.floats(0, 2e9)), min_size=1, max_size=3))
def test_what_is_encoded_is_decoded(contents):
    versions = [version(*content) for content in contents]
    sidecar = encode(DIGEST, versions)
    assert decode(sidecar, DIGEST) == versions
    assert [one.record() for one in decode(sidecar, DIGEST)] == [record for _, record, _ in contents]
    assert [one["record"] for one in json.loads(sidecar)["versions"]] == [record for _, record, _ in contents]


@given(records, st.data())
def test_no_damage_passes(record, data):
    """A flipped byte or a cut fails decoding, changes the version's length or checksum, or fails the record's check."""
    good = version(b"data", record)
    sidecar = encode(DIGEST, [good])
    if data.draw(st.booleans()):
        damaged = bytearray(sidecar)
        damaged[data.draw(st.integers(0, len(sidecar) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        damaged = bytearray(sidecar[: data.draw(st.integers(0, len(sidecar) - 1))])
    try:
        found = decode(bytes(damaged), DIGEST)[0]
        if found.checksum == good.checksum and found.length == good.length:
            assert found.record() == record
    except DamagedRecordError:
        pass


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"length":4', '"size":4'),
        ('"length":4', '"length":04'),
        ('"length":4', '"length":4.0'),
        ('"length":4', '"length":"4"'),
        ('"created":1.5', '"created":1.50'),
        ('"created":1.5', '"created":true'),
        ('"created":1.5,', ""),
        ('"record":', '"other":1,"record":'),
        ('"checksum":"c', '"checksum":"\u00e9'),
    ],
)
def test_a_head_that_is_not_as_it_was_written(old, new):
    sidecar = encode(DIGEST, [version(record={"name": "k"})]).decode()
    assert old in sidecar
    with pytest.raises(DamagedRecordError):
        decode(sidecar.replace(old, new, 1).encode(), DIGEST)


@pytest.mark.parametrize("created", [1763668800, 1763668800.25, 1e-7, 0.0])
def test_times_of_any_spelling(created):
    (found,) = decode(encode(DIGEST, [version(created=created)]), DIGEST)
    assert (found.created, type(found.created)) == (created, type(created))


def test_a_record_of_another_entry():
    with pytest.raises(DamagedRecordError):
        decode(encode("cd" * 32, [version()]), DIGEST)


def test_a_record_of_another_format():
    with pytest.raises(DamagedRecordError, match="format"):
        decode(encode(DIGEST, [version()]).replace(b'"format":1', b'"format":2'), DIGEST)


def test_nothing_is_no_record():
    for raw in (b"", b"\n", b"{}", encode(DIGEST, []), b"\0" * 500):
        with pytest.raises(DamagedRecordError):
            decode(raw, DIGEST)


def test_what_a_new_version_replaces():
    versions = [version(bytes([i])) for i in range(5)]
    assert replacing(versions[0], []) == versions[:1]
    assert replacing(versions[0], versions[1:2]) == versions[:2]
    assert len(replacing(versions[0], versions[1:])) == MAX_VERSIONS
    same_bytes = version(bytes([1]), {"newer": True})
    assert replacing(same_bytes, versions[1:3]) == [same_bytes, versions[2]], "same bytes: the record is replaced"


def test_checksum_is_xxh3_128():
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"


def called_from(depth, function):
    """Call a function from ``depth`` frames further up the stack."""
    return called_from(depth - 1, function) if depth else function()


@pytest.fixture
def nothing_is_collected():
    """Turn off garbage collection: it would run finalizers of other objects near the end of the stack."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_is_collected")
@pytest.mark.parametrize("levels", [3, 600, 900])
def test_no_entry_is_damaged_since_its_reader_is_far_up_the_stack(tmp_path, levels):
    """JSON is parsed recursively; near the stack limit the reader gets a RecursionError, and no entry is damaged."""
    record = json.loads("{" + '"a":{' * levels + "}" * levels + "}")
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        assert cache.publish(b"k", b"data", record)
        for depth in (0, 300, 600, 800, *range(870, 1000)):
            with contextlib.suppress(RecursionError):
                assert called_from(depth, lambda: cache.load(b"k").record["a"]) is not None
        assert cache.load(b"k").record == record
        assert [entry.record for entry in cache.entries()] == [record]


def test_what_nests_too_deeply_to_be_written_is_no_record(tmp_path):
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with FileStreamProgramCache(tmp_path / "cache") as cache, pytest.raises(ValueError, match="nested too deeply"):
        cache.publish(b"k", b"data", deep)
    while deep:
        deep = deep.popitem()[1]  # level by level: freeing recurses, too
