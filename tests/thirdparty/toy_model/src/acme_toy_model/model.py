"""A decoder made of opsin's layers, with one linear layer as its picture encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.api import BuildContext, ForwardStep, MappedMedia
from opsin.layers import Decoder, DecoderConfig, Linear, RotaryTable, kv_geometry, output_head


class ToyModel(nn.Module):
    """See `opsin.api.Model`."""

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        config = DecoderConfig.from_config(context.config)
        self.hidden_size, self.vocab_size = config.hidden_size, config.vocab_size
        self.kv_geometry = kv_geometry(config, context.parallel.world_size)
        self.picture = Linear(context, 3, config.hidden_size, bias=False)
        self.lm_head = output_head(context, config)
        rotary = RotaryTable(config.head_size, 10000.0, device=context.device)
        self.model = Decoder(context, config, rotary=rotary, head=self.lm_head)

    def weight_name(self, key: str) -> str | None:
        return key

    def encode(self, modality: str, items: Sequence[MappedMedia]) -> Sequence[Tensor]:
        colours = torch.cat([item.tensors["colours"] for item in items])
        return self.picture(colours).split([item.num_embeds for item in items])

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(token_ids)

    def forward(self, step: ForwardStep) -> Tensor:
        return self.model(step.embeds, step.positions, step.kv, step.plan)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)
