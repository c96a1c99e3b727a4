"""The run file: one TOML file that describes an experiment, validated before anything runs.

Every path in it may begin with `~`, hold `$VAR`, or be relative to the run file's own folder; after loading all are
absolute. `load_run` is the only way in: it raises `CptainError` (exit status 2) with one line an error, naming file,
key, value and what is allowed.
"""

import json
import math
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cptain import atomic
from cptain.errors import bad_usage

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


def _known_mix(value: Any) -> Any:
    if isinstance(value, str) and value not in ("tokens", "uniform"):
        raise ValueError('allowed: "tokens", "uniform", or [[data.mix]] tables')
    return value


AbsolutePath = Annotated[Path, BeforeValidator(_expand_path)]
Glob = Annotated[str, BeforeValidator(_expand_path)]
FolderOrHubId = Annotated[str, BeforeValidator(_expand_folder_or_hub_id)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Section):
    """What is trained.

    hf: local folder or hub id; the architecture comes from its config.json.
    tokenizer: local folder or hub id; default: hf.
    megatron: the converted checkpoint's folder; default: <run>/megatron. A shared folder serves many runs.
    """

    hf: FolderOrHubId
    tokenizer: FolderOrHubId | None = None
    megatron: AbsolutePath | None = None


class MixPart(_Section):
    """A [[data.mix]] table: the files that `input` matches share `weight` parts of the training tokens."""

    input: Glob
    weight: PositiveFloat


class Data(_Section):
    """What it is trained on.

    input: globs of .jsonl, .jsonl.gz and .jsonl.zst files; ** is any depth.
    output: the tokenized data's folder; default: <run>/data. A shared folder serves many runs.
    key: the key of a document's text.
    mix: how files blend: "tokens" (every token once), "uniform" (every file alike), or [[data.mix]] tables.
    split: weights of train, validation and test.
    on_error: "fail" at the first bad line, or "skip" and keep it in a side file.
    """

    input: Annotated[list[Glob], Field(min_length=1)]
    output: AbsolutePath | None = None
    key: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "text"
    mix: Annotated[Literal["tokens", "uniform"] | list[MixPart], BeforeValidator(_known_mix)] = "tokens"
    split: Annotated[str, AfterValidator(_split)] = "970,30,0"
    on_error: Literal["fail", "skip"] = "fail"


class Parallel(_Section):
    """How the model is cut over GPUs: tensor × pipeline × context of them hold one copy."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1

    @property
    def model_size(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class Train(_Section):
    """How it is trained. Exactly one of steps, tokens and epochs says for how long.

    megatron_args: passed to Megatron as written, after every flag that cptain sets, so they win.
    script: another training script that takes Megatron's arguments; default: cptain's own.
    """

    seq_length: PositiveInt
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    steps: PositiveInt | None = None
    tokens: Annotated[PositiveInt | None, BeforeValidator(_token_count)] = None
    epochs: PositiveFloat | None = None
    lr: PositiveFloat
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    save_interval: PositiveInt = 500
    eval_interval: PositiveInt = 100
    megatron_args: list[str] = []
    script: AbsolutePath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in ("steps", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and epochs (given: {', '.join(given) or 'none'})")
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is over lr = {self.lr}")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} must be under steps = {self.steps}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees."""
        return self.seq_length * self.global_batch_size


class Wandb(_Section):
    """Where Weights & Biases shows the run. The API key comes from the environment alone."""

    project: str
    entity: str | None = None


class Jobs(_Section):
    """How the batch scheduler runs it.

    site: a name under jobs/sites, or the path of a site file of your own.
    chain: how many train jobs follow one another, or "auto".
    """

    site: Annotated[str, BeforeValidator(_expand_site)] | None = None
    group: str | None = None
    nodes: PositiveInt = 1
    walltime: Annotated[str, Field(pattern=r"^\d+:[0-5]\d:[0-5]\d$")] | None = None
    image: AbsolutePath | None = None
    chain: PositiveInt | Literal["auto"] = "auto"


class RunFile(_Section):
    """One experiment; everything it writes lands under `folder`."""

    name: Annotated[str, Field(pattern=r"^\w[\w .,+=@-]*$", max_length=200)]
    work_dir: AbsolutePath
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    train: Train
    wandb: Wandb | None = None
    jobs: Jobs = Jobs()
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}

    @field_validator("sweep")
    @classmethod
    def _sweep_keys_exist(cls, sweep: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for dotted in sweep:
            section: Any = cls
            for key in dotted.split("."):
                annotation = section.model_fields[key].annotation if _is_section(section, key) else None
                if annotation is None:
                    raise ValueError(f'no key "{dotted}" in a run file')
                section = annotation
        return sweep

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.work_dir / self.name

    @property
    def data_folder(self) -> Path:
        """Where the indexed datasets and manifest.json are."""
        return self.data.output or self.folder / "data"

    @property
    def megatron_folder(self) -> Path:
        """Where the converted checkpoint is."""
        return self.model.megatron or self.folder / "megatron"

    @property
    def checkpoints_folder(self) -> Path:
        """Where training saves."""
        return self.folder / "checkpoints"

    @property
    def hf_folder(self) -> Path:
        """Where exported models are."""
        return self.folder / "hf"

    @property
    def logs_folder(self) -> Path:
        """Where the logs are."""
        return self.folder / "logs"

    @property
    def tokenizer(self) -> str:
        """Local folder or hub id of the tokenizer."""
        return self.model.tokenizer or self.model.hf


def _is_section(section: Any, key: str) -> bool:
    return isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields


def _shown(value: Any) -> str:
    """A value as a run file would write it, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _error_lines(file: Path, document: dict[str, Any], error: ValidationError) -> list[str]:
    """One line a wrong key: file, key, value, what is allowed."""
    lines: dict[str, str] = {}
    for detail in error.errors():
        key, value = _key_of(document, detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        if detail["type"] == "extra_forbidden":
            message = f"no such key (allowed: {', '.join(_allowed_keys(detail['loc'][:-1]))})"
        elif detail["type"] == "missing":
            message = "is missing"
        shown = "" if isinstance(value, dict) or detail["type"] == "missing" else f" = {_shown(value)}"
        lines.setdefault(key, f"{file}: {key}{shown}: {message}")
    return list(lines.values())


def _key_of(document: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """The dotted key and the value at pydantic's `location`, some of whose steps name a union's branch and no key."""
    key, value = "", document
    for place, step in enumerate(location):
        if isinstance(value, list) and isinstance(step, int):
            key, value = f"{key}[{step}]", value[step]
        elif isinstance(value, dict) and (step in value or place == len(location) - 1):
            key, value = f"{key}.{step}" if key else str(step), value.get(str(step))
    return key or "run file", value


def _allowed_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `location`."""
    section: Any = RunFile
    for step in location:
        if _is_section(section, str(step)):
            annotation = section.model_fields[str(step)].annotation
            section = next(
                (part for part in getattr(annotation, "__args__", (annotation,)) if _has_fields(part)), MixPart
            )
    return sorted(section.model_fields)


def _has_fields(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, BaseModel)


def _apply_override(document: dict[str, Any], override: str) -> None:
    """Set `key=value` (`--set`) in a parsed run file.

    A value that is no TOML is taken as a string where it is one word.
    """
    key_text, equals, value_text = override.partition("=")
    try:
        if not equals:
            raise ValueError("no equals sign")
        path = _path_of_key(key_text)
    except (ValueError, tomllib.TOMLDecodeError):
        bad_usage(f"--set {override}: allowed: key=value, such as train.lr=2.5e-5")
    try:
        parsed = tomllib.loads(f"value = {value_text}")
        if list(parsed) != ["value"]:
            raise ValueError("more than one value")
        value = parsed["value"]
    except (ValueError, tomllib.TOMLDecodeError):
        if not re.fullmatch(r"[\w./~${}@:+-]+", value_text):
            bad_usage(f"--set {override}: the value is not TOML; write a string as --set '{key_text}=\"...\"'")
        value = value_text
    section = document
    for step in path[:-1]:
        section = section.setdefault(step, {})
        if not isinstance(section, dict):
            bad_usage(f"--set {override}: {step} is not a table")
    section[path[-1]] = value


def _path_of_key(key: str) -> list[str]:
    """The parts of a dotted TOML key: `sweep."train.lr"` is ["sweep", "train.lr"]."""
    node: Any = tomllib.loads(f"{key} = 0")
    if len(node) != 1 or "\n" in key:
        raise ValueError("not one key")
    path = []
    while isinstance(node, dict):
        ((step, node),) = node.items()
        path.append(step)
    return path


def load_run(file: Path, overrides: tuple[str, ...] = ()) -> RunFile:
    """Read, override, validate and resolve a run file.

    Args:
        file: the TOML file.
        overrides: `key=value` texts whose values are TOML; they win over the file.

    Raises:
        CptainError: exit status 2, one line an error.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        bad_usage(f"{file}: cannot read the run file: {error.strerror}")
    except UnicodeDecodeError as error:
        bad_usage(f"{file}: the run file is not UTF-8 (byte {error.start})")
    except tomllib.TOMLDecodeError as error:
        bad_usage(f"{file}: not TOML: {error}")
    for override in overrides:
        _apply_override(document, override)
    try:
        return RunFile.model_validate(document, context={"folder": file.resolve().parent})
    except ValidationError as error:
        bad_usage("\n".join(_error_lines(file, document, error)))


def refuse_sweep(run: RunFile, file: Path) -> None:
    """A stage works on one run: refuse a run file that describes several."""
    if run.sweep:
        count = math.prod(len(values) for values in run.sweep.values())
        bad_usage(
            f"{file}: sweep: describes {count} runs and a stage works on one: "
            f"choose with --set {next(iter(run.sweep))}=... --set sweep={{}}"
        )


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every key whose value differs between two resolved run files."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {_shown(old)} → {_shown(new)}")
    return changes


def write_resolved(run: RunFile) -> list[str]:
    """Write <run>/run.toml, the resolved run file, and return what changed since the last time (see `changed_keys`)."""
    target = run.folder / "run.toml"
    resolved = run.model_dump(mode="json", exclude_none=True)
    changes: list[str] = []
    if target.exists():
        try:
            changes = changed_keys(tomllib.loads(target.read_text(encoding="utf-8")), resolved)
        except tomllib.TOMLDecodeError:
            changes = [f"{target} was not TOML"]
    atomic.write_text(target, tomli_w.dumps(resolved))
    return changes
