# SPDX-License-Identifier: Apache-2.0
"""One compile per program in a fleet of hosts: leases kept by a Redis server, in addition to each host's own.

A flight is one compile of a program that several hosts may want. Its lease is a key ``pc1:{flight}:l`` that expires
unless its holder renews it, every third of its life. One script checks whether the flight is over, and otherwise takes
the lease if it is free. Its token contains the server's time, since a counter would restart if it were evicted. Once
the compiled program has reached the tier, the holder writes an end mark (``pc1:{flight}:o``, kept for a few seconds),
removes the lease if it still owns it, and notifies the waiting processes. These listen, and also ask every 100 ms, so
a lost message costs no more than that.

Correctness doesn't depend on leases: the end of a flight is only a reason to look into the cache again. A lost lease
(evicted, expired while its process was suspended, lost with its server) costs a second compile. A server in trouble is
waited for once, for :data:`PATIENCE` or one deadline. After that each host compiles for itself, one process at a time
by its own leases, and a thread checks whether the server is back.
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

#: Seconds after which a lease expires unless it is renewed. Others wait this long for a holder that died.
LIFE = 4.0
#: Seconds between a waiter's requests if it isn't notified.
POLL = 0.1
#: Seconds after the first of several failures in a row during which callers try the server again.
PATIENCE = 1.0
#: Seconds between checks of a server that is out of order, at first and at most. Each rest is longer by this factor, so
#: that it lasts a tenth of the time that the server has been away.
FIRST_REST, LONGEST_REST, LONGER = 0.1, 30.0, 1.1
#: Errors that a server in trouble returns at once: nothing listens there, or it refuses (it may still be loading).
_AT_ONCE = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EIO})
#: Seconds that a flight's end mark is kept, for processes that looked into the cache before the end and ask after it.
REMEMBERED = 10.0
#: The maximum size of a value in an answer, in bytes.
_LARGEST = 1 << 16

#: KEYS: lease, end mark. ARGV: life (ms), who asks, the end mark that the asker knows.
_LOOK_OR_LEASE = """
local over = redis.call('GET', KEYS[2])
if over and over ~= ARGV[3] then return {'over', over} end
local now = redis.call('TIME')
local token = now[1] .. '.' .. now[2] .. '.' .. ARGV[2]
if redis.call('SET', KEYS[1], token, 'NX', 'PX', ARGV[1]) then return {'leased', token} end
return {'held', ''}
"""
#: KEYS: lease, end mark. ARGV: life (ms), token. A lease that the server has lost is taken again.
_RENEW = """
local holder = redis.call('GET', KEYS[1])
if (holder and holder ~= ARGV[2]) or redis.call('GET', KEYS[2]) == ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[1])
return 1
"""
#: KEYS: lease, end mark. ARGV: token, how long the end mark is kept (ms), channel.
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
        Calls its argument once everything that this process has published so far has reached the tier, or was given up.
        Default: at once.
    news : callable, optional
        Called when other hosts may have published programs that were missed here.
    ill, well : callable, optional
        Called when the server gets into trouble, and when it works again.
    life : float, optional
        Seconds after which a lease expires; default: :data:`LIFE`.

    Attributes
    ----------
    down : bool
        Whether the server is out of order, so that nothing waits for it.
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
        """Start without leases, as a forked child must: its parent renews and ends those that it holds."""
        self._lock = threading.Lock()
        self._client: RedisClient | None = None
        self._held: dict[str, str] = {}
        self._heart: threading.Thread | None = None
        self._wake = threading.Event()
        self._failures = 0
        self._failing_since: float | None = None
        self._suspected = self.down = self._refuses = self._is_closed = False
        self._rest = FIRST_REST

    @property
    def answers_at_once(self) -> bool:
        """Whether the server answers without a wait: it works, or refuses connections."""
        return not self.down or self._refuses

    def lead(self, flight: str, compile_: Callable[[], T], look_up: Callable[[], T | None], longest_wait: float) -> T:
        """Compile, unless another host is compiling the same program: then wait for its result.

        Parameters
        ----------
        flight : str
            A name that is equal on all hosts for programs that are probably the same. If they differ, this costs a
            lookup.
        compile_, look_up, longest_wait
            As for :func:`cuda_progcache.compile.single_flight.fly`.

        Returns
        -------
        The result of ``compile_``, or of ``look_up``.
        """
        self._tell()
        failures, suspected = self._failures, self._suspected
        said, word = self._look(flight)
        if said == "leased" and (suspected or failures != self._failures):  # the previous lookup may have failed
            return self._look_again_and(flight, word, compile_, look_up)
        if said == "over":  # it ended after our lookup
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
        if said == "trouble":  # once the server is back, the renewal informs the others
            word = f"{time.time()}.{current_owner()}"
        elif said != "leased":  # the other compile failed, can't be kept, or took too long
            return compile_()
        return self._holding(flight, word, compile_)

    def _look_again_and(self, flight: str, token: str, compile_: Callable[[], T], look_up: Callable[[], T | None]) -> T:
        """Holding the lease, look again for what others have published since, or compile."""

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
        """Run a script; ``None`` if the server is in trouble, or its answer is invalid."""
        while self.answers_at_once:
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
        """Send a command and return the answer (OSError if there is none within the deadline)."""
        client = self._redis()  # imported before the time limit starts
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
        """Whether to try a server in trouble again. If not, no caller does until the thread has found that it works."""
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
        """Start checking the server in the thread, since calls to it as a tier have failed."""
        with self._lock:
            self._suspected, self._is_closed = True, False
            self._wake.set()
        self._start_heart()

    def _clear(self) -> None:
        """Note that the server works again."""
        with self._lock:
            self._rest, self._failing_since = FIRST_REST, None
            self._suspected = self.down = self._refuses = False
            self._wake.set()  # so that held leases are renewed
        self._well()

    def _tell(self) -> None:
        """Warn about trouble once, whoever found it. Callers do this, since a background thread can't warn anybody."""
        why, self._untold = self._untold, ""
        if why:
            warn(
                f"the fleet's leases at {self.name} can't be used ({why}); until they can, "
                "each host compiles for itself",
                ProgCacheWarning,
            )

    def _look(self, flight: str, known: str = "") -> tuple[str, str]:
        """Take the lease if free: ``"leased"`` and a token, ``"held"``, ``"over"`` and its mark, or ``"trouble"``."""
        life = int(self._life * 1000)
        answer = self._run(_LOOK_OR_LEASE, _keys(flight), life, str(current_owner()), known, sound=_is_pair)
        return ("trouble", "") if answer is None else (answer[0].decode(), answer[1].decode())

    def _wait(self, flight: str, deadline: float) -> tuple[str, str]:
        """Wait for the end of another host's flight, or for its lease; ``"held"`` if that takes too long."""
        said, word = "held", ""
        with self._listening(_channel(flight)) as listen:
            while said == "held" and (left := deadline - time.monotonic()) > 0:
                said, word = self._look(flight)
                if said == "held":
                    listen(min(POLL, left))
        return said, word

    @contextmanager
    def _listening(self, channel: str) -> Iterator[Callable[[float], object]]:
        """Subscribe; yields a function that waits for a message, for the given number of seconds at most."""
        with ExitStack() as stack:
            began = time.monotonic()
            try:
                wait = stack.enter_context(self._redis().listening(channel, self._deadline()))
            except TimeoutError as error:
                self._bears(error, began)
                yield time.sleep
            except OSError:
                yield time.sleep  # the polling continues, and finds out about any trouble
            else:
                yield _Listener(wait).listen

    # Held leases

    def _hold(self, flight: str, token: str) -> None:
        with self._lock:
            self._held[flight] = token
            self._is_closed = False
        self._start_heart()

    def _over(self, flight: str, token: str) -> None:
        """End a flight of ours once its program has reached the tier; until then its lease is renewed."""
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
        """Write the end mark of a flight. If that fails, its lease expires instead."""
        self._run(_END, _keys(flight), token, int(REMEMBERED * 1000), _channel(flight), sound=_is_number)

    def _start_heart(self) -> None:
        with self._lock:
            if self._heart is None or not self._heart.is_alive():
                self._heart = threading.Thread(target=self._beat, name="cuda_progcache-fleet", daemon=True)
                try:
                    self._heart.start()
                except RuntimeError:  # no more threads, or the process is ending: the leases expire
                    self._heart = None

    def _beat(self) -> None:
        """Renew held leases, and check a server that is out of order; ends when there is nothing to do for a while."""
        idle = 0
        while idle < 3:
            self._wake.wait(self._life / 3)
            if self._suspected and not self._well_again():
                with self._lock:
                    if self._is_closed and not self._held:
                        self._heart = None
                        return
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
        if mine == 0:  # another host took it while this process was suspended
            with self._lock:
                if self._held.get(flight) == token:
                    del self._held[flight]

    def _well_again(self) -> bool:
        """Check a server that is in trouble, after a rest that gets longer each time."""
        time.sleep(self._rest * chance.uniform(0.8, 1.2))  # so that a fleet's hosts don't ask all at once
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
        """Close the connections, and check a server in trouble no longer; the leases can be used afterwards."""
        with self._lock:
            client, self._client, self._is_closed = self._client, None, True
        if client is not None:
            client.close()


def _keys(flight: str) -> tuple[str, str]:
    """The keys of a lease and of its end mark; in a cluster both are on the same server."""
    return f"pc1:{{{flight}}}:l", f"pc1:{{{flight}}}:o"


def _channel(flight: str) -> str:
    return f"pc1:{{{flight}}}"


class _Listener:
    """Waits for messages; after trouble it only sleeps, and the polling continues without messages."""

    def __init__(self, wait: Callable[[float], object]) -> None:
        self._wait = wait

    def listen(self, seconds: float) -> None:
        """Wait for a message, for ``seconds`` at most."""
        end = time.monotonic() + seconds
        try:
            self._wait(seconds)
        except OSError:
            self._wait = time.sleep
            time.sleep(max(0.0, end - time.monotonic()))


def _is_number(answer: Any) -> bool:
    return isinstance(answer, int)


def _is_pair(answer: Any) -> bool:
    """Whether an answer is a list of two strings."""
    return (
        isinstance(answer, list)
        and len(answer) == 2
        and all(isinstance(one, bytes) and one.isascii() for one in answer)
    )
