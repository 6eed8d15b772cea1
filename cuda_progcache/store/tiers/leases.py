# SPDX-License-Identifier: Apache-2.0
"""One compile per program in a fleet of hosts: leases that a Redis server keeps, above each host's own.

A lease is a key ``pc1:{flight}:l`` that expires unless its holder renews it, every third of its life. One script looks
whether the flight is over, and else takes the lease if it is free; its token has the server's time in it, since a
counter would begin anew where it is evicted. At the end the holder, once what it compiled has reached the tier, leaves
word (``pc1:{flight}:o``, for a few seconds), removes the lease if it is still its own, and tells those who wait. They
listen, and ask again every 100 ms, so that a lost message costs that.

Nothing depends on a lease for being right: all that equal flights share is a reason to look into the cache again. One
that is lost (evicted, expired under a process that stood still, gone with its server) costs a second compile. A server
in trouble is given :data:`PATIENCE` once, or one deadline; after that each host compiles for itself, one process for
all by its own leases, and a thread looks after the server until it is back.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util import forks
from cuda_progcache._util.chance import chance
from cuda_progcache._util.liveness import current_owner
from cuda_progcache._util.warning import warn
from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store.tiers.engine import reason

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.redis_client import RedisClient
    from cuda_progcache.store.tiers.settings import TierSettings

T = TypeVar("T")

#: Seconds that a lease lives without being renewed; so long others wait for a holder that died.
LIFE = 4.0
#: Seconds between a waiter's questions, where it is told nothing.
POLL = 0.1
#: Seconds after the first of several failures in a row for which the server is tried again by those who need it.
PATIENCE = 1.0
#: Seconds between looks at a server that is out of order: at first, and at most; each rest is so much longer than the
#: last that one lasts a tenth of the time that the server has been away.
FIRST_REST, LONGEST_REST, LONGER = 0.1, 30.0, 1.1
#: What a server says at once in its trouble: nobody listens there, or it refuses (it reads its files yet, say).
_AT_ONCE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EIO})
#: Seconds that the word of a flight's end is kept: for those who looked into the cache before, and ask now.
REMEMBERED = 10.0
#: Bytes that a value of an answer may have.
_LARGEST = 1 << 16

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
    settings : TierSettings
        The Redis that keeps them.
    landed : callable, optional
        Calls what it is handed once all that this process has published so far has reached the tier, or can't; by
        default at once.
    news : callable, optional
        Called when others may have published what was missed here.
    ill, well : callable, optional
        Called when the server is found to be in trouble, and when it works again after some.
    life : float, optional
        Seconds that a lease lives; default: :data:`LIFE`.

    Attributes
    ----------
    down : bool
        Whether the server is out of order, and isn't waited for.
    """

    def __init__(
        self,
        settings: TierSettings,
        *,
        landed: Callable[[Callable[[], None]], object] | None = None,
        news: Callable[[], object] = lambda: None,
        ill: Callable[[], object] = lambda: None,
        well: Callable[[], object] = lambda: None,
        life: float | None = None,
    ) -> None:
        self.name = settings.url
        self._settings = settings
        self._landed = landed
        self._news = news
        self._ill = ill
        self._well = well
        self._life = LIFE if life is None else life
        self._untold = ""
        self._told = False
        self.reset()
        forks.in_child(self.reset)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.name}>"

    def reset(self) -> None:
        """Begin anew, as a forked child does: the leases that its parent holds are the parent's to renew and to end."""
        self._lock = threading.Lock()
        self._client: RedisClient | None = None
        self._held: dict[str, str] = {}
        self._heart: threading.Thread | None = None
        self._wake = threading.Event()
        self._failures = 0
        self._failing_since: float | None = None
        self._suspected = self.down = self._refuses = False
        self._rest = FIRST_REST

    @property
    def costs_nothing(self) -> bool:
        """Whether asking the server costs no wait: it works, or refuses at once."""
        return not self.down or self._refuses

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
        self._tell()
        failures, suspected = self._failures, self._suspected
        said, word = self._look(flight)
        if said == "leased" and (suspected or failures != self._failures):  # the look before this may have failed
            return self._look_again_and(flight, word, compile_, look_up)
        if said == "over":  # after we had looked
            self._news()
            if (found := look_up()) is not None:
                return found
            said, word = self._look(flight, word)
        if said == "held" and longest_wait > 0:
            said, word = self._wait(flight, time.monotonic() + longest_wait)
            if said == "leased":
                return self._look_again_and(flight, word, compile_, look_up)
            self._news()
            if (found := look_up()) is not None:
                return found
        if said == "trouble":  # once the server is back, a renewal tells the others
            word = f"{time.time()}.{current_owner()}"
        elif said != "leased":  # its compile failed or can't be kept, or went on for too long
            return compile_()
        return self._holding(flight, word, compile_)

    def _look_again_and(self, flight: str, token: str, compile_: Callable[[], T], look_up: Callable[[], T | None]) -> T:
        """With a lease of ours: what others have published since we looked, or what is compiled now."""

        def look() -> T:
            self._news()
            return compile_() if (found := look_up()) is None else found

        return self._holding(flight, token, look)

    def _holding(self, flight: str, token: str, work: Callable[[], T]) -> T:
        self._hold(flight, token)
        try:
            return work()
        finally:
            self._over(flight, token)

    # The server

    def _run(self, script: str, keys: tuple[str, ...], *args: str | int, sound: Callable[[Any], bool]) -> Any:
        """The answer of a script; ``None`` if the server is in trouble, or its answer isn't sound."""
        while self.costs_nothing:
            began = time.monotonic()
            try:
                answer = self._ask("EVAL", script, len(keys), *keys, *args)
                if not sound(answer):
                    raise StoreError(errno.EPROTO, "the server sent something other than what was asked for", self.name)
            except OSError as error:
                if not self._bears(error, began):
                    return None
                time.sleep(0.05)
            else:
                if self._suspected:
                    self._clear()
                return answer
        return None

    def _ask(self, *command: str | int) -> Any:
        """The answer to a command, by the deadline (OSError: there is none)."""
        client = self._redis()  # imported before the clock runs
        client.prepare()
        return client.ask(self._deadline(), _LARGEST, command, most_items=2)[0]

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout

    def _redis(self) -> RedisClient:
        with self._lock:
            if self._client is None:
                from cuda_progcache.store.tiers.redis_client import RedisClient

                self._client = RedisClient(self._settings)
            return self._client

    def _bears(self, error: OSError, began: float) -> bool:
        """Whether to ask a server in trouble again; else nobody does until the thread has found it well."""
        with self._lock:
            now = time.monotonic()
            self._failures += 1
            self._refuses = error.errno in _AT_ONCE
            if self.down:
                return False
            if self._failing_since is None:
                self._failing_since = began
            if now - self._failing_since < PATIENCE and not isinstance(error, TimeoutError):
                self._suspected = True
                return True
            self.down = True
            if not self._told:
                self._told, self._untold = True, reason(error)
        self._ill()
        self.suspect()
        return False

    def suspect(self) -> None:
        """Start checking the server in the thread: calls to it as a tier have failed."""
        with self._lock:
            self._suspected = True
            self._wake.set()
        self._start_heart()

    def _clear(self) -> None:
        """The server works again."""
        with self._lock:
            self._rest, self._failing_since = FIRST_REST, None
            self._suspected = self.down = self._refuses = False
            self._wake.set()  # so that what is held is renewed
        self._well()

    def _tell(self) -> None:
        """Warn of trouble, once, whoever found it: by a caller, since a thread has nobody to warn."""
        why, self._untold = self._untold, ""
        if why:
            warn(
                f"the fleet's leases at {self.name} can't be used ({why}); until they can, "
                "each host compiles for itself",
                ProgCacheWarning,
            )

    def _look(self, flight: str, known: str = "") -> tuple[str, str]:
        """Take the lease if it is free: ``"leased"`` and its token, ``"held"``, ``"over"`` and the word, or trouble."""
        life = int(self._life * 1000)
        answer = self._run(_LOOK_OR_LEASE, _keys(flight), life, str(current_owner()), known, sound=_is_pair)
        return ("trouble", "") if answer is None else (answer[0].decode(), answer[1].decode())

    def _wait(self, flight: str, deadline: float) -> tuple[str, str]:
        """Wait for the end of another's flight, or for its lease; ``"held"`` where that takes too long."""
        said, word = "held", ""
        with self._listening(_channel(flight)) as listen:
            while said == "held" and (left := deadline - time.monotonic()) > 0:
                said, word = self._look(flight)
                if said == "held":
                    listen(min(POLL, left))
        return said, word

    @contextmanager
    def _listening(self, channel: str) -> Iterator[Callable[[float], object]]:
        """Subscribe; what is yielded waits for a message, or for so many seconds."""
        with ExitStack() as stack:
            began = time.monotonic()
            try:
                wait = stack.enter_context(self._redis().listening(channel, self._deadline()))
            except TimeoutError as error:
                self._bears(error, began)
                yield time.sleep
            except OSError:
                yield time.sleep  # the poll goes on, and finds what trouble there is
            else:
                yield _Listener(wait).listen

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
        self._run(_END, _keys(flight), token, int(REMEMBERED * 1000), _channel(flight), sound=_is_number)

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
            if self._suspected and not self._well_again():
                continue
            with self._lock:
                if not self._suspected:
                    self._wake.clear()
                held = list(self._held.items())
                idle = 0 if held else idle + 1
                if idle >= 3:
                    self._heart = None
            for flight, token in held:
                self._renew(flight, token)

    def _renew(self, flight: str, token: str) -> None:
        mine = self._run(_RENEW, _keys(flight), int(self._life * 1000), token, sound=_is_number)
        if mine == 0:  # another host took it, since this process had stood still
            with self._lock:
                if self._held.get(flight) == token:
                    del self._held[flight]

    def _well_again(self) -> bool:
        """Ask a server that is in trouble, after a rest that gets longer each time."""
        time.sleep(self._rest * chance.uniform(0.8, 1.2))  # so that a fleet doesn't come all at once
        try:
            is_well = self._ask("PING") == b"PONG"
        except OSError:
            is_well = False
        if not is_well:
            self._rest = min(LONGER * self._rest, LONGEST_REST)
            return False
        self._clear()
        return True

    def close(self) -> None:
        """Close the connections; the leases can be used afterwards."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()


def _keys(flight: str) -> tuple[str, str]:
    """The names of a lease and of the word of its end; in a cluster both lie on one server."""
    return f"pc1:{{{flight}}}:l", f"pc1:{{{flight}}}:o"


def _channel(flight: str) -> str:
    return f"pc1:{{{flight}}}"


class _Listener:
    """Waits for messages; after trouble, for their time alone: the poll goes on without them."""

    def __init__(self, wait: Callable[[float], object]) -> None:
        self._wait = wait

    def listen(self, seconds: float) -> None:
        """Wait for a message, or for so many seconds."""
        end = time.monotonic() + seconds
        try:
            self._wait(seconds)
        except OSError:
            self._wait = time.sleep
            time.sleep(max(0.0, end - time.monotonic()))


def _is_number(answer: Any) -> bool:
    return isinstance(answer, int)


def _is_pair(answer: Any) -> bool:
    """Whether it is two words."""
    return (
        isinstance(answer, list)
        and len(answer) == 2
        and all(isinstance(one, bytes) and one.isascii() for one in answer)
    )
