# SPDX-License-Identifier: Apache-2.0
"""Signatures: an object is trusted only if a listed key signed it with this name and this record."""

from __future__ import annotations

import base64
import copy
import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_progcache._util import dsse
from cuda_progcache.errors import StoreError
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.tiers.signing import SIGNATURE, Signer, Verifier, statement

NAME, OTHER = "ab" * 32, "cd" * 32
DATA = b"\x7fELF a program"
RECORD = {
    "name": "k.cu",
    "log": "a\udc80b",
    "duration": 0.25,
    "symbol_mapping": {"f<1>": "_Z1f"},
    "headers": [{"n": 1}],
}


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class Pair:
    """A key pair in files."""

    def __init__(self, folder, name, key=None):
        key = key or Ed25519PrivateKey.generate()
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        self.private.write_bytes(pem(key))
        public = key.public_key()
        self.public.write_bytes(
            public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
        self.hex = ""
        if isinstance(key, Ed25519PrivateKey):
            self.hex = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
        self.signer = Signer(str(self.private))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("keys"), "theirs")


def stored(record):
    """Return a record as a store returns it."""
    return Version.of(b"", encode_record(record), 0).record()


@pytest.fixture(scope="module")
def signed(ours):
    return stored(ours.signer(NAME, DATA, RECORD))


def test_what_was_signed_is_trusted_by_either_form_of_the_key(ours, theirs, signed):
    for keys in ([ours.hex], [str(ours.public)], [theirs.hex, ours.hex.upper()]):
        assert Verifier(keys)(NAME, DATA, signed) is None
    assert "none of the listed keys" in Verifier([theirs.hex])(NAME, DATA, signed)
    assert Verifier([ours.hex])(NAME, DATA, RECORD) == "it isn't signed"
    assert Verifier([ours.hex])(NAME, DATA, dict(reversed(signed.items()))) is None, "the order says nothing"
    assert Verifier([])(NAME, DATA, signed) is not None


def test_it_is_signed_anew_by_the_next_publisher(ours, theirs, signed):
    again = stored(theirs.signer(NAME, DATA, signed))
    assert Verifier([theirs.hex])(NAME, DATA, again) is None
    assert Verifier([ours.hex])(NAME, DATA, again) is not None
    assert {**again, SIGNATURE: None} == {**signed, SIGNATURE: None}


def changes():
    """Yield single changes of an object: of its name, its data or its record."""
    yield "another program", OTHER, DATA, RECORD
    yield "bytes", NAME, DATA + b"\0", RECORD
    yield "bytes", NAME, b"", RECORD
    for field in RECORD:
        yield "record", NAME, DATA, {name: value for name, value in RECORD.items() if name != field}
        yield "record", NAME, DATA, {**RECORD, field: "another"}
    yield "record", NAME, DATA, {**RECORD, "more": 1}
    yield "record", NAME, DATA, {**RECORD, "duration": 0.5}


@pytest.mark.parametrize(("what", "name", "data", "record"), list(changes()))
def test_any_change_is_seen_and_told(ours, signed, what, name, data, record):
    assert what in Verifier([ours.hex])(name, data, {**record, SIGNATURE: signed[SIGNATURE]})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(record=st.dictionaries(st.text(), json_values, max_size=4), data=st.binary(max_size=40))
def test_a_record_that_went_through_a_store_is_the_one_that_was_signed(ours, record, data):
    assert Verifier([ours.hex])(NAME, data, stored(ours.signer(NAME, data, record))) is None


@settings(deadline=None)
@given(junk=json_values)
def test_whatever_lies_where_the_signature_should_is_not_trusted(ours, junk):
    assert Verifier([ours.hex])(NAME, DATA, {**RECORD, SIGNATURE: junk}) is not None


@settings(deadline=None)
@given(where=st.lists(st.integers(0, 3), max_size=3), junk=json_values)
def test_nor_is_junk_within_it(ours, signed, where, junk):
    record = copy.deepcopy(signed)
    place = record
    steps = [SIGNATURE, *(["payload", "payloadType", "signatures", "keyid"][n] for n in where)]
    for step in steps[:-1]:
        place = place[step] if isinstance(place, dict) and isinstance(place.get(step), dict) else place
    before = place.get(steps[-1])
    place[steps[-1]] = junk
    if before != junk and steps[-1] != "keyid":
        assert Verifier([ours.hex])(NAME, DATA, record) is not None


@pytest.mark.parametrize(
    "payload",
    [b"[" * 100_000, b"no JSON", b"[]", b"{}", b'{"predicateType": "pkg:pypi/cuda-progcache#object/v1"}', b"\xff"],
)
def test_what_a_listed_key_signed_for_another_purpose_is_not_trusted(ours, payload):
    """The owner of a key may sign other things with it, such as provenance."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, dsse.PAYLOAD_TYPE, {})
    envelope.sign(dsse.signer_from_pem(str(ours.private)))
    assert Verifier([ours.hex])(NAME, DATA, {**RECORD, SIGNATURE: envelope.to_dict()}) is not None
    of_another_kind = {**statement(NAME, DATA, RECORD), "predicateType": "https://slsa.dev/provenance/v1"}
    made = dsse.sign(of_another_kind, dsse.signer_from_pem(str(ours.private)))
    assert "a different kind" in Verifier([ours.hex])(NAME, DATA, {**RECORD, SIGNATURE: made})


def test_what_is_too_large_is_not_looked_into(ours, signed):
    envelope = signed[SIGNATURE]
    for huge in ({**envelope, "payload": "A" * (2 << 20)}, {**envelope, "signatures": envelope["signatures"] * 100}):
        assert "too large" in Verifier([ours.hex])(NAME, DATA, {**RECORD, SIGNATURE: huge})


def test_the_envelope_is_one_that_others_read(ours, signed):
    from securesystemslib.dsse import Envelope

    envelope = copy.deepcopy(signed[SIGNATURE])
    read = Envelope.from_dict(envelope)  # from_dict modifies its argument
    public = dsse.signer_from_pem(str(ours.private)).public_key
    assert read.verify([public], 1)
    assert json.loads(read.payload) == statement(NAME, DATA, stored(RECORD))
    assert read.pae() == dsse.pre_authentication_encoding(base64.b64decode(signed[SIGNATURE]["payload"]))
    # The example in the DSSE protocol's documentation.
    made = dsse.pre_authentication_encoding(b"hello world", "http://example.com/HelloWorld")
    assert made == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_keys_that_cannot_be_used(tmp_path, ours, signed):
    curve = Pair(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    junk = tmp_path / "junk.pem"
    junk.write_text("no key")
    for key, why in (
        (str(curve.public), "isn't an Ed25519 key"), (str(junk), "isn't a public key"), (str(tmp_path / "x"), "x"),
    ):  # fmt: skip
        said = Verifier([ours.hex, key])(NAME, DATA, signed)
        assert "can't be used" in said, "one bad key in a list is a mistake to be told, not to be guessed around"
        assert why in said
    for key, why in (
        (curve.private, "signed with Ed25519"),
        (junk, "isn't a supported private key"),
        (tmp_path / "x", "read the signing key"),
    ):
        with pytest.raises(StoreError, match=why):
            Signer(str(key))(NAME, DATA, RECORD)
