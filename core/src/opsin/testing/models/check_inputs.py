"""Checks of what comes before the model: the plugin's door, mapper, placeholder, positions, chat."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from opsin.api import EmbedCounter, MappedMedia, Modality, Positions
from opsin.errors import OpsinError
from opsin.inputs.chat import ChatOptions
from opsin.inputs.media import media_item
from opsin.testing.models.outcome import CheckFailed, DoesNotApply, require
from opsin.testing.models.subject import ModelUnderTest

MAPPER = "the input mapper's map"
EXTREME = ((1, 1), (1, 700), (700, 1), (2, 97), (33, 29))
"""Sizes that a mapper either maps or refuses with a ValueError."""


def spec(model: ModelUnderTest) -> str:
    """The spec says what can be, and the plugin's module loads neither torch nor transformers."""
    given = model.spec
    wrong = [task for task in given.tasks if task not in ("generate", "embed")]
    require(not wrong, f"tasks {given.tasks}", '"generate" and "embed" only', "ModelSpec(tasks=)")
    require(
        bool(model.frontend.eos_token_ids),
        "no token that ends an answer",
        "one in generation_config.json, in the tokenizer's eos_token or in the family's stop_tokens",
        "ModelSpec(stop_tokens=), or the checkpoint's eos_token_id",
    )
    vocabulary = len(model.frontend.tokenizer)  # type: ignore[arg-type]
    vocab_size = model.model.vocab_size
    require(
        vocabulary <= vocab_size,
        f"a tokenizer of {vocabulary} tokens and a vocab_size of {vocab_size}",
        "a row of the embeddings for every token",
        "the vocab_size that the model reads of config.json",
    )
    module = given.build.__module__
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\nimport {module}\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    if module == "__main__" or getattr(sys.modules.get(module), "__file__", None) is None:
        return f"{vocabulary} tokens; the plugin is not a module of a file, so its imports are not checked"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    heavy = done.stdout.split()
    require(
        done.returncode == 0 and not heavy,
        f"{module} that imports {' and '.join(heavy)}" if heavy else f"{module}: {done.stderr[-300:]}",
        "a module that imports neither torch nor transformers: opsin plugins imports it",
        "the imports at the top of the module with the hooks; builders import what is heavy when called",
    )
    return f"{vocabulary} tokens; {module} is torch-free"


def mapper_types(model: ModelUnderTest) -> str:
    """Mapped items are dense, finite tensors in host memory, and `num_embeds` is a positive integer."""
    shapes = []
    for modality in model.need_media():
        names = model.frontend.processor.mappers[modality].option_names
        require(
            isinstance(names, frozenset) and all(isinstance(name, str) for name in names),
            f"option_names {names!r} of the {modality} mapper",
            "a frozenset of names",
            "the mapper's option_names",
        )
        for value in model.media(modality):
            item = media_item(modality, value)
            assert item.pixels is not None
            before = item.pixels.copy()
            mapped = model.frontend.processor.mappers[modality].map(item, {})
            _check_mapped(mapped, modality)
            require(
                np.array_equal(before, item.pixels),
                f"pixels of the {modality} that map has changed",
                "pixels as they came: they are the user's, and other requests read them",
                MAPPER,
            )
            shapes.append(f"{mapped.num_embeds}")
    return f"{len(shapes)} items of {', '.join(model.modalities)} with {', '.join(shapes)} embeddings"


def _check_mapped(mapped: Any, modality: Modality) -> None:
    require(isinstance(mapped, MappedMedia), f"a {type(mapped).__name__} from map", "a MappedMedia", MAPPER)
    count = mapped.num_embeds
    require(
        isinstance(count, int) and not isinstance(count, bool) and count > 0,
        f"num_embeds {count!r} ({type(count).__name__}) of one {modality}",
        "a positive int",
        MAPPER,
    )
    require(bool(mapped.tensors), f"no tensors of a {modality} of pixels", "the encoder's input", MAPPER)
    for name, tensor in mapped.tensors.items():
        require(
            isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided,
            f"tensors[{name!r}], a {type(tensor).__name__} on {getattr(tensor, 'device', 'no device')}",
            "a dense tensor in host memory; encode moves it to the device",
            MAPPER,
        )
        require(not tensor.requires_grad, f"tensors[{name!r}] with requires_grad", "a tensor without", MAPPER)
        require(
            not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()),
            f"NaN or infinite values in tensors[{name!r}]",
            "finite numbers",
            MAPPER,
        )


def mapper_repeats(model: ModelUnderTest) -> str:
    """An item maps to the same tensors twice, and from several threads at once."""
    count = 0
    for modality in model.need_media():
        values = model.media(modality)
        first = [_kept(model.map(modality, value)) for value in values]
        again = [model.map(modality, value) for value in reversed(values)][::-1]
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(model.map, modality, value) for value in values * 4]
            threaded = [job.result() for job in jobs]
        for which, others in (("a second time", again), ("from several threads", threaded)):
            for number, mapped in enumerate(others):
                difference = _differ(mapped, first[number % len(first)])
                require(
                    difference is None,
                    f"{modality} {number % len(first) + 1}, mapped {which}, with {difference}",
                    "the same as the first time: map is called from several threads, and cached by content",
                    f"{MAPPER}: state kept on the mapper, random numbers, buffers that are used again",
                )
                count += 1
    return f"{count} items"


def _kept(mapped: MappedMedia) -> MappedMedia:
    """A copy, so that a buffer which the mapper uses again shows."""
    return replace(mapped, tensors={name: tensor.clone() for name, tensor in mapped.tensors.items()})


def _differ(one: MappedMedia, other: MappedMedia) -> str | None:
    if one.num_embeds != other.num_embeds:
        return f"num_embeds {one.num_embeds} instead of {other.num_embeds}"
    if set(one.tensors) != set(other.tensors):
        return f"tensors {sorted(one.tensors)} instead of {sorted(other.tensors)}"
    for name, tensor in one.tensors.items():
        if tensor.dtype != other.tensors[name].dtype or not torch.equal(tensor, other.tensors[name]):
            return f"another tensors[{name!r}]"
    return None if repr(one.geometry) == repr(other.geometry) else "another geometry"


def mapper_sizes(model: ModelUnderTest) -> str:
    """`count_embeds` says what `map` will give; sizes that cannot be are a ValueError in both."""
    counted = refused = 0
    for modality in model.need_media():
        mapper = model.frontend.processor.mappers[modality]
        for value in _values_of_sizes(model, modality):
            item = media_item(modality, value)
            assert item.pixels is not None
            height, width = item.pixels.shape[-3:-1]
            frames = 1 if item.pixels.ndim == 3 else len(item.pixels)
            size = f"a {modality} of {width}x{height}"
            mapped = _value_error_or(partial(mapper.map, item, {}), f"map of {size}", MAPPER)
            refused += mapped is None
            if not isinstance(mapper, EmbedCounter):
                continue
            count = _value_error_or(
                partial(mapper.count_embeds, width, height, frames, {}),
                f"count_embeds of {size}",
                "the mapper's count_embeds",
            )
            given = mapped and mapped.num_embeds
            # Of a video, frames may be left out once their times are known: fewer may be counted.
            fits = count == given or (modality == "video" and count and given and count <= given)
            require(
                bool(fits),
                f"{count or 'a ValueError'} from count_embeds and "
                f"{'a ValueError' if mapped is None else mapped.num_embeds} from map for {size}",
                "the same: users are told by it what does not fit, before anything is decoded",
                "the mapper's count_embeds",
            )
            counted += 1
    return f"{counted} sizes counted, {refused} refused"


def _values_of_sizes(model: ModelUnderTest, modality: Modality) -> list[Any]:
    extreme = [Image.new("RGB", size, "orange") for size in EXTREME]
    return [*model.media(modality), *(extreme if modality == "image" else [[picture] for picture in extreme])]


def _value_error_or(work: Any, what: str, look_at: str) -> Any:
    """What ``work`` returns; None where it raises ValueError, as it may."""
    try:
        return work()
    except ValueError:
        return None
    except Exception as error:
        raise CheckFailed(
            f"{type(error).__name__}: {error} from {what}", "a result or a ValueError for the user", look_at
        ) from error


def placeholder(model: ModelUnderTest) -> str:
    """An item becomes valid ids, one embedding for each `is_embed`, and stands where its mark stood."""
    look_at, total = "the placeholder's expand", 0
    for modality in model.need_media():
        made = model.frontend.processor.placeholders[modality]
        for number in (1, 2):
            text = made.text(number)
            require(
                isinstance(text, str) and bool(text),
                f"{text!r} as text of {modality} {number}",
                "what users write for it",
                "the placeholder's text",
            )
        for number, value in enumerate(model.media(modality), 1):
            mapped = model.map(modality, value)
            expansion, again = made.expand(mapped, number), made.expand(mapped, number)
            ids, marks = list(expansion.token_ids), list(expansion.is_embed)
            require(
                ids == list(again.token_ids) and marks == list(again.is_embed),
                f"another expansion of {modality} {number} the second time",
                "the same",
                look_at,
            )
            require(
                len(ids) == len(marks) and sum(marks) == mapped.num_embeds,
                f"{len(ids)} ids, {len(marks)} is_embed with {sum(marks)} set, and num_embeds "
                f"{mapped.num_embeds} of a {modality}",
                "an is_embed for each id, and one set for each embedding",
                f"{look_at}, or num_embeds in {MAPPER}",
            )
            outside = [token for token in ids if not 0 <= token < model.model.vocab_size]
            require(
                not outside,
                f"the ids {outside[:5]} in a {modality}'s expansion",
                f"ids of 0 to {model.model.vocab_size - 1}",
                f"{look_at}: which id it takes of config.json or of the tokenizer",
            )
        items = model.media(modality)[: model.most_items(modality)]
        processed = model.process(model.prompt({modality: items}))
        require(
            len(processed.media) == len(items),
            f"{len(processed.media)} items in the prompt of {len(items)}",
            "all of them",
            "the placeholder's text and token_id",
        )
        for placed, value in zip(processed.media, items):
            require(
                _differ(placed.mapped, model.map(modality, value)) is None,
                f"the {modality}s in another order than they were given in",
                "the n-th item at the n-th placeholder",
                "the placeholder's text(number) and expand(mapped, number)",
            )
        total += len(processed.token_ids)
    return f"{total} tokens of expanded prompts"


def positions(model: ModelUnderTest) -> str:
    """Positions are int64 (axes, tokens), count up in text, and go on in the answer as in a longer prompt."""
    compute, config = model.spec.positions, model.frontend.processor.config
    if compute is None:
        raise DoesNotApply("positions are 0, 1, 2, ...: ModelSpec(positions=) is not given")
    look_at = "the function of ModelSpec(positions=)"
    ids = model.frontend.tokenizer.encode("a cup of coffee on the table")
    alone = _computed(partial(compute, config, ids, ()), look_at)
    counted = np.broadcast_to(np.arange(len(ids)), alone.prompt.shape)
    require(
        alone.prompt.shape[1] == len(ids) and np.array_equal(alone.prompt, counted) and alone.delta == 0,
        f"{_shown(alone)} for {len(ids)} tokens of text alone",
        "0, 1, 2, ... on every axis, and delta 0",
        look_at,
    )
    lengths = []
    for modality in model.modalities:
        for items in (model.media(modality)[:1], model.media(modality)[: model.most_items(modality)]):
            processed = model.process(model.prompt({modality: items}, " which one is it then?"))
            ids, media, length = list(processed.token_ids), processed.media, len(processed.token_ids)
            whole = _computed(partial(compute, config, ids, media), look_at)
            require(
                whole.prompt.shape == (len(alone.prompt), length) and bool((whole.prompt >= 0).all()),
                f"{_shown(whole)} for {length} tokens",
                f"({len(alone.prompt)}, {length}), none below 0: as many axes as for text alone",
                look_at,
            )
            end = media[-1].end
            for cut in range(end, length):
                short = _computed(partial(compute, config, ids[:cut], media), look_at)
                rest = np.broadcast_to(
                    np.arange(cut, length) + short.delta, (len(whole.prompt), length - cut)
                )
                require(
                    np.array_equal(short.prompt, whole.prompt[:, :cut])
                    and np.array_equal(rest, whole.prompt[:, cut:]),
                    f"positions {whole.prompt[:, cut:].tolist()} of the text after a {modality}, and a delta "
                    f"of {short.delta} that gives {rest.tolist()} where that text is the answer",
                    "the same: position of token i of an answer is i + delta, on every axis",
                    f"delta in {look_at}",
                )
            lengths.append(length)
    return f"{len(alone.prompt)} axes; prompts of {', '.join(map(str, lengths))} tokens"


def _computed(work: Any, look_at: str) -> Positions:
    try:
        found = work()
    except ValueError as error:
        raise CheckFailed(f"{error}", "Positions with int64 (axes, tokens)", look_at) from error
    require(isinstance(found, Positions), f"a {type(found).__name__}", "Positions", look_at)
    assert isinstance(found, Positions)
    return found


def _shown(given: Positions) -> str:
    return f"positions {given.prompt.shape} {given.prompt[:, :6].tolist()}..., delta {given.delta}"


def chat(model: ModelUnderTest) -> str:
    """A conversation with items in it renders to a prompt that has one placeholder for each."""
    if model.frontend.renderer.template is None:
        raise DoesNotApply("no chat template, neither the checkpoint's nor the family's")
    counts = []
    for modality in model.modalities or ["text"]:
        items = [] if modality == "text" else model.media(modality)[: model.most_items(modality)]
        parts: list[Mapping[str, Any]] = [{"type": modality, modality: item} for item in items]
        messages: Sequence[Mapping[str, Any]] = [
            {"role": "user", "content": [*parts, {"type": "text", "text": "which one?"}]}
        ]
        look_at = "ModelSpec(default_chat_template=), if the checkpoint has none, and the placeholder's text"
        try:
            found = model.frontend.chat(model.frontend.conversation(messages), ChatOptions())
        except OpsinError as error:
            raise CheckFailed(str(error), "a rendered conversation", look_at) from error
        require(
            [item.modality for item in found.media] == [modality] * len(items),
            f"{len(found.media)} items in the rendered conversation",
            f"{len(items)} of {modality}",
            look_at,
        )
        counts.append(f"{len(items)} {modality}: {len(found.token_ids)} tokens")
    return "; ".join(counts)
