"""transformers' image processor of a checkpoint, for families that map media through it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_image_processor(path: Path) -> Any:
    """The image processor that a checkpoint's folder names, computing with NumPy and Pillow.

    The forms that compute with torchvision resize by other formulas and are not used, whether torchvision is
    installed or not. Code from the folder is never run.

    Raises:
        ValueError: the folder names none that transformers ships, or its settings cannot be used.
    """
    import transformers
    from transformers import AutoImageProcessor

    slow: dict[str, Any] = {"use_fast": False}
    if int(transformers.__version__.partition(".")[0]) >= 5:
        slow = {"backend": "pil"}
    try:
        return AutoImageProcessor.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, **slow
        )
    except Exception as error:  # the many readers behind this raise anything
        reason = " ".join(str(error).split())
        raise ValueError(f"the image processor in {path} cannot be loaded: {reason:.300}") from error
