# SPDX-License-Identifier: Apache-2.0
"""Signatures of a tier's objects: signed statements in the records of programs and header manifests.

A statement is an in-toto Statement whose subject has the object's name (for a program, the digest of its key) and the
SHA-256 of its bytes; its predicate has the SHA-256 of the record without the signature. So a signed object can't be
altered, renamed, or given another record. The statement is stored as a DSSE envelope in the record's field
``signature``, and is copied with the program.

A key covers the program's inputs and the version of the key schema. So an object of another schema has another name,
which is never requested.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util import dsse
from cuda_progcache._util.digest import sha256
from cuda_progcache._util.json_text import loads
from cuda_progcache.errors import ProgCacheError, StoreError
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.tiers.envelope import MANIFESTS

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # the module has no __all__

#: The record's field that contains the envelope.
SIGNATURE = "signature"
PREDICATE_TYPE = "pkg:pypi/cuda-progcache#object/v1"


#: Takes an object's digest, bytes and record; returns why it isn't trusted, or ``None`` if it is.
Doubt = Callable[[str, bytes, Mapping[str, Any]], str | None]
#: Takes an object's digest, bytes and record; returns the record to write.
Sign = Callable[[str, bytes, Mapping[str, Any]], Mapping[str, Any]]


def statement(name: str, data: bytes, record: Mapping[str, Any]) -> dict[str, Any]:
    """The statement to sign for an object.

    Parameters
    ----------
    name : str
        The object's name.
    data : bytes
    record : mapping
        As parsed from its JSON; a signature in it is left out.
    """
    rest = {field: value for field, value in record.items() if field != SIGNATURE}
    written = json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    return {
        "_type": dsse.STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256(data).hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"record": {"sha256": sha256(written).hexdigest()}},
    }


class Signer:
    """Signs what is published to a tier.

    Parameters
    ----------
    path : str
        The path of the private key: Ed25519, PEM, unencrypted. It is read when the first object is signed.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._signer: CryptoSigner | None = None

    def __call__(self, name: str, data: bytes, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with this signer's signature, which replaces any other.

        Raises
        ------
        StoreError
            The key can't be used. The object must not be published unsigned instead.
        """
        if self._signer is None:
            self._signer = self._opened()
        plain: dict[str, Any] = loads(encode_record(record))
        return {**plain, SIGNATURE: dsse.sign(statement(name, data, plain), self._signer)}

    @property
    def public(self) -> str:
        """The public key, as 64 hex digits (StoreError if the key can't be used)."""
        if self._signer is None:
            self._signer = self._opened()
        return str(self._signer.public_key.keyval["public"])

    def _opened(self) -> CryptoSigner:
        try:
            signer = dsse.signer_from_pem(self._path)
        except OSError as error:
            raise StoreError(error.errno, f"can't read the signing key: {error.strerror}", self._path) from error
        except ProgCacheError as error:
            raise StoreError(f"can't sign programs: {error}") from error
        if signer.public_key.keytype != "ed25519":
            raise StoreError(
                f"programs are signed with Ed25519, but {self._path} is a key of type {signer.public_key.keytype}"
            )
        return signer


class Verifier:
    """Verifies the signatures of a tier's objects.

    Parameters
    ----------
    keys : sequence of str
        Public keys, each 64 hex digits or the path of a PEM file. They are read when the first object is verified. If
        one of them can't be read, nothing is trusted.
    own : Signer, optional
        A signer whose key is trusted as well.
    """

    def __init__(self, keys: Sequence[str], own: Signer | None = None) -> None:
        self._given = tuple(keys)
        self._own = own
        self._keys: tuple[Ed25519PublicKey, ...] = ()

    def __call__(self, name: str, data: bytes, record: Mapping[str, Any]) -> str | None:
        """Why an object isn't trusted; ``None`` if the owner of one of the keys has signed it under this name."""
        envelope = record.get(SIGNATURE)
        if envelope is None:
            return "it isn't signed"
        try:
            if not self._keys:
                given = self._given if self._own is None else (*self._given, self._own.public)
                self._keys = tuple(map(dsse.public_key, given))
            signed = dsse.opened(envelope, self._keys)
        except dsse.UnsignedError as error:
            return str(error)
        except (ProgCacheError, OSError) as error:
            return f"the keys to trust can't be used: {error}"
        found = statement(name, data, record)
        if signed == found:
            return None
        return _difference(signed, found)


def _difference(signed: Any, found: Mapping[str, Any]) -> str:
    """Which part of an object differs from what was signed."""
    if not isinstance(signed, dict) or signed.get("predicateType") != PREDICATE_TYPE:
        return "its signature is for a different kind of statement"
    try:
        (subject,) = signed["subject"]
        if subject["name"] != found["subject"][0]["name"]:
            return "it was signed as another program"
        if subject != found["subject"][0]:
            return "its bytes aren't those that were signed"
    except (KeyError, TypeError, ValueError):
        return "its signature is for a different kind of statement"
    return "its record isn't the one that was signed"


class Trust(NamedTuple):
    """Whose objects are trusted on a tier, and in whose name they are written.

    Attributes
    ----------
    verifier : callable or None
        A :data:`Doubt` that verifies objects before they are used. None: anyone's objects are used.
    signer : callable or None
        A :data:`Sign` that signs objects before they are written. None: they are written unsigned.
    voucher : callable or None
        A :data:`Doubt` that decides which objects of others the signer may sign. None: none of them.
    pinned : bool
        Whether the tier's URL contains the digest of all its contents.
    """

    verifier: Doubt | None = None
    signer: Sign | None = None
    voucher: Doubt | None = None
    pinned: bool = False

    def verifier_of(self, tree: str) -> Doubt | None:
        """The verifier of the objects in a tree; None if they are used unverified.

        Header manifests in an image aren't signed. If the URL contains the image's digest, that covers them.
        """
        return None if tree == MANIFESTS and self.pinned else self.verifier

    def why_not_sign(self, name: str, data: bytes, record: Mapping[str, Any]) -> str | None:
        """Why an object of others can't be written here; ``None`` if it can, or if nothing is signed."""
        if self.signer is None:
            return None
        return "nobody vouches for what others publish" if self.voucher is None else self.voucher(name, data, record)

    def version(self, digest: str, data: bytes, record: Mapping[str, Any], created: float) -> Version:
        """The version that vouches for an entry on the tier, with its record, signed if the tier's publishers sign.

        Raises
        ------
        StoreError
            It can't be signed.
        """
        signed = record if self.signer is None else self.signer(digest, data, record)
        return Version.of(data, encode_record(signed), created)
