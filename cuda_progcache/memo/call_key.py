# SPDX-License-Identifier: Apache-2.0
"""The key of a memoized call: the function's part, the arguments' digests, and what else went into it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.memo.code import Closure, closure

if TYPE_CHECKING:
    from cuda_progcache.memo.call import Metadata
    from cuda_progcache.memo.digest import Digest
    from cuda_progcache.memo.files import Watched


class Identity(NamedTuple):
    """The function's part of its calls' keys.

    ``head`` is name, module, version and code digest, ready to be hashed with the arguments; ``closure`` tells whether
    what the code refers to has changed since.
    """

    head: bytes
    code: Digest | None
    closure: Closure


class Key(NamedTuple):
    """A call's key and what went into it.

    ``arguments`` are values by parameter, without those to ignore, ``digests`` theirs, as ASCII. ``inputs`` is what
    else is in the key, as texts by component (``files``, ``environment``, ``classes`` of arguments); ``watched`` are
    those files, ``classes`` those classes with what each depends on.
    """

    digest: Digest
    arguments: dict[str, Any]
    digests: dict[str, bytes]
    identity: Identity
    inputs: dict[str, dict[str, str]]
    watched: dict[str, Watched]
    classes: tuple[tuple[type, Closure], ...]

    def described(self) -> Metadata:
        """What a record says of it beside the arguments."""
        found: Metadata = {"inputs": self.inputs} if self.inputs else {}
        if self.identity.closure.packages:
            found["packages"] = self.identity.closure.packages
        return found


_classes: weakref.WeakKeyDictionary[type, Closure] = weakref.WeakKeyDictionary()


def closure_of_class(kind: type) -> Closure:
    """What a class depends on; taken anew when that has changed."""
    known = _classes.get(kind)
    if known is None or not known.holds():
        known = _classes[kind] = closure(kind)
    return known
