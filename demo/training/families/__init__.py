"""The families that have a demonstration model."""

from __future__ import annotations

from family import Family

from families.llava import Llava
from families.minicpmv import MiniCPMV
from families.phi3v import Phi3V
from families.qwen2vl import Qwen2VL

FAMILIES: dict[str, Family] = {family.name: family for family in (Qwen2VL(), Llava(), Phi3V(), MiniCPMV())}
