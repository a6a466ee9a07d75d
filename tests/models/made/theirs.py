"""transformers' side of a comparison: a saved model with random weights, and what it computes of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Media = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Inputs:
    """What a processor gives: input ids (1, T), and the model's other arguments."""

    ids: Tensor
    media: Mapping[str, Tensor]


def random_weights(model: Any, seed: int = 11) -> None:
    """Norms near one, everything else small and random: every weight matters."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        is_norm = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if is_norm or "lambda" in name else 0.15 * noise
    model.tie_weights()


class Theirs:
    """A checkpoint and its model."""

    model: Any
    tokenizer: Any

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as the hub has them: of versions before 5, which all later ones read."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        special = config.pop("extra_special_tokens", [])
        config["additional_special_tokens"] = list(special)
        named = config.pop("model_specific_special_tokens", {})
        file.write_text(json.dumps({**config, "extra_special_tokens": named}, indent=1))

    def inputs(self, text: str, media: Media, **options: Any) -> Inputs:
        """A prompt processed: media by modality, in the order of their placeholders."""
        raise NotImplementedError

    @torch.inference_mode()
    def logits(self, inputs: Inputs, tokens: Sequence[int] = ()) -> Tensor:
        """Logits (T + len(tokens), V) of the prompt and of tokens after it, in one uncached pass."""
        if not tokens or not inputs.media:
            ids = torch.cat([inputs.ids, torch.tensor([list(tokens)], dtype=torch.int64)], 1)
            given: Tensor = self.model(input_ids=ids, use_cache=False, **inputs.media).logits[0]
            return given
        # A model with random weights may write the token of a picture, which stands for none.
        embed = self.model.get_input_embeddings()
        features = self.model.model.get_image_features(**inputs.media).pooler_output
        rows = torch.cat([part.flatten(0, -2) for part in features])
        prompt = embed(inputs.ids)[0]
        prompt[inputs.ids[0] == self.model.config.image_token_id] = rows
        embeds = torch.cat([prompt, embed(torch.tensor(list(tokens)))])[None]
        more: Tensor = self.model(inputs_embeds=embeds, use_cache=False).logits[0]
        return more

    @torch.inference_mode()
    def greedy(self, inputs: Inputs, count: int) -> tuple[list[int], Tensor]:
        """``count`` greedy tokens, each step computed anew, and their logits (count, V)."""
        tokens: list[int] = []
        rows = []
        for _ in range(count):
            rows.append(self.logits(inputs, tokens)[-1])
            tokens.append(int(rows[-1].argmax()))
        return tokens, torch.stack(rows)
