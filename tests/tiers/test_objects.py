# SPDX-License-Identifier: Apache-2.0
"""Object stores: the requests of our own S3 client, and the process that runs obstore."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ci import servers, tier_faults
from ci.servers.faulty import FaultyServer
from ci.servers.troubles import TROUBLES
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers import aws_signature, objects, s3
from cuda_progcache.store.tiers.aws_signature import AwsSigner
from cuda_progcache.store.tiers.objects import ObjectEngine
from cuda_progcache.store.tiers.on_demand import EngineOnDemand
from cuda_progcache.store.tiers.s3 import S3Engine, s3_engine
from cuda_progcache.store.tiers.settings import parse_tier

NAME = "v1/programs/ab/cdef"
LIMIT = 1 << 20
PATIENCE = "connect_timeout=300&timeout=300&write_timeout=300"


def later():
    return time.monotonic() + 300


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    """Remove the variables that give credentials, options or a proxy."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


# An answer of a terabyte


@pytest.mark.parametrize(
    ("client", "trouble", "calls"),
    [
        ("s3", "an error of a terabyte", ("get", "put", "delete", "list")),
        ("s3", "a terabyte, it says", ("get", "put", "delete", "list")),
        ("s3, obstore", "an error of a terabyte", ("get",)),
        ("s3, obstore", "a terabyte, it says", ("delete",)),
        ("gs", "an error of a terabyte", ("put",)),
        ("az", "an error of a terabyte", ("delete",)),
        ("az", "a terabyte, it says", ("list",)),
    ],
)
def test_no_answer_ends_the_process(client, trouble, calls):
    """obstore allocates as much memory as an answer announces, and aborts."""
    pytest.importorskip("obstore")
    status, said = tier_faults.try_terabyte(client, trouble, calls)
    assert (status, [line.partition(":")[0] for line in said.splitlines()]) == (0, list(calls)), said


# Signatures


@settings(max_examples=60, deadline=None)
@example("PUT", ["v1", "a b+c~*'()!ü%?#&=:@,;$"], b"data", "a/token+=", "eu-central-1", 9000)
@given(
    st.sampled_from(["GET", "PUT", "DELETE"]),
    st.lists(st.text(min_size=1, max_size=8).filter(lambda part: part not in {".", ".."}), min_size=1, max_size=4),
    st.none() | st.binary(max_size=20),
    st.none() | st.text("ABC+/=", min_size=1, max_size=8),
    st.sampled_from(["us-east-1", "eu-central-1"]),
    st.sampled_from([80, 9000]),
)
def test_signs_as_botocore_does(method, parts, body, token, region, port):
    auth = pytest.importorskip("botocore.auth")
    from urllib.parse import quote

    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    try:
        path = quote("/bucket/" + "/".join(part.replace("/", "-") for part in parts))
    except UnicodeEncodeError:  # half of a surrogate pair
        return
    host = "cache.example" if port == 80 else f"cache.example:{port}"
    signer = AwsSigner("an-id", "a-secret/+", token, region, host)
    while True:  # until both signatures fall into the same second
        asked = AWSRequest(method, f"http://cache.example:{port}{path}", data=body or b"")
        auth.S3SigV4Auth(Credentials("an-id", "a-secret/+", token), "s3", region).add_auth(asked)
        ours = signer.headers(method, path, body)
        if ours["x-amz-date"] == asked.headers["X-Amz-Date"]:
            break
    assert ours["Authorization"] == asked.headers["Authorization"]
    assert ours.get("x-amz-security-token") == asked.headers.get("X-Amz-Security-Token")


def test_a_signature_is_of_its_day(monkeypatch):
    """The signing key is derived anew at midnight (UTC)."""
    days = iter([0.0, 86399.0, 86400.0, 0.0])
    monkeypatch.setattr(
        aws_signature,
        "time",
        SimpleNamespace(gmtime=lambda: time.gmtime(next(days)), strftime=time.strftime),
    )
    signer = AwsSigner("id", "secret", None, "us-east-1", "host")
    first, second, third, fourth = (signer.headers("GET", "/x", None)["Authorization"] for _ in range(4))
    assert "/19700101/" in second
    assert "/19700102/" in third
    assert len({first, second, third}) == 3
    assert first == fourth


@pytest.mark.parametrize("prefix", ["team", "a b", "a+b~c*d", "ü", "a%20b", "a'b(c)!d", "a=b&c,d;e:f$g"])
def test_asks_for_the_objects_that_obstore_asks_for(prefix):
    """An object written by one client is found by the other."""
    pytest.importorskip("obstore")
    url = "s3://someone:something@bucket/{prefix}?endpoint=http://127.0.0.1:{port}&" + PATIENCE
    with FaultyServer("http") as server:
        made = parse_tier({"url": url.format(prefix=prefix.replace(" ", "%20"), port=server.port)})
        S3Engine(made).put(NAME, b"a program", until=later())
        obstores = ObjectEngine(made)
        assert obstores.get(NAME, limit=LIMIT, until=later()) == b"a program"
        obstores.close()
        assert len(server.objects) == 1


# The choice of the client


PLAIN = "s3://bucket/prefix"
KEYED = "s3://someone:something@bucket/prefix"


@pytest.mark.parametrize(
    ("url", "variables", "ours"),
    [
        (PLAIN, {}, True),
        (KEYED, {}, True),
        (f"{KEYED}?token=abc", {}, True),
        ("s3://bucket?token=abc", {}, False),
        ("s3://someone@bucket", {}, False),
        (PLAIN, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, True),
        (PLAIN, {"AWS_ACCESS_KEY_ID": "a"}, False),
        (PLAIN, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/x"}, False),
        (PLAIN, {"AWS_EC2_METADATA_DISABLED": "false"}, False),
        (KEYED, {"AWS_EC2_METADATA_DISABLED": "false"}, True),
        (KEYED, {"AWS_SERVER_SIDE_ENCRYPTION": "AES256"}, False),
        (KEYED, {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"}, False),
        (KEYED, {"AWS_PROFILE": "default"}, True),
        (KEYED, {"HTTPS_PROXY": "http://proxy:3128"}, False),
        (KEYED, {"HTTP_PROXY": "http://proxy:3128"}, True),
        (KEYED, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".amazonaws.com"}, True),
        (f"{KEYED}?endpoint=http://127.0.0.1:9000", {"http_proxy": "http://proxy:3128"}, False),
        (f"{KEYED}?endpoint=http://127.0.0.1:9000", {"http_proxy": "http://proxy:3128", "no_proxy": "127.0.0.1"}, True),
        ("s3://someone:something@bucket/a//b", {}, False),
        (KEYED, {"AWS_ENDPOINT_URL": "localhost:9000"}, False),
        (f"{KEYED}?endpoint=http://h:99999", {}, False),
    ],
)
def test_our_client_asks_where_it_knows_all_that_is_wanted(url, variables, ours, monkeypatch):
    pytest.importorskip("obstore")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert type(s3_engine(parse_tier(url))) is (S3Engine if ours else ObjectEngine)


def test_a_key_is_read_again_once_it_was_refused(s3_server, monkeypatch):
    """Temporary credentials may be replaced while a process runs."""
    monkeypatch.setenv("A_SECRET", "not-the-secret")
    url = s3_server.replace(servers.SECRET_KEY, "${A_SECRET}")
    engine = EngineOnDemand(parse_tier(f"{url}&{PATIENCE}"))
    with pytest.raises(PermissionError, match=r"answered 403 to GET of v1/programs/ab/cdef \(SignatureDoesNotMatch\)"):
        engine.get(NAME, limit=LIMIT, until=later())
    monkeypatch.setenv("A_SECRET", servers.SECRET_KEY)
    assert engine.get("v1/programs/no/ne", limit=LIMIT, until=later()) is None
    engine.close()


def test_where_the_bucket_is_is_told(monkeypatch):
    head = b"HTTP/1.1 301 Moved Permanently\r\nx-amz-bucket-region: eu-west-1\r\nContent-Length: 36\r\n\r\n"
    monkeypatch.setitem(
        TROUBLES["http"], "elsewhere", lambda *_: [head + b"<Error><Code>PermanentRedirect</Code>..."[:36]]
    )
    with FaultyServer("http", "elsewhere") as server:
        engine = S3Engine(parse_tier(f"{KEYED}?endpoint=http://127.0.0.1:{server.port}&{PATIENCE}"))
        with pytest.raises(StoreError, match=r"answered 301 to GET of .*; its bucket is in the region eu-west-1"):
            engine.get(NAME, limit=LIMIT, until=later())
        engine.close()


def test_a_reader_without_the_right_to_list_is_told_what_lacks(monkeypatch):
    """Amazon answers such a reader with 403 instead of 404."""
    body = b"<Error><Code>AccessDenied</Code></Error>"
    head = b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n" % len(body)
    monkeypatch.setitem(TROUBLES["http"], "denied", lambda *_: [head + body])
    with FaultyServer("http", "denied") as server:
        engine = S3Engine(parse_tier(f"{KEYED}?endpoint=http://127.0.0.1:{server.port}&{PATIENCE}"))
        with pytest.raises(StoreError, match=r"403 to GET of .* \(AccessDenied\); .* needs s3:ListBucket"):
            engine.get(NAME, limit=LIMIT, until=later())
        with pytest.raises(StoreError, match=r"403 to PUT of .* \(AccessDenied\):"):
            engine.put(NAME, b"data", until=later())
        engine.close()


def test_without_obstore_a_bucket_is_read_and_not_listed(s3_server, monkeypatch):
    monkeypatch.setattr(objects.importlib.util, "find_spec", lambda _: None)
    engine = EngineOnDemand(parse_tier(f"{s3_server}&{PATIENCE}"))
    assert engine.get("v1/programs/no/ne", limit=LIMIT, until=later()) is None
    with pytest.raises(StoreError, match="can't list without a package that isn't installed"):
        list(engine.list("v1/", until=later()))
    with pytest.raises(StoreError, match=r"pip install 'cuda-progcache\[s3\]'"):
        EngineOnDemand(parse_tier("gs://bucket")).prepare()
    engine.close()


# obstore's process


def test_a_process_that_ended_is_replaced_and_ends_with_its_tier(s3_server):
    engine = ObjectEngine(parse_tier(f"{s3_server}&{PATIENCE}"))
    engine.prepare()
    process = engine._process._running[0]
    assert engine.get("v1/programs/no/ne", limit=LIMIT, until=later()) is None
    process.send_signal(signal.SIGINT)  # Ctrl-C reaches the process, too; it must ignore it
    assert engine.get("v1/programs/no/ne", limit=LIMIT, until=later()) is None
    assert engine._process._running[0] is process
    process.kill()
    process.wait()
    assert engine.get("v1/programs/no/ne", limit=LIMIT, until=later()) is None
    second = engine._process._running[0]
    assert second is not process
    engine.close()
    assert second.returncode is not None
    engine.close()
    del engine


def test_a_process_ends_with_its_parent_however_that_ends(python, s3_server, until):
    pytest.importorskip("obstore")
    script = """
        import gc, os, sys
        from cuda_progcache.store.tiers.objects import ObjectEngine
        from cuda_progcache.store.tiers.settings import parse_tier

        engine = ObjectEngine(parse_tier(sys.argv[1]))
        engine.prepare()
        print(engine._process._running[0].pid)
        sys.stdout.flush()
        if sys.argv[2] == "gone":
            pid = engine._process._running[0].pid
            del engine
            gc.collect()
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                print("ended with its tier")
        elif sys.argv[2] == "exit":
            os._exit(0)
    """
    for how in ("gone", "exit", "usual"):
        told = python(textwrap.dedent(script), s3_server, how).split(maxsplit=1)
        assert told[1:] == (["ended with its tier\n"] if how == "gone" else [])
        until(lambda pid=int(told[0]): not _is_running(pid))


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"object_process" in file.read()
    except OSError:
        return False


def test_a_process_that_cannot_start_is_trouble_like_any_other(monkeypatch):
    pytest.importorskip("obstore")
    engine = ObjectEngine(parse_tier(f"gs://bucket?token=x&{PATIENCE}"))
    monkeypatch.setattr(objects, "_MODULE", "cuda_progcache.no_such_module")
    with pytest.raises(StoreError, match="the process for obstore ended at once") as told:
        engine.prepare()
    assert told.value.filename == "gs://bucket"
    monkeypatch.setattr(objects, "start_module", lambda *_, **__: (_ for _ in ()).throw(OSError(11, "no more")))
    with pytest.raises(StoreError, match="can't start a process for obstore"):
        engine.get(NAME, limit=LIMIT, until=later())


def test_secrets_are_in_no_repr(s3_server):
    engine = s3_engine(parse_tier(s3_server))
    engine.get("v1/programs/no/ne", limit=LIMIT, until=later())
    told = f"{engine!r}{engine._signer!r}{vars(engine)!r}"
    assert servers.SECRET_KEY not in told
    assert s3.is_enough(parse_tier(s3_server))
    engine.close()
