"""The packages of this repository: their versions, their wheels, and whether these are fit to be published.

python tools/packages.py list
python tools/packages.py version 0.2.0      # raises all of them
python tools/packages.py dist dist          # wheels and source distributions of all, checked
    python tools/packages.py check              # the same checks, without the compiled part
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE_VERSION = ROOT / "core/src/opsin/__init__.py"
_IN_CORE = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)
_IN_PROJECT = re.compile(r'^version = "(.+)"$', re.MULTILINE)
_NEEDS_CORE = re.compile(r'"opsin>=[^"]+"')


def packages() -> list[Path]:
    """Folders of all packages in this repository, the core first and opsin-all last."""
    patterns = ("core", "plugins/*", "demo/checkpoints/*", "all")
    return [path for p in patterns for path in sorted(ROOT.glob(p)) if (path / "pyproject.toml").exists()]


def version_of(package: Path) -> str:
    """A package's version, as its sources say it."""
    core = package == ROOT / "core"
    text = (CORE_VERSION if core else package / "pyproject.toml").read_text()
    found = (_IN_CORE if core else _IN_PROJECT).search(text)
    if found is None:
        raise SystemExit(f"{package}: no version found")
    return found[1]


def raise_versions(version: str) -> None:
    """Writes one version into all packages, and what plugins need of the core."""
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", version):
        raise SystemExit(f"{version!r} is not a version such as 0.2.0, 0.2.0rc1 or 0.2.0.dev3")
    major, minor = version.split(".")[:2]
    needed = f'"opsin>={major}.{minor},<{int(major) + 1}"'
    CORE_VERSION.write_text(_IN_CORE.sub(f'__version__ = "{version}"', CORE_VERSION.read_text()))
    for package in packages()[1:]:
        path = package / "pyproject.toml"
        text = _IN_PROJECT.sub(f'version = "{version}"', path.read_text(), count=1)
        path.write_text(_NEEDS_CORE.sub(needed, text))
    print(f"{len(packages())} packages are at {version} now; CHANGELOG.md wants a heading for it")


def _run(*command: str) -> None:
    environment = {**os.environ, "OPSIN_RELEASE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(folder: Path, compiled: bool, sources: bool) -> list[Path]:
    """Wheels of all packages, in the environment that runs this; with `sources` their sdists, too."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages():
        print(f"  {package.relative_to(ROOT)}", flush=True)
        options = [] if compiled else ["-C", "wheel.cmake=false", "-C", "wheel.platlib=false"]
        if "scikit_build_core" not in (package / "pyproject.toml").read_text():
            options = []
        pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder))
        _run(*pip, *options, str(package))
        if sources:
            _run(
                *(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"),
                *("-o", str(folder), str(package)),
            )
    return sorted(path for path in folder.iterdir() if path.suffix in (".whl", ".gz"))


def check(files: list[Path]) -> None:
    """twine's and check-wheel-contents' opinion of what was built; ends with it where they find fault."""
    _run(sys.executable, "-m", "twine", "check", "--strict", *map(str, files))
    wheels = [str(path) for path in files if path.suffix == ".whl"]
    # opsin-all has nothing in it but what it needs (W003 to W008 ask for modules).
    _run(sys.executable, "-m", "check_wheel_contents", *(w for w in wheels if "opsin_all" not in w))
    print(f"{len(files)} files: twine check --strict and check-wheel-contents find no fault")


def main() -> int:
    """List, raise, build or check."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the packages and their versions")
    commands.add_parser("version", help="raise all").add_argument("version")
    commands.add_parser("dist", help="build and check all").add_argument("folder", type=Path)
    commands.add_parser("check", help="build all aside, and check")
    args = parser.parse_args()
    if args.command == "list":
        for package in packages():
            print(f"{version_of(package):10} {package.relative_to(ROOT)}")
    elif args.command == "version":
        raise_versions(args.version)
    elif args.command == "dist":
        check(build(args.folder.resolve(), compiled=True, sources=True))
    else:
        with tempfile.TemporaryDirectory() as folder:
            check(build(Path(folder), compiled=False, sources=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
