# SPDX-License-Identifier: Apache-2.0
"""A tier's settings: what is accepted, what is refused, and that no secret is ever shown."""

from __future__ import annotations

import copy
import json
import pickle
import traceback

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuda_progcache.errors import ConfigError, StoreError
from cuda_progcache.store.tiers.settings import SCHEMES, Secret, TierSettings, parse_tier

READ = {
    "redis://cache": ("redis://cache", {"scheme": "redis", "host": "cache", "port": None, "path": "", "mode": "rw"}),
    "redis://Cache:6379/2?mode=ro&timeout=1.5": (
        "redis://cache:6379/2",
        {"host": "cache", "port": 6379, "path": "2", "mode": "ro", "timeout": 1.5, "connect_timeout": 0.5},
    ),
    "rediss://[::1]:6380": ("rediss://[::1]:6380", {"host": "::1", "port": 6380}),
    "https://cache.example/a/b/?max_bytes=2MB&ca-file=/ca.pem": (
        "https://cache.example/a/b",
        {"path": "a/b", "max_bytes": 2_000_000, "ca_file": "/ca.pem"},
    ),
    "s3://bucket/a/b?endpoint=http://localhost:9000&region=eu-1": (
        "s3://bucket/a/b",
        {"host": "bucket", "path": "a/b", "endpoint": "http://localhost:9000", "region": "eu-1"},
    ),
    "oci://registry:5000/team/kernels:v1?tls=no": ("oci://registry:5000/team/kernels:v1", {"mode": "ro", "tls": False}),
    f"oci://registry/kernels@sha256:{'0' * 64}": (f"oci://registry/kernels@sha256:{'0' * 64}", {"pinned": True}),
    "oci://registry/n": ("oci://registry/n", {"pinned": False, "tls": True}),
    "file:///srv/a%20layer": ("file:///srv/a%20layer", {"mode": "ro", "path": "/srv/a layer"}),
    "file:layer": ("file:///here/layer", {"path": "/here/layer"}),
    "https://h?trust=signed&keys=main.pem," + "AB" * 32: (
        "https://h",
        {"trust": "signed", "keys": ("/here/main.pem", "ab" * 32)},
    ),
    "redis://h?lease_url=redis://:pw%40leases/1": ("redis://h", {"lease_url": "redis://leases/1"}),
}


@pytest.mark.parametrize("text", READ)
def test_a_url_is_read(text):
    url, fields = READ[text]
    tier = parse_tier(text, folder="/here")
    assert tier.url == url
    assert {name: getattr(tier, name) for name in fields} == fields


def test_a_table_is_read_as_a_url_is():
    options = {"mode": "ro", "trust": "signed", "keys": ["a.pem"], "max_bytes": 1000, "timeout": 1, "user": "ci"}
    table = parse_tier({"url": "https://h/p", **options}, folder="/here")
    url = parse_tier("https://h/p?mode=ro&trust=signed&keys=a.pem&max_bytes=1000&timeout=1&user=ci", folder="/here")
    assert table == url
    assert table.credentials.user.reveal() == "ci"
    for tls in (True, False):
        assert parse_tier({"url": "oci://registry/n", "tls": tls}).tls is tls


def test_every_option_is_shown(monkeypatch):
    monkeypatch.delenv("PASS", raising=False)
    options = {"endpoint": "http://localhost:9000", "region": "eu-1", "keys": "/a.pem", "sign_key": "/k.pem"}
    given = {"url": "s3://bucket/p", **options, "password": "${PASS}", "lease_url": "redis://:abc@leases"}
    told = {"url": "s3://bucket/p", "mode": "rw", "trust": "anyone", "max_bytes": 64 * 2**20, **options}
    told |= {"connect_timeout": 0.5, "timeout": 2.0, "write_timeout": 10.0, "keys": ["/a.pem"]}
    assert parse_tier(given).shown() == told | {
        "password": "variable PASS (not set)",
        "lease_url": "redis://leases",
    }
    assert (
        parse_tier("oci://registry/n?tls=no&ca_file=/ca.pem").shown().items()
        >= {"tls": False, "ca_file": "/ca.pem"}.items()
    )
    assert "tls" not in parse_tier("oci://registry/n").shown()


REFUSED = {
    "cache:6379": "scheme",
    "no url": "isn't a URL",
    "": "isn't a URL",
    "reddis://h": "did you mean 'redis'?",
    "redis://": "no valid host",
    "redis://h:0": "no valid host",
    "redis://h:port": "no valid host",
    "https://[::1": "no valid host",
    "redis://a..b": "no valid host",
    "redis://.": "no valid host",
    f"redis://{64 * 'a'}": "no valid host",
    "redis://h/db": "database number",
    "https://h/a/../b": "'..'",
    "https://h/p?mod=ro": "did you mean 'mode'?",
    "https://h/p?mode=readonly": "rw, ro",
    "https://h/p?mode=ro&mode=rw": "twice",
    "https://h/p?ro": "name=value",
    "https://h/p#x": "%23",
    "https://h?timeout=0": "seconds",
    "https://h?timeout=nan": "seconds",
    "https://h?max_bytes=5GB": "below 4 GB",
    "https://h?trust=signed": "no keys",
    "https://h?mode=ro&sign_key=k": "nothing is published",
    "https://h?endpoint=http://x": "which https doesn't take",
    "s3://b?endpoint=localhost": "http(s)://",
    "oci://registry": "names no image",
    "oci://registry/n:t?mode=rw": "is read-only",
    "file:///layer?mode=rw": "is read-only",
    "file://host/layer": "this machine",
    "file:///layer?timeout=1": "doesn't take",
    "redis://:a@h?password=b": "twice",
    "https://h?token=a&token_file=b": "twice",
    "https://h?lease_url=https://other": "must be a Redis",
    "https://h?lease_url=reddis://other": "lease_url",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_wrong_is_said(text):
    with pytest.raises(ConfigError) as refused:
        parse_tier(text, where="CUDA_PROGCACHE_TIERS: tier 1")
    assert str(refused.value).startswith("CUDA_PROGCACHE_TIERS: tier 1")
    assert REFUSED[text] in str(refused.value)


WRONG_TYPES = [{"mode": 1}, {"keys": 1}, {"keys": [1]}, {"": 1}, {"password": 7}, {"timeout": True}, {"ca_file": ""}]
WRONG_TYPES += [{"ca_file": 7}, {"max_bytes": True}, {"max_bytes": None}]


@pytest.mark.parametrize("table", [7, None, {}, {"url": 3}, *({"url": "redis://h", **wrong} for wrong in WRONG_TYPES)])
def test_a_table_of_other_types_is_refused(table):
    with pytest.raises(ConfigError):
        parse_tier(table)


SECRET = "geheim-7f3a"
#: Ways to write a tier with a secret, both correct and mistaken.
PLACES = [
    "{scheme}://user:{secret}@host",
    "{scheme}://{secret}@host",
    "{scheme}://:{secret}@host:1x/0",
    "{scheme}://:{secret}@",
    "{scheme}://user:{secret}",
    "{secret}@host",
    "{secret}",
    "{scheme}:{secret}@host",
    "{scheme}://host/{secret}@x",
    "{scheme}://host?password={secret}",
    "{scheme}://host?pasword={secret}",
    "{scheme}://host?{secret}",
    "{scheme}://host?token={secret}&token={secret}",
    "{scheme}://:{secret}@host?password={secret}",
    "{scheme}://host?mode=ro#{secret}",
    "{scheme}://host?lease_url=redis://:{secret}%40leases",
    "{scheme}://host?lease_url=redis://:{secret}%40",
    "{scheme}://:{secret}@host?mode=nothing",
    "{scheme}://:{secret}@[::1",
]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(PLACES),
    st.sampled_from([*SCHEMES, "reddis"]),
    st.text(st.sampled_from("/?#@:%&= \u2100\t[]"), max_size=2),
    st.text(st.sampled_from("/?#@:%&= \u2100\t[]"), max_size=2),
)
@example(PLACES[0], "https", "", "\u2100")  # urllib refuses it, and repeats it in its error
def test_no_secret_is_shown(place, scheme, before, after):
    """This holds whatever is wrong with the text, and wherever the secret is in it."""
    text = place.format(scheme=scheme, secret=f"{before}{SECRET}{after}")
    shown = []
    try:
        tier = parse_tier(text)
    except ConfigError as error:
        shown += ["".join(traceback.format_exception(error)), repr(error), *map(repr, chain(error))]
        shown.append(repr(pickle.dumps(error)))
    else:
        shown += [repr(tier), str(tier), repr(pickle.dumps(tier)), json.dumps(tier.shown())]
        shown += [repr(tier.credentials), str(tier.credentials), f"{tier.credentials}"]
        shown += [repr(copy.deepcopy(tier)), repr(tier.lease)]
        if SECRET in tier.url and (scheme == "file" or SECRET in text.rpartition("@")[2]):
            return  # the secret was the host or the path
    assert not [line for line in shown if SECRET in line]


def chain(error):
    """Yield an error and the errors that led to it, including suppressed ones."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_a_secret_is_read_where_it_is_used(monkeypatch, tmp_path):
    (tmp_path / "password").write_text("from a file\n")
    tier = parse_tier("https://${WHO}:${PASS}@h?token_file=password", folder=str(tmp_path))
    monkeypatch.setenv("WHO", "ci")
    monkeypatch.setenv("PASS", SECRET)
    for one in (tier, pickle.loads(pickle.dumps(tier)), copy.copy(tier)):
        assert [secret.reveal() for secret in one.credentials] == ["ci", SECRET, "from a file"]
    assert tier.shown()["password"] == "variable PASS"
    monkeypatch.delenv("PASS")
    with pytest.raises(StoreError, match="PASS"):
        tier.credentials.password.reveal()
    (tmp_path / "password").unlink()
    with pytest.raises(StoreError, match="password"):
        tier.credentials.token.reveal()


def test_a_secret_that_was_given_stays_in_its_process_but_for_its_children(monkeypatch):
    monkeypatch.setenv("PASS", SECRET)
    tier = parse_tier("https://ci:${PASS}@h?token=abc&lease_url=redis://:def%40leases")
    elsewhere = pickle.loads(pickle.dumps(tier))
    with pytest.raises(StoreError, match="another process"):
        elsewhere.credentials.token.reveal()
    child = TierSettings.of_parent(json.loads(json.dumps(tier.for_child())))
    monkeypatch.delenv("PASS")
    assert [secret.reveal() for secret in child.credentials] == ["ci", SECRET, "abc"]
    assert child.lease.credentials.password.reveal() == "def"
    assert child.url == tier.url


def test_settings_hold_no_url_with_a_secret():
    with pytest.raises(ConfigError) as refused:
        TierSettings(f"redis://:{SECRET}@host")
    assert SECRET not in str(refused.value)


def test_a_secret_compares_by_what_it_is():
    assert Secret.parse("a") == Secret.parse("a") != Secret.parse("${a}")
    assert len({Secret.parse("a"), Secret.parse("a"), Secret.parse("${a}")}) == 2
    assert Secret.parse("a") != "a"
