# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of a faulty tier: ``python -m ci.tier_faults [--tier NAME] [--trouble PART] [--markdown FILE]``.

For each tier and each trouble of :mod:`ci.servers.troubles`, a program store with a memory level and the tier looks up
missing programs once, a thousand more times, and in eight threads at once; then it publishes a program. A tier may cost
at most its deadline once and nothing after that, and must never cause an error or return a wrong byte.

Then each call of each client gets a response of a terabyte, in a separate process, which must survive it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from ci.servers import Unavailable, found
from ci.servers.faulty import FaultyServer
from ci.servers.troubles import troubles
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.in_memory import InMemoryProgramCache
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.stack import ProgramCacheStack
from cuda_progcache.store.tiers.envelope import pack
from cuda_progcache.store.tiers.on_demand import EngineOnDemand
from cuda_progcache.store.tiers.remote import RemoteProgramCache
from cuda_progcache.store.tiers.settings import TierSettings, parse_tier

T = TypeVar("T")

TIERS = {"redis": "redis", "http": "http", "s3": "http"}
RESOLVER = "a dead resolver"
PROGRAM = bytes(range(256)) * 80
#: The time limits, in seconds, for connecting, a lookup and a write.
TIMES = (0.5, 2.0, 10.0)
#: The URL of a tier for each HTTP client, and the variables that make an S3 tier use obstore.
CLIENTS: dict[str, tuple[str, dict[str, str]]] = {
    "http": ("http://127.0.0.1:{port}/prefix?", {}),
    "s3": ("s3://someone:something@bucket/prefix?endpoint=http://127.0.0.1:{port}&", {}),
    "s3, obstore": (
        "s3://someone:something@bucket/prefix?endpoint=http://127.0.0.1:{port}&",
        {"AWS_SKIP_SIGNATURE": "false"},
    ),
    "gs": ("gs://bucket/prefix?endpoint=http://127.0.0.1:{port}&token=some-token&", {}),
    "az": ("az://account:a2V5@bucket/prefix?endpoint=http://127.0.0.1:{port}&", {}),
}
TERABYTES = ("a terabyte, it says", "an error of a terabyte")
_CALL = """
import sys, time
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.on_demand import EngineOnDemand
from cuda_progcache.store.tiers.settings import parse_tier

engine, until = EngineOnDemand(parse_tier(sys.argv[1])), time.monotonic() + 300
calls = {
    "get": lambda: engine.get("v1/x", limit=1000, until=until),
    "put": lambda: engine.put("v1/x", b"data", until=until),
    "delete": lambda: engine.delete(["v1/x"], until=until),
    "list": lambda: list(engine.list("v1/", until=until)),
}
for call in sys.argv[2:]:
    try:
        calls[call]()
    except StoreError as exc:
        print(f"{call}: {exc.strerror}")
    except TimeoutError as exc:
        print(f"{call}: {exc.strerror}")
    else:
        print(f"{call}: done")
engine.close()
"""
CALLS = ("get", "put", "delete", "list")


class Outcome(NamedTuple):
    """The outcome of lookups in a faulty tier.

    Attributes
    ----------
    tier, trouble : str
    first : float
        Seconds for the first lookup.
    more : float
        Seconds for a thousand more lookups.
    threads : float
        Seconds for one lookup in each of eight threads, with a new store.
    kept : float
        Seconds that publishing a program took the caller.
    wrong : int
        The number of lookups that returned bytes for a missing program.
    raised : tuple of str
        The errors that reached the caller.
    requests : int
        The number of requests from the first store, or of connections if there were more of them.
    said : tuple of str
        The warnings.
    state : str
        The final state of the tier's circuit breaker.
    """

    tier: str
    trouble: str
    first: float
    more: float
    threads: float
    kept: float
    wrong: int
    raised: tuple[str, ...]
    requests: int
    said: tuple[str, ...]
    state: str


def try_trouble(
    tier: str,
    trouble: str,
    folder: Path,
    times: tuple[float, float, float] = TIMES,
    look_ups: int = 1000,
    threads: int = 8,
) -> Outcome:
    """Run lookups in a tier with one kind of trouble.

    Parameters
    ----------
    tier : str
        One of :data:`TIERS`.
    trouble : str
        One of the tier's troubles.
    folder : Path
        A folder for the server's certificate.
    times : tuple of float
        Time limits for connecting, lookups and writes, in seconds.
    look_ups : int
        The number of lookups after the first.
    threads : int
        The number of threads that use a new store at once.
    """
    other = pack(entry_digest(b"another program"), PROGRAM, Version.of(PROGRAM, encode_record({}), time.time()))
    with _server(tier, trouble, other, folder) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = parse_tier(_url(tier, server, times))
        raised: list[str] = []
        found_: list[object] = []

        def ask(store: ProgramCacheStack, number: int) -> None:
            try:
                data = store.get(b"program %d" % number)
            except Exception as exc:  # noqa: BLE001 - every error that reaches the caller is recorded
                raised.append(f"{type(exc).__name__}: {exc}")
            else:
                if data is not None:
                    found_.append(data)

        store, remote = _opened(settings)
        first = _seconds(lambda: ask(store, 0))
        more = _seconds(lambda: _each(range(1, look_ups + 1), lambda number: ask(store, number)))
        requests = 0 if server is None else max(server.requests, server.connections)
        new, _ = _opened(settings)
        asking = [threading.Thread(target=ask, args=(new, number)) for number in range(threads)]
        together = _seconds(lambda: _run(asking))

        def keep() -> None:
            try:
                store.publish(b"a new program", PROGRAM, {})
            except Exception as exc:  # noqa: BLE001 - as above
                raised.append(f"{type(exc).__name__}: {exc}")

        kept = _seconds(keep)
        state = remote.breaker.state
    said = tuple(dict.fromkeys(str(warning.message) for warning in caught))
    return Outcome(tier, trouble, first, more, together, kept, len(found_), tuple(raised), requests, said, state)


def try_terabyte(client: str, trouble: str, calls: Sequence[str] = CALLS) -> tuple[int, str]:
    """Make calls in a new process to a server that responds with a terabyte; return its exit status and output.

    Parameters
    ----------
    client : str
        One of :data:`CLIENTS`.
    trouble : str
        One of :data:`TERABYTES`.
    calls : sequence of str
        Some of :data:`CALLS`.
    """
    url, variables = CLIENTS[client]
    url += "connect_timeout=300&timeout=300"
    with FaultyServer("http", trouble, PROGRAM) as server:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _CALL, url.format(port=server.port), *calls],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    return done.returncode, done.stdout or done.stderr


def _opened(settings: TierSettings) -> tuple[ProgramCacheStack, RemoteProgramCache]:
    remote = RemoteProgramCache(EngineOnDemand(settings), settings)
    return ProgramCacheStack([InMemoryProgramCache(), remote]), remote


def _each(items: Iterable[T], action: Callable[[T], object]) -> None:
    for item in items:
        action(item)


def _run(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@contextmanager
def _server(tier: str, trouble: str, body: bytes, folder: Path) -> Iterator[FaultyServer | None]:
    if trouble == RESOLVER:
        yield None
        return
    with FaultyServer(TIERS[tier], trouble, body, folder) as server:
        yield server


def _url(tier: str, server: FaultyServer | None, times: tuple[float, float, float]) -> str:
    where = "cache.dead.example" if server is None else f"127.0.0.1:{server.port}"
    secure = "s" if server is not None and server.tls else ""
    options = "connect_timeout={}&timeout={}&write_timeout={}&max_bytes=4MB".format(*times)
    if tier == "s3":
        return f"s3://someone:something@bucket/prefix?endpoint=http{secure}://{where}&{options}"
    return f"redis{secure}://{where}/0?{options}" if tier == "redis" else f"http{secure}://{where}/prefix?{options}"


def with_dead_resolver(folder: Path) -> dict[str, str]:
    """Return the environment for a process whose resolver doesn't answer for names under ``dead.example``.

    Raises
    ------
    Unavailable
        There is no C compiler to build the resolver with.
    """
    compiler = found("cc", "gcc", package="gcc")
    library = folder / "dead_resolver.so"
    source = Path(__file__).parent / "servers" / "dead_resolver.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a tier cost more than it may."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="progcache-faults-") as scratch:
        folder = Path(scratch)
        if "dead_resolver.so" not in os.environ.get("LD_PRELOAD", ""):
            try:
                environment = with_dead_resolver(folder)
            except Unavailable as exc:
                print(f"without {RESOLVER}: {exc}", file=sys.stderr)
            else:
                again = [sys.executable, "-m", "ci.tier_faults", *(sys.argv[1:] if arguments is None else arguments)]
                return subprocess.run(again, env=environment, check=False).returncode
        outcomes = []
        for tier in [tier for tier in TIERS if not options.tier or tier in options.tier]:
            kinds = troubles(TIERS[tier]) + ((RESOLVER,) if "LD_PRELOAD" in os.environ else ())
            for trouble in kinds:
                if options.trouble is None or options.trouble in trouble:
                    outcomes.append(try_trouble(tier, trouble, folder))
                    _print(outcomes[-1])
    if options.markdown:
        Path(options.markdown).write_text(as_markdown(outcomes), encoding="utf-8")
    if options.json:
        told = [outcome._asdict() for outcome in outcomes]
        Path(options.json).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    worse: list[object] = [outcome for outcome in outcomes if not is_kept(outcome)]
    print(f"{len(outcomes) - len(worse)} of {len(outcomes)} within the promise")
    tried = [
        case
        for case in itertools.product(CLIENTS, TERABYTES, CALLS)
        if not options.tier or case[0].partition(",")[0] in options.tier
        if options.trouble is None or options.trouble in case[1]
    ]
    ended = []
    for client, trouble, call in tried:
        status, said = try_terabyte(client, trouble, [call])
        print(f"{client:12}{trouble:24}{f'ended with status {status}' if status else said.strip()[:110]}", flush=True)
        ended += [(client, trouble, call, status)] if status else []
    print(f"{len(tried) - len(ended)} of {len(tried)} processes survived a response of a terabyte")
    worse += ended
    for outcome in worse:
        print(f"not: {outcome}")
    return 1 if worse else 0


def is_kept(outcome: Outcome, times: tuple[float, float, float] = TIMES) -> bool:
    """Return whether a tier cost no more than it may: one deadline in total, no error and no wrong byte.

    A tier whose circuit breaker is closed has answered, if uselessly; then only the first lookup's time is limited, as
    each answer takes time.
    """
    _, most, _ = times
    asked = outcome.first if outcome.state == "closed" else outcome.first + outcome.more
    cheap = asked <= most + 0.6 and outcome.threads <= most + 0.5 and outcome.kept <= 0.1
    return cheap and not outcome.wrong and not outcome.raised


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as a Markdown table: a row for each trouble, a column for each tier."""
    tiers = list(dict.fromkeys(outcome.tier for outcome in outcomes))
    cells = {(outcome.tier, outcome.trouble): _cell(outcome) for outcome in outcomes}
    kinds = dict.fromkeys(outcome.trouble for outcome in outcomes)
    rows = (f"| {kind} | {' | '.join(cells.get((tier, kind), '') for tier in tiers)} |" for kind in kinds)
    return "\n".join([f"| trouble | {' | '.join(tiers)} |", "|---|" + "---:|" * len(tiers), *rows, ""])


def _cell(outcome: Outcome) -> str:
    asked = "each answered" if outcome.state == "closed" else f"{outcome.more * 1000:,.0f}"
    return f"{outcome.first * 1000:,.0f}, {asked}; {outcome.threads * 1000:,.0f}"


def _print(outcome: Outcome) -> None:
    took = "".join(f"{1000 * seconds:9.1f}" for seconds in outcome[2:6])
    got = "a miss" if not outcome.wrong + len(outcome.raised) else f"{outcome.wrong} wrong, {outcome.raised[:1]}"
    said = outcome.said[0].partition(" ")[2][:110] if outcome.said else "nothing"
    print(
        f"{outcome.tier:6}{outcome.trouble:36}{took} ms {outcome.requests:5} {outcome.state:7} {got}; {said}",
        flush=True,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ci.tier_faults", description="Measure the cost of a faulty tier.")
    parser.add_argument("--tier", action="append", choices=[*TIERS, "gs", "az"], help="repeatable; default: all")
    parser.add_argument("--trouble", metavar="PART", help="only troubles whose name contains PART")
    parser.add_argument("--markdown", metavar="FILE", help="write the outcomes to FILE as a Markdown table")
    parser.add_argument("--json", metavar="FILE", help="write the outcomes to FILE as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
