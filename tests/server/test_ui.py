"""The playground's files: served with headers under which they work, and with nothing that those forbid."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from opsin.server.ui import CONTENT_TYPES, UI_PATHS, mount_ui


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    mount_ui(app)
    return TestClient(app)


def test_all_files_are_served_and_nothing_else(client: TestClient) -> None:
    assert len(UI_PATHS) == len(CONTENT_TYPES) == 10
    for path in UI_PATHS:
        response = client.get(path)
        assert response.status_code == 200
        assert (
            response.headers["content-type"]
            == CONTENT_TYPES[path.removeprefix("/ui/").strip("/") or "index.html"]
        )
    for path in ("/ui/", "/ui/index.html", "/ui/__init__.py", "/ui/../fetch.py", "/ui/%2e%2e/fetch.py"):
        assert client.get(path).status_code == 404
    assert client.get("/openapi.json").json()["paths"] == {}


def test_headers(client: TestClient) -> None:
    for path in UI_PATHS:
        headers = client.get(path).headers
        policy = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


class _Page(HTMLParser):
    """What a page loads, and what it has inline."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.inline: list[str] = []
        self.ids: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.loads += [value for name, value in attributes if name in ("src", "href") and value]
        self.inline += [f"{tag} {name}" for name in given if name.startswith("on") or name == "style"]
        self._in_script = tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


def test_nothing_is_inline_and_all_that_is_loaded_is_here(client: TestClient) -> None:
    page = _Page()
    page.feed(client.get("/").text)
    assert page.inline == []
    assert set(page.loads) == {"ui/app.js", "ui/style.css", "ui/icon.svg"}, "relative, for --root-path"
    assert len(page.ids) == len(set(page.ids))
    own = [path for path in UI_PATHS if path.endswith(".js") and "vendor" not in path]
    script = "".join(client.get(path).text for path in own)
    assert set(re.findall(r'find\("([\w-]+)"\)', script)) <= set(page.ids)
    imported = re.findall(r'from "\./([\w/.]+)"', script)
    assert {f"/ui/{name}" for name in imported} == {path for path in UI_PATHS if path.endswith(".js")} - {
        "/ui/app.js"
    }
    vendored = client.get("/ui/vendor/marked.js").text
    for text in (script, vendored):
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)
    assert not re.search(r"https?://", script + client.get("/ui/style.css").text)
