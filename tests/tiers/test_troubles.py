# SPDX-License-Identifier: Apache-2.0
"""A tier in trouble costs its deadline once, then nothing; it never causes an error or a wrong byte.

``python -m ci.tier_faults`` prints what each kind of trouble costs; the tests measure no times. A lookup that would
wait for a server forever ends, and fails, when the server ends.
"""

from __future__ import annotations

import json
import math
import textwrap
import threading
import time

import pytest

from ci import tier_faults
from ci.servers import Unavailable
from ci.servers.faulty import FaultyServer
from ci.servers.troubles import STALLS, troubles
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers import deadline, open_tier
from cuda_progcache.store.tiers.settings import parse_tier

LOOK_UPS = 20
#: Kinds of trouble in which every lookup gets an answer, though a useless one.
ANSWERED = {
    "404 with HTML",
    "404, and closed without a word",
    "nothing, and closed without a word",
    "a terabyte, it says",
    "a length below zero",
}
CASES = [(tier, trouble) for tier, protocol in tier_faults.TIERS.items() for trouble in troubles(protocol)]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A folder for a certificate, shared because a certificate takes a while to make."""
    return tmp_path_factory.mktemp("certificates")


@pytest.mark.parametrize(("tier", "trouble"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_costs_its_deadline_once_and_never_an_error(tier, trouble, certificates):
    stalls = trouble in STALLS
    # A server that answers gets all the time that a busy machine may need.
    times = (0.2, 0.3, 0.3) if stalls else (300.0, 300.0, 300.0)
    outcome = tier_faults.try_trouble(tier, trouble, certificates, times, LOOK_UPS, 3)
    assert outcome.raised == ()
    assert outcome.wrong == 0
    if trouble in ANSWERED:
        assert outcome.state == "closed"
        assert bool(outcome.said) == (trouble == "a terabyte, it says")  # reported once; none of it is read
        assert len(outcome.said) <= 2  # from two stores
        assert outcome.requests == LOOK_UPS + 1
        return
    assert outcome.said, "trouble that nobody is told of"
    assert outcome.state == "open"
    assert outcome.requests <= (1 if stalls else 3)


def test_what_sends_rubbish_is_not_taken_for_well_again():
    with FaultyServer("http", "HTML in place of the object") as server:
        tier = open_tier(parse_tier(f"http://127.0.0.1:{server.port}/prefix?connect_timeout=300&timeout=300"))
        with pytest.raises(StoreError, match="something other than what was asked for"):
            tier._probe()


def test_while_all_threads_are_stuck_a_call_fails_at_once(monkeypatch, until):
    monkeypatch.setattr(deadline, "MOST", 2)
    monkeypatch.setattr(deadline, "_threads", deadline._Threads())
    gate = threading.Event()
    for _ in range(2):
        with pytest.raises(TimeoutError, match="took too long"):
            deadline.within(time.monotonic() + 0.01, gate.wait)
    with pytest.raises(TimeoutError, match="all 2 tier threads"):
        deadline.within(math.inf, lambda: 1)  # no lock can wait that long
    assert not deadline.aside(lambda: 1)
    gate.set()
    until(lambda: deadline._threads.stuck == 0)
    assert deadline.within(time.monotonic() + 300, lambda: 1) == 1


def test_a_dead_resolver_holds_nobody(python, tmp_path):
    try:
        environment = tier_faults.with_dead_resolver(tmp_path)
    except Unavailable as exc:
        pytest.skip(str(exc))
    script = """
        import json, sys
        from ci import tier_faults
        from pathlib import Path

        told = {}
        for tier in tier_faults.TIERS:
            outcome = tier_faults.try_trouble(tier, tier_faults.RESOLVER, Path("."), (0.2, 0.3, 0.3), 20, 3)
            told[tier] = outcome._asdict()
        print(json.dumps(told))
    """
    told = json.loads(python(textwrap.dedent(script), **environment))
    assert told.keys() == tier_faults.TIERS.keys()
    for outcome in told.values():
        assert (outcome["raised"], outcome["wrong"], outcome["state"]) == ([], 0, "open")
