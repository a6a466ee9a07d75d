"""An `LLM` held against transformers: prompt ids, log-probabilities of every position, greedy tokens."""

from __future__ import annotations

from typing import Any

import torch

from opsin import LLM, SamplingParams
from tests.models.made.theirs import Media, Theirs

TOLERANCE = 1e-4
MARGIN = 1e-3
"""Below this distance of the two best logits, the winner is a matter of rounding."""


def compare(llm: LLM, theirs: Theirs, text: str, media: Media, *, count: int = 8, **options: Any) -> float:
    """Assert that both agree on a prompt and ``count`` greedy tokens; give the worst difference."""
    ours = {kind: [_ours(item) for item in items] for kind, items in media.items()}
    params = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, prompt_logprobs=0, logprobs=0, detokenize=False
    )
    prompt = {"prompt": text, "multi_modal_data": ours, "mm_processor_kwargs": options}
    [output] = llm.generate(prompt, params, use_tqdm=False)
    inputs = theirs.inputs(text, media, **options)
    assert output.prompt_token_ids == inputs.ids[0].tolist()

    answer = output.outputs[0]
    tokens = list(answer.token_ids)
    logits = theirs.logits(inputs, tokens)
    assert float(logits.abs().max()) > 0.5, "logits near zero would agree by themselves"
    expected = logits.log_softmax(-1)
    ids = [*output.prompt_token_ids, *tokens]
    assert output.prompt_logprobs is not None
    assert answer.logprobs is not None
    entries = [*output.prompt_logprobs[1:], *answer.logprobs]
    given = torch.tensor([entry[token].logprob for entry, token in zip(entries, ids[1:], strict=True)])
    wanted = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    worst = float((given - wanted).abs().max())
    assert worst < TOLERANCE, worst

    after = logits[len(output.prompt_token_ids) - 1 : -1]
    best = after.topk(2).values
    clear = (best[:, 0] - best[:, 1]) > MARGIN
    assert bool(((after.argmax(-1) == torch.tensor(tokens)) | ~clear).all())
    return worst


def _ours(item: Any) -> Any:
    """A video with its frames per second as users write it."""
    if isinstance(item, tuple):
        frames, fps = item
        return frames, {"fps": fps}
    return item
