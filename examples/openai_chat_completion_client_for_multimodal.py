"""Chat with `opsin serve` through the openai package: text, pictures by URL and inline, and video frames.

    opsin serve opsin/tiny-qwen2vl --allow-loopback-media
    python examples/openai_chat_completion_client_for_multimodal.py

The tiny model comes with this repository; any other works the same. So that nothing outside this machine is
needed, the pictures are drawn here, and those given by URL come from a small web server of this script: hence
--allow-loopback-media. With --image-url the server fetches that one instead.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw

MOVE = [(x, 56) for x in range(26, 90, 10)]
"""Where the circle of a video is in each frame."""


def draw(colour: str, *centres: tuple[int, int], format: str = "PNG") -> bytes:
    """Circles on grey, encoded."""
    picture = Image.new("RGB", (112, 112), "grey")
    for x, y in centres:
        ImageDraw.Draw(picture).ellipse((x - 12, y - 12, x + 12, y + 12), fill=colour)
    file = io.BytesIO()
    picture.save(file, format, quality=95)
    return file.getvalue()


def animation() -> bytes:
    """A circle that moves to the right, as an animated GIF: a video file that every installation can read."""
    frames = [Image.open(io.BytesIO(draw("red", centre))) for centre in MOVE]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def inline(data: bytes, kind: str) -> str:
    """A data: URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@contextlib.contextmanager
def web_server() -> Iterator[str]:
    """Serve the drawings on this machine; gives the base URL."""
    files = {
        "/red.png": draw("red", (56, 56)),
        "/three.png": draw("red", (30, 30), (80, 40), (50, 80)),
        "/moving.gif": animation(),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing: the answers are what is to be read."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def image(url: str) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": url}}


def video(url: str) -> dict[str, Any]:
    """A video file as a part of a message."""
    return {"type": "video_url", "video_url": {"url": url}}


class Chat:
    """Asks one model and prints what it says."""

    def __init__(self, client: OpenAI, max_tokens: int) -> None:
        self._client = client
        self._model = client.models.list().data[0].id
        self._max_tokens = max_tokens

    def ask(self, title: str, question: str, *media: dict[str, Any]) -> None:
        """One question; the answer is streamed."""
        print(f"{title}\n  {question}\n  -> ", end="", flush=True)
        stream = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": [*media, {"type": "text", "text": question}]}],  # type: ignore[list-item,misc]
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()


def run_text_only(chat: Chat, base: str) -> None:
    chat.ask("text only", "Who are you?")


def run_single_image(chat: Chat, base: str, url: str | None = None) -> None:
    question = "What colour is the circle?" if url is None else "What is in this picture?"
    chat.ask("one picture, by URL", question, image(url or f"{base}/red.png"))
    chat.ask(
        "one picture, inline", "What colour is the circle?", image(inline(draw("red", (56, 56)), "image/png"))
    )


def run_multi_image(chat: Chat, base: str) -> None:
    chat.ask(
        "two pictures, by URL and inline",
        "Which picture has more circles?",
        image(f"{base}/three.png"),
        image(inline(draw("blue", (56, 56)), "image/png")),
    )


def run_video(chat: Chat, base: str) -> None:
    frames = [image(inline(draw("red", centre, format="JPEG"), "image/jpeg")) for centre in MOVE]
    chat.ask("a video as frames, each a picture", "Which way does the circle move?", *frames)
    chat.ask("a video file, by URL", "Which way does the circle move?", video(f"{base}/moving.gif"))
    chat.ask(
        "a video file, inline", "Which way does the circle move?", video(inline(animation(), "image/gif"))
    )


def main() -> None:
    kinds = ("text-only", "single-image", "multi-image", "video")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chat-type", choices=kinds, help="only this (default: all)")
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="%(default)s")
    parser.add_argument("--api-key", default="none", help="what the server was given as --api-key")
    parser.add_argument("--image-url", help="a picture the server can fetch, for the first question")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()

    chat = Chat(OpenAI(base_url=args.base_url, api_key=args.api_key), args.max_tokens)
    with web_server() as base:
        for kind in [args.chat_type] if args.chat_type else kinds:
            if kind == "text-only":
                run_text_only(chat, base)
            elif kind == "single-image":
                run_single_image(chat, base, args.image_url)
            elif kind == "multi-image":
                run_multi_image(chat, base)
            else:
                run_video(chat, base)


if __name__ == "__main__":
    main()
