"""Checks of the model itself: weights, encoder, embeddings and head, other dtypes, two ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.api import MappedMedia, Modality
from opsin.errors import ConfigError
from opsin.testing.models.outcome import DoesNotApply, require
from opsin.testing.models.subject import ModelUnderTest, compare

ENCODE = "the model's encode"
CLOSE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference that another order of sums makes, relative to the largest value."""


def weights(model: ModelUnderTest) -> str:
    """Every tensor of the checkpoint has a place, or is declared as unused."""
    report = model.llm.engine.executor.weights
    require(
        not report.missing and not report.unexpected,
        f"missing {list(report.missing)[:5]}, unexpected {list(report.unexpected)[:5]}",
        "every key in its place",
        "names of modules, which are names of keys, and LanguageModel(renames=, unused=) or weight_name",
    )
    return f"{len(report.loaded)} tensors loaded, {len(report.ignored)} not used"


def encoder(model: ModelUnderTest) -> str:
    """`encode` gives (num_embeds, H) in the run dtype, finite, and different for different items."""
    shapes = []
    for modality in model.need_media():
        mapped = [model.map(modality, value) for value in model.media(modality)]
        _check_rows(model, modality, mapped, model.encode(modality, mapped))
        alone = [model.encode(modality, [item])[0] for item in mapped]
        for number in range(1, len(alone)):
            require(
                alone[number].shape != alone[0].shape or _distance(alone[number], alone[0]) > 1e-6,
                f"the same rows for {modality} 1 and {modality} {number + 1}, which are different",
                "embeddings that depend on the pixels",
                ENCODE,
            )
        shapes += [str(tuple(rows.shape)) for rows in alone]
    return ", ".join(shapes)


def _check_rows(
    model: ModelUnderTest, modality: Modality, mapped: Sequence[MappedMedia], found: Sequence[Tensor]
) -> None:
    require(
        len(found) == len(mapped),
        f"{len(found)} tensors of encode for {len(mapped)} items",
        "one for each item, in their order",
        ENCODE,
    )
    width = embed_width(model)
    for item, rows in zip(mapped, found):
        require(
            tuple(rows.shape) == (item.num_embeds, width),
            f"{tuple(rows.shape)} of encode for a {modality} with num_embeds {item.num_embeds}",
            f"({item.num_embeds}, {width})",
            f"{ENCODE}, or num_embeds of the input mapper",
        )
        require(
            rows.dtype == model.dtype,
            f"{rows.dtype} of encode in a model that runs in {model.dtype}",
            f"{model.dtype}",
            f"{ENCODE}: move tensors to the dtype and device of the BuildContext",
        )
        require(bool(torch.isfinite(rows).all()), f"NaN or infinity of a {modality}", "numbers", ENCODE)


def embed_width(model: ModelUnderTest) -> int:
    """Columns of what `encode` returns."""
    return int(getattr(model.model, "media_width", model.model.hidden_size))


def neighbours(model: ModelUnderTest) -> str:
    """Items that are encoded together come to what each one alone comes to, in whatever order."""
    worst = 0.0
    for modality in model.need_media():
        mapped = [model.map(modality, value) for value in model.media(modality)]
        alone = [model.encode(modality, [item])[0] for item in mapped]
        together = model.encode(modality, mapped)
        turned = model.encode(modality, mapped[::-1])[::-1]
        for number, expected in enumerate(alone):
            for which, rows in (("together", together[number]), ("in reversed order", turned[number])):
                apart = float("inf") if rows.shape != expected.shape else _distance(rows, expected)
                require(
                    apart <= CLOSE[model.dtype],
                    f"rows of {modality} {number + 1} that are {apart:.2g} (relative) off when {len(mapped)} "
                    f"are encoded {which}",
                    f"what it comes to alone, within {CLOSE[model.dtype]:g}",
                    f"{ENCODE}: lengths of the segments of attention, order of the split, anything that is "
                    "computed over all items of the call",
                )
                worst = max(worst, apart)
    return f"worst relative difference {worst:.1e}"


def head(model: ModelUnderTest) -> str:
    """`embed` and `logits` have the declared sizes, and a row's logits depend on that row alone."""
    subject, look_at = model.model, "the model's embed and logits; LanguageModel has both"
    device = model.llm.engine.executor.device.torch_device
    ids = torch.tensor([0, 1, 2, 1], device=device)
    with torch.inference_mode():
        rows = subject.embed(ids)
        require(
            tuple(rows.shape) == (4, subject.hidden_size) and rows.dtype == model.dtype,
            f"{tuple(rows.shape)} {rows.dtype} of embed for 4 tokens",
            f"(4, {subject.hidden_size}) {model.dtype}",
            look_at,
        )
        require(
            bool(torch.equal(rows[1], rows[3])) and not bool(torch.equal(rows[0], rows[1])),
            "embeddings that do not follow the token ids",
            "one row for one id",
            f"{look_at}: is the embedding table the one of the checkpoint?",
        )
        hidden = torch.randn(5, subject.hidden_size, generator=torch.Generator().manual_seed(3))
        hidden = hidden.to(device=device, dtype=model.dtype)
        logits = subject.logits(hidden)
        require(
            tuple(logits.shape) == (5, subject.vocab_size) and bool(torch.isfinite(logits).all()),
            f"{tuple(logits.shape)} of logits for 5 rows"
            + (", not all finite" if tuple(logits.shape) == (5, subject.vocab_size) else ""),
            f"(5, {subject.vocab_size}), finite",
            look_at,
        )
        for number in range(5):
            apart = _distance(subject.logits(hidden[number : number + 1])[0], logits[number])
            require(
                apart <= CLOSE[model.dtype],
                f"logits of a row that are {apart:.2g} (relative) off beside others",
                "the same as alone",
                "the model's logits",
            )
        require(
            _distance(logits[0], logits[1]) > 1e-4,
            "the same logits for different hidden states",
            "logits that depend on them",
            "the output head: a tied head is Embedding(tied=head), see LanguageModel",
        )
    return f"{subject.vocab_size} tokens, width {subject.hidden_size}"


def half_precision(model: ModelUnderTest) -> str:
    """In each other dtype of the device, everything runs in that dtype and says about the same."""
    device = model.llm.engine.executor.device
    others = [name for name in device.capabilities.dtypes if name != model.llm.engine.resolved.dtype]
    if not others:
        raise DoesNotApply(f"{device.name} has one dtype")
    request = model.requests(2)[1:]
    for name in others:
        with ModelUnderTest(
            model.checkpoint, plugins=model.plugins, dtype=name, **model.settings_but_dtype()
        ) as other:
            for modality in other.modalities:
                mapped = [other.map(modality, value) for value in model.media(modality)]
                _check_rows(other, modality, mapped, other.encode(modality, mapped))
            head(other)
            [answer] = other.answers(request)
    return f"{', '.join(others)}: {len(answer.token_ids)} tokens each"


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of ``other``."""
    scale = max(float(other.float().abs().max()), 1e-6)
    return float((one.float() - other.float()).abs().max()) / scale


def two_ranks(model: ModelUnderTest) -> str:
    """Two tensor-parallel ranks, each a process, come to what one does."""
    if model.plugins is not None:
        raise DoesNotApply("ranks are processes of their own, which load the plugins that are installed")
    requests, expected = model.requests()[:4], model.expected[:4]
    try:
        llm = model.load(tensor_parallel_size=2)
    except ConfigError as error:
        if "cannot be divided" in str(error):
            raise DoesNotApply(str(error)) from error
        raise
    with llm:
        answers = model.answers(requests, llm)
    look_at = (
        "split= and unit= of the family's Linear layers (column, then row), and sizes divided among ranks"
    )
    return compare(answers, expected, model.tolerance, ("on two ranks", "on one"), look_at)
