"""Scores: how similar texts are, by the cosine of their embeddings; and documents in that order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.fetch.gather import all_of
from opsin.params import PoolingParams
from opsin.results import PoolingRequestOutput
from opsin.server.answers.generation import usage
from opsin.server.http.errors import bad_request
from opsin.server.schema.prompts import PoolingRequest, RerankRequest, ScoreRequest
from opsin.server.schema.responses import (
    Pooled,
    PooledList,
    RankedDocument,
    Ranking,
    RerankedDocument,
    Score,
    ScoreList,
)
from opsin.server.serving import Serving


class Scores:
    """Compares texts with one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def score(self, request: ScoreRequest) -> ScoreList:
        """Each of the second texts with the first one, or with the first of its place.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        model = self._serving.check(request.model, task="embed")
        first, second = request.firsts, request.seconds
        if len(first) not in (1, len(second)):
            raise bad_request(f"{len(first)} and {len(second)} texts; expected 1, or as many", "text_1")
        found = await self._embed([*first, *second], request.truncate_prompt_tokens)
        ones = found[: len(first)] * (len(second) // len(first))
        scores = _cosines(ones, found[len(first) :])
        return ScoreList(
            id=f"score-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=model,
            data=[Score(index=index, object="score", score=score) for index, score in enumerate(scores)],
            usage=usage(*found),
        )

    async def rerank(self, request: RerankRequest) -> Ranking:
        """Documents, the most similar to the query first.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        model = self._serving.check(request.model, task="embed")
        texts = request.texts
        found = await self._embed([request.query, *texts], request.truncate_prompt_tokens)
        scores = _cosines(found[:1] * len(texts), found[1:])
        order = sorted(range(len(texts)), key=lambda index: -scores[index])
        results = [RankedDocument(index=index, relevance_score=scores[index]) for index in order]
        if request.return_documents is not False:
            for result in results:
                result.document = RerankedDocument(text=texts[result.index])
        return Ranking(
            id=f"rerank-{uuid.uuid4().hex}",
            object="list",
            created=int(time.time()),
            model=model,
            results=results[: request.top_n],
            usage=usage(*found),
        )

    async def pool(self, request: PoolingRequest) -> PooledList:
        """The vectors themselves.

        Raises:
            ApiError, RequestError: the request cannot be answered.
        """
        model = self._serving.check(request.model, task="embed")
        prompts = self._serving.inputs(request.input, "input")
        processed = await self._serving.plain_prompts(
            prompts, truncate=request.truncate_prompt_tokens, cache_salt=None, min_new_tokens=0
        )
        request_id = f"pool-{uuid.uuid4().hex}"
        found = await all_of(
            self._serving.engine.embed(prompt, PoolingParams(), f"{request_id}-{number}")
            for number, prompt in enumerate(processed)
        )
        return PooledList(
            id=request_id,
            object="list",
            created=int(time.time()),
            model=model,
            data=[
                Pooled(index=index, object="pooling", data=_vector(output).tolist())
                for index, output in enumerate(found)
            ],
            usage=usage(*found),
        )

    async def _embed(self, texts: Sequence[str], truncate: int | None) -> list[PoolingRequestOutput]:
        serving, started = self._serving, time.monotonic()
        most = serving.settings.limits.max_inputs
        if len(texts) > most + 1:
            raise bad_request(f"at most {most} texts are accepted (--max-inputs)")
        prompts = await serving.plain_prompts(texts, truncate=truncate, cache_salt=None, min_new_tokens=0)
        request_id = f"score-{uuid.uuid4().hex}"
        found = await all_of(
            serving.engine.embed(prompt, PoolingParams(), f"{request_id}-{number}")
            for number, prompt in enumerate(prompts)
        )
        for output in found:
            serving.metrics.embedded(started, len(output.prompt_token_ids))
        return found


def _vector(output: PoolingRequestOutput) -> Tensor:
    assert output.outputs is not None, "an embedding request ends with its embedding or an error"
    return output.outputs.data


def _cosines(first: Sequence[PoolingRequestOutput], second: Sequence[PoolingRequestOutput]) -> list[float]:
    one, other = (torch.stack([_vector(output) for output in outputs]) for outputs in (first, second))
    scores: list[float] = F.cosine_similarity(one, other, dim=1).tolist()
    return scores
