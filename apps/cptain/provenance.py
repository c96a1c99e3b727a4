"""<run>/provenance.json: with what each stage was last run, so that a result can be traced a year later."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cptain import __version__, atomic, image
from cptain.megatron_version import whole_version
from cptain.run_file import RunFile

_PACKAGES = ("megatron-core", "numpy", "tokenizers", "torch", "transformer-engine", "transformers")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    """The commit of cptain's own checkout, or of the image's, with "+changes" where files differ from it, else None."""
    if built_from := image.commit():
        return built_from
    folder = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--", "."], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


def write_provenance(run: RunFile, stage: str) -> dict[str, Any]:
    """Record the versions, host, image and command with which a stage did something, and return them; other stages'
    entries stay."""
    file = run.folder / "provenance.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    versions = _versions()
    megatron, commit = whole_version(run.train.script or Path(__file__))
    if commit is None and megatron and megatron == image.label("cptain.megatron.version"):
        commit = image.label("cptain.megatron.commit")
    content[stage] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "cptain": __version__,
        "git_commit": _git_commit(),
        "image": str(here) if (here := image.image_here()) else None,
        "megatron": megatron,
        "megatron_commit": commit,
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }
    atomic.write_json(file, content)
    entry: dict[str, Any] = content[stage]
    return entry
