"""The search page in a real browser: typing, clicking, uploading, and uploading what is no image."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from clipscale.apps.search.embed import Wanted, embed
from tests.browser import Browser
from tests.shards import sample, write_shards
from tests.unit.test_export import SMALL_TEXT, make_run

# A browser is no Python package: the default run cannot count on one.
pytestmark = pytest.mark.slow
CARDS = "document.querySelectorAll('.card .score')"
COUNT = 60


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("site")
    run = make_run(root, "model=tiny", "model.vision.layers=1", *SMALL_TEXT)
    write_shards(root / "shards", [40, 20])
    embed(Wanted(str(run), f"{root}/shards"), root / "index", jobs=1)
    command = [sys.executable, "-m", "clipscale.cli", "search", "serve", str(root / "index"), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found
    yield found[0]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.fixture
def browser(tmp_path: Path, address: str) -> Iterator[Browser]:
    with Browser(tmp_path / "home") as opened:
        opened.size(1280, 800)
        opened.open(address)
        opened.until("document.querySelectorAll('.card img').length === 12")
        yield opened
        assert opened.console == []


def text(browser: Browser, selector: str) -> str:
    return str(browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))


def look_for(browser: Browser, words: str) -> None:
    browser.evaluate("document.activeElement.blur()")
    browser.press("/")
    browser.type(words)
    browser.press("Enter")
    browser.until(f"{CARDS}.length && document.getElementById('status').textContent.includes({json.dumps(words)})")


def test_typing_moving_and_opening(browser: Browser) -> None:
    look_for(browser, "a red <b>thing</b>")
    assert browser.evaluate(f"{CARDS}.length") == 24
    assert text(browser, "#status").startswith("24 images for “a red <b>thing</b>”")
    browser.until("[...document.querySelectorAll('.card img')].slice(0, 4).every(i => i.complete && i.naturalWidth)")
    for key, place in (("ArrowDown", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("ArrowDown", 6)):
        browser.press(key)
        assert browser.evaluate("[...document.querySelectorAll('.card')].indexOf(document.activeElement)") == place
    browser.press("Enter")
    browser.until("document.getElementById('detail').open")
    first = text(browser, "#detail-key")
    browser.press("ArrowRight")
    assert text(browser, "#detail-key") != first
    browser.press("Escape")
    browser.until("!document.getElementById('detail').open")
    assert browser.evaluate("[...document.querySelectorAll('.card')].indexOf(document.activeElement)") == 7
    assert browser.evaluate("location.search") == "?q=a%20red%20%3Cb%3Ething%3C%2Fb%3E"


def test_clicking_and_finding_similar(browser: Browser) -> None:
    look_for(browser, "a blue thing")
    shown = text(browser, ".card .caption")
    browser.click(".card")
    browser.until("document.getElementById('detail').open")
    assert text(browser, "#detail-caption") == shown
    browser.click("#similar")
    browser.until("document.getElementById('status').textContent.includes('like this one')")
    assert not browser.evaluate("document.getElementById('chip').hidden")
    browser.click("#chip-clear")
    browser.until("document.querySelectorAll('.card').length === 12")


def test_filters_and_nothing_found(browser: Browser) -> None:
    look_for(browser, "a thing")
    browser.click("summary")
    browser.click("#words")
    browser.type("green")
    browser.until(
        f"{CARDS}.length < 24 && [...document.querySelectorAll('.caption')].every(c => /green/.test(c.textContent))"
    )
    browser.evaluate(
        "(f => { f.value = '00001.tar/'; f.dispatchEvent(new Event('input')) })(document.getElementById('folder'))"
    )
    browser.until("document.getElementById('active').textContent === '2'")
    browser.type(" nowhere")
    browser.until("!document.getElementById('nothing').hidden")
    assert text(browser, "#nothing-text") == "No image meets the filters for “a thing”."
    browser.click("#nothing-reset")
    browser.until(f"{CARDS}.length === 24")


def test_uploading_and_uploading_what_is_no_image(browser: Browser, tmp_path: Path) -> None:
    (good := tmp_path / "good.jpg").write_bytes(sample(33)["jpg"])
    browser.upload("#file", good)
    browser.until(f"{CARDS}.length === 24")
    assert text(browser, ".card .caption") == sample(33)["txt"].decode() and text(browser, ".score").startswith("1.000")
    assert text(browser, "#chip-text") == "good.jpg"
    (broken := tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    Image.new("L", (9000, 9000)).save(bomb := tmp_path / "bomb.png")
    (other := tmp_path / "other.txt").write_text("hello")
    (huge := tmp_path / "huge.png").write_bytes(bytes((20 << 20) + 1))
    for path, message in (
        (broken, "This file is no image that can be read"),
        (bomb, "This image has more than 50 million pixels."),
        (other, "“other.txt” is no image: choose a JPEG"),
        (huge, "“huge.png” is larger than 20 MB."),
    ):
        browser.upload("#file", path)
        browser.until(f"document.getElementById('problem-text').textContent.startsWith({json.dumps(message)})")
        assert not browser.evaluate("document.getElementById('problem').hidden || document.querySelector('.card')")
    look_for(browser, "a thing")
    assert browser.evaluate("document.getElementById('problem').hidden")


def test_a_phone_needs_no_scrolling_aside(browser: Browser) -> None:
    browser.size(360, 740, phone=True)
    look_for(browser, "a thing")
    browser.click("summary")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.click(".card")
    browser.until("document.getElementById('detail').open")
    assert browser.evaluate("document.getElementById('detail').getBoundingClientRect().width <= innerWidth")


def test_a_server_that_is_gone_is_said(browser: Browser) -> None:
    look_for(browser, "a thing")
    browser.evaluate("window.fetch = () => Promise.reject(new TypeError('gone'))")
    browser.evaluate("document.getElementById('text').value = 'other'")
    browser.click("#go")
    browser.until("!document.getElementById('problem').hidden")
    assert text(browser, "#problem-text") == "The server does not answer. Is it still running?"
