"""OpenVINO GenAI: its continuous batching pipeline, to which all requests are added at once."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Request, Workload

from peers.measured import Result

MAX_NUM_SEQS = 16
MAX_NUM_BATCHED_TOKENS = 2048
"""As opsin's; its own default of 256 computes a prompt in pieces."""


class OpenVino:
    """``ContinuousBatchingPipeline`` on the CPU."""

    def __init__(self, model: Path, settings: Mapping[str, Any], threads: int) -> None:
        import openvino_genai

        self._genai = openvino_genai
        schedule = openvino_genai.SchedulerConfig()
        schedule.max_num_seqs = MAX_NUM_SEQS
        schedule.max_num_batched_tokens = MAX_NUM_BATCHED_TOKENS
        schedule.enable_prefix_caching = True
        self._settings = dict(settings)
        properties = {"INFERENCE_NUM_THREADS": threads, **settings}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), schedule, "CPU", properties, {}, properties
        )
        self._num_requests = 0

    def run(self, workload: Workload, requests: Sequence[Request]) -> Result:
        """See `PeerSide.run`."""
        from openvino import Tensor

        config = self._genai.GenerationConfig()
        config.max_new_tokens = workload.new_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        ids: list[list[int]] = [[] for _ in requests]
        times: list[float] = []
        start = time.perf_counter()
        handles = []
        for request in requests:
            picture = Tensor(np.asarray(request.image)[None])
            handles.append(self._pipeline.add_request(self._num_requests, request.text, [picture], config))
            self._num_requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, own in zip(handles, ids):
                if handle.can_read():
                    for output in handle.read().values():
                        own += output.generated_ids
            times += [time.perf_counter() - start] * (len(ids[0]) - len(times))
        self._pipeline.get_tokenizer().decode(ids)
        seconds = time.perf_counter() - start
        prompts = sum(handle.get_vlm_perf_metrics().get_num_input_tokens() for handle in handles)
        return Result(
            seconds=seconds,
            token_times=times if workload.streamed else (),
            num_prompt_tokens=prompts,
            output_ids=ids,
        )

    def about(self) -> dict[str, str]:
        """Version, and the precision of what is not quantised."""
        version = importlib.metadata.version("openvino-genai")
        precision = self._settings.get("INFERENCE_PRECISION_HINT") or default_precision()
        return {"version": f"openvino-genai {version}", "computes in": precision}


def default_precision() -> str:
    """What OpenVINO computes in on this processor when nobody says."""
    from openvino import Core

    name: str = Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return name


if __name__ == "__main__":
    print(default_precision())
