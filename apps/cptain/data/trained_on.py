"""What a run trains on, as a small value that its history keeps, so that a resume on other data is noticed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from cptain.data.blend import blend
from cptain.data.manifest import Record
from cptain.run_file import RunFile

_COUNTED = ("files", "documents", "tokens")


def trained_on(run: RunFile, records: list[Record]) -> dict[str, Any]:
    """The files that have tokens, their blend and their split.

    Returns:
        What JSON keeps as it is: "files", "documents", "tokens", "tokenized" (those of data.tokenized), "split", "mix"
        ("tokens", "uniform", or the weight or the repeats of each table's glob), "tokenizer" (its hash), and "sha256"
        over the split and the prefix, content, tokens and weight of every file: where that is equal, it is the same
        training data in the same proportions.
    """
    blended = blend(run.data.mix, records)
    lines = [run.data.split]
    whole = sum(weight for weight, _ in blended)
    lines += [
        json.dumps([_name(record), record.sha256, record.tokens, f"{weight / whole:.9g}"]) for weight, record in blended
    ]
    mix = run.data.mix
    return {
        "files": len(blended),
        "documents": sum(record.documents for _, record in blended),
        "tokens": sum(record.tokens for _, record in blended),
        "tokenized": sum(record.tokens for _, record in blended if record.is_tokenized),
        "split": run.data.split,
        "mix": mix if isinstance(mix, str) else {part.input: part.weight or f"{part.repeat:g} times" for part in mix},
        "tokenizer": records[0].recipe.tokenizer,
        "sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
    }


def _name(record: Record) -> str:
    """The same wherever the data lies."""
    return Path(record.prefix).name if record.is_tokenized else record.prefix


def other_data(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs between two values of `trained_on`, in words; "" where nothing does."""
    if before.get("sha256") == after.get("sha256"):
        return ""
    found = [f"{before[key]:,} → {after[key]:,} {key}" for key in _COUNTED if before[key] != after[key]]
    found += [
        f"data.{key} {json.dumps(before[key])} → {json.dumps(after[key])}"
        for key in ("split", "mix")
        if before[key] != after[key]
    ]
    return ", ".join(found) or "other files, or other text in them, with the same counts"
