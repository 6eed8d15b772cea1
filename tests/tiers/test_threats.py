# SPDX-License-Identifier: Apache-2.0
"""One test per threat of the threat model (ci/docs/reference/threat-model.md), against a real server.

The attacker can write anything to the server, well-formed and with correct checksums: checksums only guard against
accidents. Whatever the attacker does is a miss, never an error, and is reported once.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import warnings

import pytest
import redis
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache import FileStreamProgramCache, Program, ProgramCacheStack, ProgramOptions, subscribe
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.keys.elsewhere import for_elsewhere
from cuda_progcache.keys.headers import HeaderSet
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.derived import merge_manifest
from cuda_progcache.store.records import Version, encode, encode_record
from cuda_progcache.store.tiers.envelope import pack, unpack
from cuda_progcache.store.tiers.sides import MANIFESTS, Item, side
from cuda_progcache.store.tiers.upkeep import sync
from tests.tiers.conftest import PATIENCE, place_on

KEY, OTHER = b"a key", b"another key"
SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The path of a private key, and its public key as hex digits."""
    key, path = Ed25519PrivateKey.generate(), tmp_path_factory.mktemp("key") / "key.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return path, key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


@pytest.fixture
def attacker(redis_url):
    with redis.Redis.from_url(redis_url.partition("?")[0]) as made:
        yield made


@pytest.fixture
def publisher(redis_url, open_url, pair):
    return open_url(f"{redis_url}&sign_key={pair[0]}")


@pytest.fixture
def reader(redis_url, open_url, pair):
    return open_url(f"{redis_url}&trust=signed&keys={pair[1]}&mode=ro")


@pytest.fixture
def anyone(redis_url, open_url):
    return open_url(f"{redis_url}&max_bytes=100000")


def place(key):
    return f"pc1:{{{entry_digest(key)}}}:e"


def forged(key, data, record):
    """Return a well-formed object, as anybody can make it."""
    return pack(entry_digest(key), data, Version.of(data, encode_record(record), time.time()))


def taken_apart(key, packed):
    data, version = unpack(entry_digest(key), packed)
    return data, version.record()


def misses(store, key, match):
    """Assert that the first lookup misses with a matching warning, and that further lookups miss without one."""
    with pytest.warns(ProgCacheWarning, match=match):
        assert store.load(key) is None
    assert store.load(key) is None
    assert store.get(key) is None


def published(publisher, *keys):
    for key in keys:
        assert publisher.publish(key, b"binary of " + key, {"name": key.decode()})
    assert publisher.flush(300)


def test_what_was_signed_is_used_with_its_record(publisher, reader):
    published(publisher, KEY)
    found = reader.load(KEY)
    assert (found.data, found.record["name"]) == (b"binary of a key", "a key")


def test_an_unsigned_program_is_not_used(anyone, reader):
    published(anyone, KEY)
    misses(reader, KEY, "isn't signed")
    assert reader._inner.tier().untrusted == 1


def test_altered_bytes_are_not_used(publisher, reader, anyone, attacker):
    published(publisher, KEY, OTHER)
    _, record = taken_apart(KEY, attacker.get(place(KEY)))
    attacker.set(place(KEY), forged(KEY, b"malware", record))
    misses(reader, KEY, "its bytes aren't those that were signed")
    whole = attacker.get(place(OTHER))
    attacker.set(place(OTHER), whole[:-1] + bytes([whole[-1] ^ 1]))
    misses(anyone, OTHER, "something else")


def test_swapped_entries_are_not_used(publisher, reader, anyone, attacker):
    published(publisher, KEY, OTHER)
    first, second = attacker.get(place(KEY)), attacker.get(place(OTHER))
    attacker.set(place(KEY), second)
    misses(anyone, KEY, "something else")
    attacker.set(place(KEY), forged(KEY, *taken_apart(OTHER, second)))
    misses(reader, KEY, "it was signed as another program")
    assert taken_apart(KEY, first)[0] != taken_apart(OTHER, second)[0]


def test_a_record_replayed_for_another_program_is_not_used(publisher, reader, attacker):
    published(publisher, KEY, OTHER)
    mine, theirs = (taken_apart(key, attacker.get(place(key))) for key in (KEY, OTHER))
    attacker.set(place(KEY), forged(KEY, mine[0], theirs[1]))
    misses(reader, KEY, "signed as another program")


def test_an_altered_record_is_not_used(publisher, reader, attacker):
    """The record's symbol mapping decides which kernel is launched."""
    published(publisher, KEY)
    data, record = taken_apart(KEY, attacker.get(place(KEY)))
    attacker.set(place(KEY), forged(KEY, data, {**record, "symbol_mapping": {"f": "_Zg"}}))
    misses(reader, KEY, "its record isn't the one that was signed")


def test_a_program_under_an_old_key_schema_is_not_used(publisher, reader, attacker, monkeypatch):
    """A key contains the schema: a program signed under an old one has another name, and can't be moved to the new."""
    from cuda_progcache.keys import schema

    def compiled(cache):
        return Program(SOURCE, "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=cache)

    with monkeypatch.context() as patch:
        patch.setattr(schema, "SCHEMA", "0")
        schema._recipe.cache_clear()
        old = compiled(publisher)
    schema._recipe.cache_clear()
    new = compiled(publisher)
    assert publisher.flush(300)
    assert old.digest != new.digest
    stale = attacker.get(f"pc1:{{{old.digest}}}:e")
    data, version = unpack(old.digest, stale)
    where = f"pc1:{{{new.digest}}}:e"
    attacker.set(where, pack(new.digest, data, version))
    with pytest.warns(ProgCacheWarning, match="signed as another program"):
        assert not compiled(reader).hit


def test_a_forged_header_manifest_is_not_used(publisher, reader, attacker, tmp_path):
    """A forged manifest could omit a header, so that a program compiled without the header would be served."""
    (tmp_path / "v.h").write_text("#define V 1\n")

    def compiled(cache):
        options = ProgramOptions(arch="sm_80", include_path=[str(tmp_path)])
        code = '#include "v.h"\nextern "C" __global__ void k(int *a) { *a = V; }'
        return Program(code, "c++", options).compiled("cubin", cache=cache)

    assert not compiled(publisher).hit
    assert publisher.flush(300)
    (name,) = [key.decode() for key in attacker.keys("*}:m") if b"v.h" in attacker.get(key)][:1]
    digest = name[5:-3]
    content, version = unpack(digest, attacker.get(name))
    attacker.set(name, pack(digest, content + b"\n", Version.of(content + b"\n", version.record_json, 0)))
    with pytest.warns(ProgCacheWarning, match="isn't trusted"):
        assert reader.find_manifest(digest) is None


def headers_program(folder):
    options = ProgramOptions(arch="sm_80", include_path=[str(folder)])
    return Program('#include "v.h"\nextern "C" __global__ void k(int *a) { *a = V; }', "c++", options)


@pytest.fixture
def elsewhere(redis_server, open_url):
    """Another tier, to which anyone can write."""
    return open_url(place_on("redis_server", redis_server))


@pytest.mark.parametrize("kind", ["tier", "layer"])
def test_an_unsigned_manifest_leads_to_no_signed_program(
    publisher, reader, attacker, elsewhere, open_url, tmp_path, kind
):
    """The manifest could claim that the headers are unchanged since an earlier program was signed."""
    header, always = tmp_path / "v.h", tmp_path / "always"
    header.write_text("#define V 1\n")
    always.write_bytes(b"")
    old = headers_program(tmp_path).compiled("cubin", cache=publisher)
    assert publisher.flush(300)
    unsigned, layer = elsewhere, tmp_path / "layer"
    with FileStreamProgramCache(layer) as made:
        made.publish(KEY, b"data", {})
    for name in [key.decode()[5:-3] for key in attacker.keys("*}:m")]:
        manifest = json.loads(publisher.find_manifest(name))
        for one in manifest["sets"]:
            identity, digest = HeaderSet.from_json(one).identity, hashlib.sha256().hexdigest()
            one.update(headers=[[["A", 0, str(always)], digest]], plain=[digest] * bool(one["plain"]))
            one.update(absent=[], perhaps=[], present=[], links=[], stands_for=identity)
        elsewhere.keep_manifest(name, json.dumps(manifest).encode())
        merge_manifest(str(layer), name, json.dumps(manifest).encode())
    assert elsewhere.flush(300)
    if kind == "layer":
        unsigned = open_url(f"file://{layer}")
    header.write_text("#define V 2\n")
    with ProgramCacheStack((FileStreamProgramCache(tmp_path / "disk"), unsigned, reader)) as stack:
        now = headers_program(tmp_path).compiled("cubin", cache=stack)
    assert not now.hit
    assert now.data != old.data


SETS = [{"n": n} for n in range(3)]


def manifest_of(*sets):
    return json.dumps({"format": 4, "sets": sets}).encode()


@pytest.mark.parametrize("way", ["compile", "sync"])
def test_a_publisher_signs_no_header_sets_of_others(publisher, reader, anyone, redis_url, pair, way):
    name = entry_digest(KEY)

    def publish(content):
        if way == "sync":
            opened = side(f"{redis_url}&sign_key={pair[0]}", writes=True)
            opened.write(MANIFESTS, [Item(name, content, {})])
            opened.close()
        else:
            publisher.keep_manifest(name, content)
            assert publisher.flush(300)

    anyone.keep_manifest(name, manifest_of(SETS[0]))
    assert anyone.flush(300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ProgCacheWarning)
        publish(manifest_of(SETS[1]))
    publish(manifest_of(SETS[2]))
    reader._inner.forget_misses()
    assert json.loads(reader.find_manifest(name))["sets"] == [SETS[2], SETS[1]]


def test_sync_keeps_the_signatures_of_manifests(publisher, elsewhere, open_url, redis_url, pair):
    name, content = entry_digest(KEY), for_elsewhere(HeaderSet())
    publisher.keep_manifest(name, content)
    published(publisher, KEY)
    signed = f"trust=signed&keys={pair[1]}"
    there = elsewhere.engine.name
    assert sync(f"{redis_url}&{signed}", f"{there}?{PATIENCE}").manifests == 1
    assert open_url(f"{there}?{PATIENCE}&{signed}&mode=ro").find_manifest(name) == content
    assert sync(f"{redis_url}&{signed}", f"{there}?{PATIENCE}").manifests == 0
    more = for_elsewhere(HeaderSet(probes=("<a> in b: missing",)))
    elsewhere.keep_manifest(name, more)
    assert elsewhere.flush(300)
    before = elsewhere.engine.get(f"v1/manifests/{name[:2]}/{name[2:]}", limit=1 << 20, until=time.monotonic() + 300)
    assert sync(f"{redis_url}&{signed}", f"{there}?{PATIENCE}").manifests == 0, "it has all of it"
    after = elsewhere.engine.get(f"v1/manifests/{name[:2]}/{name[2:]}", limit=1 << 20, until=time.monotonic() + 300)
    assert after == before


def test_a_huge_manifest_is_not_read(anyone, redis_url, open_url, attacker):
    tier, name = open_url(redis_url), entry_digest(KEY)
    huge = json.dumps({"format": 4, "sets": [], "more": "x" * (5 << 20)}).encode()
    attacker.set(f"pc1:{{{name}}}:m", pack(name, huge, Version.of(huge, b"{}", 0)))
    with pytest.warns(ProgCacheWarning, match="more than the limit of 4194304"):
        assert tier.find_manifest(name) is None


def test_a_copy_is_signed_only_if_somebody_vouches_for_it(publisher, reader, elsewhere, open_url, pair):
    """A hit in a slower tier is copied to the faster ones, although this machine didn't compile it."""
    signing = open_url(f"{elsewhere.engine.name}?{PATIENCE}&sign_key={pair[0]}")
    signing.publish(OTHER, b"signed", {})
    elsewhere.publish(KEY, b"malware", {})
    assert signing.flush(300)
    assert elsewhere.flush(300)
    stack = ProgramCacheStack((publisher, elsewhere))
    assert stack.load(KEY).data == b"malware", "which is what trust=anyone says"
    assert stack.load(OTHER).data == b"signed"
    assert stack.flush(300)
    assert reader.load(KEY) is None
    assert reader.load(OTHER).data == b"signed"


def test_what_is_too_large_is_not_read(publisher, anyone, attacker):
    attacker.set(place(KEY), forged(KEY, b"\0" * 200_000, {}))
    misses(anyone, KEY, "the value has 200")


def test_what_says_that_it_is_too_large_is_not_read(anyone, attacker):
    attacker.set(place(KEY), struct.pack("<8sII", b"CPCO\x01\0\0\0", 2**32 - 1, 2**32 - 1))
    misses(anyone, KEY, "something else")


def hostile():
    """Yield invalid records whose checksums are correct."""
    yield b"[" * 50_000
    yield b'{"a":' * 15_000
    yield b'{"a": ' + b"9" * 50_000 + b"}"
    yield b'{"a": NaN}'
    yield b"[]"
    yield b"null"
    yield b'{"a": 1} {"b": 2}'
    yield b'{"a": "\xff"}'
    yield b'{"signature": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"


@pytest.mark.parametrize("record_json", list(hostile()), ids=lambda text: text[:12].decode("latin-1"))
def test_hostile_json_is_a_miss(anyone, reader, attacker, record_json):
    digest = entry_digest(KEY)
    attacker.set(place(KEY), pack(digest, b"data", Version.of(b"data", record_json, 0)))
    misses(anyone, KEY, "something else")
    misses(reader, KEY, "something else")


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from((10**400, -(10**400)))
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
FIELDS = ("symbol_mapping", "log", "log_files", "headers", "duration", "name", "components", "resource_usage")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    record=st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, junk)),
    named=st.sampled_from((True, True, True, False)),
)
def test_a_record_of_the_wrong_shape_fails_no_compile(anyone, attacker, compiled_once, heard, record, named):
    """If anyone is trusted, a record can have any shape: either the bytes are used, or the lookup is a miss."""
    digest, data, symbol = compiled_once.digest, compiled_once.data, compiled_once.symbol_mapping["t<int>"]
    if named:
        record = record | {"symbol_mapping": {"t<int>": symbol.decode()}}
    attacker.set(f"pc1:{{{digest}}}:e", pack(digest, data, Version.of(data, encode_record(record), 0)))
    anyone.forget_misses()
    heard.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = typed().compiled("cubin", ("t<int>",), cache=FromTier(anyone))
        assert isinstance(made.log, str)
    assert made.data == data
    assert made.symbol_mapping["t<int>"] == symbol
    assert [event.kind for event in heard if event.kind in {"hit", "compile"}] == ["hit" if named else "compile"]


@pytest.fixture
def heard():
    events = []
    end = subscribe(events.append)
    yield events
    end()


def typed():
    return Program("template <class T> __global__ void t(T *a) { *a = 1; }", "c++", ProgramOptions(arch="sm_80"))


@pytest.fixture(scope="module")
def compiled_once():
    from cuda_progcache import InMemoryProgramCache

    return typed().compiled("cubin", ("t<int>",), cache=InMemoryProgramCache())


class FromTier(ProgramCacheStack):
    """A stack that has only a tier, and writes nothing to it."""

    def __init__(self, tier):
        super().__init__((tier,), write_policy="skip")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(answer=st.binary(max_size=300) | st.binary(max_size=40).map(lambda rest: b"CPCO\x01\0\0\0" + rest))
def test_whatever_a_lying_server_answers_is_a_miss(anyone, attacker, answer):
    attacker.set(place(KEY), answer)
    anyone.forget_misses()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert anyone.load(KEY) is None


def test_a_thief_of_a_read_token_changes_nothing(redis_server, redis_url, open_url, publisher, reader):
    """The server lets a read-only role write nothing, whatever mode the client asks for."""
    published(publisher, KEY)
    token = "a-read-token"
    with redis.Redis.from_url(redis_url.partition("?")[0]) as admin:
        admin.acl_setuser("reads", enabled=True, passwords=[f"+{token}"], keys=["pc1:*"], commands=["+get", "+select"])
    thief = open_url(f"{redis_url}&user=reads&password={token}")
    assert thief.load(KEY).data == b"binary of a key"
    thief.publish(KEY, b"malware", {})
    thief.publish(OTHER, b"malware", {})
    with pytest.warns(ProgCacheWarning, match="permissions") as told:
        assert thief.flush(300)
    assert not any(token in str(warning.message) for warning in told)
    assert (thief.tier().stored, thief.tier().waiting) == (0, 2)
    assert token not in repr(thief) + repr(thief.tier())
    assert reader.load(KEY).data == b"binary of a key"
    assert reader.load(OTHER) is None


def test_a_publisher_whose_key_is_gone_publishes_nothing_unsigned(redis_url, open_url, tmp_path, attacker):
    publisher = open_url(f"{redis_url}&sign_key={tmp_path / 'gone.pem'}")
    publisher.publish(KEY, b"data", {})
    with pytest.warns(ProgCacheWarning, match="can't read the signing key"):
        assert publisher.flush(300)
    assert attacker.keys("pc1:*") == []


def test_a_signature_stays_with_what_is_kept_here(publisher, reader, tmp_path):
    """Signed programs can therefore be exported as a layer and be trusted by other machines."""
    published(publisher, KEY)
    with ProgramCacheStack((FileStreamProgramCache(tmp_path / "disk"), reader)) as stack:
        stack.load(KEY)
    record = FileStreamProgramCache(tmp_path / "disk").load(KEY).record
    assert json.dumps(record["signature"])
    assert encode(entry_digest(KEY), [Version.of(b"", encode_record(record), 0)])
