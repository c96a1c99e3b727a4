"""TOML files with a schema: the run file and a site's. What is wrong in one is said in one line: file, key, value, what
is allowed.
"""

import datetime
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from cptain.errors import bad_usage


class Section(BaseModel):
    """A table of a TOML file. Keys that it does not name are refused."""

    # A key that Python keeps to itself ("from") is the alias of its field.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)

    @classmethod
    def by_key(cls) -> dict[str, FieldInfo]:
        """The table's fields by their keys, as a file writes them."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


S = TypeVar("S", bound=Section)


def _duration(value: Any) -> Any:
    """TOML takes 12:00:00 without quotes for a time of day; it is meant as HH:MM:SS all the same."""
    if isinstance(value, datetime.time):
        return value.isoformat()
    if isinstance(value, str) and not re.fullmatch(r"\d+:[0-5]\d:[0-5]\d", value):
        raise ValueError('allowed: HH:MM:SS, such as "12:00:00"')
    return value


Duration = Annotated[str, BeforeValidator(_duration)]
"""HH:MM:SS, the one form that every scheduler takes."""


def seconds(duration: str) -> int:
    """The seconds of an HH:MM:SS."""
    hours, minutes, rest = duration.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(rest)


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """Parse a TOML file.

    Args:
        file: the file.
        what: what it is, for errors: "run file".

    Raises:
        CptainError: exit status 2.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        bad_usage(f"{file}: cannot read the {what}: {error.strerror}")
    except UnicodeDecodeError as error:
        bad_usage(f"{file}: the {what} is not UTF-8 (byte {error.start})")
    except tomllib.TOMLDecodeError as error:
        bad_usage(f"{file}: not TOML: {error}")


def validate(schema: type[S], document: dict[str, Any], file: Path) -> S:
    """Build `schema` from a parsed file; paths in it are relative to the file's own folder.

    Raises:
        CptainError: exit status 2, one line a wrong key.
    """
    try:
        return schema.model_validate(document, context={"folder": file.resolve().parent})
    except ValidationError as error:
        bad_usage("\n".join(_error_lines(schema, document, file, error)))


def shown(value: Any) -> str:
    """A value as a TOML file would write it, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def is_section(annotation: Any) -> bool:
    """Whether a key's type is a table of its own."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def table_of(annotation: Any) -> type[Section] | None:
    """The table that a key's type is, or may be where the key is given; None for any other type."""
    kinds = [kind for kind in getattr(annotation, "__args__", (annotation,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and is_section(kinds[0]) else None


def _error_lines(schema: type[Section], document: dict[str, Any], file: Path, error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for detail in error.errors():
        key, value = _key_of(document, detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if detail["type"] == "extra_forbidden":
            message = f"no such key (allowed: {', '.join(_allowed_keys(schema, detail['loc'][:-1]))})"
        elif detail["type"] == "missing":
            message = "is missing"
        what = "" if isinstance(value, dict) or detail["type"] == "missing" else f" = {shown(value)}"
        lines.setdefault(key, f"{file}: {key}{what}: {message}" if key else f"{file}: {message}")
    return list(lines.values())


def _key_of(document: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """The dotted key and the value at pydantic's `location`, some of whose steps name a union's branch and no key."""
    key, value = "", document
    for place, step in enumerate(location):
        if isinstance(value, list) and isinstance(step, int):
            key, value = f"{key}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or place == len(location) - 1):
            key, value = f"{key}.{step}" if key else str(step), value.get(str(step))
    return key, value


def _allowed_keys(schema: type[Section], location: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at `location`."""
    section: Any = schema
    for step in location:
        if str(step) in section.by_key():
            section = _section_in(section.by_key()[str(step)].annotation)
    return sorted(section.by_key())


def _section_in(annotation: Any) -> Any:
    """The table in a type such as `Wandb | None` or `Literal[…] | list[MixPart]`."""
    if is_section(annotation):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _section_in(part))), None)
