"""Which chips of a node an engine has: as many as Ray has granted, told apart by locked files.

Ray counts a custom resource but does not say which of its pieces are whose. A lock is free again when its
holder's process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from opsin.errors import ConfigError

_held: list[int] = []
"""Open files, whose locks last as long as this process."""


def take_chips(name: str, count: int, total: int, folder: Path | None = None) -> int:
    """The index of the first of ``count`` chips that follow one another and nobody else has.

    Args:
        name: of the device.
        count: how many.
        total: chips of this node.
        folder: of the lock files; by default one of this user in the system's folder for such.

    Raises:
        ConfigError: there are not so many free ones in a row.
    """
    folder = folder or Path(tempfile.gettempdir()) / f"opsin-chips-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for first in range(0, total - count + 1, count):
        taken = [_lock(folder / f"{name}-{index}.lock") for index in range(first, first + count)]
        if all(descriptor is not None for descriptor in taken):
            _held.extend(descriptor for descriptor in taken if descriptor is not None)
            return first
        for descriptor in taken:
            if descriptor is not None:
                os.close(descriptor)
    raise ConfigError(
        f"{count} free {name} chips in a row are needed; this node has {total}, and others hold them. Is the "
        "node's resource (ray start --resources) what it has?"
    )


def _lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
