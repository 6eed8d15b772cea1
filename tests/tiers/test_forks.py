# SPDX-License-Identifier: Apache-2.0
"""Tiers in forked children: both child and parent work afterwards.

Each test runs a separate process and kills its children if they take too long: the client must hang neither in a
child nor in its parent.
"""

from __future__ import annotations

import json
import textwrap

import pytest

from tests.tiers.conftest import SERVERS, place_on

#: Helpers of the scripts that fork; ``value(n)`` is the program under ``key(n)``.
CHILDREN = """
import json, os, signal, sys, threading, time, warnings

def open_tier(url):
    from cuda_progcache.store import tiers
    from cuda_progcache.store.tiers.settings import parse_tier
    return tiers.open_tier(parse_tier(url))

url = sys.argv[1]

def key(number):
    return b"key %d" % number

def value(number):
    return b"program %d " % number * 1000

def fill(tier, numbers):
    for number in numbers:
        tier.publish(key(number), value(number), {"number": number})
    assert tier.flush(300)

def ask(tier, numbers):
    '''What look-ups give: "right", "miss" or "wrong", and what was said.'''
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [tier.get(key(number)) for number in numbers]
    verdicts = {None: "miss"}
    told = ["right" if data == value(number) else verdicts.get(data, "wrong") for number, data in zip(numbers, found)]
    return sorted(set(told)), [str(warning.message) for warning in caught]

def in_child(work, meanwhile=lambda: time.sleep(0.002)):
    '''What work() gives in a forked child; "hangs" where it doesn't end.'''
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writing, json.dumps(work()).encode())
        except BaseException as exc:
            os.write(writing, json.dumps(f"{type(exc).__name__}: {exc}").encode())
        finally:
            os._exit(0)
    os.close(writing)
    until = time.monotonic() + 120
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "hangs"
        meanwhile()
    with open(reading, "rb") as told:
        return json.loads(told.read() or b'"died"')
"""

USED = """
tier = open_tier(url)
fill(tier, range(8))
numbers = list(range(8))
before = ask(tier, numbers)

def in_parent_s_child():
    first = ask(tier, 20 * numbers)
    tier.publish(key(100), value(100), {})
    tier.flush(300)
    grandchild = in_child(lambda: ask(tier, numbers))
    another = open_tier(url)
    return {"first": first, "again": ask(tier, numbers), "grandchild": grandchild, "another": ask(another, numbers)}

# Both ask at once: over one connection each would get the other's answers.
meanwhile = []
told = in_child(in_parent_s_child, lambda: meanwhile.append(ask(tier, numbers)))
fill(tier, range(8, 12))
after = ask(tier, list(range(12)))
fresh = open_tier(url)
print(json.dumps({"before": before, "child": told, "meanwhile": meanwhile, "after": after, "kept": ask(fresh, [100])}))
"""

CROWD = """
tier = open_tier(url)
fill(tier, range(8))
numbers = list(range(8))
ending, wrong, rounds = threading.Event(), [], []

def hammer():
    while not ending.is_set():
        found, said = ask_plain(tier)
        rounds.append(1)
        if found != ["right"]:
            wrong.append((found, said))

def ask_plain(tier):
    told = {"right" if tier.get(key(number)) == value(number) else "wrong" for number in numbers}
    return sorted(told), []

threads = [threading.Thread(target=hammer) for _ in range(4)]
for thread in threads:
    thread.start()
told = []
for _ in range(6):
    seen = len(rounds)
    end = time.monotonic() + 300
    while len(rounds) < seen + 4:
        assert time.monotonic() < end
        time.sleep(0.001)
    told.append(in_child(lambda: ask(tier, numbers)))
ending.set()
for thread in threads:
    thread.join()
print(json.dumps({"children": told, "wrong": wrong, "after": ask(tier, numbers)}))
"""

OF_THE_APPLICATION = """
from datetime import timedelta

import obstore
from obstore.store import S3Store

def use():
    given = {"endpoint": "http://127.0.0.1:9", "region": "r", "skip_signature": True}
    store = S3Store("b", **given, allow_http=True, retry_config={"max_retries": 0, "retry_timeout": timedelta(1)})
    try:
        obstore.get(store, "x")
    except Exception as exc:
        return type(exc).__name__

def fill_and_ask():
    fill(tier, range(2))
    return ask(tier, [0, 1])

tier = open_tier(url)
print(json.dumps([use(), in_child(fill_and_ask), use()]))
"""

UNUSED = """
tier = open_tier(url)

def fill_and_ask():
    fill(tier, range(4))
    return ask(tier, list(range(4)))

print(json.dumps([in_child(fill_and_ask), in_child(lambda: ask(tier, list(range(4)))), ask(tier, list(range(4)))]))
"""

RIGHT = [["right"], []]


#: Variables that make an S3 tier use obstore.
BY_OBSTORE = {"AWS_SKIP_SIGNATURE": "false"}


@pytest.fixture(params=[*SERVERS, "s3_server,obstore"])
def forked(request, python):
    """A function that runs a script with an empty tier on each kind of server, and returns the values it prints."""
    server, comma, _ = request.param.partition(",")
    url = place_on(server, request.getfixturevalue(server))

    def run(script):
        variables = BY_OBSTORE if comma else {}
        return json.loads(python(CHILDREN + textwrap.dedent(script), url, PYTHONWARNINGS="ignore", **variables))

    return run


def test_a_child_of_one_that_has_used_it(forked):
    told = forked(USED)
    assert told["before"] == RIGHT
    assert all(one == RIGHT for one in told["meanwhile"])
    assert told["after"] == RIGHT
    assert told["child"] == {"first": RIGHT, "again": RIGHT, "grandchild": RIGHT, "another": RIGHT}
    assert told["kept"] == RIGHT


@pytest.mark.parametrize("forked", SERVERS, indirect=True)
def test_children_of_one_whose_threads_are_using_it(forked):
    told = forked(CROWD)
    assert told["wrong"] == []
    assert told["after"] == RIGHT
    assert all(child == RIGHT for child in told["children"]), told["children"]


@pytest.mark.parametrize("forked", SERVERS, indirect=True)
def test_children_of_one_that_has_not_used_it(forked):
    """A tier configured before a fork works after it, with every client."""
    assert forked(UNUSED) == [RIGHT, RIGHT, RIGHT]


@pytest.mark.parametrize("variables", [{}, BY_OBSTORE], ids=["ours", "obstore"])
def test_a_child_of_one_that_has_used_obstore_itself(python, s3_url, variables):
    """obstore's runtime hangs in the child, but tiers don't use the runtime of their own process."""
    pytest.importorskip("obstore")
    before, child, after = json.loads(python(CHILDREN + OF_THE_APPLICATION, s3_url, **variables))
    assert before == after
    assert child == RIGHT


def test_a_child_that_has_loaded_obstore_itself(python, s3_server):
    """The child is like a server's worker, forked before obstore was loaded."""
    pytest.importorskip("obstore")
    script = """
        def work():
            import obstore
            tier = open_tier(url)
            fill(tier, range(4))
            return ask(tier, list(range(4)))

        print(json.dumps(in_child(work)))
    """
    assert json.loads(python(CHILDREN + textwrap.dedent(script), s3_server)) == RIGHT
