"""``opsin doctor --report FILE``: one archive to send to whoever can help, with nothing private in it."""

from __future__ import annotations

import getpass
import json
import re
import socket
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

_README = """\
Written by `opsin doctor --report`. Every file is text, or what its name says; look before you send them.
Folders of users, the machine's name and the user's name are replaced.

"""


def write_report(path: Path, report: Mapping[str, Any], files: Mapping[str, str | bytes]) -> list[str]:
    """Write the archive.

    Args:
        path: a file that is not there yet.
        report: what the doctor found.
        files: name -> content, from the device's plugin.

    Returns:
        The names of its files.

    Raises:
        FileExistsError: the file is there.
    """
    contents: dict[str, str | bytes] = {
        "doctor.json": json.dumps(report, indent=2, default=str),
        "packages.txt": "\n".join(_packages()) + "\n",
        **files,
    }
    listed = "".join(f"  {name}\n" for name in contents)
    contents = {"README.txt": f"{_README}{listed}", **contents}
    with zipfile.ZipFile(path, "x", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, without_names(content) if isinstance(content, str) else content)
    return list(contents)


def without_names(text: str) -> str:
    """A text without folders of users, the machine's name and the user's."""
    text = text.replace(str(Path.home()), "~")
    text = re.sub(r"/(home|Users)/[^/\s\"']+", "~", text)
    names = [socket.gethostname()]
    with suppress(Exception):  # no user of this number
        names.append(getpass.getuser())
    for name in names:
        if len(name) > 3 and name != "root":
            text = re.sub(rf"\b{re.escape(name)}\b", "(name)", text)
    return text


def _packages() -> list[str]:
    """As ``pip list --format=freeze`` has them."""
    found = {(d.metadata["Name"] or "?", d.version) for d in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found, key=lambda pair: pair[0].lower())]
