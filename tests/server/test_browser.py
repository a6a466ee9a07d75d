"""The playground in a real Chromium, against a real server: `make test-browser`.

SCREENSHOT=FILE keeps the picture of the page that the documentation shows.
"""

from __future__ import annotations

import base64
import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image, ImageDraw

from tests.server.process import GOLDEN, ServerProcess, serve

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from scenes import FRESH_SEEDS, make_question

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = pytest.mark.browser

KEY = "sesame-open"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
WAIT_MS = 20_000

DROP = """(target, {files, kind}) => {
    const transfer = new DataTransfer();
    for (const {name, type, data} of files) {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], name, {type}));
    }
    const event = kind === "paste"
        ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
        : new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true});
    target.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    path = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert path is not None, "these tests need Chromium: apt install chromium, or say CHROMIUM=PATH"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The trained tiny model: its answers are true."""
    with serve("opsin/tiny-qwen2vl", log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that wants a key."""
    log = tmp_path_factory.mktemp("locked") / "log"
    with serve(str(GOLDEN / "qwen2vl" / "model"), log=log, api_key=KEY) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test when its policy is violated or its script throws."""
    context = browser.new_context(viewport={"width": 1180, "height": 760})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # The browser itself reports every failed request; the tests cause some.
    assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def drawing(colour: str, shape: str = "circle") -> bytes:
    picture = Image.new("RGB", (112, 112), (128, 128, 128))
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)((34, 34, 78, 78), fill=colour)
    return encoded(picture)


def encoded(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def hand_over(
    page: Page, kind: str, target: str, *pictures: tuple[str, bytes], type: str = "image/png"
) -> None:
    """Drop or paste files onto an element."""
    files = [{"name": name, "type": type, "data": base64.b64encode(data).decode()} for name, data in pictures]
    page.locator(target).evaluate(DROP, {"files": files, "kind": kind})


def opened(page: Page, server: ServerProcess) -> Page:
    page.goto(server.url + "/")
    page.get_by_text("Ready", exact=True).wait_for()
    return page


def asked(page: Page, question: str) -> Locator:
    """Ask; gives the finished card."""
    page.get_by_role("textbox", name="Question").fill(question)
    earlier = page.locator("article").count()
    page.get_by_role("button", name="Ask").click()
    page.locator("article").nth(earlier).wait_for()
    page.locator("article.running").wait_for(state="detached")
    return page.locator("article").first


def test_a_dropped_picture_gets_a_true_answer(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    red = drawing("red")
    hand_over(page, "dragover", "#drop", ("red.png", red))
    assert "over" in (page.locator("#drop").get_attribute("class") or "")
    hand_over(page, "drop", "#drop", ("red.png", red))
    page.get_by_text("112 × 112").wait_for()
    card = asked(page, "What colour is the circle?")
    assert card.locator(".text").inner_text() == "red"
    assert re.fullmatch(
        r"\d+ prompt and \d+ answer tokens · first after \d+\.\d\d s · all after \d+\.\d\d s",
        card.locator(".figures").inner_text(),
    )
    assert page.locator("#announcer").inner_text() == "Answer: red"

    # Another picture in its place, by paste; the first answer stays below.
    page.get_by_role("button", name="Remove red.png").click()
    hand_over(page, "paste", "#question", ("image.png", drawing("blue", "square")))
    card = asked(page, "What colour is the square?")
    assert card.locator(".text").inner_text() == "blue"
    assert page.locator("article .text").all_inner_texts() == ["blue", "red"]


def test_scenes_of_the_demonstration(page: Page, playground: ServerProcess, tmp_path: Path) -> None:
    """Everything on the page at once, as the documentation shows it."""
    opened(page, playground)
    for kind, seed in (("position", 7002), ("compare", 7006), ("describe", 7003)):
        question = make_question(kind, FRESH_SEEDS[0] + seed)
        while page.locator("#pictures li").count():
            page.locator("#pictures .remove").first.click()
        scenes = [(f"scene-{index}.png", encoded(each)) for index, each in enumerate(question.images)]
        hand_over(page, "drop", "#drop", *scenes)
        page.locator("#pictures .size", has_text="×").nth(len(scenes) - 1).wait_for()
        card = asked(page, question.text)
        assert card.locator(".text").inner_text() == question.answer
        # A rate is told of long answers only.
        assert (" tokens/s" in card.locator(".figures").inner_text()) is (kind == "describe")
    page.screenshot(path=os.environ.get("SCREENSHOT", tmp_path / "playground.png"))


def test_a_server_of_embeddings_says_so(page: Page, tmp_path: Path) -> None:
    model = str(GOLDEN / "qwen2vl" / "model")
    with serve(model, "--task", "embedding", log=tmp_path / "log") as server:
        page.goto(server.url + "/")
        page.get_by_text("This server makes embeddings, not answers").wait_for()
        assert page.get_by_role("button", name="Ask").is_disabled()
        page.get_by_role("textbox", name="Question").fill("What?")
        page.get_by_role("textbox", name="Question").press("Enter")
        assert page.locator("article").count() == 0


def test_chosen_pictures_and_the_copied_code(
    page: Page,
    playground: ServerProcess,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    opened(page, playground)
    (tmp_path / 'a "red" one.png').write_bytes(drawing("red"))
    (tmp_path / "blue.png").write_bytes(drawing("blue"))
    page.set_input_files("#files", [tmp_path / 'a "red" one.png', tmp_path / "blue.png"])
    page.get_by_text("112 × 112").nth(1).wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("12")
    card = asked(page, 'Which picture has more "circles"?\nThe first or the second \\ one?')
    answer = card.locator(".text").inner_text()
    card.get_by_role("button", name="Python").click()
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied").wait_for()
    code: str = page.evaluate("() => navigator.clipboard.readText()")
    assert code == page.locator("#code").text_content()

    (tmp_path / "client.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    runpy.run_path("client.py")
    assert capsys.readouterr().out == answer + "\n"


def test_files_of_one_name_and_files_that_are_no_pictures(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    for colour in ("red", "blue", "green"):
        hand_over(page, "paste", "#question", ("image.png", drawing(colour)))
    page.get_by_text("image-3.png").wait_for()
    assert page.locator("#pictures .name").all_inner_texts() == ["image.png", "image-2.png", "image-3.png"]
    hand_over(page, "drop", "body", ("notes.txt", b"text"), type="text/plain")
    page.get_by_text("Only pictures can be attached.").wait_for()
    assert page.locator("#pictures li").count() == 3


def test_the_keyboard_is_enough(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    page.get_by_role("button", name="Draw an example").press("Enter")
    question = page.get_by_role("textbox", name="Question")
    assert re.fullmatch(r"What colour is the (circle|square|triangle)\?", question.input_value())
    assert question.evaluate("(element) => element === document.activeElement")
    question.press("Shift+Enter")
    assert page.locator("article").count() == 0
    question.press("Enter")
    page.locator("article .figures", has_text="all after").wait_for()
    assert page.locator("article .text").inner_text() in ("red", "green", "blue", "yellow", "purple")


def test_an_empty_question_and_an_error_of_the_server(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Write a question first.").wait_for()
    hand_over(page, "drop", "#drop", ("broken.png", drawing("red")[:60]))
    card = asked(page, "What is it?")
    assert "failed" in (card.get_attribute("class") or "")
    assert "truncated or damaged" in card.locator(".text").inner_text()
    assert page.get_by_role("button", name="Ask").is_enabled()


def test_an_answer_can_be_stopped(page: Page, locked: ServerProcess) -> None:
    """The model of random weights does not end by itself, greedily."""
    unlock(page, locked)
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill("1500")
    page.get_by_role("textbox", name="Question").fill("Go on")
    page.get_by_role("button", name="Ask").click()
    page.locator("article.running .figures", has_text="first after").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("article.stopped .figures", has_text="stopped").wait_for()
    assert page.get_by_role("button", name="Ask").is_enabled()
    assert page.get_by_role("button", name="Stop").is_hidden()


def unlock(page: Page, server: ServerProcess) -> None:
    page.goto(server.url + "/")
    page.get_by_text("This server wants a key.").wait_for()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_text("Ready", exact=True).wait_for()


def test_behind_an_api_key(page: Page, locked: ServerProcess) -> None:
    page.goto(locked.url + "/")
    page.get_by_text("This server wants a key.").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("An API key is needed").wait_for()
    page.get_by_role("button", name="API key").click()
    page.get_by_label("Key", exact=True).fill("wrong")
    page.get_by_role("button", name="Use").click()
    page.get_by_text("The server does not accept this key.").wait_for()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    page.get_by_text("Ready", exact=True).wait_for()
    card = asked(page, "Hello")
    assert "failed" not in (card.get_attribute("class") or "")
    card.get_by_role("button", name="Python").click()
    code = page.locator("#code").inner_text()
    assert 'api_key=os.environ["OPENAI_API_KEY"]' in code
    assert KEY not in code
    assert KEY not in page.content()

    page.reload()  # the tab still knows it
    page.get_by_text("Ready", exact=True).wait_for()
    assert page.evaluate("() => localStorage.length") == 0
    assert page.context.cookies() == []


INJECT = """() => {
    const script = document.createElement("script");
    try {
        script.textContent = "window.wasRun = 1";
        document.body.append(script);
    } catch {}
    const image = document.createElement("img");
    return new Promise((resolve) => {
        image.onerror = () => resolve(window.wasRun === undefined);
        image.src = "https://elsewhere.example/a.png";
        document.body.append(image);
    });
}"""


def test_the_policy_holds(browser: Browser, playground: ServerProcess) -> None:
    """The headers in a browser that enforces them: no inline code runs, nothing foreign is loaded."""
    context = browser.new_context()
    page = opened(context.new_page(), playground)
    violations: list[str] = []
    page.on("console", lambda message: violations.append(message.text))
    blocked: list[tuple[str, str | None]] = []
    page.on("requestfailed", lambda request: blocked.append((request.url, request.failure)))
    assert page.evaluate(INJECT) is True
    assert any("img-src" in text for text in violations)
    assert any("TrustedScript" in text or "script-src" in text for text in violations)
    assert blocked == [("https://elsewhere.example/a.png", "csp")]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1180, 390])
def test_nothing_is_cut_off_and_all_text_can_be_read(
    browser: Browser, playground: ServerProcess, scheme: str, width: int
) -> None:
    """On a phone and on a desk, in both colour schemes: contrast as WCAG AA has it, all within the width."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = opened(context.new_page(), playground)
    page.get_by_role("button", name="Draw an example").click()
    page.get_by_role("button", name="Ask").click()
    page.locator("article .figures", has_text="all after").wait_for()
    page.mouse.move(0, 0)
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    low = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []
    unnamed = page.locator("button, input, select, textarea").evaluate_all(
        """(elements) => elements.filter((element) => element.offsetParent
            && !element.labels?.length && !element.ariaLabel && !element.textContent.trim()).length"""
    )
    assert unnamed == 0
    context.close()


CONTRASTS = """() => {
    const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b]
        .map((value) => value / 255)
        .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
        .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
    const ground = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = channels(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || !element.offsetParent) continue;
        if (element.closest(":disabled")) continue;
        const text = luminance(channels(getComputedStyle(element).color));
        const behind = luminance(ground(element));
        const ratio = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
        found.push([walker.currentNode.textContent.trim().slice(0, 40), ratio]);
    }
    return found;
}"""
