# SPDX-License-Identifier: Apache-2.0
"""A report in headless Chromium: with a few programs and with 10,000, on a wide and on a narrow screen."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest

from cuda_progcache.report import data, page
from cuda_progcache.report.listings import listings

#: Bytes of a report on 10,000 programs, without listings.
LARGEST = 4_000_000


@pytest.fixture(scope="module")
def few(small, tmp_path_factory):
    found = data.collect(small)
    path = tmp_path_factory.mktemp("few") / "report.html"
    path.write_text(page.write(found, listings(small, [one.digest for one in found.programs])), "utf-8")
    return path, found


@pytest.fixture(scope="module")
def many(large, tmp_path_factory):
    found = data.collect(large)
    path = tmp_path_factory.mktemp("many") / "report.html"
    path.write_text(page.write(found), "utf-8")
    return path, found


@contextmanager
def opened(browser, path, width=1400, **options):
    """A page on a report; what it says on the console, and any request, is an error."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
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
        shown.get_by_label("Search", exact=True).fill("KERNEL_7 sm_80")
        expected = [one for one in found.programs if "kernel_7" in one.name and one.arch == "sm_80"]
        assert f"{len(expected):,} of 10,000" in shown.locator("#count").inner_text()
        shown.get_by_role("button", name="size").click()
        assert shown.locator('th[aria-sort="descending"]').inner_text() == "size"
        largest = max(expected, key=lambda one: one.size)
        assert page.size(largest.size) in rows.first.inner_text()
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
        # The whole of both kernels is between the lines that differ and those around them.
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
