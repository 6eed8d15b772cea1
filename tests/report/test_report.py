# SPDX-License-Identifier: Apache-2.0
"""Reports: their figures compared with the store's, the content of their file, and their behaviour in Chromium."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest

from cuda_progcache._util.amounts import size
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.report import data, page
from cuda_progcache.report.listings import listings
from cuda_progcache.report.plots import plots

#: The limit on the size of a report on 10,000 programs without listings, in bytes.
LARGEST = 4_000_000
#: Milliseconds to wait for Chromium at most, on a busy machine.
PATIENCE = 300_000


class Parts(HTMLParser):
    """A parser that collects the elements of a page, with their attributes."""

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
    assert sum(one.hits for one in found.lookups) == found.counted.hits
    assert sum(one.misses for one in found.lookups) == found.counted.misses
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


def test_lookups_are_told_by_the_hour_or_by_the_day():
    """Lookups are grouped by hour if they span less than two days, otherwise by day.

    Undated lookups come first, and periods without lookups are left out.
    """
    from cuda_progcache.store.stats import Span, Totals

    day = 86400.0 * 20_000
    hours = [Span(day + 3600 * hour, Totals(hits=hour, misses=1)) for hour in (0, 5, 47)]
    idle = Span(day + 3600 * 9, Totals(stored=3))
    old = Span(0.0, Totals(hits=4))
    assert data._lookups([old, *hours, idle]) == (
        (0.0, 0.0, 4, 0), *((day + 3600 * hour, 3600.0, hour, 1) for hour in (0, 5, 47)),
    )  # fmt: skip
    later = Span(day + 3600 * 48, Totals(hits=1, misses=3))
    assert data._lookups([old, *hours, idle, later]) == (
        (0.0, 0.0, 4, 0), (day, 86400.0, 5, 2), (day + 86400, 86400.0, 47, 1), (day + 2 * 86400, 86400.0, 1, 3),
    )  # fmt: skip
    assert data._lookups([old]) == ((0.0, 0.0, 4, 0),)
    assert data._lookups([idle]) == ()
    assert later.counted.hits / 4 == data._lookups([later])[0].hit_rate


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
    assert len(unpacked(html, "chunk-0")["records"]) == len(found.programs)
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
    row = next(one for one in unpacked(html, "chunk-0")["records"] if "</script>" in one["log"])
    assert row["log"] == "</script><img src=x onerror=alert(1)>\\x1b[31m\\u202egnp.exe\\x00"


@pytest.mark.parametrize("text", ["a\x7f", "\u2066x\u2069", "\u200f", "\ud800", "\u2028", "\x85", "\ufeff"])
def test_what_does_not_show_is_written_out(text):
    assert data.visible(text).isprintable()
    assert "\\" in data.visible(text)
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
    assert CliRunner().invoke(app, ["report", "--cache-dir", str(tmp_path / "none")]).exit_code == 5
    asked = [each for each in asked if each != "--json"]
    shown = CliRunner().invoke(app, [*asked[:-2], "1", "--no-plots"])
    assert "reading machine code: 1 of 1" in shown.stderr  # a listing takes about a second


@pytest.fixture(scope="module")
def few(html, found, tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "report.html"
    path.write_text(html, "utf-8")
    return path, found


@pytest.fixture(scope="module")
def many(large, tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "report.html"
    path.write_text(page.write(large), "utf-8")
    return path, large


@pytest.fixture(scope="module")
def browser(few, many):
    """Headless Chromium; tests that use it are skipped if Chromium or playwright isn't installed.

    The reports are written before it starts. In the greenlets of playwright, CPython 3.11's ast.parse, with which
    pytest rewrites the asserts of imported modules, can fail with "AST constructor recursion depth mismatch".
    """
    driver = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: pip install playwright")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no Chromium is installed: apt install chromium, or set CHROMIUM")
    with driver.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=PATIENCE)
        yield started
        started.close()


@contextmanager
def opened(browser, path, width=1400, **options):
    """Open a report in a new page; console messages, script errors, dialogs and network requests are failures."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    context.set_default_timeout(PATIENCE)
    shown = context.new_page()
    complaints = []
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    shown.goto(path.as_uri())
    shown.locator("html[data-ready]").wait_for(state="attached")
    yield shown
    context.close()
    assert not complaints


def go(shown, view):
    shown.evaluate("(view) => { location.hash = view; }", view)
    shown.locator(f'html[data-ready="{view}"]').wait_for(state="attached")


def test_ten_thousand_programs_fit_and_are_searched_and_sorted(browser, many):
    path, found = many
    assert len(found.programs) == 10_000
    assert path.stat().st_size < LARGEST
    with opened(browser, path) as shown:
        shown.get_by_role("link", name="Programs", exact=True).click()
        rows = shown.locator("#rows tr")
        assert rows.count() == 50
        assert "10,000 programs" in shown.locator("#count").inner_text()
        shown.get_by_label("Search programs").fill("KERNEL_7 sm_80")
        expected = [one for one in found.programs if "kernel_7" in one.name and one.arch == "sm_80"]
        assert f"{len(expected):,} of 10,000" in shown.locator("#count").inner_text()
        shown.get_by_role("button", name="size").click()
        assert shown.locator('th[aria-sort="descending"]').inner_text() == "size"
        largest = max(expected, key=lambda one: one.size)
        assert size(largest.size) in rows.first.inner_text()
        shown.get_by_role("button", name="name").click()
        assert shown.locator("th[aria-sort=ascending]").inner_text() == "name"
        shown.get_by_role("button", name="Next").click()
        assert "page 2 of" in shown.locator("#pager").inner_text()
        rows.first.get_by_role("link").click()
        shown.locator("#entry .facts").wait_for()
        digest = shown.locator("#entry .digest").first.inner_text()
        one = next(one for one in found.programs if one.digest == digest)
        shown.get_by_text(f"Headers ({len(one.headers)})").click()
        assert one.headers[0][0] in shown.locator("#entry").inner_text()


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_screen(browser, few, many, width):
    for path, found in (few, many):
        with opened(browser, path, width, color_scheme="dark") as shown:
            digests = [one.digest for one in found.programs if one.target == "cubin"][:2]
            for view in ("overview", "programs", "variants", f"entry={digests[0]}", f"diff={','.join(digests)}"):
                go(shown, view)
                assert shown.evaluate("document.documentElement.scrollWidth") <= width, view


def test_two_programs_are_chosen_and_compared(browser, few):
    path, found = few
    old, new = sorted((o for o in found.programs if o.target == "cubin" and o.arch == "sm_90"), key=lambda o: o.created)
    with opened(browser, path) as shown:
        go(shown, "programs")
        button = shown.get_by_role("button", name=re.compile("^Compare two"))
        for one in (old, new):
            assert button.is_disabled()
            shown.get_by_role("checkbox", name=re.compile(one.digest[:12])).check()
        button.click()
        shown.locator("#diff h4").wait_for()
        told = shown.locator("#diff").inner_text()
        assert old.digest[:12] in told
        assert "code" in told
        # The edit multiplies a by 2, which adds an FADD or FMUL.
        cut, add = (shown.locator(f"#diff .{kind}").all_inner_texts() for kind in ("cut", "add"))
        assert add
        assert cut != add
        assert all("FMUL" not in line for line in cut)
        assert any(re.search("FADD|FMUL", line) for line in add)


def test_a_program_opens_with_its_code_by_keyboard(browser, few):
    path, found = few
    one = next(one for one in found.programs if one.arch == "sm_80")
    with opened(browser, path) as shown:
        go(shown, "programs")
        shown.get_by_role("link", name=one.digest[:12]).press("Enter")
        code = shown.get_by_role("listbox", name="SASS: saxpy")
        code.wait_for()
        assert shown.evaluate("document.activeElement.id") == "title-entry"
        code.press("End")
        assert shown.locator('[role=option][aria-selected="true"]').count() == 1
        code.press("ArrowUp")
        assert code.get_attribute("aria-activedescendant") == shown.locator("[aria-selected=true]").get_attribute("id")
        assert str(one.kernels[0].registers) in shown.locator("#entry table").first.inner_text()
        assert "isn't kept" in shown.locator("#entry").inner_text()
        assert shown.locator(".picture img").evaluate("(image) => image.decode().then(() => image.naturalWidth)") > 100


def test_text_from_elsewhere_runs_nothing(browser, few, hostile):
    path, found = few
    one = next(one for one in found.programs if "onerror" in one.name)
    with opened(browser, path) as shown:
        for view in ("programs", f"entry={one.digest}"):
            go(shown, view)
            assert hostile[:37] in shown.locator("main").inner_text()
        assert shown.locator("img[src=x]").count() == 0


#: Finds elements with too little contrast by WCAG 2.2 (1.4.3: 4.5, or 3 for large text; 1.4.11: 3 for control borders).
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const luminance = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const v = c[i] / 255; return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const ratio = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x); return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => {
    const above = [];
    for (let at = element; at; at = at.parentElement) above.push(rgba(getComputedStyle(at).backgroundColor));
    return above.reduceRight((below, colour) => over(colour, below), rgba(getComputedStyle(document.documentElement)
      .colorScheme && matchMedia("(prefers-color-scheme: dark)").matches ? "#121212" : "#fff"));
  };
  const shown = (element) => element.checkVisibility({ visibilityProperty: true }) && !element.closest(":disabled")
    && element.getBoundingClientRect().width > 1;
  const found = { texts: 0, controls: 0, low: [] };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement, style = getComputedStyle(element);
    if (!node.data.trim() || !shown(element) || element.closest("script, style")) continue;
    const below = ground(element);
    const ink = over(rgba(element.closest("svg") ? style.fill : style.color), below);
    const px = parseFloat(style.fontSize), large = px >= 24 || (px >= 18.66 && parseInt(style.fontWeight) >= 700);
    found.texts += 1;
    if (ratio(ink, below) < (large ? 3 : 4.5)) found.low.push([node.data.trim(), ratio(ink, below)]);
  }
  for (const element of document.querySelectorAll("input, .bar button, .bar select")) {
    if (!shown(element) || element.type === "checkbox") continue;
    found.controls += 1;
    const edge = rgba(getComputedStyle(element).borderTopColor), below = ground(element.parentElement);
    if (ratio(over(edge, below), below) < 3) found.low.push([element.outerHTML, ratio(edge, below)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, few, scheme):
    path, found = few
    digests = [one.digest for one in found.programs if one.target == "cubin"]
    with opened(browser, path, color_scheme=scheme) as shown:
        shown.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        controls = 0
        for view in ("overview", "programs", "variants", f"entry={digests[0]}", f"diff={digests[0]},{digests[1]}"):
            go(shown, view)
            shown.evaluate("for (const one of document.querySelectorAll('main [role=option].linked')) one.click()")
            told = shown.evaluate(CONTRASTS)
            assert told["texts"] >= 15, view
            assert told["low"] == [], (view, scheme)
            controls += told["controls"]
        assert controls >= 2


FOCUSED = """() => {
  const element = document.activeElement, style = getComputedStyle(element);
  if (element === document.body) return null;
  const all = [...document.querySelectorAll("*")];
  return { at: all.indexOf(element), ring: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1,
           inside: element.getBoundingClientRect().bottom > 0 };
}"""
FOCUSABLE = """() => {
  const all = [...document.querySelectorAll("*")];
  return all.map((one, at) => [one, at]).filter(([one]) => one.tabIndex >= 0 && !one.matches(":disabled")
    && one.checkVisibility({ visibilityProperty: true })).map(([one, at]) => at);
}"""


@pytest.mark.parametrize("view", ["overview", "programs", "variants", "entry", "diff"])
def test_tab_comes_to_everything_and_shows_where_it_is(browser, few, view):
    path, found = few
    digests = [one.digest for one in found.programs if one.target == "cubin"]
    with opened(browser, path) as shown:
        go(shown, {"entry": f"entry={digests[0]}", "diff": f"diff={digests[0]},{digests[1]}"}.get(view, view))
        shown.keyboard.press("Tab")  # tabbing would otherwise start where a script set the focus
        shown.evaluate("document.querySelector('.skip').focus()")
        wanted = shown.evaluate(FOCUSABLE)
        seen = wanted[:1]
        for _ in range(len(wanted) + 5):
            shown.keyboard.press("Tab")
            focused = shown.evaluate(FOCUSED)
            if focused is None:
                break  # the focus has left the page: there is no trap
            assert focused["ring"], focused
            assert focused["inside"], focused
            seen.append(focused["at"])
        assert sorted(set(seen)) == wanted


def test_all_of_it_is_done_without_a_mouse(browser, few):
    path, found = few
    with opened(browser, path) as shown:
        shown.keyboard.press("Tab")
        assert shown.evaluate("document.activeElement.className") == "skip"
        shown.keyboard.press("Enter")
        shown.locator('html[data-ready="programs"]').wait_for(state="attached")
        shown.get_by_role("button", name="size").focus()
        shown.keyboard.press("Space")
        assert shown.locator('th[aria-sort="descending"]').inner_text() == "size"
        assert shown.evaluate("document.activeElement.textContent").startswith("size")
        boxes = shown.locator("#rows input[type=checkbox]")
        for at in (0, 1):
            boxes.nth(at).focus()
            shown.keyboard.press("Space")
        shown.get_by_role("button", name=re.compile("^Compare two")).focus()
        shown.keyboard.press("Enter")
        shown.locator("#diff .facts, #diff table, #diff h4").first.wait_for()
        assert shown.evaluate("document.activeElement.id") == "title-diff"
        shown.go_back()
        shown.locator('html[data-ready="programs"]').wait_for(state="attached")
        shown.get_by_label("Search programs").focus()
        shown.keyboard.type("sm_80")
        assert shown.locator("#rows tr").count() == 1
        go(shown, "overview")
        shown.locator("summary", has_text="Hit rate over time").focus()
        shown.keyboard.press("Enter")
        assert f"{found.lookups[-1].hits:,}" in shown.locator("details[open] tbody tr").last.inner_text()
