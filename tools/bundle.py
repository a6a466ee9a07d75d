"""Wheels of opsin and of what it needs, in a folder: for a machine that has no network.

Run by the Python that will install them: pip resolves for the interpreter that it runs in. torch is left out:
it comes with the machine (a vendor's container has its own build).

    python3.10 tools/bundle.py bundle --constraint 'numpy<2'
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from packages import packages

ROOT = Path(__file__).parents[1]
_EXTRAS = ("serve",)
_FREE = ("torch", "numpy", "transformers", "huggingface_hub", "huggingface-hub", "tokenizers")
"""Not pinned: an older torch wants older ones."""


def requirements(wheels: list[Path]) -> list[str]:
    """What wheels need besides each other and torch, with what the core's server needs."""
    found: set[str] = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = Parser().parsestr(archive.read(name).decode())
        for needed in metadata.get_all("Requires-Dist", []):
            requirement, _, marker = (part.strip() for part in needed.partition(";"))
            extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
            if extra is None or extra[1] in _EXTRAS:
                rest = re.sub(r"\s*(and\s+)?extra == ['\"][^'\"]+['\"]", "", marker).strip()
                found.add(f"{requirement}; {rest}" if rest else requirement)
    return sorted(one for one in found if not re.match(r"(opsin|torch)\b", one))


def constraints() -> list[str]:
    """The pins of this repository, without those that a machine with an older torch cannot have."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith(tuple(f"{name}==" for name in _FREE))]


def main() -> int:
    """Build, download, count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument(
        "--constraint", action="append", default=[], help="a further constraint, e.g. 'numpy<2' (repeatable)"
    )
    args = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    args.folder.mkdir(parents=True, exist_ok=True)
    folders = [package for package in packages() if package.name != "all"]
    print(f"building {len(folders)} packages")
    build = [*pip, "wheel", "--no-deps", "-w", str(args.folder), *map(str, folders)]
    subprocess.run(build, check=True)
    needed = requirements(sorted(args.folder.glob("opsin*.whl")))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join([*constraints(), *args.constraint]) + "\n")
        file.flush()
        print(f"downloading what they need: {', '.join(needed)}")
        download = [*pip, "download", "--only-binary=:all:", "-d", str(args.folder), "-c", file.name]
        subprocess.run([*download, *needed], check=True)
    wheels = list(args.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{args.folder}: {len(wheels)} wheels, {size:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
