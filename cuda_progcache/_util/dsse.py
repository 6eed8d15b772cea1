# SPDX-License-Identifier: Apache-2.0
"""Signed statements: DSSE envelopes (Dead Simple Signing Envelope, protocol 1.0) over in-toto Statements v1.

Envelopes are created with ``securesystemslib``, but opened with ``cryptography`` alone, since a hit has to wait for the
import. Both come with the extra ``sign``. Any kind of key can sign; a reader's keys must be Ed25519.
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
#: The most signatures in an envelope, and the most characters in its statement.
_MOST_SIGNATURES, _LONGEST = 16, 1 << 20


class UnsignedError(ValueError):
    """The envelope isn't signed by any of the keys. The message says why; callers that open envelopes catch this."""


def signer_from_pem(path: str) -> CryptoSigner:
    """Make a signer from an unencrypted private key in a PEM file.

    Raises
    ------
    ProgCacheError
        The extra ``sign`` isn't installed, or the file isn't such a key.
    OSError
        The file can't be read.
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
        raise ProgCacheError(f"{path} isn't a supported private key (unencrypted, PEM): {error}") from error


def sign(statement: Mapping[str, Any], *signers: Signer) -> dict[str, Any]:
    """Sign a statement and return the envelope.

    Parameters
    ----------
    statement : mapping
        An in-toto statement, as JSON values.
    *signers : securesystemslib.signer.Signer
        One or more signers.
    """
    from securesystemslib.dsse import Envelope

    payload = json.dumps(statement, separators=(",", ":"), sort_keys=True).encode()
    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    for signer in signers:
        envelope.sign(signer)
    return envelope.to_dict()


def public_key(given: str) -> Ed25519PublicKey:
    """Return an Ed25519 public key, given as 64 hex digits or as the path of a PEM file.

    Raises
    ------
    ProgCacheError
        The extra ``sign`` isn't installed, or the file isn't such a key.
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
        raise ProgCacheError(f"{given} isn't a public key in PEM format: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProgCacheError(f"{given} isn't an Ed25519 key; other keys can't verify programs")
    return key


def opened(envelope: object, keys: Iterable[Ed25519PublicKey]) -> Any:
    """Return the statement in an envelope that at least one of the keys has signed.

    The key ids in an envelope aren't signed, so they are ignored and every key is tried.

    Raises
    ------
    UnsignedError
        The envelope is malformed, or none of the keys has signed it.
    """
    from cryptography.exceptions import InvalidSignature

    try:
        payload, signatures = _parts(envelope)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsignedError(f"its signature isn't a DSSE envelope with an in-toto statement ({error})") from error
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
                raise UnsignedError("the signed statement isn't JSON") from error
    raise UnsignedError("none of the listed keys has signed it")


def _parts(envelope: Any) -> tuple[bytes, list[bytes]]:
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise ValueError("unknown payload type")
    payload, signatures = envelope["payload"], envelope["signatures"]
    if len(payload) > _LONGEST or len(signatures) > _MOST_SIGNATURES:
        raise ValueError("too large")
    return base64.b64decode(payload, validate=True), [
        base64.b64decode(each["sig"], validate=True) for each in signatures
    ]


def pre_authentication_encoding(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Return the bytes to sign: DSSE's PAE of the type and the payload, each with its length."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
