"""llama.cpp through its C interface: prompts are evaluated one after another, then decoded as one batch.

That is what its server does with several slots, without HTTP. The high-level class of llama-cpp-python has
one sequence only.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workloads import Request, Workload

from peers.engines.gguf_names import TEXT, VISION
from peers.measured import Result

MAX_NUM_SEQS = 16
CONTEXT = 16 * 1024
"""Tokens of all sequences together; the largest workload has 15,000."""

PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


class LlamaCpp:
    """A text model and its vision tower (mtmd)."""

    def __init__(self, model: Path, settings: Mapping[str, Any], threads: int) -> None:  # noqa: ARG002
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._llama, self._mtmd = llama_cpp, mtmd_cpp
        # A callback that does nothing: the default writes every tensor to stderr. Kept, or it would be freed.
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(self._silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = _made(
            llama_cpp.llama_model_load_from_file(str(model / TEXT).encode(), parameters), TEXT
        )
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = CONTEXT, 2048, 512
        context.n_seq_max, context.kv_unified = MAX_NUM_SEQS, True
        context.n_threads = context.n_threads_batch = threads
        self._context = _made(llama_cpp.llama_init_from_model(self._model, context), "a context")
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.n_threads, vision.warmup = False, False, threads, False
        self._vision = _made(
            mtmd_cpp.mtmd_init_from_file(str(model / VISION).encode(), self._model, vision), VISION
        )
        self._batch = llama_cpp.llama_batch_init(MAX_NUM_SEQS, 0, 1)

    def run(self, workload: Workload, requests: Sequence[Request]) -> Result:
        """See `PeerSide.run`."""
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        ids: list[list[int]] = []
        positions: list[int] = []
        times: list[float] = []
        num_prompt_tokens = 0
        start = time.perf_counter()
        for sequence, request in enumerate(requests):
            num_tokens, position = self._evaluate(sequence, request)
            num_prompt_tokens += num_tokens
            positions.append(position)
            ids.append([self._best(-1)])
        times.append(time.perf_counter() - start)
        for _ in range(workload.new_tokens - 1):
            self._decode([own[-1] for own in ids], positions)
            positions = [position + 1 for position in positions]
            for sequence, own in enumerate(ids):
                own.append(self._best(sequence))
            times.append(time.perf_counter() - start)
        for own in ids:
            self._text(own)
        seconds = time.perf_counter() - start
        return Result(
            seconds=seconds,
            token_times=times if workload.streamed else (),
            num_prompt_tokens=num_prompt_tokens,
            output_ids=ids,
        )

    def about(self) -> dict[str, str]:
        """Version; products are computed in 8 bits where weights have them."""
        version = importlib.metadata.version("llama_cpp_python")
        return {
            "version": f"llama-cpp-python {version}",
            "computes in": "float32; 8 bits with 8- and 4-bit weights",
        }

    def _evaluate(self, sequence: int, request: Request) -> tuple[int, int]:
        """Compute a prompt; gives its number of tokens, and the position behind it."""
        mtmd = self._mtmd
        pixels = np.ascontiguousarray(request.image)
        height, width, _ = pixels.shape
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd.mtmd_bitmap_init(width, height, data)
        chunks = mtmd.mtmd_input_chunks_init()
        try:
            text = request.text.replace(PLACEHOLDER, mtmd.mtmd_default_marker().decode()).encode()
            given = mtmd.mtmd_input_text(text=text, text_len=len(text), add_special=False, parse_special=True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            if mtmd.mtmd_tokenize(self._vision, chunks, ctypes.byref(given), bitmaps, 1):
                raise RuntimeError("llama.cpp could not tokenize a prompt")
            behind = self._llama.llama_pos(0)
            failed = mtmd.mtmd_helper_eval_chunks(
                self._vision, self._context, chunks, 0, sequence, 2048, True, ctypes.byref(behind)
            )
            if failed:
                raise RuntimeError(f"llama.cpp could not evaluate a prompt: status {failed}")
            return mtmd.mtmd_helper_get_n_tokens(chunks), behind.value
        finally:
            mtmd.mtmd_input_chunks_free(chunks)
            mtmd.mtmd_bitmap_free(bitmap)

    def _decode(self, tokens: Sequence[int], positions: Sequence[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position) in enumerate(zip(tokens, positions)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = i, 1
        if status := self._llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp could not decode: status {status}")

    def _best(self, index: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._size,)).argmax())

    def _text(self, ids: Sequence[int]) -> str:
        tokens = (self._llama.llama_token * len(ids))(*ids)
        text = ctypes.create_string_buffer(64 * len(ids))
        length = self._llama.llama_detokenize(
            self._vocabulary, tokens, len(ids), text, len(text), False, False
        )
        return text.raw[: max(length, 0)].decode(errors="replace")


def _made(made: Any, what: str) -> Any:
    if made is None:
        raise RuntimeError(f"llama.cpp could not make {what}")
    return made
