"""Run a checkpoint once, in a process of its own: ``python -m tests.models.full_size.run_once JSON``.

The argument: ``{"folder", "dtype", "picture", "prompt", "num_tokens"}``; or, for transformers' model,
``"token_ids"`` (a prompt and what was generated after it) instead of ``"prompt"``. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def memory(name: str) -> int:
    """A line of /proc/self/status, in bytes: "VmHWM" (peak, mapped files too) or "RssAnon" (private, now)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


class PeakPrivateMemory:
    """Watches this process's private memory from a thread, every 5 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory("RssAnon"))
            time.sleep(0.005)


class Clock:
    """Seconds since it was started, on the wall and of this process's processor time."""

    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        wall, processor = self._started
        return {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}


def ours(folder: str, dtype: Any, picture: str, prompt: str, num_tokens: int) -> dict[str, Any]:
    """Load with `LLM`, ask about a picture once."""
    from opsin import LLM, SamplingParams

    peak, before, clock = PeakPrivateMemory(), memory("RssAnon"), Clock()
    llm = LLM(folder, dtype=dtype, kv_cache_memory=256 * 2**20)
    report: dict[str, Any] = {
        "load": clock.read(),
        "load_peak_bytes": peak.bytes - before,
        "resident_bytes": memory("RssAnon") - before,
    }
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    media = {"image": Image.open(picture).convert("RGB")}
    request: Any = {"prompt": prompt, "multi_modal_data": media}
    clock = Clock()
    stream = llm.stream(request, params)
    next(stream)
    prefill, clock = clock.read(), Clock()
    *_, output = stream
    decode = clock.read()
    (answer,) = output.outputs
    assert answer.logprobs is not None
    return {
        **report,
        "peak_bytes": peak.bytes - before,
        "peak_with_files_bytes": memory("VmHWM"),
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": answer.token_ids,
        "logprobs": [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids)],
        "prefill": prefill,
        "decode": decode,
    }


@torch.inference_mode()
def theirs(folder: str, dtype: str, picture: str, token_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """Log-probabilities that transformers' model gives the last ``num_tokens`` ids, and its choices."""
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(
        images=[Image.open(picture).convert("RGB")], return_tensors="pt"
    )
    ids = torch.tensor([token_ids])
    kinds = (ids == model.config.image_token_id).long()
    logits = model(input_ids=ids, mm_token_type_ids=kinds, **pixels, use_cache=False).logits[0]
    steps = logits[-num_tokens - 1 : -1].float().log_softmax(-1)
    chosen = steps.gather(1, ids[0, -num_tokens:].unsqueeze(1)).squeeze(1)
    return {"logprobs": chosen.tolist(), "token_ids": steps.argmax(-1).tolist()}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(theirs(**asked) if "token_ids" in asked else ours(**asked)))
