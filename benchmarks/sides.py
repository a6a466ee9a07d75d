"""The two sides compared: opsin, and transformers at its best on the same job.

Each takes PIL pictures and prompt texts that are already in memory and gives texts back, so image processing,
tokenization and detokenization are inside the measured time on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from workloads import Request, Workload

DType = Literal["float32", "bfloat16"]

MAX_MODEL_LEN = 1024
MAX_NUM_SEQS = 16
"""Context and batch that the largest workload needs; opsin sizes its KV cache by them."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one repetition on one side gave.

    Attributes:
        seconds: the whole call, from pictures and texts to texts.
        token_times: seconds from the call to each generated token of the first request; streamed only.
        prompt_ids: token ids of each request's prompt, the picture's included.
        output_ids: generated token ids of each request.
        num_cached_tokens: prompt tokens that were not computed because an earlier or a parallel request had
            computed them.
    """

    seconds: float
    token_times: tuple[float, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    output_ids: tuple[tuple[int, ...], ...]
    num_cached_tokens: int = 0


class Side(Protocol):
    """A loaded model that runs workloads."""

    def run(self, workload: Workload, requests: Sequence[Request]) -> Measurement:
        """Run all requests at once, from pictures and texts to texts."""
        ...


class OpsinSide:
    """`opsin.LLM`: one ``generate`` call with all requests, or ``stream``."""

    def __init__(self, model: Path, dtype: DType | None = None, **settings: Any) -> None:
        from opsin import LLM

        sizes = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
        self.llm = LLM(str(model), dtype=dtype, **{**sizes, **settings})

    def run(self, workload: Workload, requests: Sequence[Request]) -> Measurement:
        from opsin import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=workload.new_tokens, ignore_eos=True)
        prompts = [
            {"prompt": request.text, "multi_modal_data": {"image": request.image}} for request in requests
        ]
        token_times: list[float] = []
        start = time.perf_counter()
        if workload.streamed:
            (prompt,) = prompts
            for output in self.llm.stream(prompt, params):
                now = time.perf_counter() - start
                # An update may carry several tokens, or only the end.
                token_times += [now] * (len(output.outputs[0].token_ids) - len(token_times))
            outputs = [output]
        else:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Measurement(
            seconds=seconds,
            token_times=tuple(token_times),
            prompt_ids=tuple(tuple(output.prompt_token_ids) for output in outputs),
            output_ids=tuple(tuple(output.outputs[0].token_ids) for output in outputs),
            num_cached_tokens=sum(o.metrics.num_cached_tokens for o in outputs if o.metrics is not None),
        )


class TransformersSide:
    """``Qwen2VLForConditionalGeneration.generate``: one left-padded batch, greedy, KV cache, SDPA attention.

    The processor is put together by hand from its parts: AutoProcessor wants torchvision for its video part,
    and the PIL image processor is the one whose pixels opsin's equal.
    """

    def __init__(self, model: Path, dtype: DType) -> None:
        import torch
        from transformers import AutoTokenizer, GenerationConfig, Qwen2VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
        from transformers.utils import logging

        logging.disable_progress_bar()  # it would write into ours
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(model)
        self.model = Qwen2VLForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        # No end-of-sequence id: every row runs to max_new_tokens with no check in between.
        self.model.generation_config = GenerationConfig(
            do_sample=False, use_cache=True, pad_token_id=self.tokenizer.pad_token_id
        )
        self.image_token: str = "<|image_pad|>"
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(self.image_token)

    def run(self, workload: Workload, requests: Sequence[Request]) -> Measurement:
        import torch

        clock = _TokenClock() if workload.streamed else None
        start = time.perf_counter()
        inputs = self._inputs(requests)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=workload.new_tokens, streamer=clock)
        num_prompt = inputs["input_ids"].shape[1]
        self.tokenizer.batch_decode(ids[:, num_prompt:], skip_special_tokens=True)
        seconds = time.perf_counter() - start
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
        return Measurement(
            seconds=seconds,
            token_times=tuple(moment - start for moment in clock.moments) if clock else (),
            prompt_ids=tuple(
                tuple(token for token, real in zip(row, mask, strict=True) if real) for row, mask in rows
            ),
            output_ids=tuple(map(tuple, ids[:, num_prompt:].tolist())),
        )

    def logit_gap(self, request: Request, prefix: Sequence[int], first: int, second: int) -> float:
        """Logit of ``first`` less that of ``second`` after prompt and ``prefix``: how near a tie they are."""
        import torch

        inputs = self._inputs([request])
        more = torch.tensor([list(prefix)], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_id).int()
        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=1).logits[0, -1].float()
        return float(logits[first] - logits[second])

    def _inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        pictures = self.image_processor(images=[request.image for request in requests], return_tensors="pt")
        merged = self.image_processor.merge_size**2
        texts = [
            request.text.replace(self.image_token, self.image_token * (int(grid.prod()) // merged))
            for request, grid in zip(requests, pictures["image_grid_thw"], strict=True)
        ]
        inputs = dict(self.tokenizer(texts, padding=True, return_tensors="pt"))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_id).int()
        return {**inputs, **pictures}


class _TokenClock:
    """A transformers streamer that only takes the time; it decodes nothing."""

    def __init__(self) -> None:
        self.moments: list[float] = []
        self._prompt_seen = False

    def put(self, ids: Any) -> None:  # noqa: ARG002 (they are not decoded)
        if self._prompt_seen:
            self.moments.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to flush."""


SIDES: dict[str, Callable[[Path, DType], Side]] = {"opsin": OpsinSide, "transformers": TransformersSide}
