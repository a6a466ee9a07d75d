"""The public, torch-free vocabulary of opsin: everything a plugin may name.

A plugin returns *specs* (frozen, keyword-only) from its hooks. A spec carries small builder functions
whose heavy imports are local, so that discovering plugins loads neither torch nor transformers.

Shape legend, used in every docstring of the project: T tokens in a step, B sequences, E embeddings of one
media item, H hidden size, N query heads, K key/value heads, D head size, V vocabulary size, A position
axes (1, or 3 for M-RoPE).
"""

from opsin.api.device import (
    Capabilities,
    Device,
    MemoryInfo,
    Probe,
)
from opsin.api.kernels import (
    Activation,
    AttentionBatch,
    DenseAttention,
    GatedAct,
    KernelQuery,
    Kernels,
    KVGeometry,
    KVLayer,
    LayerNorm,
    LinearFn,
    OpName,
    PagedAttention,
    PlanAttention,
    PrepareLinear,
    RMSNorm,
    Rotary,
    TopK,
    WriteKV,
)
from opsin.api.media import (
    Expansion,
    InputContext,
    InputMapper,
    MappedMedia,
    MediaItem,
    Modality,
    PlacedMedia,
    Placeholder,
    Positions,
    ProcessedPrompt,
    Tokenizer,
)
from opsin.api.model import (
    BuildContext,
    ForwardStep,
    Model,
    Parallel,
    Pooling,
    PoolingType,
)
from opsin.api.specs import (
    API_MAJOR,
    API_MINOR,
    CHECKPOINT_GROUP,
    ENTRY_POINT_GROUP,
    DeviceSpec,
    InputMapperSpec,
    KernelSpec,
    ModelSpec,
    PlaceholderSpec,
)
from opsin.api.tools import ToolCallPiece, ToolFormat, ToolParser, ToolPieces

__all__ = [
    "API_MAJOR",
    "API_MINOR",
    "CHECKPOINT_GROUP",
    "ENTRY_POINT_GROUP",
    "Activation",
    "AttentionBatch",
    "BuildContext",
    "Capabilities",
    "DenseAttention",
    "Device",
    "DeviceSpec",
    "Expansion",
    "ForwardStep",
    "GatedAct",
    "InputContext",
    "InputMapper",
    "InputMapperSpec",
    "KVGeometry",
    "KVLayer",
    "KernelQuery",
    "KernelSpec",
    "Kernels",
    "LayerNorm",
    "LinearFn",
    "MappedMedia",
    "MediaItem",
    "MemoryInfo",
    "Modality",
    "Model",
    "ModelSpec",
    "OpName",
    "PagedAttention",
    "Parallel",
    "PlacedMedia",
    "Placeholder",
    "PlaceholderSpec",
    "PlanAttention",
    "Pooling",
    "PoolingType",
    "Positions",
    "PrepareLinear",
    "Probe",
    "ProcessedPrompt",
    "RMSNorm",
    "Rotary",
    "Tokenizer",
    "ToolCallPiece",
    "ToolFormat",
    "ToolParser",
    "ToolPieces",
    "TopK",
    "WriteKV",
]
