"""What a family's own tests look at inside of a loaded model, and of a model without weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opsin.api import (
    BuildContext,
    InputContext,
    MappedMedia,
    Modality,
    Model,
    Placeholder,
    ProcessedPrompt,
    Tokenizer,
)
from opsin.checkpoint.files import load
from opsin.checkpoint.processor import load_image_processor
from opsin.checkpoint.tokenizer import load_tokenizer
from opsin.checkpoint.weights import LoadReport, load_weights, model_slots
from opsin.inputs.chat import ChatOptions
from opsin.inputs.placeholders import Marker, PlaceholderFinder
from opsin.inputs.template import ChatTemplate
from opsin.kernels import Kernels
from opsin.llm import LLM

M = TypeVar("M")


def loaded_model(llm: LLM) -> Model:
    """The family's model, with its weights."""
    model: Model = llm.engine.executor.model
    return model


def weight_report(llm: LLM) -> LoadReport:
    """Which keys of the checkpoint went where."""
    return llm.engine.executor.weights


def process(llm: LLM, prompt: Any) -> ProcessedPrompt:
    """A prompt with its media mapped, placeholders expanded, positions set."""
    return llm.engine.frontend.processor.process(prompt)


def render(llm: LLM, messages: Sequence[Mapping[str, Any]], *, allow_special_tokens: bool = False) -> str:
    """The text of a conversation's prompt, as the model's chat template writes it."""
    frontend = llm.engine.frontend
    options = ChatOptions(allow_special_tokens=allow_special_tokens)
    return frontend.renderer.render(frontend.conversation(messages), options).text or ""


def render_template(source: str, checkpoint: str | Path, messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as a chat template writes it, with the header of the answer at its end.

    Args:
        source: Jinja text.
        checkpoint: folder or name, for the tokenizer.
        messages: as templates get them: ``content`` is a text or a list of parts.
    """
    template = ChatTemplate(source, load_tokenizer(load(str(checkpoint)).path))
    rendered: str = template.render(
        list(messages), add_generation_prompt=True, continue_final_message=False, tools=None, variables={}
    )
    return rendered


def encode(llm: LLM, modality: Modality, items: Sequence[MappedMedia]) -> list[Tensor]:
    """The encoder's rows for some items in one call, past every cache; copies."""
    with torch.inference_mode():
        return [rows.clone() for rows in loaded_model(llm).encode(modality, items)]


@contextmanager
def recorded_logits(llm: LLM) -> Iterator[list[Tensor]]:
    """The logits the model gives inside the block, one (rows, V) tensor per call."""
    model = llm.engine.executor.model
    original, seen = model.logits, []

    def logits(hidden: Tensor) -> Tensor:
        given: Tensor = original(hidden)
        seen.append(given.clone())
        return given

    model.logits = logits  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        model.logits = original  # type: ignore[method-assign]


def input_context(
    checkpoint: str | Path, *, options: Mapping[str, Any] | None = None, **preprocessor: Any
) -> InputContext:
    """What mappers and placeholders of a checkpoint are built from.

    Args:
        checkpoint: folder or name.
        options: ``mm_processor_kwargs`` of the engine.
        preprocessor: settings of the image processor, over the checkpoint's.
    """
    found = load(str(checkpoint))
    return InputContext(
        config=found.config,
        preprocessor={**found.preprocessor, **preprocessor},
        tokenizer=load_tokenizer(found.path),
        options=options or {},
        video_preprocessor=found.video_preprocessor,
        read_json=found.read_json,
        load_image_processor=partial(load_image_processor, found.path),
    )


def find_placeholders(
    text: str,
    placeholders: Mapping[Modality, Placeholder],
    tokenizer: Tokenizer,
    counts: Mapping[Modality, int],
    options: Mapping[str, Any] | None = None,
) -> list[int | tuple[Modality, int]]:
    """A prompt as token ids, with (modality, number) where an item's expansion will stand.

    Raises:
        RequestError: placeholders and the numbers of items do not match.
    """
    parts = PlaceholderFinder(tokenizer, placeholders).in_text(text, counts, options or {})
    return [(part.modality, part.number) if isinstance(part, Marker) else part for part in parts]


def build_unloaded(
    build: Callable[[BuildContext], M], config: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> M:
    """A model of this config.json without weights, on reference kernels: nothing is allocated."""
    return build(BuildContext(config=config, kernels=Kernels("cpu", []), dtype=dtype))


def weight_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name, after `Model.weight_name`, of each tensor that a model takes -> its shape in the checkpoint."""
    return {name: slot.shape for name, slot in model_slots(model).items()}


def fill(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> LoadReport:
    """Put (key, tensor) pairs into a model; says what is missing and what was not expected."""
    return load_weights(model, tensors)
