# SPDX-License-Identifier: Apache-2.0
"""Real servers for the tests of tiers, each started once per session; tests of an unavailable server are skipped.

A server's fixture gives its base URL. ``tier_url`` gives each test an empty place on each server. A new server needs a
fixture in this file and an entry in ``SERVERS``.
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
#: Timeouts that outlast any load of the machine, so that a slow lookup isn't a miss.
PATIENCE = "connect_timeout=300&timeout=300&write_timeout=300"


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """Let stores wait for all their queued writes when they end, and keep failing levels out of use for the test."""
    monkeypatch.setitem(CircuitBreaker.__init__.__kwdefaults__, "rest", 600.0)
    monkeypatch.setattr(write_back, "AT_EXIT", DEADLINE)
    monkeypatch.setattr(stack, "_CLOSING", DEADLINE)


@pytest.fixture
def until():
    """A function that waits for a condition."""

    def wait(said):
        end = time.monotonic() + DEADLINE
        while not said():
            assert time.monotonic() < end, "it didn't happen"
            time.sleep(0.001)

    return wait


def wait_until_listening(port, process, log):
    """Wait until a server that was just started listens; fail with its log if it ends instead."""
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
    """A function that starts a server for the session, ``serve(name, command, port)``; it is killed at the end."""
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
    """The URL of a Redis server for the session."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("no redis-server (apt-get install redis-server)")
    port = servers.free_port()
    serve("redis", [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--databases", "10000"], port)
    return f"redis://127.0.0.1:{port}"


def started(server, factory, *clients):
    """Start one of :mod:`ci.servers`; skip the test if it isn't available."""
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
    """An nginx for the session, with ``ci/servers/nginx.conf``: everybody can read; users with a password can write."""
    yield from started(servers.nginx, tmp_path_factory)


@pytest.fixture(scope="session")
def nginx_server(nginx):
    """The URL at which nginx accepts writes."""
    return nginx.writer


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The URL, with its options, of a bucket on nanio."""
    for served in started(servers.nanio, tmp_path_factory, "obstore"):
        yield served.writer


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory):
    """The URL, with its options, of a bucket on moto."""
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


#: The numbers of the Redis databases that no test has used yet.
_databases = iter(range(1, 10000))


def place_on(server, base):
    """Return the URL of an empty place on a server, with long timeouts."""
    place = next(_databases) if server == "redis_server" else uuid.uuid4().hex
    url, mark, options = base.partition("?")
    return f"{url}/{place}?{options}{mark and '&'}{PATIENCE}"


@pytest.fixture(params=SERVERS)
def tier_url(request):
    """The URL of an empty tier, on each kind of server that is available."""
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
    """A function that opens a tier by its URL; the tier is closed after the test."""
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
    """A store on the shelf, which remembers a miss for as long as a test takes."""
    monkeypatch.setattr(remote_objects, "_MISSED_FOR", 600.0)
    return RemoteProgramCache(shelf)


@pytest.fixture
def black_hole():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def own_tiers(monkeypatch, tmp_path):
    """No configured tiers, and separate stores for each test: otherwise a tier's memory of a miss outlives the test."""
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS", raising=False)
    monkeypatch.setattr(behind, "_opened", {})
    monkeypatch.chdir(tmp_path)
    configuration._configured.cache_clear()


@pytest.fixture
def run(capsys):
    """A function that runs the command line, checks its exit code and returns its output (parsed, with ``--json``)."""

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
    """A function that runs a script in a new process, with arguments, and returns its output."""

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
