"""What stands beside a Hugging Face model's weights, compared: config.json, the tokenizer, how text is generated.

Equal are two folders from which transformers makes the same model and tokenizer, in its version 4 as in 5: keys that
say the same in other words are equal, as are a key that is left out and one that is null.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cptain.data.tokenizer import is_tokenizer_file
from cptain.errors import CptainError, one_line
from cptain.model.architecture import read_architecture, read_config

_GENERATION = "generation_config.json"
# Where a model came from, and what changes its speed alone.
_MEANS_NOTHING = ("_name_or_path", "transformers_version", "_from_model_config", "use_cache")
# What `Architecture` holds, whichever words a config has for it, or leaves out where it is the default.
_IN_ARCHITECTURE = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps"),
    *("tie_word_embeddings", "dtype", "torch_dtype"),
)


def dtype_differences(folder: Path, found: set[torch.dtype]) -> list[str]:
    """A line where config.json says another dtype than the weights have, as which transformers would load them."""
    said, names = _said_dtypes(folder), {str(dtype).removeprefix("torch.") for dtype in found}
    if len(said) < 2 and said <= names:
        return []
    return [f"config.json: dtype: {_names(said)}, and the weights are {_names(names)}"]


def differences(a: Path, b: Path) -> list[str]:
    """How two models' files differ, a line a key of config.json and generation_config.json, and a line a file of the
    tokenizer.

    Raises:
        CptainError: a file that cannot be read; a config that Megatron cannot represent.
    """
    sides = (a, b)
    lines = _of_values("config.json", *({**_config(side), "dtype": _names(_said_dtypes(side))} for side in sides))
    if any((side / _GENERATION).is_file() for side in sides):
        lines += _of_values(_GENERATION, *(_generation(side) for side in sides))
    names = {file.name for side in sides for file in side.iterdir() if is_tokenizer_file(file.name)}
    for name in sorted(names):
        there = [(side / name).is_file() for side in sides]
        if not all(there):
            lines.append(f"{name}: only in {'A' if there[0] else 'B'}")
        elif _content(a / name) != _content(b / name):
            lines.append(f"{name}: differs")
    return lines


def _said_dtypes(folder: Path) -> set[str]:
    """The dtypes that config.json says the weights have; two where transformers 4 and 5 read different ones."""
    config = read_config(folder)
    return {str(config[key]) for key in ("dtype", "torch_dtype") if config.get(key) is not None}


def _names(found: set[str]) -> str:
    return " and ".join(sorted(found)) or "none"


def _config(folder: Path) -> dict[str, Any]:
    others = {key: value for key, value in read_config(folder).items() if key not in _IN_ARCHITECTURE}
    # Architecture's longest sequence is that of a sliding window, where there is one.
    return {**asdict(read_architecture(folder)), **others}


def _generation(folder: Path) -> dict[str, Any]:
    content = _content(folder / _GENERATION) if (folder / _GENERATION).is_file() else {}
    if not isinstance(content, dict):
        raise CptainError(f"{folder / _GENERATION}: not a JSON object")
    return content


def _content(file: Path) -> Any:
    """What a file holds: of JSON the values, however they are written."""
    try:
        raw = file.read_bytes()
        return json.loads(raw) if file.suffix == ".json" else raw
    except (OSError, ValueError, RecursionError) as error:
        raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error


def _of_values(name: str, a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    keys = [key for key in {**a, **b} if key not in _MEANS_NOTHING]
    return [f"{name}: {key}: {_shown(a.get(key))} ≠ {_shown(b.get(key))}" for key in keys if a.get(key) != b.get(key)]


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)[:80]
