# SPDX-License-Identifier: Apache-2.0
"""The file format of a call's record.

A file is one JSON object, which begins with a checksum::

    {
        "checksum": "<32 hex>",
        "record": {
            "format": 1,
            "key": "<64 hex>",
            "name": "area",
            "module": "shapes",
            "arguments": {"r": "<digest>"},
            "result": "<digest>",
            "inline": {"<digest>": 2},
            "metadata": {...},
        },
    }

The checksum is the XXH3-128 of the record's bytes. If the storage has a secret, ``"signature"`` (HMAC-SHA256 over key
and record) follows the checksum. ``inline`` holds values that are small enough to need no file, as tagged JSON;
``unstored`` names the arguments of which only the digest is kept.
"""

from __future__ import annotations

from typing import Any

import msgspec
from xxhash import xxh3_128_hexdigest

from cuda_progcache.memo.call import DigestedCall, Unstored
from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.storage import codecs
from cuda_progcache.memo.tagged_json import SaveError

FORMAT = 1
_HEAD = b'{"checksum":"'
_RECORD = b'"record":'
_CODEC = "record"


class DamagedRecordError(ValueError):
    """A record is damaged. The storage catches this and treats the record as a miss."""


class RefusedRecordError(ValueError):
    """A record isn't signed with the storage's secret. The storage catches this and treats the record as a miss."""


class Record(msgspec.Struct, omit_defaults=True):
    """The JSON fields of a record; see :class:`~cuda_progcache.memo.call.DigestedCall`."""

    format: int
    key: str
    name: str
    arguments: dict[str, str]
    module: str | None = None
    version: str | int | None = None
    code_digest: str | None = None
    result: str | None = None
    metadata: dict[str, dict[str, Any]] = {}
    inline: dict[str, msgspec.Raw] = {}
    unstored: list[str] = []
    keyed: bool = False


def _text(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return str(value)


_encoder = msgspec.json.Encoder(enc_hook=_text)
_decoder = msgspec.json.Decoder(Record)


def encode(call: DigestedCall, key: Digest) -> bytes:
    """Return a call's record as JSON; SaveError if the call contains values that JSON can't represent."""
    record = Record(
        FORMAT, key, call.name, dict(call.arguments), call.module, call.version, call.code_digest, call.result,
        call.metadata or {},
        {digest: msgspec.Raw(text) for digest, text in call.inline.items()},
        [name for name, digest in call.arguments.items() if isinstance(digest, Unstored)],
        call.key is not None,
    )  # fmt: skip
    try:
        return _encoder.encode(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise SaveError(f"the call of {call.name} can't be recorded: {error}") from error


def decode(text: bytes) -> DigestedCall:
    """Return the call in the JSON of a record; DamagedRecordError if the text isn't a record."""
    try:
        record = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedRecordError(str(error)) from error
    arguments = {name: Digest(digest) for name, digest in record.arguments.items()}
    for name in record.unstored:
        arguments[name] = Unstored(record.arguments.get(name, ""))
    return DigestedCall(
        record.name, arguments, None if record.result is None else Digest(record.result), record.metadata,
        record.module, record.version, None if record.code_digest is None else Digest(record.code_digest),
        Digest(record.key) if record.keyed else None,
        {Digest(digest): bytes(raw) for digest, raw in record.inline.items()} if record.inline else {},
    )  # fmt: skip


def seal(record: bytes, key: str, secret: bytes | None) -> bytes:
    """Return the content of a record's file."""
    checksum = xxh3_128_hexdigest(record).encode()
    signature = b"" if secret is None else b'"signature":"%b",' % codecs.sign(secret, key, _CODEC, record).encode()
    return b"".join((_HEAD, checksum, b'",', signature, _RECORD, record, b"}\n"))


def unseal(data: bytes, key: str, secret: bytes | None) -> bytes:
    """Return the record in a file's content; DamagedRecordError, or RefusedRecordError if ``secret`` didn't sign it."""
    place = data.find(_RECORD, len(_HEAD), 200)
    record = data[place + len(_RECORD) : -2]
    if place < 0 or not data.startswith(_HEAD) or data[-2:] != b"}\n":
        raise DamagedRecordError("not a record")
    if xxh3_128_hexdigest(record).encode() != data[len(_HEAD) : len(_HEAD) + 32]:
        raise DamagedRecordError("the record's checksum doesn't match")
    if not record.startswith(b'{"format":%d,"key":"%b"' % (FORMAT, key.encode())):
        raise DamagedRecordError("the record belongs to another call or has an unknown format")
    if secret is not None:
        signed = data[len(_HEAD) + 34 : place]
        signature = signed.removeprefix(b'"signature":"').removesuffix(b'",').decode("ascii", "replace")
        if not codecs.is_signed(secret, key, _CODEC, record, signature):
            raise RefusedRecordError("the record isn't signed with this storage's secret")
    return record
