# SPDX-License-Identifier: Apache-2.0
"""Signed statements: DSSE envelopes (Dead Simple Signing Envelope, protocol 1.0) over in-toto Statements v1.

Envelopes are made with ``securesystemslib``, and opened with ``cryptography`` alone, which a hit has to wait for: both
come with the extra ``sign``. Any kind of key signs; those that a reader lists are Ed25519.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache.errors import ProgCacheError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import CryptoSigner, Signer  # type: ignore[attr-defined]  # it has no __all__

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
#: What an envelope may have at most: signatures, and characters of its statement.
_MOST_SIGNATURES, _LONGEST = 16, 1 << 20


class UnsignedError(ValueError):
    """Not an envelope that one of the keys has signed. Whoever opens one catches it: it says what is wrong."""


def signer_from_pem(path: str) -> CryptoSigner:
    """Make a signer from an unencrypted private key in a PEM file.

    Raises
    ------
    ProgCacheError
        The extra ``sign`` isn't installed, or the file is no such key.
    OSError
        It can't be read.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # it has no __all__
    except ImportError as error:
        raise ProgCacheError(f"signing needs `pip install 'cuda-progcache[sign]'` ({error})") from error
    with open(path, "rb") as file:
        content = file.read()
    try:
        return CryptoSigner(load_pem_private_key(content, password=None))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ProgCacheError(f"{path} is no private key that can be used here (PEM, unencrypted): {error}") from error


def sign(statement: Mapping[str, Any], *signers: Signer) -> dict[str, Any]:
    """Put a statement into an envelope.

    Parameters
    ----------
    statement : mapping
        An in-toto statement; JSON.
    *signers : securesystemslib.signer.Signer
        One or more.
    """
    from securesystemslib.dsse import Envelope

    payload = json.dumps(statement, separators=(",", ":"), sort_keys=True).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    return envelope.to_dict()


def public_key(given: str) -> Ed25519PublicKey:
    """An Ed25519 public key: 64 hex digits, or the path of a PEM file.

    Raises
    ------
    ProgCacheError
        The extra ``sign`` isn't installed, or it is no such key.
    OSError
        The file can't be read.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError as error:
        raise ProgCacheError(f"signatures need `pip install 'cuda-progcache[sign]'` ({error})") from error
    if len(given) == 64 and not given.strip("0123456789abcdefABCDEF"):
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(given))
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    with open(given, "rb") as file:
        content = file.read()
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ProgCacheError(f"{given} is no public key (PEM): {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProgCacheError(f"{given} is no Ed25519 key, and others aren't taken for programs")
    return key


def opened(envelope: object, keys: Iterable[Ed25519PublicKey]) -> Any:
    """The statement in an envelope that at least one of the keys has signed.

    The key ids in it are hints that nobody has signed: each key is tried.

    Raises
    ------
    UnsignedError
        There is none.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        payload, signatures = _parts(envelope)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsignedError(f"its signature is no DSSE envelope of a statement ({error})") from error
    signed = pre_authentication_encoding(payload)
    for key in keys:
        for signature in signatures:
            try:
                key.verify(signature, signed)
            except InvalidSignature:
                continue
            try:
                return json.loads(payload)
            except (ValueError, RecursionError) as error:
                raise UnsignedError("what was signed is no JSON") from error
    raise UnsignedError("none of the listed keys has signed it")


def _parts(envelope: Any) -> tuple[bytes, list[bytes]]:
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError("of another type")
    payload, signatures = envelope["payload"], envelope["signatures"]
    if len(payload) > _LONGEST or len(signatures) > _MOST_SIGNATURES:
        raise ValueError("too large")
    return base64.b64decode(payload, validate=True), [
        base64.b64decode(each["sig"], validate=True) for each in signatures
    ]


def pre_authentication_encoding(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """What is signed: DSSE's PAE over type and payload, each with its length."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
