"""A family held against transformers' own model: prompt, log-probabilities, greedy tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoint.files import load
from opsin.llm import LLM
from opsin.params import SamplingParams
from opsin.plugins import Plugins
from opsin.testing.models.inside import recorded_logits
from opsin.testing.models.outcome import require


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A prompt that both are asked.

    Attributes:
        text: with the placeholders that both know.
        images: pictures, in the order of their placeholders.
        videos: a list of frames, or whatever opsin takes as a video, for each.
        options: ``mm_processor_kwargs`` of opsin; transformers' processor gets them as keyword arguments.
    """

    text: str
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What came of one case.

    Attributes:
        case: that was compared.
        num_prompt: tokens of the expanded prompt.
        tokens: greedy tokens that were compared.
        worst: largest difference of a log-probability, over the whole vocabulary at all positions.
    """

    case: ModelCase
    num_prompt: int
    tokens: int
    worst: float


def compare_with_transformers(
    checkpoint: str | Path,
    cases: Sequence[ModelCase],
    *,
    processor: Any = None,
    inputs: Callable[[ModelCase], Mapping[str, Any]] | None = None,
    model: Any = None,
    plugins: Plugins | None = None,
    tolerance: float = 1e-4,
    max_tokens: int = 8,
    **settings: Any,
) -> list[Comparison]:
    """Ask opsin and transformers the same, in float32, and hold all there is against each other.

    Compared are the ids of the expanded prompt, the log-probabilities of the whole vocabulary at every
    position of prompt and answer, and the greedy tokens (where the best two are closer than ten times the
    tolerance, either may have been taken).

    Args:
        checkpoint: folder, as of `tiny_checkpoint`.
        cases: prompts.
        processor: transformers' processor; None: ``AutoProcessor`` of the folder.
        inputs: case -> keyword arguments of transformers' model, where its processor cannot be used (because
            it needs torchvision, say); the ids of the expanded prompt are then compared with ``input_ids``
            of these.
        model: transformers' model; None: the class that config.json names, from the folder.
        plugins: loaded plugins. Default: those installed.
        tolerance: largest difference of two log-probabilities.
        max_tokens: greedy tokens of each answer.
        settings: fields of `EngineConfig`.

    Raises:
        CheckFailed: they differ; an AssertionError.
        ValueError: this transformers has no such model.
    """
    theirs = _their_model(checkpoint) if model is None else model
    if inputs is None:
        inputs = _Processed(_their_processor(checkpoint) if processor is None else processor)
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=0)
    given = {"dtype": "float32", "kv_cache_memory": 2**26, "enable_prefix_caching": False, **settings}
    found = []
    with LLM(str(checkpoint), plugins=plugins, **given) as llm:
        for number, case in enumerate(cases, 1):
            prompt: dict[str, Any] = {"prompt": case.text, "mm_processor_kwargs": dict(case.options)}
            media = {"image": list(case.images), "video": list(case.videos)}
            if any(media.values()):
                prompt["multi_modal_data"] = {kind: items for kind, items in media.items() if items}
            with recorded_logits(llm) as seen:
                [output] = llm.generate(prompt, params, use_tqdm=False, on_error="return")
            require(
                output.error is None,
                f"case {number}: the error {type(output.error).__name__}: {output.error}",
                "an answer",
                "what the message names; the log has the traceback",
            )
            found.append(
                _compare(
                    case,
                    output.prompt_token_ids,
                    output.outputs[0].token_ids,
                    torch.cat(seen).float(),
                    theirs,
                    dict(inputs(case)),
                    tolerance,
                    f"case {number}",
                )
            )
    return found


def _compare(
    case: ModelCase,
    prompt_ids: Sequence[int],
    tokens: Sequence[int],
    logits: Tensor,
    theirs: Any,
    given: dict[str, Any],
    tolerance: float,
    where: str,
) -> Comparison:
    wanted = given["input_ids"][0].tolist()
    place = next(
        (n for n, (a, b) in enumerate(zip(prompt_ids, wanted)) if a != b), min(map(len, (prompt_ids, wanted)))
    )
    require(
        list(prompt_ids) == wanted,
        f"{where}: a prompt of {len(prompt_ids)} tokens that differs from place {place} on: "
        f"{list(prompt_ids[place : place + 6])}",
        f"transformers' {len(wanted)} tokens: {wanted[place : place + 6]}",
        "the mapper's num_embeds (sizes, grids), the placeholder's text and expand",
    )
    expected = _their_logits(theirs, given, tokens).log_softmax(-1)
    ours = logits.log_softmax(-1)
    assert len(ours) == len(expected) == len(prompt_ids) + len(tokens) - 1, (len(ours), len(expected))
    require(
        float(expected.max(-1).values.min()) > -20 and float(expected.std()) > 1e-2,
        f"{where}: log-probabilities of transformers' that are all alike",
        "weights that tell mistakes from rounding",
        "the checkpoint: tiny_checkpoint and randomise make such weights",
    )
    apart = (ours - expected).abs().amax(-1)
    first = next((n for n, value in enumerate(apart.tolist()) if not value <= tolerance), None)
    require(
        first is None,
        f"{where}: log-probabilities that are {float(apart.max()):.2g} off, first by "
        f"{0 if first is None else float(apart[first]):.2g} at place {first} of {len(prompt_ids)} prompt and "
        f"{len(tokens)} answer tokens",
        f"transformers', within {tolerance:g}",
        _where(case, first, len(prompt_ids)),
    )
    best = expected[len(prompt_ids) - 1 :].topk(2)
    for number, token in enumerate(tokens):
        clear = float(best.values[number, 0] - best.values[number, 1]) > 10 * tolerance
        require(
            not clear or token == int(best.indices[number, 0]),
            f"{where}: token {token} at place {number} of the answer",
            f"token {int(best.indices[number, 0])}",
            "the sampler's settings: these are greedy tokens",
        )
    return Comparison(case=case, num_prompt=len(prompt_ids), tokens=len(tokens), worst=float(apart.max()))


def _where(case: ModelCase, first: int | None, num_prompt: int) -> str:
    if not case.images and not case.videos:
        return "the decoder: text alone is off (config fields, rotary positions, weights under wrong names)"
    if first is not None and first >= num_prompt:
        return "delta of the positions: the prompt agrees, the answer does not"
    return (
        "the encoder's output (compare it with get_image_features), positions of what is in and after the "
        "first item, and the order of patches; text alone is compared by a case without items"
    )


@torch.inference_mode()
def _their_logits(theirs: Any, given: dict[str, Any], tokens: Sequence[int]) -> Tensor:
    """(L + answer - 1, V): all in one uncached pass."""
    ids = given["input_ids"]
    more = torch.tensor([list(tokens[:-1])], dtype=ids.dtype)
    longer = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and value.dtype == torch.int64:
            rest = more if name == "input_ids" else torch.full_like(more, int(name == "attention_mask"))
            longer[name] = torch.cat([value, rest], 1)
    logits: Tensor = theirs(**longer, use_cache=False).logits[0]
    return logits.float()


class _Processed:
    """Case -> what transformers' processor makes of it."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, case: ModelCase) -> Mapping[str, Any]:
        media = {"images": list(case.images) or None, "videos": list(case.videos) or None}
        given = {name: items for name, items in media.items() if items is not None}
        return dict(self._processor(text=[case.text], **given, return_tensors="pt", **case.options))


def _their_model(checkpoint: str | Path) -> Any:
    import transformers

    architecture = load(str(checkpoint)).architecture
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {architecture}; pass another implementation as "
            "model= with inputs=, or compare with recorded values"
        )
    return kind.from_pretrained(
        str(checkpoint), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def _their_processor(checkpoint: str | Path) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(str(checkpoint), local_files_only=True)
    except ImportError as error:
        raise ValueError(
            f"transformers' processor of {checkpoint} cannot be loaded here "
            f"({' '.join(str(error).split())[:200]}); pass processor=, or inputs="
        ) from error
