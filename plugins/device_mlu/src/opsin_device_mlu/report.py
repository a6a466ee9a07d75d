"""What ``opsin doctor --report`` packs about a card: signatures, cnmon, arguments of calls that failed."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from opsin_device_mlu.binding import signature_text
from opsin_device_mlu.book import FUNCTIONS
from opsin_device_mlu.device import Unusable, backend, known_kernels
from opsin_device_mlu.ops import DISTRIBUTION, PACKAGE, find_ops
from opsin_device_mlu.settings import PREFIX, Settings

_TIMEOUT_S = 60
_VARIABLES = (PREFIX, "TMO_", "CN_", "MLU_", "NEUWARE_", "TORCH_MIN_CNLOG")
_BEHIND = {
    "rms_norm": "fused_rms_norm",
    "layer_norm": "fused_layer_norm",
    "gated_act": "active",
    "rotary": "apply_rotary",
    "write_kv": "reshape_paged_cache",
    "paged_attention": "single_query_cached_kv_attn",
    "dense_attention": "flash_attention",
    "linear": "matmul",
}
"""What begins a kernel's name -> the function whose calls are dumped."""


def files() -> Mapping[str, str | bytes]:
    """Name -> content. Never raises: what cannot be had says why."""
    found: dict[str, str | bytes] = {
        "mlu/cnmon.txt": _output("cnmon") + _output("cnmon", "info"),
        "mlu/environment.txt": "".join(
            f"{name}={value}\n" for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)
        ),
        "mlu/signatures.txt": _signatures(),
    }
    try:
        module, settings = backend(), Settings.read()
        declined = known_kernels(module, 0, settings, find_ops(settings)).declined
    except (Unusable, ValueError) as error:
        return {**found, "mlu/kernels.txt": f"{error}\n"}
    found["mlu/kernels.txt"] = "".join(f"{name}: {why}\n" for name, why in declined.items()) or "all right\n"
    for function in dict.fromkeys(
        _BEHIND[key] for name in declined for key in _BEHIND if name.startswith(key)
    ):
        found |= _dumped(function)
    return found


def _output(*command: str) -> str:
    head = f"$ {' '.join(command)}\n"
    if shutil.which(command[0]) is None:
        return f"{head}not found\n"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{head}{error}\n"
    return f"{head}{done.stdout}{done.stderr}\n"


def _signatures() -> str:
    """Of everything in the package: what no public text tells for certain."""
    try:
        module = importlib.import_module(PACKAGE)
    except Exception as error:  # its libraries may raise whatever they like
        return f"{PACKAGE} cannot be imported: {type(error).__name__}: {error}\n"
    names = sorted({*getattr(module, "__all__", ()), *FUNCTIONS, *(n for n in dir(module) if n[0] != "_")})
    functions = [(name, getattr(module, name, None)) for name in names]
    lines = [f"{name}{signature_text(f)}" for name, f in functions if callable(f)]
    return "\n".join([f"{DISTRIBUTION}, {getattr(module, '__version__', 'no __version__')}", *lines, ""])


def _dumped(function: str) -> Mapping[str, str | bytes]:
    """One function's calls while its kernel is tried, as the vendor's gen-case writes them (manual 6.2)."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TMO_GEN_CASE": "1",
            "TMO_GEN_CASE_OP_NAME": function,
            "TMO_GEN_CASE_PATH": folder,
        }
        command = [sys.executable, "-m", "opsin_device_mlu.report"]
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=5 * _TIMEOUT_S, check=False
            )
            said = f"{done.stdout}{done.stderr}"[-20_000:]
        except (OSError, subprocess.TimeoutExpired) as error:
            said = f"{error}\n"
        dumps = sorted(path for path in Path(folder).rglob("*") if path.is_file())[:20]
        cases = {f"mlu/gen_case/{path.relative_to(folder)}": path.read_bytes() for path in dumps}
        return {f"mlu/gen_case/{function}.txt": said or "nothing was said\n", **cases}


if __name__ == "__main__":
    _settings = Settings.read()
    known_kernels(backend(), 0, _settings, find_ops(_settings))
