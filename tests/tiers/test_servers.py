# SPDX-License-Identifier: Apache-2.0
"""Tiers on the servers that teams run: nginx configured as in the guides, and S3 as nanio and moto implement it."""

from __future__ import annotations

import gc
import os
import resource
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from urllib.parse import unquote

import pytest
import redis

from ci import servers
from ci.servers.faulty import FaultyServer
from ci.servers.troubles import CLOSE, RESET, STALLS, TROUBLES, troubles
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers import connections, sides, upkeep
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.on_demand import EngineOnDemand
from cuda_progcache.store.tiers.settings import parse_tier
from cuda_progcache.store.tiers.timed_http import HttpClient
from cuda_progcache.store.tiers.timed_sockets import is_readable

NAME = "v1/programs/ab/cdef"
LIMIT = 1 << 20
#: The variable, and its value, that makes an S3 tier use obstore.
BY_OBSTORE = ("AWS_SKIP_SIGNATURE", "false")


def later():
    return time.monotonic() + 300


def engine_of(url):
    """Return an engine whose timeouts are long, so that a busy machine causes no failures."""
    return EngineOnDemand(
        parse_tier(f"{url}{'&' if '?' in url else '?'}connect_timeout=300&timeout=300&write_timeout=300")
    )


def use(engine):
    """Read and write with an engine on a working server; return the names of the small objects."""
    names = [f"v1/programs/{number:02x}/{number}" for number in range(12)]
    assert engine.get(NAME, limit=LIMIT, until=later()) is None
    engine.put(NAME, b"first", until=later())
    engine.put(NAME, b"second", until=later())
    assert engine.get(NAME, limit=LIMIT, until=later()) == b"second"
    engine.put_many({name: name.encode() for name in names}, until=later())
    found = engine.get_many([*names, "v1/programs/no/ne"], limit=LIMIT, until=later())
    assert found == {name: name.encode() for name in names} | {"v1/programs/no/ne": None}
    large = bytes(range(256)) * (4 << 10)
    engine.put("packs/large", large, until=later())
    assert engine.get("packs/large", limit=len(large), until=later()) == large
    with pytest.raises(StoreError, match="more than the limit"):
        engine.get("packs/large", limit=len(large) - 1, until=later())
    return names


def look_around(engine, names):
    """Check listings and removals."""
    now = time.time()
    listed = {one.name: one for one in engine.list("v1/programs/", until=later())}
    assert listed.keys() == {NAME, *names}
    assert listed[NAME].size == len(b"second")
    assert abs(listed[NAME].modified - now) < 3600
    assert [one.name for one in engine.list("v1/programs/ab/c", until=later())] == [NAME]
    assert [one.name for one in engine.list("v1/programs/ab/x", until=later())] == []
    assert list(engine.list("v1/nothing/", until=later())) == []
    engine.delete([*names, NAME, "v1/programs/no/ne"], until=later())
    assert [one.name for one in engine.list("", until=later())] == ["packs/large"]
    assert engine.get(NAME, limit=LIMIT, until=later()) is None
    engine.delete([], until=later())


@pytest.mark.parametrize("server", ["nginx_server", "s3_server", "moto_server", "s3_server,obstore"])
def test_does_all_that_an_engine_does(server, request, monkeypatch):
    server, comma, _ = server.partition(",")
    url = request.getfixturevalue(server)
    if comma:
        monkeypatch.setenv(*BY_OBSTORE)
    engine = engine_of(url.replace("/cache", f"/{request.node.name}"))
    look_around(engine, use(engine))
    engine.close()
    assert engine.get("packs/large", limit=1 << 21, until=later()) is not None


def test_nginx_lets_everybody_read_and_no_stranger_write(nginx):
    writer, reader = engine_of(nginx.writer), engine_of(nginx.reader)
    writer.put(NAME, b"from main", until=later())
    assert reader.get(NAME, limit=LIMIT, until=later()) == b"from main"
    for url in (nginx.reader, nginx.writer.replace(servers.PASSWORD, "guessed")):
        stranger = engine_of(url)
        with pytest.raises(PermissionError, match="answered 401"):
            stranger.put(NAME, b"from a pull request", until=later())
        with pytest.raises(PermissionError, match="answered 401"):
            stranger.delete([NAME], until=later())
    assert reader.get(NAME, limit=LIMIT, until=later()) == b"from main"


def test_a_password_is_in_no_message(nginx):
    stranger = engine_of(nginx.writer.replace(servers.PASSWORD, "a-secret"))
    with pytest.raises(StoreError) as told:
        stranger.put(NAME, b"x", until=later())
    assert "a-secret" not in f"{told.value}{told.value.__cause__}{stranger.name}"


@pytest.fixture(params=["ours", "obstore"])
def each_client(request, monkeypatch):
    """Use an S3 tier with our client, and with obstore."""
    if request.param == "obstore":
        monkeypatch.setenv(*BY_OBSTORE)


@pytest.mark.usefixtures("each_client")
def test_a_bucket_that_is_not_there_is_no_miss(s3_server):
    engine = engine_of(s3_server.replace(f"@{servers.BUCKET}/", "@no-such-bucket/"))
    with pytest.raises(StoreError, match="no such bucket"):
        engine.get(NAME, limit=LIMIT, until=later())
    with pytest.raises(StoreError, match="does the bucket exist"):
        engine.put(NAME, b"x", until=later())


@pytest.mark.usefixtures("each_client")
def test_a_wrong_secret_is_told_and_not_shown(s3_server):
    engine = engine_of(s3_server.replace(servers.SECRET_KEY, "another-secret-key"))
    with pytest.raises(PermissionError, match="answered 403") as told:
        engine.get(NAME, limit=LIMIT, until=later())
    assert "another-secret-key" not in repr(told.value)
    assert told.value.__cause__ is None


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/prefix?endpoint=http://127.0.0.1:{port}",
        "s3://someone:a-secret@bucket/prefix?endpoint=http://127.0.0.1:{port}",
        "gs://bucket/prefix?endpoint=http://127.0.0.1:{port}&token=some-token",
        "az://account:a2V5@bucket/prefix?endpoint=http://127.0.0.1:{port}",
        "az://account@bucket/prefix?endpoint=http://127.0.0.1:{port}&token=sv%3D1%26sig%3Dsome-token",
    ],
)
def test_every_object_store_is_asked_as_it_wants_to_be(url):
    """A fake server keeps what it is given; the real services aren't available to the tests."""
    pytest.importorskip("obstore")
    with FaultyServer("http") as server:
        engine = engine_of(url.format(port=server.port))
        assert engine.get(NAME, limit=LIMIT, until=later()) is None
        engine.put(NAME, b"a program", until=later())
        assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
        assert len(server.objects) == 1
        assert unquote(next(iter(server.objects))).endswith(f"bucket/prefix/{NAME}")


def test_google_is_not_written_to_by_nobody():
    """Otherwise the client would ask the machine's metadata service for credentials."""
    pytest.importorskip("obstore")
    with FaultyServer("http") as server:
        engine = engine_of(f"gs://bucket/prefix?endpoint=http://127.0.0.1:{server.port}")
        assert engine.get(NAME, limit=LIMIT, until=later()) is None
        with pytest.raises(PermissionError, match="without credentials"):
            engine.put(NAME, b"a program", until=later())
        assert server.requests == 1


def test_a_server_that_cannot_list_says_what_can():
    with FaultyServer("http", "HTML in place of the object") as server:
        engine = engine_of(f"http://127.0.0.1:{server.port}/prefix")
        with pytest.raises(StoreError, match="autoindex_format json"):
            list(engine.list("v1/", until=later()))


def test_a_large_write_has_the_time_of_a_write_and_not_of_a_connection(nginx_url):
    """A client's timeout for connecting often limits the sending as well."""
    engine = EngineOnDemand(parse_tier(nginx_url))
    body = bytes(32 << 20)
    engine.put(NAME, body, until=later())
    assert engine.get(NAME, limit=len(body), until=later()) == body


@pytest.fixture
def answering(monkeypatch):
    """A function that starts a server with one answer to every request; it returns a tier's URL and the server."""
    with ExitStack() as stack:

        def start(protocol, *answer, **more):
            def script(speaks, asked, _):
                yield from answer if protocol == "redis" else (speaks.head(asked, len(answer[0])), *answer)

            monkeypatch.setitem(TROUBLES[protocol], "this answer", script)
            server = stack.enter_context(FaultyServer(protocol, "this answer", **more))
            return f"{protocol}://127.0.0.1:{server.port}", server

        yield start


ENDLESS_SCAN = b"*2\r\n$1\r\n1\r\n*0\r\n"


@pytest.fixture
def telling(monkeypatch):
    """A function that starts a server with one script per request, and returns an engine and the server."""
    with ExitStack() as stack:

        def start(protocol, *scripts):
            left = list(scripts)

            def script(speaks, asked, _):
                steps = left.pop(0)
                bodies = [one for one in steps if isinstance(one, bytes)]
                yield b"".join(speaks.head(asked, len(body)) + body + speaks.tail for body in bodies)
                yield from steps[len(bodies) :]

            monkeypatch.setitem(TROUBLES[protocol], "these answers", script)
            server = stack.enter_context(FaultyServer(protocol, "these answers"))
            return engine_of(f"{protocol}://127.0.0.1:{server.port}"), server

        yield start


@pytest.mark.parametrize("ends", [CLOSE, RESET], ids=["closes", "resets"])
@pytest.mark.parametrize("protocol", ["redis", "http"])
def test_a_connection_that_is_closed_when_it_is_used_is_replaced(telling, protocol, ends):
    engine, server = telling(protocol, [b"one"], [ends], [b"two"], [ends], [b"OK"], [ends], [ends])
    assert engine.get(NAME, limit=LIMIT, until=later()) == b"one"
    assert engine.get(NAME, limit=LIMIT, until=later()) == b"two"
    engine.put(NAME, b"data", until=later())
    assert (server.connections, server.requests) == (3, 5)
    with pytest.raises(StoreError):  # the new connection is closed, too
        engine.get(NAME, limit=LIMIT, until=later())
    assert (server.connections, server.requests) == (4, 7)
    engine.close()


@pytest.mark.parametrize("protocol", ["redis", "http"])
def test_a_connection_that_nobody_used_for_long_is_not_used(telling, protocol, monkeypatch):
    monkeypatch.setattr(connections, "IDLE", 0.0)
    engine, server = telling(protocol, [b"one"], [b"two"])
    assert [engine.get(NAME, limit=LIMIT, until=later()) for _ in range(2)] == [b"one", b"two"]
    assert server.connections == 2


@pytest.mark.parametrize("protocol", ["redis", "http"])
def test_an_answer_that_nobody_asked_for_is_none(telling, protocol):
    engine, _ = telling(protocol, [b"one", b"two"], [b"three"])
    assert [engine.get(NAME, limit=LIMIT, until=later()) for _ in range(2)] == [b"one", b"three"]
    engine.close()


@pytest.mark.parametrize("answer", [b"$9000\r\n", b"$4\r\ndata\r\n", b"-ERR no\r\n"], ids=["large", "last", "refused"])
def test_a_batch_that_is_left_early_leaves_no_answer_to_the_next(monkeypatch, answer):
    """Its other answers are still under way, so the connection doesn't look readable."""
    asked_for = []

    def script(speaks, asked, _):
        asked_for.append(asked.target)
        if len(asked_for) % 2:
            yield answer

    monkeypatch.setitem(TROUBLES["redis"], "the first alone", script)
    monkeypatch.setattr("cuda_progcache.store.tiers.redis.BATCH_BYTES", 4)
    with FaultyServer("redis", "the first alone") as server:
        engine = engine_of(f"redis://127.0.0.1:{server.port}")
        for number in (1, 2):
            with suppress(StoreError):
                assert engine.get_many([NAME, "x"], limit=1000, until=later()).keys() == {NAME}
            assert server.connections == number
        engine.close()


def test_what_redis_has_not_confirmed_is_not_written(answering):
    for answer in (b"+QUEUED\r\n", b":1\r\n", b"$-1\r\n", b"$4\r\n<ht>\r\n", b"*0\r\n"):
        url, _ = answering("redis", answer)
        engine = engine_of(url)
        with pytest.raises(StoreError):
            engine.put(NAME, b"data", until=later())
        with pytest.raises(StoreError):
            engine.put_many({NAME: b"data"}, until=later())


@pytest.mark.parametrize("status", ["100 Continue", "102 Processing", "103 Early Hints"])
def test_an_answer_may_have_others_before_it(monkeypatch, status):
    def script(speaks, asked, body):
        yield 3 * f"HTTP/1.1 {status}\r\nLink: <x>\r\n\r\n".encode() + speaks.head(asked, len(body)) + body

    monkeypatch.setitem(TROUBLES["http"], "others before it", script)
    with FaultyServer("http", "others before it", b"a program") as server:
        engine = engine_of(f"http://127.0.0.1:{server.port}")
        for _ in range(2):
            assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
        engine.put(NAME, b"data", until=later())
        assert server.connections == 1


#: Every operation of an engine.
CALLS = (
    lambda engine: engine.get(NAME, limit=1000, until=later()),
    lambda engine: engine.get_many([NAME, "x"], limit=1000, until=later()),
    lambda engine: engine.put(NAME, b"data", until=later()),
    lambda engine: engine.put_many({NAME: b"data", "x": b"data"}, until=later()),
    lambda engine: engine.delete([NAME, "x"], until=later()),
    lambda engine: list(engine.list("v1/", until=later())),
)


@pytest.mark.parametrize("protocol", ["redis", "http"])
def test_no_operation_fails_otherwise_than_by_our_errors(protocol, tmp_path):
    """The errors have the tier's name and a reason."""
    failed = []
    for trouble in troubles(protocol):
        if trouble in STALLS:
            continue
        with FaultyServer(protocol, trouble, b"a program", tmp_path) as server:
            secure = "s" if server.tls else ""
            engine = engine_of(f"{protocol}{secure}://127.0.0.1:{server.port}")
            for call in CALLS:
                try:
                    call(engine)
                except StoreError as exc:
                    failed.append((bool(exc.strerror), exc.filename == engine.name))
            engine.close()
    assert set(failed) == {(True, True)}


@pytest.mark.parametrize("ends", [CLOSE, RESET], ids=["closes", "resets"])
@pytest.mark.parametrize("protocol", ["redis", "http"])
def test_an_answer_that_is_cut_anywhere_is_none(monkeypatch, protocol, ends):
    """The answer after it is whole again."""
    cut_at = []

    def script(speaks, asked, body):
        whole = speaks.head(asked, len(body)) + body + speaks.tail
        if not cut_at:
            cut_at.extend(range(len(whole)))
            yield whole
        else:
            yield whole[: cut_at.pop()]
            yield ends

    monkeypatch.setitem(TROUBLES[protocol], "cut", script)
    with FaultyServer(protocol, "cut", b"a program") as server:
        engine = engine_of(f"{protocol}://127.0.0.1:{server.port}")
        assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
        engine.close()
        while cut_at:
            with pytest.raises(StoreError):
                engine.get(NAME, limit=LIMIT, until=later())
        assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
        engine.close()


def test_credentials_are_read_again_once_they_were_refused(monkeypatch):
    """A token in a file may be replaced while a process runs."""
    answers = [b"200 OK", b"401 Unauthorized", b"200 OK", b"200 OK"]

    def script(*_):
        yield b"HTTP/1.1 " + answers.pop(0) + b"\r\nContent-Length: 0\r\n\r\n"

    monkeypatch.setitem(TROUBLES["http"], "expired", script)
    read = []
    with FaultyServer("http", "expired") as server:
        client = HttpClient(
            f"http://127.0.0.1:{server.port}", connect_timeout=300, headers=lambda: read.append(1) or {"A": "b"}
        )
        seen = [(client.exchange("GET", "/x", until=later(), limit=LIMIT).status, len(read)) for _ in range(4)]
        client.close()
    assert seen == [(200, 1), (401, 1), (200, 2), (200, 2)]


@pytest.mark.parametrize("size", ["-1", "-5", "-FFFF"])
def test_a_chunk_has_no_size_below_zero(monkeypatch, size):
    def script(speaks, asked, body):
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        yield head + size.encode() + b"\r\nabcde\r\n0\r\n\r\n"
        yield CLOSE

    monkeypatch.setitem(TROUBLES["http"], "such a chunk", script)
    with FaultyServer("http", "such a chunk") as server:
        engine = engine_of(f"http://127.0.0.1:{server.port}")
        with pytest.raises(StoreError, match="a chunk of -"):
            engine.get(NAME, limit=LIMIT, until=later())


def test_a_scan_that_never_ends_is_ended(answering, monkeypatch):
    url, _ = answering("redis", ENDLESS_SCAN)
    with pytest.raises(TimeoutError):
        list(engine_of(url).list("v1/", until=time.monotonic() + 0.2))
    monkeypatch.setattr(sides, "_LISTING", 0.2)
    with pytest.raises(StoreError, match="the listing took too long"):
        upkeep.collect(url, older_than=1.0)


def test_a_folder_that_is_in_itself_is_not_descended_for_ever(answering):
    url, server = answering("http", b'[{"name": "v1", "type": "directory"}, {"name": "x", "size": 1, "mtime": 5}]')
    found = list(engine_of(url).list("", until=later()))
    assert [(one.name, one.size, one.modified) for one in found][:2] == [("v1/v1/v1/x", 1, 0.0), ("v1/v1/x", 1, 0.0)]
    assert (len(found), server.requests) == (4, 4)


def test_a_foreign_listing_is_an_error_of_the_store(answering):
    foreign = """{} 5 null "name" [5] [null] ["x"] [[]] [{}] [{"name":5,"size":1}] {"name":{}} [{"name":"x"}]
        [{"name":"x","size":"1"}] [{"name":"../x","size":1}] [{"name":"..","type":"directory"}]"""
    for answer in (*foreign.split(), "", 5000 * "["):
        url, _ = answering("http", answer.encode())
        with pytest.raises(StoreError, match="autoindex_format json"):
            list(engine_of(url).list("v1/", until=later()))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"*3\r\n" + 3 * (b"$60\r\n" + 60 * b"x" + b"\r\n"), TooLargeError),
        (b"*3\r\n" + 3 * (b"+" + 60 * b"x" + b"\r\n"), TooLargeError),
        (b"*2\r\n" + 2 * b"*4\r\n:1\r\n:2\r\n:3\r\n:4\r\n", StoreError),
        (b"*2\r\n" + 2 * b"*4\r\n*0\r\n*0\r\n*0\r\n*0\r\n", StoreError),
    ],
    ids=["values", "lines", "numbers", "lists"],
)
def test_an_answer_is_bounded_as_a_whole(answering, answer, error):
    from cuda_progcache.store.tiers.redis_client import RedisClient

    url, _ = answering("redis", answer)
    client = RedisClient(parse_tier(url))
    assert client.ask(later(), 600, ("ANY", "x"), most_items=20) != []
    with pytest.raises(error):
        client.ask(later(), 100, ("ANY", "x"), most_items=8)
    client.close()


def test_threads_that_connect_at_once_make_one_context(tmp_path, monkeypatch):
    made, make, together = [], ssl.create_default_context, threading.Barrier(4)

    def slowly(*given, **named):
        made.append(1)
        time.sleep(0.05)  # so that the other threads arrive meanwhile
        return make(*given, **named)

    monkeypatch.setattr(ssl, "create_default_context", slowly)
    with FaultyServer("http", "a certificate nobody knows", b"a program", tmp_path) as server:
        engine = engine_of(f"https://localhost:{server.port}/prefix?ca_file={tmp_path}/self-signed.pem")
        engine.prepare()

        def ask(_):
            together.wait(300)
            return engine.get(NAME, limit=LIMIT, until=later())

        with ThreadPoolExecutor(4) as pool:
            assert set(pool.map(ask, range(4))) == {b"a program"}
        assert made == [1]
        engine.close()


def test_the_context_of_https_is_made_once(tmp_path, monkeypatch):
    made, make = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *given, **named: made.append(1) or make(*given, **named))
    with FaultyServer("http", "a certificate nobody knows", b"a program", tmp_path) as server:
        engine = engine_of(f"https://localhost:{server.port}/prefix?ca_file={tmp_path}/self-signed.pem")
        for _ in range(2):
            assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
            engine.close()
        assert (server.connections, made) == (2, [1])


def test_a_tls_context_is_made_once_and_connections_are_kept_above_descriptor_1023(answering, tmp_path, monkeypatch):
    made, make = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *given, **named: made.append(1) or make(*given, **named))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 2000), hard), hard))
    with FaultyServer("redis", "a certificate nobody knows", b"a program", tmp_path) as server, ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        engine = engine_of(f"rediss://localhost:{server.port}?ca_file={tmp_path}/self-signed.pem")
        while stack.enter_context(open(os.devnull, "rb")).fileno() < 1100:
            pass
        assert [engine.get(NAME, limit=LIMIT, until=later()) for _ in range(3)] == [b"a program"] * 3
        assert server.connections == 1
        engine.close()
        assert engine.get(NAME, limit=LIMIT, until=later()) == b"a program"
        assert (server.connections, made) == (2, [1])
        engine.close()


@pytest.mark.parametrize("url", ["rediss://127.0.0.1:1", "https://127.0.0.1:1"])
def test_certificates_are_read_before_the_time_of_a_call_runs(url, monkeypatch):
    """On a busy machine, reading them takes longer than the first lookup may."""
    made, make = [], ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *given, **named: made.append(1) or make(*given, **named))
    engine = engine_of(url)
    engine.prepare()
    assert made == [1]
    with pytest.raises(StoreError, match="refused"):
        engine.get(NAME, limit=LIMIT, until=later())
    assert made == [1]


@pytest.mark.parametrize("scheme", ["rediss", "https"])
def test_certificates_that_are_missing_are_told_by_the_call(scheme, tmp_path):
    engine = engine_of(f"{scheme}://127.0.0.1:1/1?ca_file={tmp_path}/none.pem")
    engine.prepare()
    with pytest.raises(StoreError, match="No such file"):
        engine.get(NAME, limit=LIMIT, until=later())


def test_a_handshake_that_hangs_is_cut_off():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(300)
        engine = engine_of(f"rediss://127.0.0.1:{server.getsockname()[1]}")
        while not is_readable(server):  # a busy machine may use up the time before it connects
            with pytest.raises(TimeoutError):
                engine.get(NAME, limit=LIMIT, until=time.monotonic() + 0.3)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(300)
            while connection.recv(1 << 16):
                pass


def test_a_server_that_wants_no_more_of_a_body_is_heard():
    """The server answers and closes the connection while the body is being sent; the sender sees a broken pipe."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 12)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        engine = engine_of(f"http://127.0.0.1:{server.getsockname()[1]}/prefix")
        with pytest.raises(StoreError, match="answered 413"):
            engine.put(NAME, bytes(64 << 20), until=later())


@pytest.mark.parametrize(
    ("answer", "size", "kept"),
    [
        ("200 OK", 20, True),
        ("404 Not Found", 20, True),
        ("302 Found", 0, True),
        ("500 Oops", 200_000, False),  # more than is worth reading
        ("200 OK\r\nConnection: close", 20, False),
        ("200 OK\r\nTransfer-Encoding: chunked", 20, True),
        ("404 Not Found\r\nTransfer-Encoding: chunked", 20, True),
        ("404 Not Found\r\nTransfer-Encoding: chunked", 64 << 10, True),
        ("500 Oops\r\nTransfer-Encoding: chunked", 200_000, False),
        ("500 Oops\r\nConnection: close", 200_000, False),
    ],
)
def test_connections_are_kept_and_what_is_left_of_an_answer_is_never_the_next_one(monkeypatch, answer, size, kept):
    body = bytes(size)
    chunked = answer.endswith("chunked")
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body) if chunked else body
    length = "" if chunked else f"Content-Length: {size}\r\n"
    monkeypatch.setitem(
        TROUBLES["http"], "this answer", lambda *_: [f"HTTP/1.1 {answer}\r\n{length}\r\n".encode() + sent]
    )
    with FaultyServer("http", "this answer") as server:
        client = HttpClient(f"http://127.0.0.1:{server.port}", connect_timeout=300)
        for _ in range(3):
            found = client.exchange("GET", "/x", until=later(), limit=LIMIT)
            assert (found.status, found.data) == (int(answer[:3]), body if size <= 64 << 10 else b"")
        client.close()
        gc.collect()  # a socket left open causes a warning
        assert (server.requests, server.connections) == (3, 1 if kept else 3)


def test_a_target_that_is_no_ascii_is_trouble_like_any_other():
    with FaultyServer("http") as server:
        client = HttpClient(f"http://127.0.0.1:{server.port}", connect_timeout=300)
        for target in ("/\xe4", "/a b", "/a\r\nX: y"):
            with pytest.raises(StoreError, match="can't be reached"):
                client.exchange("GET", target, until=later(), limit=LIMIT)
        assert server.requests == 0


def test_a_redis_that_refuses_to_list_is_not_empty(redis_url):
    """The user may lack the permission to ask for sizes."""
    engine = EngineOnDemand(parse_tier(redis_url))
    engine.put(NAME, b"data", until=later())
    engine.close()
    with redis.Redis.from_url(redis_url.partition("?")[0]) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+secret"], keys="*", commands=["+@all", "-memory"])
    reader = EngineOnDemand(parse_tier(redis_url.replace("redis://", "redis://reader:secret@")))
    assert reader.get(NAME, limit=LIMIT, until=later()) == b"data"
    with pytest.raises(StoreError, match="NOPERM") as told:
        list(reader.list("v1/programs/", until=later()))
    assert told.value.filename == reader.name
    reader.close()
