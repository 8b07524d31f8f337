"""The page in a real browser: headless Chromium, by mouse, by keyboard, and at the width of a phone."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from PIL import Image

from shapleycam import Explainer
from shapleycam.serve import ExplainerRuntime

from .tiny import PREPROCESS, Known, Live, classifier, encoded, live, pixels

sync_api = (
    pytest.importorskip("playwright.sync_api")
    if not os.environ.get("CI")
    else __import__("playwright.sync_api", fromlist=["sync_playwright"])
)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have Chromium: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """The page in a window of its own, and what it complained of."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 900) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.addresses: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#method option, #token-form:not([hidden])", state="attached")

    def choose(self, data: bytes, name: str = "mine.png", kind: str = "image/png") -> None:
        self.page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})

    def answered(self) -> None:
        self.page.wait_for_selector("#answer:not([hidden]):not(.stale) .class")

    def picture(self, element: str) -> Any:
        source = self.page.get_attribute(element, "src")
        return numpy.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))).astype(int)


@pytest.fixture
def opened(browser: Any, shared: Live) -> Iterator[Opened]:
    found = Opened(browser, shared.url)
    yield found
    found.page.close()
    assert found.complaints == []
    assert all(address.startswith((shared.url, "data:", "blob:")) for address in found.addresses)


def drawn(one: Known, target: int) -> Any:
    explanation = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None], target)
    return explanation.overlay(one.view[None], colormap="turbo", alpha=1.0)[0].numpy().astype(int)


def test_a_photograph_its_classes_and_their_maps(opened: Opened, one: Known) -> None:
    page = opened.page
    opened.choose(one.data)
    opened.answered()
    best = one.logits.argsort(descending=True)[:5].tolist()
    assert [row.inner_text().split("\n")[0] for row in page.query_selector_all(".class .name")] == [f"thing {c}" for c in best]
    assert page.inner_text("#status").startswith(f"Most probably: thing {best[0]}, ")
    assert (opened.picture("#view") == one.view.permute(1, 2, 0).numpy()).all()
    for n in (0, 3):
        page.click(f".class:nth-of-type({n + 1})")
        assert numpy.abs(opened.picture("#heat") - drawn(one, best[n])).max() <= 1
        assert f"thing {best[n]}" in page.get_attribute("#stack", "aria-label")
        assert f"thing {best[n]}" in page.inner_text("#caption")


def test_the_completeness_gap_in_words(opened: Opened, one: Known) -> None:
    opened.choose(one.data)
    opened.answered()
    explanation = Explainer(classifier().model)(PREPROCESS.normalise(one.view)[None], with_gap=True)
    gap = float(explanation.gap[0])
    share = abs(gap / (gap + float(explanation.raw.sum())))
    words = opened.page.inner_text("#gap")
    assert f"({round(100 * share)} %)" in words
    verdict = "adds up." if share <= 0.05 else "nearly adds up." if share <= 0.25 else "in part." if share <= 1 else "does not"
    assert verdict in words.split("\n")[0]
    opened.page.select_option("#method", "eigencam")
    opened.page.locator("#gap", has_text="no completeness gap").wait_for()


def test_method_and_utility_are_asked_for(opened: Opened, one: Known) -> None:
    opened.choose(one.data)
    opened.answered()
    opened.page.select_option("#method", "layercam")
    opened.page.select_option("#utility", "probability")
    opened.page.locator("#caption", has_text="(layercam, probability)").wait_for()
    expected = Explainer(classifier().model, method="layercam", utility="probability")(PREPROCESS.normalise(one.view)[None])
    overlay = expected.overlay(one.view[None], colormap="turbo", alpha=1.0)[0].numpy().astype(int)
    assert numpy.abs(opened.picture("#heat") - overlay).max() <= 1


def test_by_keyboard_alone(opened: Opened, one: Known) -> None:
    page = opened.page
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#example-list') !== null"):
            break
    page.keyboard.press("Enter")  # an example
    opened.answered()
    assert page.get_attribute("#example-list li:first-child button", "aria-pressed") == "true"
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "opacity":
            break
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#opacity-value") == "55 %"
    assert page.evaluate("getComputedStyle(document.querySelector('#heat')).opacity") == "0.55"
    page.keyboard.press("Tab")
    before = page.get_attribute("#heat", "src")
    page.keyboard.press("ArrowDown")
    assert page.is_checked(".class:nth-of-type(2) input") and page.get_attribute("#heat", "src") != before
    outline = page.evaluate("getComputedStyle(document.activeElement.closest('.class')).outlineStyle")
    assert outline == "solid"


def test_a_photograph_may_be_dropped(opened: Opened, one: Known) -> None:
    opened.page.evaluate(
        """(data) => {
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        base64.b64encode(one.data).decode(),
    )
    opened.answered()
    assert opened.page.get_attribute("#stack", "aria-label").startswith("dropped.png with the map of")


def test_what_the_server_refuses_is_told(browser: Any, shared: Live, one: Known) -> None:
    opened = Opened(browser, shared.url)
    opened.choose(b"no picture", "x.png")
    opened.page.wait_for_selector("#status.bad")
    assert "no PNG" in opened.page.inner_text("#status") and opened.page.is_hidden("#answer")
    assert opened.page.get_attribute("#status", "role") == "status"
    opened.choose(one.data)  # and the page goes on
    opened.answered()
    opened.page.close()


def test_a_picture_of_a_kind_that_the_server_does_not_take_is_converted(opened: Opened) -> None:
    opened.choose(encoded(pixels(3), "GIF"), "x.gif", "image/gif")
    opened.answered()


def test_the_page_at_the_width_of_a_phone(browser: Any, shared: Live, one: Known, tmp_path: Path) -> None:
    opened = Opened(browser, shared.url, 360, 740)
    opened.choose(one.data)
    opened.answered()
    page = opened.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for element in page.query_selector_all(".class, select, .drop, #example-list button"):
        box = element.bounding_box()
        if box is None:  # one model: there is nothing to choose
            continue
        assert box["height"] >= 44 or box["width"] >= 44, element.inner_text()
    stack = page.query_selector("#stack").bounding_box()
    assert stack["y"] < 740, "the map is out of sight"
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_rule_of_accessibility_is_broken(browser: Any, shared: Live, one: Known, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    opened = Opened(browser, shared.url)
    opened.page.emulate_media(color_scheme=scheme)
    for answered in (False, True):
        if answered:
            opened.choose(one.data)
            opened.answered()
        found = Axe().run(opened.page).response["violations"]
        assert [(rule["id"], [node["target"] for node in rule["nodes"]]) for rule in found] == []
    opened.page.close()


def test_names_of_classes_are_text_and_nothing_else(browser: Any, one: Known) -> None:
    hostile = classifier()
    names = tuple((f"<img src=x onerror=\"document.title='owned'\"> {i}",) for i in range(6))
    with live(ExplainerRuntime(replace(hostile, classes=names))) as found:
        opened = Opened(browser, found.url)
        opened.choose(one.data, "<b>name</b>.png")
        opened.answered()
        assert opened.page.inner_text(".class .name").startswith("<img src=x")
        assert opened.page.title().startswith("Where did") and opened.complaints == []
        opened.page.close()


def test_a_token_is_asked_for(browser: Any, one: Known) -> None:
    with live(token="correct-horse-battery") as found:
        assert httpx.get(found.url, verify=False).status_code == 200
        opened = Opened(browser, found.url)
        opened.page.wait_for_selector("#token-form:not([hidden])")
        opened.page.fill("#token", "correct-horse-battery")
        opened.page.keyboard.press("Enter")
        opened.page.wait_for_selector("#method option", state="attached")
        opened.choose(one.data)
        opened.answered()
        opened.page.close()
