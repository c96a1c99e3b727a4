"""Print constraints.txt for the base it runs on: a package that the base has, or constrains, stays as it is there.

A base such as NGC's PyTorch is built and tested as one set, and its torch is like no other: pip may add to it, and
must replace nothing. The base's own constraints (PIP_CONSTRAINT) apply beside these, so what they name is left to them.
A base without torch is no such set, and takes the versions as they stand.
"""

import importlib.metadata
import os
import re
import sys
from pathlib import Path


def canonical(name: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def names(file: Path) -> set[str]:
    """The packages that a constraints file names."""
    lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {canonical(match[0]) for line in lines if (match := re.match(r"[A-Za-z0-9][\w.-]*", line))}


def installed(name: str) -> str | None:
    """The version of a package that the base has."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    """Print one line for each line of the file named on the command line, except where the base's constraints rule."""
    held = installed("torch") is not None
    ruled: set[str] = set()
    for file in os.environ.get("PIP_CONSTRAINT", "").split():
        if Path(file).is_file():
            ruled |= names(Path(file))
    for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
        name, pinned, _ = line.partition("==")
        if not pinned or canonical(name) in ruled:
            continue
        here = installed(name) if held else None
        print(f"{name}=={here}" if here else line)


main()
