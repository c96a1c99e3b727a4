"""The run file: one TOML file that describes an experiment, validated before anything runs.

Every path in it may begin with `~`, hold `$VAR`, or be relative to the run file's own folder; after loading all are
absolute. `load_run` is the only way in: it raises `CptainError` (exit status 2) with one line an error, naming file,
key, value and what is allowed.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cptain import atomic
from cptain.errors import bad_usage
from cptain.run_values import AbsolutePath, FolderOrHubId, Glob, SiteNameOrFile, Split, TokenCount, VariableName
from cptain.toml_file import Duration, Section, is_section, read_toml, shown, validate

_HOW_LONG = ("steps", "tokens", "epochs")  # keys of [train]


class Model(Section):
    """What is trained.

    hf: local folder or hub id; the architecture comes from its config.json.
    tokenizer: local folder or hub id; default: hf.
    megatron: the converted checkpoint's folder; default: <run>/megatron. A shared folder serves many runs.
    """

    hf: FolderOrHubId
    tokenizer: FolderOrHubId | None = None
    megatron: AbsolutePath | None = None


def _known_mix(value: Any) -> Any:
    if isinstance(value, str) and value not in ("tokens", "uniform"):
        raise ValueError('allowed: "tokens", "uniform", or [[data.mix]] tables')
    return value


class MixPart(Section):
    """A [[data.mix]] table: the files that `input` matches share `weight` parts of the training tokens."""

    input: Glob
    weight: PositiveFloat


class Data(Section):
    """What it is trained on.

    input: globs of .jsonl, .jsonl.gz and .jsonl.zst files; ** is any depth.
    output: the tokenized data's folder; default: <run>/data. A shared folder serves many runs.
    key: the key of a document's text.
    mix: how files blend: "tokens" (every token once), "uniform" (every file alike), or [[data.mix]] tables.
    split: weights of train, validation and test.
    on_error: "fail" at the first bad line, or "skip" and keep it in a side file.
    strip: cut white space off both ends of every text, as the lab's fork of Megatron-LM does; upstream does not.
    check_fraction: of the documents, encoded by Hugging Face's own library too; a difference ends the run.
    max_document_bytes: a longer line is a bad one.
    max_epochs: no part of the mix is seen more often, unless train.epochs asks for it. Returns of repeated data fall
        sharply beyond 16 (Muennighoff et al. 2023, arXiv:2305.16264).
    """

    input: Annotated[list[Glob], Field(min_length=1)]
    output: AbsolutePath | None = None
    key: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "text"
    mix: Annotated[Literal["tokens", "uniform"] | list[MixPart], BeforeValidator(_known_mix)] = "tokens"
    split: Split = "970,30,0"
    on_error: Literal["fail", "skip"] = "fail"
    strip: bool = False
    check_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    max_document_bytes: PositiveInt = 1 << 25
    max_epochs: PositiveFloat = 16.0


class Parallel(Section):
    """How the model is cut over GPUs: tensor × pipeline × context of them hold one copy."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1

    @property
    def model_size(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context


class Train(Section):
    """How it is trained. Exactly one of steps, tokens and epochs says for how long.

    megatron_args: passed to Megatron as written, after cptain's own, so that they win over its defaults; what a key
        or config.json says is refused.
    script: another training script that takes Megatron's arguments; default: cptain's own.
    """

    seq_length: PositiveInt
    micro_batch_size: PositiveInt = 1
    global_batch_size: PositiveInt
    steps: PositiveInt | None = None
    tokens: TokenCount | None = None
    epochs: PositiveFloat | None = None
    lr: PositiveFloat
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    save_interval: PositiveInt = 500
    eval_interval: PositiveInt = 100
    megatron_args: list[str] = Field(default_factory=list)
    script: AbsolutePath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in _HOW_LONG if getattr(self, key) is not None]
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


class Wandb(Section):
    """Where Weights & Biases shows the run. The API key comes from the environment alone."""

    project: str
    entity: str | None = None


class Jobs(Section):
    """How the batch scheduler runs it.

    site: a name under jobs/sites, or the path of a site file of your own.
    group, reservation: whose account is charged, and the id of reserved nodes for the train jobs.
    environment: variables of the shell that submits which the jobs get, besides the site's user_environment.
    mail: where the scheduler writes to when a job ends.
    nodes, walltime: of a train job; HH:MM:SS.
    margin: how long before the walltime training stops, to save, HH:MM:SS.
    image: the Apptainer image; default: the one that `cptain jobs` runs in.
    shards: tasks of the preprocess job, which is an array.
    chain: how many train jobs follow one another; "auto": as many as the steps need, and one more.
    seconds_per_step: the time of a step, for "auto"; default: what earlier logs of the run show.
    """

    site: SiteNameOrFile | None = None
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    reservation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = None
    environment: list[VariableName] = Field(default_factory=list)
    mail: Annotated[str, Field(pattern=r"^[\w.+-]+@[\w.-]+$")] | None = None
    nodes: PositiveInt = 1
    walltime: Duration | None = None
    margin: Duration = "00:10:00"
    image: AbsolutePath | None = None
    shards: PositiveInt = 4
    chain: PositiveInt | Literal["auto"] = "auto"
    seconds_per_step: PositiveFloat | None = None


def sweep_keys(keys: str) -> list[str]:
    """The dotted keys of an entry of [sweep]: "train.lr", or several that change together, "train.lr, train.min_lr"."""
    return [key.strip() for key in keys.split(",")]


class RunFile(Section):
    """One experiment; everything it writes lands under `folder`."""

    name: Annotated[str, Field(pattern=r"^\w[\w .,+=@-]*$", max_length=200)]
    work_dir: AbsolutePath
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    train: Train
    wandb: Wandb | None = None
    jobs: Jobs = Jobs()
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)

    @field_validator("sweep")
    @classmethod
    def _sweep_is_of_this_schema(cls, sweep: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for keys, rows in sweep.items():
            for dotted in sweep_keys(keys):
                section: Any = cls
                for key in dotted.split("."):
                    if not is_section(section) or key not in section.model_fields or dotted == "sweep":
                        raise ValueError(f'no key "{dotted}" in a run file')
                    section = section.model_fields[key].annotation
            for row in rows if "," in keys else ():
                if not isinstance(row, list) or len(row) != len(sweep_keys(keys)):
                    raise ValueError(f'"{keys}": allowed: lists of {len(sweep_keys(keys))} values; not {shown(row)}')
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
    try:
        set_key(document, path, value)
    except ValueError as error:
        bad_usage(f"--set {override}: {error}")


def set_key(document: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a key of a parsed run file. One of train.steps, tokens and epochs takes the place of the others.

    Raises:
        ValueError: a step of the path is not a table.
    """
    section = document
    for step in path[:-1]:
        section = section.setdefault(step, {})
        if not isinstance(section, dict):
            raise ValueError(f"{step} is not a table")
    if path[:-1] == ["train"] and path[-1] in _HOW_LONG:
        for key in _HOW_LONG:
            section.pop(key, None)
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
    document = read_toml(file, "run file")
    for override in overrides:
        _apply_override(document, override)
    return validate(RunFile, document, file)


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every key whose value differs between two resolved run files."""
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key}: {shown(old)} → {shown(new)}")
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
