"""Who is compared with whom: one row per engine and form of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from workloads import Workload

Peer = Literal["opsin", "transformers", "openvino", "llamacpp"]
Rate = Literal["float32", "bfloat16", "int8"]

PEERS: tuple[Peer, ...] = ("opsin", "transformers", "openvino", "llamacpp")

FLOAT, INT8, INT4 = "16 and 32 bits", "8 bits", "4 bits"
GROUPS = (FLOAT, INT8, INT4)
"""Rows of one group store their weights in about as many bits; only they are compared."""

WORKLOADS = (
    Workload(name="latency", title="one request", num_requests=1, new_tokens=64, streamed=True),
    Workload(name="throughput", title="16 requests, 64 new tokens each", num_requests=16, new_tokens=64),
    Workload(
        name="shared",
        title="8 questions about one picture, 64 new tokens each",
        num_requests=8,
        new_tokens=64,
        same_image=True,
    ),
    Workload(
        name="system",
        title="8 requests with a common system prompt of 1,500 tokens, 16 new tokens each",
        num_requests=8,
        new_tokens=16,
        system_tokens=1500,
    ),
)

LATENCY_SAMPLES = 3
"""The latency workload is short: it runs this often in a turn."""

MAX_MODEL_LEN = 2048
"""Context that the longest workload needs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: unique.
        peer: the engine; also its environment.
        group: see `GROUPS`.
        layer_bits, head_bits: per weight of the decoder's layers and of the output head, scales included;
            None: the engine decides, and no floor is given.
        rate: arithmetic whose measured rate is the floor of matrix products; None as above.
        settings: for the side's class.
        export: form of the exported model, if the engine needs one of its own.
        about: what a reader must know to judge the figures.
        only_with_bfloat16: runs only where the engine would compute in bfloat16 by itself.
    """

    name: str
    peer: Peer
    group: str
    layer_bits: float | None
    head_bits: float | None
    rate: Rate | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    export: str | None = None
    about: str
    only_with_bfloat16: bool = False


def _opsin(
    form: str, group: str, bits: tuple[float | None, float | None], rate: Rate | None, **more: Any
) -> Row:
    return Row(
        name=f"opsin {form}",
        peer="opsin",
        group=group,
        layer_bits=bits[0],
        head_bits=bits[1],
        rate=rate,
        **more,
    )


def _openvino(form: str, group: str, bits: tuple[float, float], rate: Rate, about: str) -> list[Row]:
    own = Row(
        name=f"OpenVINO {form}",
        peer="openvino",
        group=group,
        layer_bits=bits[0],
        head_bits=bits[1],
        rate=rate,
        export=form,
        about=about,
    )
    exact = Row(
        name=f"OpenVINO {form}, precision f32",
        peer="openvino",
        group=group,
        layer_bits=bits[0],
        head_bits=bits[1],
        rate="float32" if form == "fp32" else rate,
        export=form,
        settings={"INFERENCE_PRECISION_HINT": "f32"},
        about="the same with INFERENCE_PRECISION_HINT=f32",
        only_with_bfloat16=True,
    )
    return [own, exact]


def _llamacpp(form: str, group: str, bits: tuple[float, float], rate: Rate, vision: str) -> Row:
    return Row(
        name=f"llama.cpp {form}",
        peer="llamacpp",
        group=group,
        layer_bits=bits[0],
        head_bits=bits[1],
        rate=rate,
        export=form,
        about=f"vision tower in {vision}; batches are decoded together, prompts computed one after another",
    )


ROWS: tuple[Row, ...] = (
    _opsin("float32", FLOAT, (32, 32), "float32", settings={"dtype": "float32"}, about='dtype="float32"'),
    _opsin("default", FLOAT, (16, 16), None, about="no setting at all"),
    Row(
        name="transformers float32",
        peer="transformers",
        group=FLOAT,
        layer_bits=32,
        head_bits=32,
        rate="float32",
        settings={"dtype": "float32"},
        about="eager, SDPA attention; a batch is one left-padded generate",
    ),
    Row(
        name="transformers bfloat16",
        peer="transformers",
        group=FLOAT,
        layer_bits=16,
        head_bits=16,
        rate="bfloat16",
        settings={"dtype": "bfloat16"},
        about="the same in bfloat16",
    ),
    *_openvino(
        "fp32", FLOAT, (32, 32), "float32", "continuous batching, prefix cache on, KV cache u8 (its default)"
    ),
    _llamacpp("f16", FLOAT, (16, 16), "float32", "f16"),
    _opsin("int8", INT8, (8, 8), "int8", settings={"quantization": "int8"}, about='quantization="int8"'),
    *_openvino(
        "int8", INT8, (8, 8), "int8", "weights int8 a row, activations rounded in prefill; the rest as above"
    ),
    _llamacpp("Q8_0", INT8, (8.5, 8.5), "int8", "Q8_0"),
    _opsin("int4", INT4, (4.5, 8), "int8", settings={"quantization": "int4"}, about='quantization="int4"'),
    *_openvino(
        "int4", INT4, (4.125, 8), "int8", "decoder int4 in groups of 128, head int8; the rest as above"
    ),
    _llamacpp("Q4_0", INT4, (4.5, 8.5), "int8", "Q8_0"),
)
