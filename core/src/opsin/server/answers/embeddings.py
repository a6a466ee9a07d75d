"""Embeddings: `EmbeddingRequest` in, `EmbeddingList` out. Knows nothing of HTTP."""

from __future__ import annotations

import base64
import time
import uuid

from opsin.api import ProcessedPrompt
from opsin.fetch.gather import all_of
from opsin.params import PoolingParams
from opsin.results import PoolingRequestOutput
from opsin.server.answers.generation import usage
from opsin.server.http.errors import bad_request
from opsin.server.schema.prompts import EmbeddingRequest
from opsin.server.schema.responses import Embedding, EmbeddingList
from opsin.server.serving import Serving


class Embeddings:
    """Turns texts and messages into vectors with one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def create(self, request: EmbeddingRequest) -> EmbeddingList:
        """The vectors, in the order of the inputs.

        Raises:
            ApiError, RequestError: the request cannot be answered; then none of its inputs is.
        """
        serving, started = self._serving, time.monotonic()
        model = serving.check(request.model, task="embed")
        width = serving.info.hidden_size
        if request.dimensions is not None and request.dimensions > width:
            raise bad_request(f"this model's embeddings have {width} dimensions", "dimensions")
        request_id = f"embd-{uuid.uuid4().hex}"
        prompts = await self._prompts(request)
        params = PoolingParams(dimensions=request.dimensions)
        found = await all_of(
            serving.engine.embed(prompt, params, f"{request_id}-{number}")
            for number, prompt in enumerate(prompts)
        )
        for output in found:
            serving.metrics.embedded(started, len(output.prompt_token_ids))
        return EmbeddingList(
            id=request_id,
            object="list",
            created=int(time.time()),
            model=model,
            data=[
                Embedding(index=index, object="embedding", embedding=_numbers(output, request))
                for index, output in enumerate(found)
            ],
            usage=usage(*found),
        )

    async def _prompts(self, request: EmbeddingRequest) -> list[ProcessedPrompt]:
        serving = self._serving
        if request.input is None:
            if request.truncate_prompt_tokens is not None:
                raise bad_request(
                    "messages are not truncated: a picture could be cut in two; use input",
                    "truncate_prompt_tokens",
                )
            options = request.options(cache_salt=request.cache_salt)
            return [await serving.chat_prompt(request, options, min_new_tokens=0)]
        inputs = serving.inputs(request.input, "input")
        if request.mm_processor_kwargs:
            raise bad_request("input holds no media; use messages", "mm_processor_kwargs")
        return await serving.plain_prompts(
            inputs, truncate=request.truncate_prompt_tokens, cache_salt=request.cache_salt, min_new_tokens=0
        )


def _numbers(output: PoolingRequestOutput, request: EmbeddingRequest) -> list[float] | str:
    assert output.outputs is not None, "an embedding request ends with its embedding or an error"
    if request.encoding_format != "base64":
        return output.outputs.embedding
    return base64.b64encode(output.outputs.data.numpy().astype("<f4").tobytes()).decode()
