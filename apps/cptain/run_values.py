"""The values that keys of a run file take, beside TOML's own: paths, counts of tokens, splits, names of variables."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, ValidationInfo

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOKEN_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KMBT]?)")
_TOKEN_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def _expand(value: str, info: ValidationInfo) -> str:
    """`value` with ~ and $VAR expanded, made absolute from the run file's folder."""
    if "\0" in value or "\n" in value:
        raise ValueError("a path cannot hold a line break or a null character")
    expanded = os.path.expandvars(os.path.expanduser(value))
    if unset := _VARIABLE.search(expanded):
        raise ValueError(f"the environment variable {unset.group()} is not set")
    folder = info.context["folder"] if info.context else Path.cwd()
    return os.path.normpath(folder / expanded)


def _expand_path(value: Any, info: ValidationInfo) -> Any:
    return _expand(value, info) if isinstance(value, str) else value


def _expand_pair(value: Any, info: ValidationInfo) -> Any:
    return _expand(value, info).removesuffix(".bin").removesuffix(".idx") if isinstance(value, str) else value


def _expand_folder_or_hub_id(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    path = _expand(value, info)
    return value if _HUB_ID.fullmatch(value) and not os.path.exists(path) else path


def _expand_site(value: Any, info: ValidationInfo) -> Any:
    """A site is a name, or the path of a site file of the user's own."""
    return _expand(value, info) if isinstance(value, str) and value.endswith(".toml") else value


def _token_count(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not (match := _TOKEN_COUNT.fullmatch(value)):
        raise ValueError('allowed: a whole number, or digits with K, M, B or T, such as "15B"')
    return round(float(match[1]) * _TOKEN_SCALE[match[2]])


def _split(value: str) -> str:
    parts = value.split(",")
    if len(parts) != 3 or not all(re.fullmatch(r"\d+(\.\d+)?", part.strip()) for part in parts):
        raise ValueError('allowed: the weights of train, validation and test, such as "970,30,0"')
    if float(parts[0]) == 0:
        raise ValueError("nothing is left to train on: the first weight must be over 0")
    return ",".join(part.strip() for part in parts)


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*\*?$")]  # a * is any ending
AbsolutePath = Annotated[Path, BeforeValidator(_expand_path)]
Glob = Annotated[str, BeforeValidator(_expand_path)]
PairGlob = Annotated[str, BeforeValidator(_expand_pair)]  # of tokenized files, or of text
FolderOrHubId = Annotated[str, BeforeValidator(_expand_folder_or_hub_id)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
TokenCount = Annotated[PositiveInt, BeforeValidator(_token_count)]
Split = Annotated[str, AfterValidator(_split)]
SiteNameOrFile = Annotated[str, BeforeValidator(_expand_site)]
