"""The house as docs/architecture.md describes it: every file is there, and no import runs to a floor above."""

import ast
import re
from pathlib import Path

from conftest import PROJECT

PACKAGE = PROJECT / "apps" / "cptain"
FLOORS = (
    "",
    "model megatron",
    "data",
    "checkpoint",
    "training",
    "scheduling",
    "plan.py report doctor shell_script",
    "cli.py cli_about_runs.py option_types.py __main__.py",
)


def floor(file: Path) -> int:
    """Which floor a file of the package is on: the ground is 0."""
    first = file.relative_to(PACKAGE).parts[0]
    return next((number for number, rooms in enumerate(FLOORS) if first in rooms.split()), 0)


def imported(file: Path) -> set[Path]:
    """The files of the package that a file imports, in its functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in names if name.startswith("cptain.")}
    return {path for path in paths if path.exists()}


def test_every_file_has_a_line_in_the_architecture_and_every_line_a_file() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `([\w/.]+)` \| \S", text, flags=re.MULTILINE)
    rooms = {path for path in PACKAGE.glob("*/__init__.py") if f"\n## {path.parent.name}/: " in text}
    files = {str(path.relative_to(PACKAGE)) for path in set(PACKAGE.rglob("*.py")) - rooms}
    assert sorted(described) == sorted(files)


def test_no_import_runs_to_a_floor_above() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    up = [
        f"{file.name} imports {other.name}" for file in files for other in imported(file) if floor(other) > floor(file)
    ]
    assert up == []
    assert sum(len(imported(file)) for file in files) > len(files)  # imports are seen at all


def test_rooms_of_one_floor_do_not_know_each_other() -> None:
    for file in (PACKAGE / "model").glob("*.py"):
        assert all(other.parent.name != "megatron" for other in imported(file))
    for file in (PACKAGE / "megatron").glob("*.py"):
        assert all(other.parent.name != "model" for other in imported(file))
