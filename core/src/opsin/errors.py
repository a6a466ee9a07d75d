"""The error tree.

OpsinError
├── PluginError            a plugin is broken, missing or in conflict
│   ├── MissingPluginError nobody provides what was asked for
│   └── PluginConflictError two plugins claim one key
├── ConfigError            a setting cannot be (also a ValueError)
├── CheckpointError        a checkpoint is incomplete or does not fit its architecture
├── RequestError           one request is bad; all others go on (also a ValueError)
│   ├── MediaError         its media
│   └── PromptTooLongError it does not fit the context
├── RequestsFailed         some requests of a batch failed; `.outputs` has all results
└── DeviceLostError        the device is gone; the only fatal error of a running engine

BatchInterrupted is a KeyboardInterrupt: Ctrl-C during a batch; `.outputs` has what is finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any


class OpsinError(Exception):
    """Root of all errors raised on purpose."""


class PluginError(OpsinError):
    """A plugin is broken, missing or in conflict."""


class MissingPluginError(PluginError):
    """No installed plugin provides what was asked for; the message names who would."""


class PluginConflictError(PluginError):
    """Two plugins claim one key; the message names both and the setting that decides."""


class ConfigError(OpsinError, ValueError):
    """A setting is out of range, unknown, or not possible on this device."""


class CheckpointError(OpsinError):
    """A checkpoint is missing files or tensors, or has tensors nobody expects."""


class RequestError(OpsinError, ValueError):
    """This request cannot be served. It fails alone."""


class MediaError(RequestError):
    """A media item cannot be used: undecodable, too large, too many, wrong shape."""


class FetchError(RequestError):
    """A URL may not or cannot be fetched.

    Attributes:
        status: as an HTTP status: 403 (it is not allowed), 422 (it leads to an error or to something that is
            no picture), 502 or 504 (it may work later).
        param: the kind of URL, e.g. ``"image_url"``.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class PromptTooLongError(RequestError):
    """The expanded prompt does not fit into the context."""


class RequestsFailed(OpsinError):
    """Some requests of one call failed.

    Attributes:
        outputs: the outputs of all requests, in order; failed ones have ``error`` set.
    """

    def __init__(self, message: str, outputs: Sequence[Any]) -> None:
        super().__init__(message)
        self.outputs = list(outputs)


class BatchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a batch.

    Attributes:
        outputs: finished outputs, by the number of their prompt.
    """

    def __init__(self, message: str, outputs: Mapping[int, Any]) -> None:
        super().__init__(message)
        self.outputs = dict(outputs)


class DeviceLostError(OpsinError):
    """The device stopped answering; the engine cannot go on."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'temperature'?)"``; empty if no known name is near."""
    return "".join(f" (did you mean {near!r}?)" for near in get_close_matches(name, known, n=1))


def require_known(
    where: str,
    names: Iterable[Any],
    known: Iterable[str],
    error: type[OpsinError],
    *,
    also_meant: Iterable[str] = (),
) -> None:
    """Refuse names that are not known, suggesting the one that was probably meant, or ``also_meant``.

    Raises:
        OpsinError: of type ``error``, for the first unknown name.
    """
    accepted = sorted(known)
    for name in names:
        if name not in accepted:
            hint = did_you_mean(str(name), [*accepted, *also_meant])
            listed = ", ".join(accepted) or "none"
            raise error(f"{where}: unknown {str(name)[:50]!r}{hint}; accepted: {listed}")
