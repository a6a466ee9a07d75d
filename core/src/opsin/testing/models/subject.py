"""The model under test: loaded once, asked many things; requests and media made from fixed seeds."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import MappedMedia, Modality, Model, ModelSpec, ProcessedPrompt
from opsin.errors import PromptTooLongError, RequestError
from opsin.inputs.frontend import Frontend
from opsin.inputs.media import media_item
from opsin.llm import LLM
from opsin.params import SamplingParams
from opsin.plugins import Plugins
from opsin.results import RequestOutput
from opsin.testing.models.outcome import CheckFailed, DoesNotApply, require

TOLERANCE = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 4e-1}
"""How far two log-probabilities of one token may be apart when only the order of sums differs."""

SIZES = ((320, 213), (150, 240), (96, 96), (400, 80))
"""Width and height of the pictures that models are asked about."""

VIDEO_SIZE, VIDEO_FRAMES = (112, 84), 5
WORDS = re.findall(r"\w+", "the picture shows a cup of coffee and two cats on the table near a rocket")

EmbedsInput = Callable[[Modality, Sequence[Tensor], Sequence[Any]], Any]
"""(modality, embeddings of each item, geometry of each) -> what ``multi_modal_data`` takes instead."""

Request = tuple[dict[str, Any], SamplingParams]


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    Attributes:
        prompt_token_ids: the expanded prompt.
        token_ids: of the answer.
        logprobs: log-probability of each of them.
        margins: of each, how much more probable the best token was than the second.
    """

    prompt_token_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    margins: Sequence[float]


class ModelUnderTest:
    """A checkpoint with the plugin that runs it, for `opsin.testing.models.check_model`.

    A context manager; what it loads is released at its end. Models are loaded when a check first needs them.

    Args:
        checkpoint: folder or name of a checkpoint, usually of a `tiny_checkpoint`.
        plugins: loaded plugins. Default: those installed.
        dtype: run dtype of the comparisons; float32 tells most.
        embeds_input: how users pass ready-made embeddings of this family, if not in one of the usual layouts
            (a list of tensors, one tensor, a dict with grids); None: in one of these.
        unread: fields of the checkpoint's JSON files that nothing is expected to read, usually as keys of
            what says why: ``"do_pad"``, with its section (``"vision_config.vocab_size"``), or of one file at
            the top (``"config.json/patch_size"``). See the check ``config-fields``.
        takes_embeds: whether the family takes ready-made embeddings.
        pictures: images instead of the generated ones.
        num_requests: how many mixed requests the comparisons run.
        max_tokens: longest answer of those.
        settings: fields of `EngineConfig` for every load.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        plugins: Plugins | None = None,
        dtype: str = "float32",
        embeds_input: EmbedsInput | None = None,
        takes_embeds: bool = True,
        unread: Collection[str] = (),
        pictures: Sequence[Image.Image] | None = None,
        num_requests: int = 16,
        max_tokens: int = 16,
        **settings: Any,
    ) -> None:
        self.checkpoint, self.plugins = str(checkpoint), plugins
        self.takes_embeds, self.unread = takes_embeds, frozenset(unread)
        self.num_requests, self.max_tokens = num_requests, max_tokens
        self._embeds_input, self._pictures = embeds_input, pictures
        self._settings = {"dtype": dtype, "kv_cache_memory": 2**26, **settings}
        self._llm: LLM | None = None
        self._expected: list[Answer] | None = None
        self._media: dict[Modality, list[Any]] = {}

    def __enter__(self) -> ModelUnderTest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the model."""
        if self._llm is not None:
            self._llm.close()
            self._llm = None

    # ---- the model and its parts --------------------------------------------------------------

    def load(self, checkpoint: str | Path | None = None, **changes: Any) -> LLM:
        """Another `LLM` of it, with other settings; the caller closes it."""
        return LLM(
            self.checkpoint if checkpoint is None else str(checkpoint),
            plugins=self.plugins,
            **{**self._settings, **changes},
        )

    def settings_but_dtype(self) -> dict[str, Any]:
        """The settings of every load, for another `ModelUnderTest`."""
        return {name: value for name, value in self._settings.items() if name != "dtype"}

    def adopt(self, llm: LLM) -> None:
        """Use a model that the caller has loaded, and closes."""
        self._llm = llm

    @property
    def llm(self) -> LLM:
        """The model with the usual settings, loaded once."""
        if self._llm is None:
            self._llm = self.load()
        return self._llm

    @property
    def frontend(self) -> Frontend:
        """What is between words and pictures and the engine."""
        return self.llm.engine.frontend

    @property
    def model(self) -> Model:
        """The family's model, with its weights."""
        model: Model = self.llm.engine.executor.model
        return model

    @property
    def spec(self) -> ModelSpec:
        """What the plugin registered."""
        return self.llm.engine.model_spec

    @property
    def dtype(self) -> torch.dtype:
        """Run dtype."""
        dtype = getattr(torch, self.llm.engine.resolved.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def tolerance(self) -> float:
        """See `TOLERANCE`."""
        return TOLERANCE[self.llm.engine.resolved.dtype]

    @property
    def modalities(self) -> Sequence[Modality]:
        """What it takes besides text."""
        return sorted(self.frontend.processor.mappers)

    def need_media(self) -> Sequence[Modality]:
        """The modalities; raises `DoesNotApply` where there are none."""
        if not self.modalities:
            raise DoesNotApply("the model takes text alone")
        return self.modalities

    # ---- media --------------------------------------------------------------------------------

    def media(self, modality: Modality) -> list[Any]:
        """Some different items, the same on every run; small enough that several fit into the context."""
        if modality not in self._media:
            self._media[modality] = self._made(modality)
        return self._media[modality]

    def _made(self, modality: Modality) -> list[Any]:
        if modality == "image" and self._pictures is not None:
            return list(self._pictures)
        if modality not in ("image", "video"):
            raise DoesNotApply(f"no {modality} can be made here; the suite knows images and videos")
        most, scale = self.llm.engine.info.max_model_len // 8, 1.0
        while True:
            items = make_images(scale) if modality == "image" else make_videos(scale)
            counts = [self.map(modality, item).num_embeds for item in items]
            if max(counts) <= most or scale < 0.1:
                return items
            scale *= 0.7

    def map(self, modality: Modality, value: Any, **options: Any) -> MappedMedia:
        """The family's mapping of an item, past every cache."""
        item = media_item(modality, value)
        mapper = self.frontend.processor.mappers[modality]
        merged = {**self.frontend.processor.options, **options}
        return mapper.map(item, {name: merged[name] for name in mapper.option_names if name in merged})

    def most_items(self, modality: Modality) -> int:
        """How many items of a modality go into one prompt here."""
        embeds = max(self.map(modality, item).num_embeds for item in self.media(modality))
        room = self.llm.engine.info.max_model_len // 2
        return max(1, min(2, self.frontend.processor.limits.get(modality, 2), room // embeds))

    def prompt(self, media: Mapping[Modality, Sequence[Any]], text: str = " which one?") -> dict[str, Any]:
        """Placeholders, as users write them, before a text."""
        placeholders = self.frontend.processor.placeholders
        marks = [
            placeholders[modality].text(number)
            for modality, items in media.items()
            for number in range(1, len(items) + 1)
        ]
        prompt: dict[str, Any] = {"prompt": "".join(marks) + text}
        if media:
            prompt["multi_modal_data"] = {modality: list(items) for modality, items in media.items()}
        return prompt

    def process(self, prompt: dict[str, Any]) -> ProcessedPrompt:
        """Media mapped, placeholders expanded, positions set."""
        return self.frontend.processor.process(prompt)

    def encode(self, modality: Modality, items: Sequence[MappedMedia]) -> list[Tensor]:
        """The family's encoder, past every cache; copies."""
        with torch.inference_mode():
            return [rows.clone() for rows in self.model.encode(modality, items)]

    def embeds_prompt(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """The prompt with finished embeddings in place of its pictures or videos."""
        processed = self.process(prompt)
        given: dict[str, Any] = {}
        for modality in prompt["multi_modal_data"]:
            mapped = [item.mapped for item in processed.media if item.modality == modality]
            embeds = [self.encode(modality, [item])[0] for item in mapped]
            given[modality] = self._as_users_pass(modality, embeds, [item.geometry for item in mapped])
        return {**prompt, "multi_modal_data": given}

    def _as_users_pass(self, modality: Modality, embeds: Sequence[Tensor], geometries: Sequence[Any]) -> Any:
        if self._embeds_input is not None:
            return self._embeds_input(modality, embeds, geometries)
        mapper, refusals = self.frontend.processor.mappers[modality], []
        for layout in usual_embeds_input(modality, embeds, geometries):
            try:
                if len(mapper.split_embeds(layout)) == len(embeds):
                    return layout
            except ValueError as error:
                refusals.append(str(error))
        raise CheckFailed(
            f"a split_embeds of {modality} that takes none of the usual layouts "
            f"({'; '.join(refusals)[:400]})",
            "one that takes a list of tensors, or the layout named as ModelUnderTest(embeds_input=)",
            "the mapper's split_embeds; takes_embeds=False if the family is to have no such input",
        )

    # ---- requests -----------------------------------------------------------------------------

    def requests(self, count: int | None = None, seed: int = 0) -> list[Request]:
        """Mixed requests: text alone, one and several items, different lengths, some items repeated."""
        chance = random.Random(seed)
        room = self.llm.engine.info.max_model_len // 4
        per_word = max(1, len(self.frontend.tokenizer.encode(" ".join(WORDS))) // len(WORDS))
        longest = max(3, min(40, room // per_word))
        found = []
        for number in range(self.num_requests if count is None else count):
            media = {}
            for modality in self.modalities:
                most = self.most_items(modality)
                if wanted := chance.choice([0, 1, 1, most] if modality == "image" else [0, 0, 1]):
                    media[modality] = [chance.choice(self.media(modality)) for _ in range(wanted)]
            if number == 0:
                media = {}
            text = " ".join(chance.choice(WORDS) for _ in range(chance.randint(3, longest)))
            length = chance.randint(max(1, self.max_tokens // 4), self.max_tokens)
            params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=2)
            prompt = self.prompt(media, f"\n{text}")
            try:
                self.process(prompt)
            except PromptTooLongError:  # items of several modalities together
                prompt = self.prompt({}, f"\n{text}")
            found.append((prompt, params))
        return found

    def one(self, prompt: dict[str, Any], llm: LLM | None = None) -> Answer:
        """A prompt's answer."""
        params = SamplingParams(temperature=0, max_tokens=self.max_tokens, ignore_eos=True, logprobs=2)
        return self.answers([(prompt, params)], llm)[0]

    def answers(self, requests: Sequence[Request], llm: LLM | None = None) -> list[Answer]:
        """Answers to a batch."""
        llm = self.llm if llm is None else llm
        prompts, params = [prompt for prompt, _ in requests], [params for _, params in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False, on_error="return")
        return [_answer(output) for output in outputs]

    @property
    def expected(self) -> list[Answer]:
        """Answers to `requests`, one by one and without a prefix cache: the plainest way."""
        if self._expected is None:
            with self.load(enable_prefix_caching=False) as plain:
                self._expected = [self.answers([request], plain)[0] for request in self.requests()]
        return self._expected


def _answer(output: RequestOutput) -> Answer:
    if output.error is not None:
        raise CheckFailed(
            f"the error {type(output.error).__name__}: {output.error}",
            "an answer",
            "the log, which has the traceback; a RequestError names the part that failed",
        ) from output.error
    [sample] = output.outputs
    assert sample.logprobs is not None
    logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, sample.token_ids)]
    best = [sorted((each.logprob for each in entry.values()), reverse=True) for entry in sample.logprobs]
    margins = [first - second for first, second, *_ in best]
    for number, value in enumerate(logprobs):
        require(
            value == value,  # NaN is not
            f"NaN as log-probability of token {number} of the answer",
            "finite logits",
            "the model's forward, and what encode returns",
        )
    return Answer(output.prompt_token_ids, sample.token_ids, logprobs, margins)


def compare(
    got: Sequence[Answer], expected: Sequence[Answer], tolerance: float, ways: tuple[str, str], look_at: str
) -> str:
    """Hold answers to the same requests against each other; returns what was compared.

    Where tokens differ, the two best ones must have been closer than the tolerance; what follows is then not
    comparable.

    Args:
        got: answers in the order of the requests.
        expected: the same, computed in the plainer way.
        tolerance: of log-probabilities.
        ways: how the two were computed, as in ``("batched", "one by one")``.
        look_at: where the mistake would be.

    Raises:
        CheckFailed: they differ.
    """
    worst, tokens = 0.0, 0
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        require(
            one.prompt_token_ids == other.prompt_token_ids,
            f"{ways[0]}, other prompt tokens in request {number} than {ways[1]} "
            f"({_first_difference(one.prompt_token_ids, other.prompt_token_ids)})",
            "the same tokens",
            "the placeholder's expand and the mapper: what they give may depend on the item alone",
        )
        for place, (token, wanted) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
            apart = abs(one.logprobs[place] - other.logprobs[place])
            if token != wanted and other.margins[place] <= 2 * tolerance:
                break
            require(
                token == wanted and apart <= tolerance,
                f"{ways[0]}, token {token} with log-probability {one.logprobs[place]:.4f} at place {place} "
                f"of the answer to request {number}",
                f"token {wanted} with {other.logprobs[place]:.4f} as {ways[1]} (within {tolerance:g})",
                look_at,
            )
            worst, tokens = max(worst, apart), tokens + 1
    return f"{len(got)} requests, {tokens} tokens, worst log-probability difference {worst:.1e}"


def _first_difference(left: Sequence[int], right: Sequence[int]) -> str:
    place = next((n for n, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), None)
    if place is None:
        return f"{len(left)} and {len(right)} tokens"
    return f"token {place} is {left[place]} and {right[place]}"


def usual_embeds_input(
    modality: Modality, embeds: Sequence[Tensor], geometries: Sequence[Any]
) -> Sequence[Any]:
    """The layouts in which families take ready-made embeddings, the first usual one first."""
    layouts: list[Any] = [list(embeds)]
    if len({tuple(part.shape) for part in embeds}) == 1:
        layouts.append(torch.stack(list(embeds)))
    name = f"{modality}_embeds"
    if all(isinstance(grid, tuple) and len(grid) == 3 for grid in geometries):
        layouts.append(
            {name: torch.cat(list(embeds)), f"{modality}_grid_thw": torch.tensor(list(geometries))}
        )
    layouts.append({name: list(embeds)})
    return layouts


def make_images(scale: float = 1.0, seed: int = 0) -> list[Image.Image]:
    """Pictures of different sizes: smooth colours with some noise."""
    random_numbers = np.random.default_rng(seed)
    return [_picture(random_numbers, width, height, scale) for width, height in SIZES]


def make_videos(scale: float = 1.0, seed: int = 1) -> list[list[Image.Image]]:
    """Two videos, a list of frames each; the number of frames is odd."""
    random_numbers = np.random.default_rng(seed)
    return [
        [_picture(random_numbers, *VIDEO_SIZE, scale) for _ in range(VIDEO_FRAMES - 2 * number)]
        for number in range(2)
    ]


def _picture(numbers: np.random.Generator, width: int, height: int, scale: float) -> Image.Image:
    size = max(2, round(width * scale)), max(2, round(height * scale))
    colours = Image.fromarray(numbers.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = numbers.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(colours).astype(np.int64) + noise).clip(0, 255).astype(np.uint8))


__all__ = ["Answer", "EmbedsInput", "ModelUnderTest", "Request", "RequestError", "compare", "make_images"]
