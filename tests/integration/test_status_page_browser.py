"""The status page in a browser: what a person sees, reads and hears."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cdc_sync.ops.http import HttpServer
from tests.support.chromium import Browser, Tab, find_chromium
from tests.support.status_scenes import (
    HOSTILE,
    SCENES,
    Scene,
    copying,
    dead_letters,
    hostile,
    qdrant_away,
    served,
    streaming,
)

_LOADED = "document.querySelector('#events li, #events p') !== null"

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    assert program is not None
    with Browser(program) as running:
        yield running


def opened(tab: Tab, server: HttpServer) -> None:
    tab.go(f"{server.url}/")
    tab.wait(_LOADED)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("streaming", ["In step", "Every committed change is in Qdrant.", "public.articles",
                       "0 s", "12.0 MiB", "of 1.0 GiB allowed", "low risk", "81,402",
                       "verified 3 h 0 min ago", "no difference"]),
        ("copying", ["Copying", "60 %", "731,200 of 1,204,311", "1,310,400 of ~8,930,121",
                     "waits, 48,211 rows"]),
        ("qdrant-away", ["Qdrant does not answer", "refused", "no answer for 6 min", "retrying",
                         "×23", "read by nobody"]),
        ("slot-at-risk", ["Needs attention too", "The slot is about to be lost", "961 MiB",
                          "max_slot_wal_keep_size"]),
        ("dead-letters", ["Dead letters", "17 rows could not be written", "cdc-sync dlq list"]),
        ("stopped-table", ["shop.products has stopped", "1024 dimensions", "on_dimension_change",
                           "The other tables go on."]),
    ],
)  # fmt: skip
def test_each_scene_says_what_matters(browser: Browser, name: str, words: list[str]) -> None:
    with served(SCENES[name]()) as server, browser.page() as tab:
        opened(tab, server)
        text = tab.text()
        for expected in words:
            assert expected in text
        assert tab.complaints() == []


def test_names_that_look_like_markup_stay_names(browser: Browser) -> None:
    with served(hostile()) as server, browser.page(width=360) as tab:
        opened(tab, server)
        assert HOSTILE[0] in tab.text()
        assert tab.evaluate("document.querySelectorAll('img, body script ~ script').length") == 0
        assert tab.evaluate("typeof window.owned") == "undefined"
        named = tab.evaluate("[...document.querySelectorAll('td:first-child > bdi')]"
                             ".map((cell) => cell.textContent)")  # fmt: skip
        assert isinstance(named, list)
        assert set(HOSTILE) <= set(named)
        assert tab.complaints() == []


def test_the_policy_holds_in_the_browser(browser: Browser) -> None:
    with served(streaming()) as server, browser.page() as tab:
        opened(tab, server)
        forbidden = "(() => { try { document.body.innerHTML = '<b>x</b>'; return 'allowed' } "
        assert tab.evaluate(forbidden + "catch (error) { return error.name } })()") == "TypeError"
        away = f"fetch('{server.url.replace('127.0.0.1', 'localhost')}/status')"
        assert tab.evaluate(f"{away}.then(() => 'allowed', () => 'refused')") == "refused"


def test_it_says_when_the_daemon_is_gone_and_when_it_is_back(browser: Browser) -> None:
    scene = streaming()
    with browser.page() as tab:
        with served(scene) as server:
            opened(tab, server)
            port = server.port
        tab.wait("document.body.innerText.includes('No answer since')")
        assert "public.articles" in tab.text(), "what was known last stays"
        assert str(tab.evaluate("document.title")).startswith("✕ no answer")
        with HttpServer("127.0.0.1", port, board=scene.board, metrics=scene.metrics):
            tab.wait("document.querySelector('h1').textContent === 'In step'")
        assert not tab.evaluate("document.body.innerText.includes('No answer')")


def test_it_follows_what_happens(browser: Browser) -> None:
    scene = streaming()
    with served(scene) as server, browser.page() as tab:
        opened(tab, server)
        scene.board.set_sink(False, "connection refused")
        tab.wait("document.body.innerText.includes('Qdrant does not answer')")
        scene.board.set_sink(True)
        scene.board.table("public.articles").update(changes_applied=99_999)
        tab.wait("document.body.innerText.includes('99,999')")
        assert "In step" in tab.text()


def test_the_history_is_there_after_a_reload(browser: Browser) -> None:
    points = "document.querySelector('.chart path:last-child').getAttribute('d').split('L').length"
    with served(streaming()) as server, browser.page() as tab:
        opened(tab, server)
        assert tab.evaluate(points) == 120
        opened(tab, server)
        assert tab.evaluate(points) == 120
        label = tab.evaluate("document.querySelector('.chart').getAttribute('aria-label')")
        assert label == "Lag in seconds over the last 10 minutes: highest 262 ms"


def test_all_events_can_be_shown_and_stay_shown(browser: Browser) -> None:
    scene = streaming()
    for number in range(20):
        scene.log.info("window_closed", tables=number)
    rows = "document.querySelectorAll('#events li').length"
    with served(scene) as server, browser.page() as tab:
        opened(tab, server)
        assert tab.evaluate(rows) == 12
        tab.evaluate("document.querySelector('#events button').click()")
        assert tab.evaluate(rows) == 23
        scene.log.info("copy_completed", tables=3)
        tab.wait(f"{rows} === 24")


# -- for everybody


@pytest.mark.parametrize("make", [*SCENES.values(), hostile], ids=lambda make: make.__name__)
def test_it_fits_a_phone(browser: Browser, make: type[Scene]) -> None:
    with served(make()) as server, browser.page(width=360, height=740) as tab:
        opened(tab, server)
        assert tab.evaluate("document.documentElement.scrollWidth") == 360
        # Nothing sticks out of its box either.
        outside = tab.evaluate(
            "[...document.querySelectorAll('.page *')].filter((node) => node.getClientRects()"
            ".length && !node.closest('thead, svg') && node.getBoundingClientRect().right > 361)"
            ".map((node) => node.outerHTML.slice(0, 80))"
        )
        assert outside == []


# The contrast of WCAG 2: of every text with the nearest background that is not transparent.
_FAINT = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const hidden = !node.getClientRects().length || node.closest('script, style, noscript');
    if (hidden || !walker.currentNode.textContent.trim()) continue;
    seen += 1;
    const [one, other] = [light(rgb(getComputedStyle(node).color)), light(behind(node))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) found.push([walker.currentNode.textContent, contrast]);
  }
  return [seen, found];
})()
"""


def texts(tab: Tab) -> tuple[int, list[object]]:
    """How many texts there are, and those of too little contrast."""
    found = tab.evaluate(_FAINT)
    assert isinstance(found, list)
    return found[0], found[1]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_is_readable(browser: Browser, dark: bool) -> None:
    with browser.page(dark=dark) as tab:
        for make in (streaming, copying, qdrant_away, dead_letters, hostile):
            with served(make()) as server:
                opened(tab, server)
                seen, faint = texts(tab)
                assert seen > 40
                assert faint == []
        tab.wait("document.body.innerText.includes('No answer since')")
        assert texts(tab)[1] == []


def test_a_screen_reader_finds_its_way(browser: Browser) -> None:
    with served(copying()) as server, browser.page() as tab:
        opened(tab, server)
        tab.call("Accessibility.enable")
        nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
        assert isinstance(nodes, list)
        found = [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored")
        ]
        roles = [role for role, _ in found]
        assert {"banner", "main", "contentinfo", "table", "rowgroup", "heading"} <= set(roles)
        assert ("heading", "Copying") in found
        assert ("region", "Tables") in found
        assert ("region", "Recent events") in found
        headers = [name for role, name in found if role == "columnheader"]
        assert headers == ["Table", "State", "Copy", "Changes", "Dead letters"]
        bars = {name for role, name in found if role == "progressbar"}
        assert {"Copied of all tables", "Copied of public.articles"} <= bars
        assert all(name for role, name in found if role in ("img", "image", "progressbar", "link"))
        live = "document.querySelector('h1').closest('[aria-live]').getAttribute('aria-live')"
        assert tab.evaluate(live) == "polite"
        assert tab.evaluate("document.documentElement.lang") == "en"
        assert tab.evaluate("document.querySelectorAll('h1').length") == 1
