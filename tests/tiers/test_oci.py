# SPDX-License-Identifier: Apache-2.0
"""OCI images as read-only tiers: pulled once, verified by digest, and unpacked safely."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.service.export import write_oci
from cuda_progcache.store.derived import merge_manifest
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.images import _is_ours
from cuda_progcache.store.tiers.settings import parse_tier
from cuda_progcache.store.tiers.upkeep import sync

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
KEY = b"a key"
#: Timeouts that outlast any load of the machine.
PATIENCE = {"tls": "no", "connect_timeout": 300, "timeout": 300}


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    """The folder in which images are unpacked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return tmp_path / "user-cache" / "cuda-progcache-images"


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """The folder of a cache with one program, and the bytes of its image's layer."""
    folder = tmp_path_factory.mktemp("filled")
    with FileStreamProgramCache(folder / "cache", durability="none") as cache:
        cache.publish(KEY, b"binary", {"name": "k"})
        write_oci(cache, folder / "image", lambda _: True)
    index = json.loads((folder / "image" / "index.json").read_text())
    blobs = folder / "image" / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].removeprefix("sha256:")).read_bytes())
    return folder, (blobs / manifest["layers"][0]["digest"].removeprefix("sha256:")).read_bytes()


def sha256(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Registry:
    """A registry that gives prepared answers, as a hostile one could."""

    def __init__(self):
        self.answers, self.asked = {}, []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                registry.asked.append((self.path, self.headers.get("Authorization")))
                status, headers, body = registry.answer(self.path, self.headers)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, headers):
        told = self.answers.get(path, (404, {}, b""))
        return told(headers) if callable(told) else told

    def image(self, layer, *, size=None, digest=None, **more):
        """Add an image with this layer; return the digest of its manifest."""
        about = {"mediaType": LAYER, "digest": digest or sha256(layer), "size": len(layer) if size is None else size}
        return self.manifest({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [about], **more}, layer)

    def manifest(self, manifest, *blobs):
        body = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        for reference in ("tag", sha256(body)):
            self.answers[f"/v2/team/kernels/manifests/{reference}"] = (200, {"Content-Type": MANIFEST}, body)
        for blob in blobs:
            self.answers[f"/v2/team/kernels/blobs/{sha256(blob)}"] = (200, {}, blob)
        return sha256(body)


@pytest.fixture
def registry():
    made = Registry()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def opened(registry):
    """A function that opens an image of the registry."""

    def make(reference=":tag", **options):
        given = "&".join(f"{name}={value}" for name, value in {**PATIENCE, **options}.items())
        return open_tier(parse_tier(f"oci://{registry.host}/team/kernels{reference}?{given}"))

    return make


def test_an_image_is_pulled_once_and_found_there_ever_after(registry, opened, filled, images):
    digest = registry.image(filled[1])
    found = opened().load(KEY)
    assert (found.data, found.record) == (b"binary", {"name": "k"})
    assert os.listdir(images) == [digest.replace(":", "-")]
    asked = len(registry.asked)
    again = opened()
    assert again.load(KEY).data == b"binary"
    assert again.load(b"another") is None
    assert [path for path, _ in registry.asked[asked:]] == ["/v2/team/kernels/manifests/tag"], "a tag may have moved"
    asked = len(registry.asked)
    assert opened(f"@{digest}").load(KEY).data == b"binary"
    assert opened(f":tag@{digest}").load(KEY).data == b"binary"
    assert len(registry.asked) == asked, "an image that is named by its digest is asked for at no registry"
    assert again.publish(KEY, b"x", {}) is False


def test_trouble_says_what_to_do(registry, opened):
    for how, said in (({}, "no such image (404)"), ({"tls": "yes", "connect_timeout": 0.5}, "tls=no")):
        with pytest.warns(ProgCacheWarning, match=re.escape(said)):
            assert opened(":never-pushed", **how).load(KEY) is None
    realm = {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token"'}
    registry.answers["/v2/team/kernels/manifests/other"] = (401, realm, b"")
    registry.answers["/token?"] = (200, {}, b'{"token": 7}')
    registry.answers["/v2/team/kernels/manifests/private"] = (403, {}, b"")
    registry.answers["/v2/team/kernels/manifests/broken"] = (500, {}, b"")
    for tag, said in (("private", "user and password"), ("broken", "answered 500"), ("other", "returned no token")):
        with pytest.warns(ProgCacheWarning, match=said):
            assert opened(f":{tag}").load(KEY) is None


def test_an_index_of_one_image_is_that_image(registry, opened, filled):
    digest = registry.image(filled[1])
    registry.manifest({"schemaVersion": 2, "manifests": [{"digest": digest}]})
    assert opened().load(KEY).data == b"binary"


@pytest.mark.parametrize("way", ["basic", "bearer", "token"])
def test_who_asks_is_said_to_the_registry_and_to_nobody_else(registry, opened, filled, way):
    elsewhere = Registry()
    digest = registry.image(filled[1])
    blob = f"/v2/team/kernels/blobs/{sha256(filled[1])}"
    elsewhere.answers["/kept?signature=1"] = registry.answers[blob]
    registry.answers[blob] = (307, {"Location": f"http://{elsewhere.host}/kept?signature=1"}, b"")
    realm = f'Bearer realm="http://{registry.host}/token",service="r",scope="repository:team/kernels:pull"'
    challenge = {"basic": 'Basic realm="x"', "bearer": realm, "token": realm}[way]
    basic, bearer = "Basic bWU6cHc=", "Bearer t0"
    expected = basic if way == "basic" else bearer

    def guarded(answer):
        def say(headers):
            known = headers.get("Authorization") == expected
            return answer if known else (401, {"WWW-Authenticate": challenge}, b"")

        return say

    for path, answer in list(registry.answers.items()):
        registry.answers[path] = guarded(answer)
    token = (200, {}, b'{"token": "t0"}')
    path = "/token?service=r&scope=repository%3Ateam%2Fkernels%3Apull"
    registry.answers[path] = lambda headers: token if headers.get("Authorization") == basic else (401, {}, b"")
    entrance = {"token": "t0"} if way == "token" else {"user": "me", "password": "pw"}
    assert opened(f"@{digest}", **entrance).load(KEY).data == b"binary"
    assert elsewhere.asked == [("/kept?signature=1", None)]
    elsewhere.server.shutdown()
    elsewhere.server.server_close()


def member(name, content=b"x", **more):
    made = tarfile.TarInfo(name)
    made.size = len(content)
    for field, value in more.items():
        setattr(made, field, value)
    return made, content


def archive(*members, entries=True):
    """Return a compressed layer of the members, by default after an entry as a cache directory has it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        if entries:
            tar.addfile(*[part if isinstance(part, tarfile.TarInfo) else io.BytesIO(part) for part in member(ENTRY)])
        for info, data in members:
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return gzip.compress(content.getvalue(), mtime=0)


ENTRY = "entries/ab/" + "c" * 62
HAZARDS = {
    "above": [member("../outside")],
    "above, within": [member("entries/../../outside")],
    "absolute": [member("/tmp/outside")],
    "another folder": [member("bin/sh")],
    "a back slash": [member("entries/..\\..\\outside")],
    "a hidden name": [member("entries/.outside")],
    "too deep": [member("entries/" + "a/" * 50 + "b")],
    "an empty part": [member("entries//outside")],
    "a new line": [member("entries/ab/c\n")],
    "a symbolic link": [member("entries/link", b"", type=tarfile.SYMTYPE, linkname="/etc")],
    "a file behind a link": [
        member("entries/ab", b"", type=tarfile.SYMTYPE, linkname="/tmp"),
        member("entries/ab/outside"),
    ],
    "a hard link": [member("entries/link", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd")],
    "a device": [member("entries/null", b"", type=tarfile.CHRTYPE)],
    "a pipe": [member("entries/pipe", b"", type=tarfile.FIFOTYPE)],
    "one file twice": [member(ENTRY)],
    "a file in the place of a folder": [member("entries/ab", b"x")],
    "a long header": [member("entries/ab/x", pax_headers={"comment": "x" * (2 << 20)})],
    "a map of holes": [member("entries/ab/x", pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})],
}


def refused(opened, images, match, reference=":tag"):
    tier = opened(reference)
    with pytest.warns(ProgCacheWarning, match=match):
        assert tier.load(KEY) is None
    assert tier.load(KEY) is None
    assert not images.exists() or os.listdir(images) == [], "nothing of it is left"


@pytest.mark.parametrize("hazard", HAZARDS.values(), ids=HAZARDS)
def test_hazards_in_a_layer_refuse_it_whole(registry, opened, images, hazard, tmp_path):
    registry.image(archive(*hazard))
    refused(opened, images, r"failed \(")
    assert not list(tmp_path.rglob("outside*"))
    assert not os.path.lexists("/tmp/outside")


def test_a_cache_that_cannot_be_written_is_named(registry, opened, images, filled):
    registry.image(filled[1])
    images.parent.write_bytes(b"")  # a file where a directory should be
    tier = opened()
    with pytest.warns(ProgCacheWarning, match=f"can't unpack the image in {images} "):
        assert tier.load(KEY) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a home directory")
def test_a_user_without_a_home_directory_is_told_so(registry, opened, filled, monkeypatch):
    registry.image(filled[1])
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "nowhere")
    tier = opened()
    with pytest.warns(ProgCacheWarning, match="in the user's cache .no home directory is known"):
        assert tier.load(KEY) is None


def test_bombs_are_not_unpacked(registry, opened, images):
    bomb = gzip.compress(b"\0" * (64 << 20), 9, mtime=0)
    assert len(bomb) < 1 << 17
    registry.image(bomb)
    refused(opened, images, "an implausible size")


def test_headers_without_an_end_are_not_read(registry, opened, images):
    """Each header describes the next one, and tarfile recurses for each."""
    header = tarfile.TarInfo("entries/ab/x")
    header.type = tarfile.XGLTYPE
    registry.image(gzip.compress(header.tobuf() * 20_000, mtime=0))
    refused(opened, images, r"failed \(the layer")


@pytest.mark.parametrize(
    "pack", [bytes, functools.partial(gzip.compress, compresslevel=1, mtime=0)], ids=["tar", "gzip"]
)
def test_a_layer_is_unpacked_in_little_memory(registry, opened, images, pack, monkeypatch):
    big = os.urandom(4 << 20) * 6
    registry.image(pack(gzip.decompress(archive(member("records/" + "a" * 64, big)))))
    tier = opened()
    tracemalloc.start()
    try:
        assert tier.load(KEY) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    (image,) = images.iterdir()
    assert (image / "records" / ("a" * 64)).read_bytes() == big
    assert peak < len(big) / 2


def test_what_is_not_as_its_digest_says_is_not_used(registry, opened, images, filled):
    layer = filled[1]
    for lie in (layer[:-1] + bytes([layer[-1] ^ 1]), layer[:-1], layer + b"\0"):
        registry.image(layer)
        registry.answers[f"/v2/team/kernels/blobs/{sha256(layer)}"] = (200, {}, lie)
        refused(opened, images, r"failed \(")
    other = gzip.compress(gzip.decompress(layer), 1)  # valid, but with another digest than the manifest's
    registry.image(layer, size=len(other))
    registry.answers[f"/v2/team/kernels/blobs/{sha256(layer)}"] = (200, {}, other)
    refused(opened, images, "returned something else")
    digest = registry.image(layer)
    registry.answers[f"/v2/team/kernels/manifests/{digest}"] = (200, {}, b"{}")
    refused(opened, images, "returned a manifest other than", f"@{digest}")


def test_sizes_are_judged_before_anything_is_read(registry, opened, images, filled):
    registry.image(filled[1], size=1 << 40)
    refused(opened, images, "more than the limit")
    assert not any("blobs" in path for path, _ in registry.asked)
    registry.image(filled[1])
    blob = f"/v2/team/kernels/blobs/{sha256(filled[1])}"
    registry.answers[blob] = (200, {"Content-Length": str(1 << 40)}, b"")
    refused(opened, images, "more than the limit")


@pytest.mark.parametrize(
    ("why", "manifest"),
    [("is not JSON", b"<html>"), ("is not a JSON object", b"[]"), ("is not JSON", b"[" * 100_000),
     *[("not an image with one layer", layers) for layers in
       (b"{}", b'{"layers": 1}', b'{"layers": [1]}', b'{"layers": [{}]}',
        b'{"layers": [{"digest": "sha256:../../x", "size": 1}]}',
        b'{"layers": [{"digest": "sha256:%b", "size": true}]}' % (b"0" * 64))],
     ("exactly one image", b'{"manifests": []}'), ("exactly one image", b'{"manifests": {}}')],
)  # fmt: skip
def test_hostile_manifests(registry, opened, images, manifest, why):
    registry.manifest(manifest)
    refused(opened, images, why)


def test_a_layer_that_is_no_archive_is_refused(registry, opened, images):
    for layer in (b"no archive" * 100, gzip.compress(b"no archive" * 100), b"\x1f\x8bno archive"):
        registry.image(layer)
        refused(opened, images, "can't be read")


@pytest.mark.parametrize(
    ("name", "is_ours"),
    [("CACHEDIR.TAG", True), ("entries", False), ("entries/ab", True), ("records/a/b/c/d", True),
     ("records/a/b/c/d/e", False), ("records/..", False), ("records//a", False), ("other/ab", False),
     ("tmp/ab", False), ("", False), ("CACHEDIR.TAG/a", False)],
)  # fmt: skip
def test_only_what_a_cache_directory_has_is_unpacked(name, is_ours):
    assert _is_ours(name) is is_ours


def test_redirects_end_and_stay_encrypted(registry, opened, images, filled):
    registry.image(filled[1])
    blob = f"/v2/team/kernels/blobs/{sha256(filled[1])}"
    registry.answers[blob] = (302, {"Location": blob}, b"")
    refused(opened, images, "answered 302")
    assert len(registry.asked) < 12
    registry.answers[blob] = (302, {"Location": "file:///etc/passwd"}, b"")
    refused(opened, images, "redirects to something other")


def test_a_signed_image_needs_no_trust_in_the_registry(registry, opened, images, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cuda_progcache.store.base import entry_digest
    from cuda_progcache.store.tiers.signing import Signer

    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
    signer = Signer(str(tmp_path / "key.pem"))
    with FileStreamProgramCache(tmp_path / "signed", durability="none") as cache:
        cache.publish(KEY, b"ours", signer(entry_digest(KEY), b"ours", {"name": "k"}))
        cache.publish(b"not signed", b"theirs", {"name": "k"})
        sets = [{"entry": entry_digest(KEY)}]
        manifest_name, content = "ef" * 32, json.dumps({"format": 3, "sets": sets}, separators=(",", ":")).encode()
        merge_manifest(str(cache.path), manifest_name, content)
        write_oci(cache, tmp_path / "image", lambda _: True)
    (manifest,) = json.loads((tmp_path / "image" / "index.json").read_text())["manifests"]
    for path in (tmp_path / "image" / "blobs" / "sha256").iterdir():
        registry.answers[f"/v2/team/kernels/blobs/sha256:{path.name}"] = (200, {}, path.read_bytes())
    body = registry.answers[f"/v2/team/kernels/blobs/{manifest['digest']}"]
    registry.answers["/v2/team/kernels/manifests/tag"] = body
    layer = f"file://{tmp_path / 'signed'}?trust=signed&keys={public}"
    for tier in (opened(trust="signed", keys=public), open_tier(parse_tier(layer))):
        assert tier.load(KEY).data == b"ours"
        with pytest.warns(ProgCacheWarning, match="isn't signed"):
            assert tier.load(b"not signed") is None
        assert tier.find_manifest(manifest_name) is None
    trusting = f"?tls=no&connect_timeout=300&timeout=300&trust=signed&keys={public}"
    for reference, found in ((":tag", None), (f"@{manifest['digest']}", content)):
        tier = opened(reference, trust="signed", keys=public)
        with pytest.warns(ProgCacheWarning, match="isn't signed"):
            assert tier.load(b"not signed") is None  # the digest in the URL vouches for manifests only
        assert tier.find_manifest(manifest_name) == found
        report = sync(f"oci://{registry.host}/team/kernels{reference}{trusting}", tmp_path / reference[1:4])
        assert (report.copied, report.unusable, report.manifests) == (1, 1, 0 if found is None else 1)


LONG_AGO = time.time() - 40 * 86400.0


def age(images, moment=LONG_AGO):
    """Set the times of everything in the images folder to ``moment``."""
    for path in (images, *images.rglob("*")):
        os.utime(path, (moment, moment))


def test_the_end_of_a_store_waits_for_no_pull(registry, opened, images, filled, until):
    digest = registry.image(filled[1])
    (path,) = (path for path in registry.answers if "/blobs/" in path)
    answer, asked, gate = registry.answers[path], threading.Event(), threading.Event()
    registry.answers[path] = lambda _: (asked.set(), gate.wait(300), answer)[2]
    tier = opened(timeout=0.5)
    with pytest.warns(ProgCacheWarning, match="took too long"):
        assert tier.load(KEY) is None
    assert asked.wait(300)
    tier.close()
    assert not images.exists() or digest.replace(":", "-") not in os.listdir(images)
    gate.set()
    until(lambda: digest.replace(":", "-") in os.listdir(images))
    assert opened().load(KEY) is not None


def pull(registry, opened, number):
    """Create another image and pull it; return the name of its directory."""
    digest = registry.image(archive(member(f"records/{number:064x}")))
    tier = opened()
    assert tier.load(b"none of it") is None
    tier.close()
    return digest.replace(":", "-")


def test_an_image_that_was_not_used_for_a_month_goes_when_another_is_unpacked(registry, opened, images):
    pull(registry, opened, 1)
    (images / ".unpacking-killed" / "entries").mkdir(parents=True)
    age(images)
    recent = pull(registry, opened, 2)
    assert os.listdir(images) == [recent]
    age(images, time.time() - 20 * 86400.0)
    latest = pull(registry, opened, 3)
    assert {*os.listdir(images)} == {recent, latest}, "a program may want it next week"
    age(images)
    tier = opened(f"@{recent.replace('-', ':')}")
    assert tier.load(KEY) is None
    tier.close()
    newest = pull(registry, opened, 4)
    assert {*os.listdir(images)} == {recent, newest}
    open_files = [path for path in map(target_of, os.listdir("/proc/self/fd")) if str(images) in path]
    assert open_files == [], "what was removed is still locked"


def target_of(descriptor):
    """Return the path of an open file; empty if it has just been closed."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


HOLDER = """
import os, sys
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier
tier = open_tier(parse_tier(sys.argv[1]))
assert tier.load(b"a key").data == b"binary"
if sys.argv[2] == "forked" and os.fork():
    os._exit(0)
print("ready", flush=True)
sys.stdin.read()
print(tier.load(b"a key").data.decode(), flush=True)
"""


@pytest.mark.parametrize("who", ["this", "forked"])
def test_an_image_that_another_process_uses_stays(registry, opened, filled, images, who):
    digest = registry.image(filled[1])
    url = f"oci://{registry.host}/team/kernels:tag?tls=no&connect_timeout=300&timeout=300"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, url, who], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "ready\n"
        age(images)
        pull(registry, opened, 1)
        assert digest.replace(":", "-") in os.listdir(images)
        told, _ = holder.communicate("")
        assert told == "binary\n"
    age(images)
    latest = pull(registry, opened, 2)
    assert os.listdir(images) == [latest], "nobody uses it any more"


def test_a_real_registry(real_registry, tmp_path):
    """skopeo pushes what export --oci writes unchanged; a machine with an empty cache then compiles nothing."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "v.h").write_text("#define V 1\n")

    def compiled(cache):
        options = ProgramOptions(arch="sm_80", include_path=[str(tmp_path / "include")])
        code = '#include "v.h"\nextern "C" __global__ void k(int *a) { *a = V; }'
        return Program(code, "c++", options).compiled("cubin", cache=cache)

    with FileStreamProgramCache(tmp_path / "here", durability="none") as here:
        made = compiled(here)
        write_oci(here, tmp_path / "image", lambda _: True)
    target = f"docker://{real_registry}/team/kernels:v1"
    subprocess.run(
        ["skopeo", "copy", "--dest-tls-verify=false", "--insecure-policy", f"oci:{tmp_path / 'image'}:latest", target],
        check=True, capture_output=True,
    )  # fmt: skip
    (named,) = json.loads((tmp_path / "image" / "index.json").read_text())["manifests"]
    for number, reference in enumerate((":v1", f"@{named['digest']}")):
        tier = f"oci://{real_registry}/team/kernels{reference}?tls=no&connect_timeout=300&timeout=300"
        with FileStreamProgramCache(tmp_path / f"there-{number}", durability="none", tiers=[tier]) as there:
            found = compiled(there)
            assert (found.hit, found.data) == (True, made.data)
