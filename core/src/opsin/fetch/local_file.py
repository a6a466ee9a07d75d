"""``file://`` URLs: files under the one folder that the server was told to share."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from opsin.errors import FetchError, MediaError


def read_local_file(url: str, root: Path | None, max_bytes: int) -> bytes:
    """The content of a ``file:///...`` URL.

    Args:
        url: the URL; percent-encoding is decoded.
        root: ``--allowed-local-media-path``, an existing folder; None: every file is refused.
        max_bytes: most bytes of content.

    Raises:
        FetchError: FORBIDDEN: it is not under ``root`` once symbolic links are followed. Whether it exists
            is not told.
        MediaError: it is under ``root`` but cannot be read, or is too large.
    """
    if root is None:
        raise FetchError(
            403,
            "file:// URLs are not read by this server; pass a data: URL (the operator can share a folder "
            "with --allowed-local-media-path)",
        )
    outside = FetchError(403, "the file:// URL does not lead into the folder that this server shares")
    unreadable = MediaError("the file:// URL leads to nothing that can be read")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise MediaError("the file:// URL is malformed; expected file:///folder/file") from None
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise outside
    try:
        path = Path(unquote(parts.path, errors="strict")).resolve()
        shared = path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL byte, broken UTF-8, too long, a loop of links
        raise outside from None
    if not shared:
        raise outside
    try:
        # The path is resolved: whatever is a link now has become one since. Devices and pipes are not opened
        # for reading before it is known that they are none, for that could block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise unreadable from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise unreadable
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(max_bytes + 1)
    finally:
        os.close(descriptor)
    if len(content) > max_bytes:
        raise MediaError(f"the file is too large; at most {max_bytes} bytes are accepted")
    return content
