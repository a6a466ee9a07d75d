"""Many pictures as one job: OpenAI's files and batches, through `opsin serve` and the openai package.

    opsin serve opsin/tiny-qwen2vl --files-dir jobs/
    python examples/openai_batch_client.py --pictures 50

The job goes on when this script ends, and after a restart of the server; answers are fetched when it is done.
Without a server, `opsin batch` does the same from the command line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import time
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "purple")


def picture(colour: str) -> str:
    """A circle on grey, as a data: URL."""
    canvas = Image.new("RGB", (112, 112), "grey")
    ImageDraw.Draw(canvas).ellipse((34, 34, 78, 78), fill=colour)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def line(number: int, model: str) -> dict[str, Any]:
    """One request of the job; `custom_id` tells whose answer is whose, for they come in any order."""
    content = [
        {"type": "image_url", "image_url": {"url": picture(COLOURS[number % len(COLOURS)])}},
        {"type": "text", "text": "What colour is the circle?"},
    ]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    return {"custom_id": f"picture-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="%(default)s")
    parser.add_argument("--api-key", default="none", help="what the server was given as --api-key")
    parser.add_argument("--pictures", type=int, default=20, help="how many (%(default)s)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id

    job = "".join(json.dumps(line(number, model)) + "\n" for number in range(args.pictures))
    file = client.files.create(file=("pictures.jsonl", job.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status not in ("completed", "failed", "cancelled", "expired"):
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
        counts = batch.request_counts
        if counts:
            print(f"{batch.status}: {counts.completed} of {counts.total}, {counts.failed} failed", flush=True)
    if batch.output_file_id is None:
        raise SystemExit(f"the job ended as {batch.status}: {batch.errors}")
    answers = [json.loads(text) for text in client.files.content(batch.output_file_id).text.splitlines()]
    for answer in sorted(answers, key=lambda each: int(each["custom_id"].partition("-")[2])):
        print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
