# SPDX-License-Identifier: Apache-2.0
"""The key of a memoized call: the function's part, the arguments' digests, and the other inputs."""

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

    ``head`` is name, module, version and code digest, ready to be hashed with the arguments. ``closure`` tells whether
    anything that the code refers to has changed since.
    """

    head: bytes
    code: Digest | None
    closure: Closure


class Key(NamedTuple):
    """A call's key and its inputs.

    ``arguments`` are the values by parameter, without ignored ones; ``digests`` are their digests, as ASCII. ``inputs``
    are the other inputs of the key, as texts by component (``files``, ``environment``, ``classes`` of arguments).
    ``watched`` are these files; ``classes`` are these classes and their closures.
    """

    digest: Digest
    arguments: dict[str, Any]
    digests: dict[str, bytes]
    identity: Identity
    inputs: dict[str, dict[str, str]]
    watched: dict[str, Watched]
    classes: tuple[tuple[type, Closure], ...]

    def described(self) -> Metadata:
        """Return the record's metadata on the key's inputs other than the arguments."""
        found: Metadata = {"inputs": self.inputs} if self.inputs else {}
        if self.identity.closure.packages:
            found["packages"] = self.identity.closure.packages
        return found


_classes: weakref.WeakKeyDictionary[type, Closure] = weakref.WeakKeyDictionary()


def closure_of_class(kind: type) -> Closure:
    """Return the closure of a class: cached, and computed again once anything in it has changed."""
    known = _classes.get(kind)
    if known is None or not known.holds():
        known = _classes[kind] = closure(kind)
    return known
