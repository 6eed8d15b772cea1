# SPDX-License-Identifier: Apache-2.0
"""Real servers for the tests of tiers, each started once for a session; where one can't be had, its tests are skipped.

A server's fixture gives its base URL. ``tier_url`` gives each test a place of its own on each of them: a server joins
by a fixture here and a line in ``SERVERS``.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import uuid

import pytest

from ci import servers
from cuda_progcache.cli import main
from cuda_progcache.store import stack
from cuda_progcache.store.breaker import CircuitBreaker
from cuda_progcache.store.tiers import behind, configuration, open_tier, remote_objects, write_back
from cuda_progcache.store.tiers.remote import RemoteProgramCache
from cuda_progcache.store.tiers.settings import parse_tier
from tests.tiers.shelf import Shelf

#: The fixture of each kind of server.
SERVERS = ("redis_server", "nginx_server", "s3_server")
DEADLINE = 300.0
#: What no load of the machine outlasts: a look-up that takes long here is a slow one, and no miss.
PATIENCE = "connect_timeout=300&timeout=300&write_timeout=300"


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """The end of a store waits for all that is on its way, and what is out of use stays so, however long that takes."""
    monkeypatch.setitem(CircuitBreaker.__init__.__kwdefaults__, "rest", 600.0)
    monkeypatch.setattr(write_back, "AT_EXIT", DEADLINE)
    monkeypatch.setattr(stack, "_CLOSING", DEADLINE)


@pytest.fixture
def until():
    """Wait for a condition."""

    def wait(said):
        end = time.monotonic() + DEADLINE
        while not said():
            assert time.monotonic() < end, "it didn't happen"
            time.sleep(0.001)

    return wait


def wait_until_listening(port, process, log):
    """Wait for a server that has just been started; fails with its log where it ends instead."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.01)
    raise AssertionError(f"nothing listens on port {port}: {log.read_text()}")


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Start a server for the session: ``serve(name, command, port)``; it is killed at the end."""
    processes = []

    def start(name, command, port):
        log = tmp_path_factory.mktemp(name) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        processes.append(process)
        wait_until_listening(port, process, log)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def redis_server(serve):
    """The URL of a Redis server of this session's."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("no redis-server (apt-get install redis-server)")
    port = servers.free_port()
    serve("redis", [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--databases", "10000"], port)
    return f"redis://127.0.0.1:{port}"


def started(server, factory, *clients):
    """Start one of :mod:`ci.servers`; skips where it can't be had."""
    for client in clients:
        pytest.importorskip(client)
    folder = factory.mktemp(server.__name__)
    try:
        with server(folder) as served:
            yield served
    except servers.Unavailable as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="session")
def nginx(tmp_path_factory):
    """An nginx of this session's, by ``ci/servers/nginx.conf``: everybody reads, who has a password writes."""
    yield from started(servers.nginx, tmp_path_factory)


@pytest.fixture(scope="session")
def nginx_server(nginx):
    """The URL at which an nginx takes writes."""
    return nginx.writer


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The URL, with its options, of a bucket of nanio's."""
    for served in started(servers.nanio, tmp_path_factory, "obstore"):
        yield served.writer


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory):
    """The same of moto's."""
    for served in started(servers.moto, tmp_path_factory, "obstore"):
        yield served.writer


@pytest.fixture(scope="session")
def real_registry(serve, tmp_path_factory):
    """The address of an OCI registry, Debian's docker-registry."""
    binary = shutil.which("docker-registry")
    if binary is None or shutil.which("skopeo") is None:
        pytest.skip("no docker-registry and skopeo (apt-get install docker-registry skopeo)")
    folder, port = tmp_path_factory.mktemp("registry"), servers.free_port()
    (folder / "registry.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}/kept}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    serve("registry", [binary, "serve", str(folder / "registry.yml")], port)
    return f"127.0.0.1:{port}"


#: The database of a Redis server that the next test gets.
_databases = iter(range(1, 10000))


def place_on(server, base):
    """A URL on a server where nothing lies yet, with patience."""
    place = next(_databases) if server == "redis_server" else uuid.uuid4().hex
    url, mark, options = base.partition("?")
    return f"{url}/{place}?{options}{mark and '&'}{PATIENCE}"


@pytest.fixture(params=SERVERS)
def tier_url(request):
    """The URL of an empty tier, on each kind of server that can be had here."""
    return place_on(request.param, request.getfixturevalue(request.param))


@pytest.fixture
def nginx_url(nginx_server):
    """The URL of an empty tier on nginx."""
    return place_on("nginx_server", nginx_server)


@pytest.fixture
def s3_url(s3_server):
    """The URL of an empty tier on S3."""
    return place_on("s3_server", s3_server)


@pytest.fixture
def redis_url(redis_server):
    """The URL of an empty tier on Redis."""
    return place_on("redis_server", redis_server)


@pytest.fixture
def open_url():
    """Open a tier by its URL; it is closed with the test."""
    opened = []

    def make(url):
        opened.append(open_tier(parse_tier(url)))
        return opened[-1]

    yield make
    for tier in opened:
        tier.close()


@pytest.fixture
def shelf():
    """A service in memory."""
    return Shelf()


@pytest.fixture
def tier(shelf, monkeypatch):
    """A store on it, which remembers a miss for as long as a test takes."""
    monkeypatch.setattr(remote_objects, "_MISSED_FOR", 600.0)
    return RemoteProgramCache(shelf)


@pytest.fixture
def black_hole():
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def own_tiers(monkeypatch, tmp_path):
    """Nothing is configured, and each test's stores are its own: else a tier's memory of a miss outlives the test."""
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS", raising=False)
    monkeypatch.setattr(behind, "_opened", {})
    monkeypatch.chdir(tmp_path)
    configuration._configured.cache_clear()


@pytest.fixture
def run(capsys):
    """Run the command line, which ends with a code; gives what it prints, of ``--json`` the values."""

    def command(*arguments, code=0):
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in arguments])
        told = capsys.readouterr()
        assert (ended.value.code or 0) == code, told
        assert "Traceback" not in told.err
        return json.loads(told.out) if "--json" in arguments else told.out + told.err

    return command


@pytest.fixture
def python():
    """Run a script in a process of its own, with arguments; gives what it prints."""

    def run(script, *arguments, **environment):
        import os

        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
