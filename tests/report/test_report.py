# SPDX-License-Identifier: Apache-2.0
"""What a report says against the store, and what its file may hold."""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.report import data, page
from cuda_progcache.report.listings import listings
from cuda_progcache.report.plots import plots


class Parts(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))


def unpacked(html, name):
    found = re.search(rf'id="data-{name}">([^<]*)<', html)[1]
    return json.loads(gzip.decompress(base64.b64decode(found)))


@pytest.fixture(scope="module")
def found(small):
    return data.collect(small, 10**8)


@pytest.fixture(scope="module")
def html(small, found):
    return page.write(found, listings(small, [one.digest for one in found.programs]), plots(found), "1.0")


def test_the_figures_are_the_stores(small, found):
    from cuda_progcache.service.comparison import kernel_uses

    entries = {one.digest: one for one in small.entries()}
    assert {one.digest: one.size for one in found.programs} == {key: one.size for key, one in entries.items()}
    assert found.bytes == small.stats().bytes
    assert found.seconds == pytest.approx(small.census().seconds)
    assert found.counted == small.all_time()
    assert found.hit_rate == found.counted.hits / (found.counted.hits + found.counted.misses) > 0
    assert found.saved == pytest.approx(found.counted.hits * found.seconds / len(entries))
    assert sum(one.programs for one in found.periods) == sum(one.programs for one in found.costs) == len(entries)
    assert sum(one.seconds for one in found.costs) == pytest.approx(found.seconds)
    assert sum(one.seconds for one in found.periods) == pytest.approx(found.seconds)
    used = {(one.entry.digest, one.kernel): one for one in kernel_uses(entries.values())}
    shown = {(one.digest, kernel.name): kernel for one in found.programs for kernel in one.kernels}
    assert len(shown) == len(used) == 3
    for key, kernel in shown.items():
        assert (kernel.registers, kernel.occupancy) == (used[key].resources.registers, used[key].occupancy.ratio)


def test_a_miss_is_counted_by_what_had_changed(found):
    by_reason = {(one.target, one.arch, one.why) for one in found.programs if one.name == "saxpy.cu"}
    assert ("cubin", "sm_90", (data.FIRST,)) in by_reason
    assert ("cubin", "sm_90", ("source",)) in by_reason
    assert ("ptx", "sm_90", ("kind of binary",)) in by_reason
    assert ("cubin", "sm_80", ("architecture",)) in by_reason
    assert found.why[data.FIRST] == 2


def test_the_page_has_every_program(found, html):
    table = unpacked(html, "table")
    names = table["strings"]
    assert [row[0] for row in table["rows"]] == [one.digest for one in found.programs]
    assert [names[row[1]] for row in table["rows"]] == [one.name for one in found.programs]
    assert len(unpacked(html, "chunk-0")) == len(found.programs)
    for one in found.programs:
        listing = unpacked(html, f"listing-{one.digest}")
        assert bool(listing["kernels"]) == (one.target == "cubin")
        assert bool(listing["ptx"]) == (one.target == "ptx")
        assert listing["provenance"]["svg"].startswith("<svg")
    saxpy = next(one for one in found.programs if one.arch == "sm_80")
    code = unpacked(html, f"listing-{saxpy.digest}")["kernels"]["saxpy"]["code"]
    assert {line for *_, line in code if line} >= {2, 3}


def test_the_page_loads_nothing(html):
    loading = {"src", "href", "data", "action", "poster", "srcset", "formaction", "xlink:href"}
    for tag, attributes in Parts(html).elements:
        for name in loading & attributes.keys():
            assert attributes[name].startswith(("#", "data:,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_text_from_elsewhere_stays_text(html, hostile):
    assert hostile not in html
    assert not set(html) & set("\x00\x1b\u202e")
    assert [tag for tag, _ in Parts(html).elements].count("img") == 0
    row = next(one for one in unpacked(html, "chunk-0") if "</script>" in one["log"])
    assert row["log"] == "</script><img src=x onerror=alert(1)>\\u{001B}[31m\\u{202E}gnp.exe\\u{0000}"


@pytest.mark.parametrize("text", ["a\x7f", "\u2066x\u2069", "\u200f", "\ud800", "\u2028", "\x85", "\ufeff"])
def test_what_does_not_show_is_written_out(text):
    assert data.visible(text).isprintable()
    assert "\\u{" in data.visible(text)
    data.visible(text).encode("utf-8")


def test_an_empty_cache_has_a_report(tmp_path):
    from cuda_progcache import FileStreamProgramCache

    found = data.collect(FileStreamProgramCache(tmp_path))
    assert (found.programs, found.hit_rate, found.saved) == ((), None, None)
    assert "The cache is empty." in page.write(found, (), plots(found))


def test_listings_stop_at_the_limit(found, monkeypatch):
    monkeypatch.setattr(page, "LISTINGS_LIMIT", 1000)
    html = page.write(found, [("a" * 64, {"x": "fits"}), ("b" * 64, {"x": list(range(9999))}), ("c" * 64, {})])
    assert unpacked(html, "table")["listed"] == ["a" * 64, "c" * 64]


def test_plots_name_the_extra_that_they_need(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ProgCacheError, match=r"cuda-progcache\[plot\]"):
        plots(found)


def test_the_command_writes_the_file(small, tmp_path):
    from click.testing import CliRunner

    from cuda_progcache.cli.app import app

    out = tmp_path / "report.html"
    asked = ["report", "-o", str(out), "--cache-dir", str(small.path), "--listings", "0", "--no-plots", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["bytes"], told["programs"], told["listings"]) == (out.stat().st_size, len(small), 0)
    assert CliRunner().invoke(app, ["report", "--cache-dir", str(tmp_path / "none")]).exit_code == 1
