"""The playground in a real Chromium, against a real server: `make test-browser`.

SCREENSHOT=FILE keeps the picture of the page that the documentation shows.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageDraw

from tests.server.process import GOLDEN, ServerProcess, serve

sys.path.insert(0, str(Path(__file__).parents[2] / "demo"))

from scenes import FRESH_SEEDS, make_question, make_scene

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
    """Ask; gives the finished turn."""
    page.get_by_role("textbox", name="Question").fill(question)
    earlier = page.locator("article").count()
    page.get_by_role("button", name="Ask").click()
    page.locator("article").nth(earlier).wait_for()
    page.locator("article.running").wait_for(state="detached")
    return page.locator("article").last


def set_up(page: Page, **values: str) -> None:
    """Fill fields of the settings."""
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " ").capitalize()).fill(value)
    page.get_by_role("button", name="Close").click()


def sent(page: Page) -> list[dict[str, Any]]:
    """The bodies of all questions from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("/completions") else None)
    return bodies


def test_a_dropped_picture_gets_a_true_answer(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    red = drawing("red")
    hand_over(page, "dragover", "#ask", ("red.png", red))
    assert "over" in (page.locator("#ask").get_attribute("class") or "")
    hand_over(page, "drop", "#ask", ("red.png", red))
    page.get_by_text("112 × 112").wait_for()
    turn = asked(page, "What colour is the circle?")
    assert turn.locator(".text").inner_text() == "red"
    assert re.fullmatch(
        r"\d+ prompt and \d+ answer tokens · first after \d+\.\d\d s · all after \d+\.\d\d s",
        turn.locator(".figures").inner_text(),
    )
    assert page.locator("#announcer").inner_text() == "Answer: red"
    assert page.locator("#attachments li").count() == 0


def test_turns_make_a_conversation(page: Page, playground: ServerProcess) -> None:
    """The second question is about the first one's picture; a new chat knows nothing of it."""
    opened(page, playground)
    bodies = sent(page)
    set_up(page, system_prompt="Answer briefly.", temperature="0")
    hand_over(page, "drop", "#ask", ("red.png", drawing("red")))
    page.get_by_text("112 × 112").wait_for()
    asked(page, "What colour is the circle?")
    turn = asked(page, "What shape is it?")
    assert turn.locator(".text").inner_text() == "circle"
    roles = [(message["role"], len(message["content"])) for message in bodies[1]["messages"]]
    assert roles == [("system", 15), ("user", 2), ("assistant", 3), ("user", 1)]
    turn.get_by_role("button", name="Copy").click()
    turn.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == "circle"
    turn.get_by_role("button", name="Retry").click()
    page.locator("article.done .figures", has_text="all after").nth(1).wait_for()
    assert bodies[2]["messages"] == bodies[1]["messages"]
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    turn = asked(page, "Hello")
    assert "circle" not in turn.locator(".text").inner_text()
    assert [message["role"] for message in bodies[3]["messages"]] == ["system", "user"]


def test_the_conversation_is_there_after_a_reload(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    set_up(page, system_prompt="Answer briefly.", most_tokens="33")
    hand_over(page, "drop", "#ask", ("red.png", drawing("red")))
    page.get_by_text("112 × 112").wait_for()
    asked(page, "What colour is the circle?")
    opened(page, playground)
    assert page.locator("article .text").all_inner_texts() == ["red"]
    assert page.locator("article img").evaluate("(image) => image.naturalWidth") == 112
    bodies = sent(page)
    assert asked(page, "What shape is it?").locator(".text").inner_text() == "circle"
    assert bodies[0]["max_tokens"] == 33
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Answer briefly."}
    page.get_by_role("button", name="New chat").click()
    opened(page, playground)
    assert page.locator("article").count() == 0


def test_settings_act(page: Page, playground: ServerProcess) -> None:
    """The checkpoint asks for the best token alone; a temperature of one's own lifts that."""
    opened(page, playground)
    bodies = sent(page)
    asked(page, "Hello")
    set_up(page, temperature="2")
    answers = {asked(page, "Hello").locator(".text").inner_text() for _ in range(6)}
    assert len(answers) > 1
    set_up(page, temperature="0")
    asked(page, "Hello")
    sampling = [{n: body.get(n) for n in ("temperature", "top_p", "top_k")} for body in bodies]
    assert sampling[0] == {"temperature": None, "top_p": None, "top_k": None}
    assert sampling[1] == {"temperature": 2, "top_p": 1, "top_k": 0}
    assert sampling[-1] == {"temperature": 0, "top_p": None, "top_k": None}


def test_scenes_of_the_demonstration(page: Page, playground: ServerProcess, tmp_path: Path) -> None:
    """Everything on the page at once, as the documentation shows it."""
    opened(page, playground)
    question = make_question("compare", FRESH_SEEDS[0] + 7006)
    scenes = [(f"scene-{index}.png", encoded(each)) for index, each in enumerate(question.images)]
    hand_over(page, "drop", "#ask", *scenes)
    page.locator("#attachments .size", has_text="×").nth(1).wait_for()
    turn = asked(page, question.text)
    assert turn.locator(".text").inner_text() == question.answer
    page.get_by_role("button", name="New chat").click()
    scene = make_scene("objects", FRESH_SEEDS[0] + 7004, (168, 140), count=3)
    told = {kind: (text, answer) for kind, text, answer in scene.questions}
    hand_over(page, "drop", "#ask", ("scene.png", encoded(scene.images[0])))
    page.locator("#attachments .size", has_text="×").wait_for()
    for kind in ("describe", "position"):
        turn = asked(page, told[kind][0])
        assert turn.locator(".text").inner_text() == told[kind][1]
        assert " tokens/s" not in turn.locator(".figures").inner_text()  # it came in one piece
    page.evaluate("() => document.documentElement.scrollTo(0, 0)")
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


def film() -> bytes:
    """A red circle that moves right, as a WebM file."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=4)
        stream.width = stream.height = 112
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "4", "b": "2M"}
        for step in range(6):
            picture = Image.new("RGB", (112, 112), (128, 128, 128))
            x = 14 + 9 * step
            ImageDraw.Draw(picture).ellipse((x, 40, x + 28, 68), fill=(215, 30, 35))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode(None))
    return file.getvalue()


def test_videos(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    hand_over(page, "drop", "#ask", ("film.webm", film()), type="video/webm")
    page.get_by_text("1.5 s").wait_for()
    turn = asked(page, "Which way does the circle move?")
    assert turn.locator(".text").inner_text() == "right"
    assert turn.locator("video").evaluate("(video) => video.videoWidth") == 112
    turn.get_by_role("button", name="Python").click()
    assert 'media("film.webm")' in page.locator("#code").inner_text()


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
    set_up(page, temperature="0", most_tokens="12", system_prompt="Be brief.")
    asked(page, 'Which picture has more "circles"?\nThe first or the second \\ one?')
    turn = asked(page, "Hello")
    answer = turn.locator(".text").inner_text()
    turn.get_by_role("button", name="Python").click()
    page.get_by_role("button", name="Copy", exact=True).last.click()
    page.locator("#copied", has_text="Copied").wait_for()
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
    names = page.locator("#attachments .name")
    assert names.all_inner_texts() == ["image.png", "image-2.png", "image-3.png"]
    hand_over(page, "drop", "body", ("notes.txt", b"text"), type="text/plain")
    page.get_by_text("Only pictures and videos can be attached.").wait_for()
    assert names.count() == 3


def test_pictures_are_put_in_order(page: Page, playground: ServerProcess) -> None:
    """By dragging, and by arrow keys; they are sent in that order."""
    opened(page, playground)
    for colour in ("red", "green", "blue"):
        hand_over(page, "drop", "#ask", (f"{colour}.png", drawing(colour)))
        page.get_by_text(f"{colour}.png", exact=True).wait_for()
    names = page.locator("#attachments .name")
    page.locator("#attachments li").nth(0).drag_to(page.locator("#attachments li").nth(2))
    assert names.all_inner_texts() == ["green.png", "blue.png", "red.png"]
    page.get_by_role("button", name="red.png, 3 of 3").press("ArrowLeft")
    assert names.all_inner_texts() == ["green.png", "red.png", "blue.png"]
    page.keyboard.press("ArrowLeft")  # the picture has kept the focus
    page.keyboard.press("ArrowLeft")  # there is no further place
    assert names.all_inner_texts() == ["red.png", "green.png", "blue.png"]
    bodies = sent(page)
    asked(page, "What?")
    pictures = [part["image_url"]["url"] for part in bodies[0]["messages"][0]["content"][:3]]
    wanted = [drawing(colour) for colour in ("red", "green", "blue")]
    assert [base64.b64decode(url.partition(",")[2]) for url in pictures] == wanted


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
    # Every button of the page can be reached.
    seen = set()
    for _ in range(25):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("() => document.activeElement.textContent.trim()"))
    assert {"New chat", "Settings", "API key", "Copy", "Retry", "Python", "Attach", "Ask"} <= seen


def test_what_is_wrong_is_said_before_it_is_asked(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Write a question first.").wait_for()
    hand_over(page, "drop", "#ask", ("broken.png", drawing("red")[:60]), ("red.png", drawing("red")))
    page.get_by_text("broken.png is damaged or not a picture.").wait_for()
    page.get_by_role("textbox", name="Question").fill("What colour is the circle?")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("Remove broken.png first.").wait_for()
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="Remove broken.png").click()
    assert asked(page, "What colour is the circle?").locator(".text").inner_text() == "red"


def test_an_error_of_the_server_stays_out_of_the_conversation(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    turn = asked(page, "Hello " * 9000)
    assert "failed" in (turn.get_attribute("class") or "")
    assert "context" in turn.locator(".fault").inner_text()
    assert page.get_by_role("button", name="Ask").is_enabled()
    bodies = sent(page)
    asked(page, "Hello")
    assert [message["role"] for message in bodies[0]["messages"]] == ["user"]


def test_an_answer_can_be_stopped(page: Page, locked: ServerProcess) -> None:
    """The model of random weights does not end by itself, greedily."""
    unlock(page, locked)
    set_up(page, temperature="0", most_tokens="1500")
    page.get_by_role("textbox", name="Question").fill("Go on")
    page.get_by_role("button", name="Ask").click()
    page.locator("article.running .figures", has_text="first after").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.locator("article.stopped .fault", has_text="Stopped").wait_for()
    assert page.get_by_role("button", name="Ask").is_enabled()
    assert page.get_by_role("button", name="Stop").is_hidden()


def test_an_interrupted_stream_is_shown_as_such(page: Page, tmp_path: Path) -> None:
    """The server is killed in the middle of an answer: what came stays, and it is said that it is not all."""
    model = str(GOLDEN / "qwen2vl" / "model")
    with pytest.raises(AssertionError, match="ended by itself"), serve(model, log=tmp_path / "log") as server:  # noqa: PT012
        opened(page, server)
        set_up(page, temperature="0", most_tokens="1500")
        page.get_by_role("textbox", name="Question").fill("Go on")
        page.get_by_role("button", name="Ask").click()
        page.locator("article.running .figures", has_text="first after").wait_for()
        server.process.kill()
        page.locator("article.interrupted .fault", has_text="connection").wait_for()
        assert page.locator("article .text").inner_text() != ""
        assert page.locator("article .figures").inner_text().startswith("first after")


def test_a_page_left_while_it_answers(page: Page, locked: ServerProcess) -> None:
    unlock(page, locked)
    asked(page, "Hello")
    set_up(page, temperature="0", most_tokens="1500")
    page.get_by_role("textbox", name="Question").fill("Go on")
    page.get_by_role("button", name="Ask").click()
    page.locator("article.running .figures", has_text="first after").wait_for()
    opened(page, locked)
    assert page.locator("article").count() == 2
    page.locator("article.interrupted .fault", has_text=re.compile("reloaded|connection")).wait_for()


MARKDOWN = """# Title

A **bold** word, *another*, `code <b>`, ~~gone~~, a [page](https://example.com/a),
a [trick](javascript:alert(1)).
Second line &amp; more.

- one
- two
  1. inner

> quoted

| shape | colour |
|---|---|
| circle | red |

```python
print("<script>alert(1)</script>")
```

<img src=x onerror="window.wasRun = 1"><script>window.wasRun = 1</script>
![picture](https://elsewhere.example/a.png)
"""


def test_markdown_is_shown_and_nothing_of_it_runs(page: Page, playground: ServerProcess) -> None:
    opened(page, playground)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream",
            body="".join(
                f"data: {json.dumps({'choices': [{'delta': {'content': piece}, 'finish_reason': None}]})}\n\n"
                for piece in re.findall(r"[\s\S]{1,7}", MARKDOWN)
            )
            + "data: [DONE]\n\n",
        ),
    )
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    text = asked(page, "Show me").locator(".text")
    for selector, content in {
        "h4": "Title", "strong": "bold", "em": "another", "p > code": "code <b>", "del": "gone",
        "p:has(strong) br >> nth=0": "", "blockquote": "quoted", "ul ol li": "inner", "td >> nth=0": "circle",
        "pre code": 'print("<script>alert(1)</script>")', "a": "page",
    }.items():  # fmt: skip
        assert text.locator(selector).inner_text().strip() == content, selector
    assert text.locator("a").count() == 1
    assert text.locator("a").get_attribute("rel") == "noopener noreferrer"
    assert "Second line & more." in text.inner_text()
    assert 'onerror="window.wasRun = 1"' in text.inner_text()
    assert text.locator("img, script").count() == 0
    assert page.evaluate("() => window.wasRun") is None
    assert not any("elsewhere" in url for url in requests)
    text.get_by_role("button", name="Copy").click()
    text.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == 'print("<script>alert(1)</script>")'


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
    set_up(page, temperature="0", most_tokens="1500")
    turn = asked(page, "Hello")
    assert "failed" not in (turn.get_attribute("class") or "")
    assert " tokens/s" in turn.locator(".figures").inner_text()
    turn.get_by_role("button", name="Python").click()
    code = page.locator("#code").inner_text()
    assert 'api_key=os.environ["OPENAI_API_KEY"]' in code
    assert KEY not in code
    assert KEY not in page.content()

    page.reload()  # the tab still knows it
    page.get_by_text("Ready", exact=True).wait_for()
    assert page.evaluate("() => localStorage.length") == 0
    assert page.context.cookies() == []
    assert KEY not in page.evaluate(KEPT)


KEPT = """() => new Promise((resolve) => {
    const request = indexedDB.open("opsin-playground");
    request.onsuccess = () => {
        const kept = request.result.transaction("kept").objectStore("kept").getAll();
        kept.onsuccess = () => resolve(JSON.stringify(kept.result));
    };
})"""


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
def test_nothing_is_cut_off_and_everybody_can_use_it(
    browser: Browser, playground: ServerProcess, scheme: str, width: int, tmp_path: Path
) -> None:
    """On a phone and on a desk, in both colour schemes: all within the width, no fault that axe finds, the
    answer in view. SCREENSHOTS=FOLDER keeps what it looks like."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,  # type: ignore[arg-type]
    )
    page = opened(context.new_page(), playground)
    faults = {"empty": violations(page)}
    for _ in range(3):
        page.get_by_role("button", name="Draw an example").click()
        page.locator("#attachments .size", has_text="×").wait_for()
        turn = asked(page, page.get_by_role("textbox", name="Question").input_value())
        page.wait_for_function(AT_END)
        # Not behind the field below, and not above the window.
        box, field = turn.locator(".text").bounding_box(), page.locator("#ask").bounding_box()
        assert box is not None
        assert field is not None
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= field["y"] + 1
    hand_over(page, "drop", "#ask", ("red.png", drawing("red")), ("broken.png", drawing("red")[:60]))
    page.get_by_text("broken.png is damaged").wait_for()
    page.wait_for_function(
        "() => document.documentElement.scrollTop + innerHeight >= document.body.scrollHeight - 2"
    )
    page.mouse.move(0, 0)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"playground-{width}-{scheme}.png")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    faults["conversation"] = violations(page)
    low = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []
    for button, name in (("Settings", "settings"), ("API key", "key"), ("Python", "code")):
        page.get_by_role("button", name=button).last.click()
        faults[name] = violations(page)
        page.keyboard.press("Escape")
    assert faults == {place: [] for place in faults}
    context.close()


AT_END = "() => document.documentElement.scrollTop + innerHeight >= document.body.scrollHeight - 2"


def violations(page: Page) -> list[str]:
    """What axe-core finds, with all of its rules."""
    import axe_playwright_python

    script = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text()
    page.evaluate(f"{script}; undefined")
    found = page.evaluate("() => axe.run().then(({violations}) => violations)")
    return [f"{fault['id']}: {node['html']}" for fault in found for node in fault["nodes"]]


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
