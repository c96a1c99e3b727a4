"""What a converted checkpoint was made of: source.json in its release, which convert writes and train asks."""

import json
from pathlib import Path
from typing import Any

from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import RELEASE, TRACKER
from cptain.data.vocabulary import Extension
from cptain.errors import CptainError

SOURCE = "source.json"


def source_of(folder: Path, reader: SafetensorsReader, extension: Extension | None = None) -> dict[str, Any]:
    """What a release was made of, kept beside it so that a changed model is converted again."""
    files = [folder / "config.json", *reader.files]
    source = {"model": str(folder), "files": {file.name: _stat(file) for file in files}}
    return {**source, "vocabulary": extension.described()} if extension else source


def _stat(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def is_converted(root: Path, source: dict[str, Any]) -> bool:
    """Whether a checkpoint's root holds a whole release that was made of `source`."""
    try:
        recorded = json.loads((root / RELEASE / SOURCE).read_text(encoding="utf-8"))
        if recorded["source"] != source or (root / TRACKER).read_text(encoding="utf-8").strip() != RELEASE:
            return False
        with TorchDistReader(root / RELEASE):
            return True
    except (OSError, ValueError, KeyError, TypeError, CptainError):
        return False


def check_converted_from(root: Path, folder: Path, extension: Extension | None) -> None:
    """Refuse a release that was converted from another model than the one in `folder`, or with other new tokens, of
    whose weights nothing shows in a tensor's shape.

    Raises:
        CptainError: which model or file differs. Weights that are no longer there are not missed.
    """
    try:
        record = json.loads((root / RELEASE / SOURCE).read_text(encoding="utf-8"))
        source, files = record["source"], record["source"]["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # converted by another tool
    if source["model"] != str(folder):
        raise CptainError(
            f"{root / RELEASE}: converted from {source['model']}, and model.hf is {folder}: run convert again"
        )
    if source.get("vocabulary") != (extension.described() if extension else None):
        raise CptainError(f"{root / RELEASE}: converted with another [model.vocabulary]: run convert again")
    for name, stat in files.items():
        if (folder / name).exists() and _stat(folder / name) != stat:
            raise CptainError(f"{folder / name}: changed since {root / RELEASE} was made of it: run convert again")
