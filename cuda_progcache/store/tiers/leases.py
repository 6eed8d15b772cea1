# SPDX-License-Identifier: Apache-2.0
"""One compile per program in a fleet of hosts: leases that a Redis server keeps, above each host's own.

A lease is a key ``pc1:{flight}:l`` that expires unless its holder renews it, every third of its life. One script looks
whether the flight is over, and else takes the lease if it is free; its token has the server's time in it, since a
counter would begin anew where it is evicted. At the end the holder, once what it compiled has reached the tier, leaves
word (``pc1:{flight}:o``, for a few seconds), removes the lease if it is still its own, and tells those who wait. They
listen, and ask again every 100 ms, so that a lost message costs that.

Nothing depends on a lease for being right: all that equal flights share is a reason to look into the cache again. One
that is lost (evicted, expired under a process that stood still, gone with its server) costs a second compile. A server
in trouble is given :data:`PATIENCE` once; after that each host compiles for itself, one process for all by its own
leases, and a thread looks after the server until it is back.
"""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util.liveness import current_owner
from cuda_progcache._util.warning import warn
from cuda_progcache.errors import ProgCacheWarning

if TYPE_CHECKING:
    import redis

T = TypeVar("T")

#: Seconds that a lease lives without being renewed; so long others wait for a holder that died.
LIFE = 6.0
#: Seconds between a waiter's questions, where it is told nothing.
POLL = 0.1
#: Seconds after the first of several failures in a row for which the server is tried again by those who need it.
PATIENCE = 1.0
#: Seconds between looks at a server that is out of order: at first, and at most.
FIRST_REST, LONGEST_REST = 0.25, 30.0
#: Seconds that the word of a flight's end is kept: for those who looked into the cache before, and ask now.
REMEMBERED = 10.0

#: KEYS: lease, word. ARGV: life (ms), who asks, the word that the asker knows.
_LOOK_OR_LEASE = """
local over = redis.call('GET', KEYS[2])
if over and over ~= ARGV[3] then return {'over', over} end
local now = redis.call('TIME')
local token = now[1] .. '.' .. now[2] .. '.' .. ARGV[2]
if redis.call('SET', KEYS[1], token, 'NX', 'PX', ARGV[1]) then return {'leased', token} end
return {'held', ''}
"""
#: KEYS: lease, word. ARGV: life (ms), token. A lease that the server has lost is taken anew.
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if (holder and holder ~= ARGV[2]) or redis.call('GET', KEYS[2]) == ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
return 1
"""
#: KEYS: lease, word. ARGV: token, how long the word is kept (ms), channel.
_END = """
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return redis.call('PUBLISH', ARGV[3], ARGV[1])
"""


class FleetLeases:
    """The leases of all hosts that compile into one tier.

    Parameters
    ----------
    connect : callable
        Makes the client, at the first flight.
    name : str
        The server, as people are told of it.
    prefix : str
        Of the keys.
    landed : callable, optional
        Calls what it is handed once all that this process has published so far has reached the tier, or can't; by
        default at once.
    life : float
        Seconds, :data:`LIFE`.
    """

    def __init__(
        self,
        connect: Callable[[], redis.Redis],
        name: str,
        *,
        prefix: str = "pc1:",
        landed: Callable[[Callable[[], None]], object] | None = None,
        life: float = LIFE,
    ) -> None:
        self._connect = connect
        self.name = name
        self._prefix = prefix
        self._landed = landed
        self._life = life
        self._warned = False
        self.reset()
        _fleets.add(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.name}>"

    def reset(self) -> None:
        """Begin anew, as a forked child does: the leases that its parent holds are the parent's to renew and to end."""
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._held: dict[str, str] = {}
        self._heart: threading.Thread | None = None
        self._wake = threading.Event()
        self._failing_since: float | None = None
        self._down = False
        self._rest = FIRST_REST

    @property
    def down(self) -> bool:
        """Whether the server is out of order, so that nobody asks it but the thread that looks after it."""
        return self._down

    def lead(self, flight: str, compile_: Callable[[], T], look_up: Callable[[], T | None], longest_wait: float) -> T:
        """Compile, unless another host is at it: then wait for it and take what it made.

        Parameters
        ----------
        flight : str
            The same on every host for what is likely the same program; what differs after all costs a look.
        compile_, look_up, longest_wait
            As :func:`cuda_progcache.compile.single_flight.fly` has them.

        Returns
        -------
        What ``compile_`` returned, or what ``look_up`` found.
        """
        said, word = self._look(flight)
        if said == "over":  # after we had looked
            if (found := look_up()) is not None:
                return found
            said, word = self._look(flight, word)
        if said == "held" and longest_wait > 0:
            said, word = self._wait(flight, time.monotonic() + longest_wait)
            try:
                found = look_up()
            except BaseException:
                if said == "leased":
                    self._end(flight, word)
                raise
            if found is not None:
                if said == "leased":
                    self._end(flight, word)
                return found
        if said != "leased":
            # Its compile failed or can't be kept, or went on for too long, or the server is in trouble.
            return compile_()
        self._hold(flight, word)
        try:
            return compile_()
        finally:
            self._over(flight, word)

    # The server

    def _keys(self, flight: str) -> tuple[str, str]:
        """The names of a lease and of the word of its end; in a cluster both lie on one server."""
        return f"{self._prefix}{{{flight}}}:l", f"{self._prefix}{{{flight}}}:o"

    def _redis(self) -> redis.Redis:
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _run(self, script: str, keys: tuple[str, ...], *args: object) -> Any:
        """What a script answers; ``None`` where the server is in trouble."""
        from redis.exceptions import RedisError

        while not self._down:
            began = time.monotonic()
            try:
                answer = self._redis().register_script(script)(keys=keys, args=args)
            except (RedisError, OSError) as error:
                if not self._bears(error, began):
                    return None
                time.sleep(0.05)
            else:
                self._failing_since = None
                return answer
        return None

    def _bears(self, error: Exception, began: float) -> bool:
        """Whether to ask a server in trouble again; else nobody does until the thread has found it well."""
        with self._lock:
            if self._failing_since is None:
                self._failing_since = began
            if time.monotonic() - self._failing_since < PATIENCE:
                return True
            first, self._down = not self._down, True
            tell, self._warned = not self._warned, True
            self._wake.set()
        if first:
            self._start_heart()
        if tell:
            warn(
                f"the leases of the fleet at {self.name} are out of order ({type(error).__name__}: {error}); until they "
                f"are back each host compiles for itself",
                ProgCacheWarning,
            )
        return False

    def _look(self, flight: str, known: str = "") -> tuple[str, str]:
        """Take the lease if it is free: ``"leased"`` and its token, ``"held"``, ``"over"`` and the word, or trouble."""
        answer = self._run(_LOOK_OR_LEASE, self._keys(flight), int(self._life * 1000), str(current_owner()), known)
        return ("trouble", "") if answer is None else (_text(answer[0]), _text(answer[1]))

    def _wait(self, flight: str, deadline: float) -> tuple[str, str]:
        """Wait for the end of another's flight, or for its lease; ``"held"`` where that takes too long."""
        said, word = "held", ""
        with self._listening(self._channel(flight)) as listen:
            while said == "held" and (left := deadline - time.monotonic()) > 0:
                said, word = self._look(flight)
                if said == "held":
                    listen(min(POLL, left))
        return said, word

    @contextmanager
    def _listening(self, channel: str) -> Iterator[Callable[[float], object]]:
        """Subscribe; what is yielded waits for a message, or for so many seconds."""
        from redis.exceptions import RedisError

        subscription = None
        try:
            subscription = self._redis().pubsub(ignore_subscribe_messages=True)
            subscription.subscribe(channel)
        except (RedisError, OSError):
            yield time.sleep  # the poll goes on, and finds the trouble
            return

        def listen(seconds: float) -> None:
            end = time.monotonic() + seconds
            try:
                # An acknowledged subscription is no message.
                while (left := end - time.monotonic()) > 0 and subscription.get_message(timeout=left) is None:
                    pass
            except (RedisError, OSError):
                time.sleep(max(0.0, end - time.monotonic()))

        try:
            yield listen
        finally:
            subscription.close()

    def _channel(self, flight: str) -> str:
        return f"{self._prefix}{{{flight}}}"

    # What is held

    def _hold(self, flight: str, token: str) -> None:
        with self._lock:
            self._held[flight] = token
        self._start_heart()

    def _over(self, flight: str, token: str) -> None:
        """End a flight of ours when what it made has reached the tier; until then its lease is renewed."""
        process = os.getpid()

        def end() -> None:
            if os.getpid() == process:
                with self._lock:
                    self._held.pop(flight, None)
                self._end(flight, token)

        if self._landed is None:
            end()
        else:
            self._landed(end)

    def _end(self, flight: str, token: str) -> None:
        """Give word that a flight is over. In trouble its lease runs out instead."""
        self._run(_END, self._keys(flight), token, int(REMEMBERED * 1000), self._channel(flight))

    def _start_heart(self) -> None:
        with self._lock:
            if self._heart is None or not self._heart.is_alive():
                self._heart = threading.Thread(target=self._beat, name="cuda_progcache-fleet", daemon=True)
                try:
                    self._heart.start()
                except RuntimeError:  # no more threads, or the end of the process: the leases run out
                    self._heart = None

    def _beat(self) -> None:
        """Renew what is held, and look after a server that is out of order; ends when there is neither for a while."""
        idle = 0
        while idle < 3:
            self._wake.wait(self._life / 3)
            if self._down and not self._well_again():
                continue
            with self._lock:
                held = list(self._held.items())
                idle = 0 if held else idle + 1
                if idle >= 3:
                    self._heart = None
            for flight, token in held:
                self._renew(flight, token)

    def _renew(self, flight: str, token: str) -> None:
        mine = self._run(_RENEW, self._keys(flight), int(self._life * 1000), token)
        if mine == 0:  # another host took it, since this process had stood still
            with self._lock:
                if self._held.get(flight) == token:
                    del self._held[flight]

    def _well_again(self) -> bool:
        """Ask a server that is out of order, after a rest that gets longer each time."""
        from redis.exceptions import RedisError

        time.sleep(self._rest * random.uniform(0.8, 1.2))  # noqa: S311 - so that a fleet doesn't come all at once
        try:
            self._redis().ping()
        except (RedisError, OSError):
            self._rest = min(2 * self._rest, LONGEST_REST)
            return False
        with self._lock:
            self._rest, self._failing_since, self._down = FIRST_REST, None, False
            self._wake.clear()
        return True

    def close(self) -> None:
        """Close the connections; the leases can be used afterwards."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


_fleets: weakref.WeakSet[FleetLeases] = weakref.WeakSet()


def _start_anew() -> None:
    for fleet in list(_fleets):
        fleet.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
