# SPDX-License-Identifier: Apache-2.0
"""The sidecar file: an entry's record, and how to check that the two belong together.

A sidecar is one JSON object, laid out in lines so that a plain ``get`` parses a few numbers and not a compile log::

    {"format":1,"digest":"<64 hex>","versions":[
    {"length":1234,"checksum":"<32 hex>","created":1763668800.25,"record_length":5,"record_checksum":"...","record":
    {...the caller's record...}},
    ...the versions before...
    ]}

``digest`` is that of the key, so that a misplaced sidecar is noticed; ``length`` and ``checksum`` (XXH3-128) are the
entry's, ``record_length`` and ``record_checksum`` those of the record's line.

Why versions: an entry and its sidecar are two files, and only one file at a time can be replaced. The sidecar is
replaced first, and names the binaries that may be there: the new one, and those it replaces. So a reader finds a
matching pair at any time, even after a crash at any time. Usually there is one version; a second one appears only when
a key is written again with different bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from xxhash import xxh3_128_hexdigest

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.json_text import loads
from cuda_progcache._util.own_stack import on_own_stack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
#: The approximate size of the sidecar's own fields, in bytes.
FRAME_SIZE = 280
#: The published version, and two that it may replace: enough for three writers racing for one key.
MAX_VERSIONS = 3


class DamagedRecordError(ValueError):
    """A file isn't a valid sidecar of its entry. Internal to the store: such a lookup is a miss."""


def checksum(data: bytes) -> str:
    """XXH3-128 of ``data``, 32 hex digits."""
    return xxh3_128_hexdigest(data)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A caller's record as one line of JSON.

    Raises
    ------
    TypeError, ValueError
        It isn't a JSON object, or contains NaN or infinities.
    """
    if not isinstance(record, Mapping):
        raise TypeError(f"a record must be a JSON object (a mapping), got {type(record).__name__}")
    try:
        import json

        # ASCII: a log may have lone surrogates (from file names that aren't UTF-8), which UTF-8 can't encode.
        write = functools.partial(json.dumps, allow_nan=False, separators=(",", ":"))
        return on_own_stack(write, dict(record)).encode("ascii")
    except (TypeError, ValueError) as exc:
        raise type(exc)(f"a record must be a JSON object: {exc}") from exc


class Version(NamedTuple):
    """One binary that a sidecar vouches for.

    Attributes
    ----------
    length : int
        Bytes of the entry.
    checksum : str
        XXH3-128 of the entry.
    created : float
        When it was published, seconds since the epoch.
    record_checksum : str
        XXH3-128 of ``record_json``.
    record_json : bytes
        The caller's record, JSON.
    """

    length: int
    checksum: str
    created: float
    record_checksum: str
    record_json: bytes

    @classmethod
    def of(cls, data: bytes, record_json: bytes, created: float) -> Version:
        """The version of these bytes."""
        return cls(len(data), checksum(data), created, checksum(record_json), record_json)

    def check(self) -> None:
        """Check that the caller's record is as it was written (DamagedRecordError if not)."""
        if checksum(self.record_json) != self.record_checksum:
            raise DamagedRecordError("the record doesn't have its checksum")
        if self.record_json not in _OBJECTS:
            parse(self.record_json)

    def record(self) -> dict[str, Any]:
        """The caller's record (DamagedRecordError if it isn't as it was written)."""
        if checksum(self.record_json) != self.record_checksum:
            raise DamagedRecordError("the record doesn't have its checksum")
        return parse(self.record_json)


#: Records known to be JSON objects without parsing: that of a plain ``cache[key] = value``.
_OBJECTS = frozenset({b"{}"})


def parse(record_json: bytes) -> dict[str, Any]:
    """Parse a record (DamagedRecordError if it isn't a JSON object)."""
    try:
        record = on_own_stack(loads, record_json)
    except ValueError as exc:
        raise DamagedRecordError(f"the record is no JSON: {exc}") from exc
    if not isinstance(record, dict):
        raise DamagedRecordError("the record is no JSON object")
    return record


def encode(digest: str, versions: Sequence[Version]) -> bytes:
    """A sidecar file: ``versions`` of the entry ``digest``, newest first."""
    lines = b"},\n".join([b"%b\n%b" % (_head(version), version.record_json) for version in versions])
    return b"%b\n%b}\n]}\n" % (_first_line(digest), lines)


def _first_line(digest: str) -> bytes:
    return b'{"format":%d,"digest":"%b","versions":[' % (FORMAT, digest.encode("ascii"))


def _head(version: Version) -> bytes:
    return (
        f'{{"length":{version.length},"checksum":"{version.checksum}","created":{version.created!r},'
        f'"record_length":{len(version.record_json)},"record_checksum":"{version.record_checksum}","record":'
    ).encode("ascii")


def decode(raw: bytes, digest: str) -> list[Version]:
    """The versions in a sidecar file, newest first.

    Raises
    ------
    DamagedRecordError
        The file is truncated, altered, of another format or of another entry.
    """
    lines = raw.split(b"\n")
    if lines[0] != _first_line(digest):
        raise DamagedRecordError("not a record of this entry in a format that is known")
    if lines[-2:] != [b"]}", b""] or len(lines) % 2 == 0:
        raise DamagedRecordError("cut short")
    versions = []
    try:
        for head_line, body in zip(lines[1:-2:2], lines[2:-2:2], strict=True):
            versions.append(_decode_head(head_line, body))
    except (ValueError, OverflowError) as exc:
        raise DamagedRecordError(f"damaged: {exc}") from exc
    if not versions:
        raise DamagedRecordError("names no entry")
    return versions


def _decode_head(line: bytes, body: bytes) -> Version:
    """Parse a version from its two lines (ValueError if the first isn't as it was written).

    This is done without :mod:`json`, whose import takes longer than the rest of a lookup in a new process. The line has
    six fields in a fixed order.
    """
    length, digest, created, record_length, record_digest, _ = [
        field.partition(":")[2] for field in line.decode("ascii").split(",")
    ]
    published = int(created) if created.isdigit() else float(created)
    version = Version(int(length), digest[1:-1], published, record_digest[1:-1], body[: int(record_length)])
    if _head(version) != line:  # if equal, the names and types are right, and it can be rewritten unchanged
        raise DamagedRecordError("not as it was written")
    return version


def replacing(new: Version, present: Sequence[Version]) -> list[Version]:
    """The versions of a sidecar that publishes ``new`` in place of the ``present`` ones."""
    return [new, *(old for old in present if old.checksum != new.checksum)][:MAX_VERSIONS]
