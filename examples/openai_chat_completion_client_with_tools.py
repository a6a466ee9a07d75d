"""A tool that is called with what is on a picture, through `opsin serve` and the openai package.

    opsin serve opsin/tiny-qwen2vl
    python examples/openai_chat_completion_client_with_tools.py --max-tokens 16

The model names the colour, a function of this script counts the stock, its result goes back as a message.
A model that was trained on tools decides itself when to call one (`--tool-choice auto`). The tiny one was
not, and is told to: it calls in the right form, for that is enforced; what it says there is chance.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw

STOCK = {"red": 12, "green": 7, "blue": 0, "yellow": 3}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "count_stock",
        "description": "How many parts of a colour are in stock.",
        "parameters": {
            "type": "object",
            "properties": {"colour": {"enum": list(STOCK)}},
            "required": ["colour"],
            "additionalProperties": False,
        },
    },
}


def count_stock(colour: str) -> dict[str, Any]:
    """The tool: what a program knows and a model does not."""
    return {"colour": colour, "in_stock": STOCK[colour]}


def picture(colour: str) -> dict[str, Any]:
    """A drawn part, as a piece of a message."""
    canvas = Image.new("RGB", (112, 112), "grey")
    ImageDraw.Draw(canvas).ellipse((34, 34, 78, 78), fill=colour)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="%(default)s")
    parser.add_argument("--api-key", default="none", help="what the server was given as --api-key")
    parser.add_argument("--tool-choice", choices=("required", "auto"), default="required", help="%(default)s")
    parser.add_argument("--max-tokens", type=int, default=256, help="of the last answer (%(default)s)")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key=args.api_key)
    model = client.models.list().data[0].id

    for colour in STOCK:
        question = {"type": "text", "text": "What colour is the circle?"}
        messages: list[Any] = [{"role": "user", "content": [picture(colour), question]}]
        answer = client.chat.completions.create(
            model=model, messages=messages, tools=[TOOL], tool_choice=args.tool_choice, temperature=0
        )  # type: ignore[call-overload]
        message = answer.choices[0].message
        if not message.tool_calls:
            print(f"no call, but: {message.content}")
            continue
        [call] = message.tool_calls
        result = count_stock(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments})  ->  {json.dumps(result)}")
        messages += [message, {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}]
        final = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[TOOL],
            tool_choice="none",
            temperature=0,
            max_tokens=args.max_tokens,
        )
        print(f"  {final.choices[0].message.content}")


if __name__ == "__main__":
    main()
