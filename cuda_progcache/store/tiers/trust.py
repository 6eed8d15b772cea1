# SPDX-License-Identifier: Apache-2.0
"""Whom a tier trusts, and in whose name it is written: one verdict for look-ups, writes, copies and packs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cuda_progcache.store.records import Version, encode_record

#: Says why an entry isn't to be trusted; ``None``: it is. Takes digest, bytes and record.
Verifier = Callable[[str, bytes, Mapping[str, Any]], str | None]
#: The record to store in the place of the one given. Takes digest, bytes and record.
Signer = Callable[[str, bytes, Mapping[str, Any]], Mapping[str, Any]]


class Trust(NamedTuple):
    """What is asked about an object before it is used or sent.

    Attributes
    ----------
    verifier : callable or None
        A :data:`Verifier` of what is used; None: it is anyone's.
    signer : callable or None
        A :data:`Signer` of what is sent; None: it is sent as it is.
    voucher : callable or None
        A :data:`Verifier` of what others made and the signer may sign; None: nothing of others.
    """

    verifier: Verifier | None = None
    signer: Signer | None = None
    voucher: Verifier | None = None

    def doubt(self, name: str, data: bytes, record: Mapping[str, Any]) -> str | None:
        """Why an object isn't to be used; ``None``: it is."""
        return None if self.verifier is None else self.verifier(name, data, record)

    def doubt_in_own_name(self, name: str, data: bytes, record: Mapping[str, Any]) -> str | None:
        """Why what others made isn't to be sent on in the signer's name; ``None``: it is, or nothing is signed."""
        if self.signer is None:
            return None
        return "nobody vouches for what others publish" if self.voucher is None else self.voucher(name, data, record)

    def version(self, digest: str, data: bytes, record: Mapping[str, Any], created: float) -> Version:
        """What vouches for an entry there: its record, signed where the tier's publishers sign.

        Raises
        ------
        StoreError
            It can't be signed.
        """
        signed = record if self.signer is None else self.signer(digest, data, record)
        return Version.of(data, encode_record(signed), created)
