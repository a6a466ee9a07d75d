"""Which frames of a video are looked at (transformers, ``SmolVLMVideoProcessor.sample_frames``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsin.layers import fields

SKIPPED = 1.0
"""Seconds that are left out at both ends of a long video."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How many frames.

    Attributes:
        fps: frames per second; None: as many as there are.
        num_frames: at most this many; None: any number.
    """

    fps: float | None = None
    num_frames: int | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Sampling:
        """From the settings for videos: ``video_sampling``, or ``fps`` and ``num_frames`` (transformers 5).

        Raises:
            ValueError: a setting cannot be used.
        """
        older = fields(settings, {"fps": float | None, "max_frames": int | None}, "video_sampling")
        newer = fields(settings, {"fps": float | None, "num_frames": int | None})
        return cls().changed(
            {
                "fps": newer["fps"] if older["fps"] is None else older["fps"],
                "num_frames": newer["num_frames"] if older["max_frames"] is None else older["max_frames"],
            }
        )

    def changed(self, options: Mapping[str, Any]) -> Sampling:
        """With the options of a request.

        Raises:
            ValueError: an option cannot be used.
        """
        fps, count = options.get("fps", self.fps), options.get("num_frames", self.num_frames)
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not fps > 0):
            raise ValueError(f"fps={fps!r}: expected a positive number of frames per second")
        if count is not None and (type(count) is not int or count < 1):
            raise ValueError(f"num_frames={count!r}: expected a positive integer")
        return replace(self, fps=fps, num_frames=count)

    @property
    def samples(self) -> bool:
        """Whether frames may be left out."""
        return self.fps is not None or self.num_frames is not None

    @staticmethod
    def duration(times: Sequence[float]) -> float:
        """Seconds from the first frame to the end of the last one, which lasts as long as the others do."""
        return times[0] if len(times) < 2 else round(len(times) / _rate(times), 9)

    def chosen(self, times: Sequence[float]) -> Sequence[int]:
        """Indices of the frames that are looked at, ascending."""
        count, duration = len(times), self.duration(times)
        if not self.samples or count < 2:
            return range(count)
        most = count if self.num_frames is None else self.num_frames
        fps = _rate(times) if self.fps is None else self.fps
        wanted = max(1, min(round(fps * duration), most))
        first, last = 0, count - 1
        if duration - 2 * SKIPPED > most * fps:
            skipped = SKIPPED * _rate(times)
            first, last = int(skipped), min(int(count - skipped), count - 1)
        if first >= last:
            first, last = 0, count - 1
        return [int(index) for index in np.unique(np.linspace(first, last, wanted, dtype=int))]


def _rate(times: Sequence[float]) -> float:
    """Frames per second, without the rounding errors of times: their products are cut to integers."""
    return float(f"{(len(times) - 1) / (times[-1] - times[0]):.12g}")
