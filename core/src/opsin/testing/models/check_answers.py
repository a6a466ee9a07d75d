"""Checks through the engine: how a request is computed does not show in what it gives."""

from __future__ import annotations

from typing import Any

from PIL import ImageOps

from opsin.testing.models.outcome import DoesNotApply, require
from opsin.testing.models.subject import Answer, ModelUnderTest, compare

CHUNKS = (1, 7, 16, 50)


def batched(model: ModelUnderTest) -> str:
    """Requests in one batch are answered as each one alone."""
    look_at = "encode (its items know nothing of each other), and layers of the family's own: no batch axis"
    got = model.answers(model.requests())
    return compare(got, model.expected, model.tolerance, ("batched", "one by one"), look_at)


def chunked(model: ModelUnderTest) -> str:
    """Prompts computed in pieces of any size are answered as whole ones."""
    look_at = (
        "what the model's forward or encode keeps between calls, and positions: a step may hold any part of "
        "a prompt, and half of a picture"
    )
    details = []
    for chunk in CHUNKS:
        count = 4 if chunk == 1 else len(model.expected)
        with model.load(max_num_batched_tokens=chunk) as small:
            got = model.answers(model.requests()[:count], small)
        ways = (f"in chunks of {chunk}", "whole")
        details.append(compare(got, model.expected[:count], model.tolerance, ways, look_at))
    return f"chunks of {', '.join(map(str, CHUNKS))}; the last: {details[-1]}"


def cached(model: ModelUnderTest) -> str:
    """With everything in the prefix cache and the encoder cache, answers are the same."""
    model.answers(model.requests())
    before = model.llm.engine.stats()
    got = model.answers(model.requests())
    after = model.llm.engine.stats()
    look_at = "state in the model or the mapper: the same prompt must come to the same keys, values and rows"
    found = compare(got, model.expected, model.tolerance, ("from the prefix cache", "uncached"), look_at)
    require(
        after.prefix_hits > before.prefix_hits or max(map(_length, model.expected)) < 32,
        "no hit in the prefix cache for prompts that were just computed",
        "hits: the same prompt expands to the same ids and the same item has the same digest",
        "the placeholder's expand, and the geometry: both must be the same every time",
    )
    require(
        after.num_encoded == before.num_encoded,
        f"{after.num_encoded - before.num_encoded} items encoded again",
        "none: they are in the encoder cache",
        "the mapper's option_names and digest of the item",
    )
    return f"{found}; {after.prefix_hits - before.prefix_hits} hits"


def _length(answer: Answer) -> int:
    return len(answer.prompt_token_ids)


def small_caches(model: ModelUnderTest) -> str:
    """With room for one item in the encoder cache, and one item encoded per step, answers are the same."""
    with model.load(encoder_cache_memory=1, max_encoder_tokens=1) as tight:
        got = model.answers(model.requests(), tight)
    ways, look_at = ("with a small encoder cache", "with a large one"), "what encode keeps between calls"
    return compare(got, model.expected, model.tolerance, ways, look_at)


def preempted(model: ModelUnderTest) -> str:
    """Requests that lose their blocks and are computed again are answered the same."""
    executor, requests = model.llm.engine.executor, model.requests()
    block = model.llm.engine.resolved.block_size
    geometry = executor.model.kv_geometry
    rows = executor.device.kv_row_elements
    per_token = geometry.num_kv_heads * geometry.head_size if rows is None else rows(geometry)
    block_bytes = 2 * geometry.num_layers * per_token * model.dtype.itemsize * block
    longest = max(len(answer.prompt_token_ids) + len(answer.token_ids) for answer in model.expected)
    blocks = -(-longest // block) + 4
    with model.load(kv_cache_memory=blocks * block_bytes, max_model_len=longest + 1) as tight:
        got = model.answers(requests, tight)
        times = tight.engine.stats().num_preemptions
    look_at = "what the model keeps of a sequence outside of the KV cache"
    found = compare(got, model.expected, model.tolerance, ("preempted", "undisturbed"), look_at)
    if not times:
        raise DoesNotApply(f"nothing was preempted with {blocks} blocks; give more num_requests")
    return f"{times} preemptions; {found}"


def order(model: ModelUnderTest) -> str:
    """Items swapped give another answer; in the same order the same one; another item another one."""
    details = []
    for modality in model.need_media():
        first, second = model.media(modality)[:2]
        pairs = [([first], [_recoloured(first)])]
        if model.most_items(modality) > 1:
            pairs.append(([first, second], [second, first]))
        for one, other in pairs:
            straight, changed, again = (
                model.one(model.prompt({modality: items})) for items in (one, other, one)
            )
            what = f"a {modality} in other colours" if len(one) == 1 else f"two swapped {modality}s"
            apart = max(abs(a - b) for a, b in zip(straight.logprobs, changed.logprobs))
            require(
                straight.token_ids != changed.token_ids or apart > 1e-4,
                f"the same answer for {what} (log-probabilities within {apart:.1e})",
                "one that depends on what is where",
                "encode (does it read the pixels, and return items in their order?), expansion, positions",
            )
            ways = ("asked again", "the first time")
            compare([again], [straight], model.tolerance, ways, "state in the model or the mapper")
            details.append(f"{what}: {apart:.2g} apart")
    return "; ".join(details)


def _recoloured(item: Any) -> Any:
    """The same size in other colours."""
    return [ImageOps.invert(frame) for frame in item] if isinstance(item, list) else ImageOps.invert(item)


def embeddings(model: ModelUnderTest) -> str:
    """Finished embeddings in place of pixels are answered as the pixels."""
    if not model.takes_embeds:
        raise DoesNotApply("the family takes no ready-made embeddings")
    details = []
    for modality in model.need_media():
        for count in sorted({1, model.most_items(modality)}):
            prompt = model.prompt({modality: model.media(modality)[:count]})
            ready = model.embeds_prompt(prompt)
            ways = ("with embeddings", "with pixels")
            look_at = "the mapper's split_embeds, and its map of an item with embeds: num_embeds and geometry"
            got = [model.one(ready), model.one(ready)]
            expected = [model.one(prompt)] * 2
            details.append(compare(got, expected, model.tolerance, ways, look_at))
    return details[-1]
