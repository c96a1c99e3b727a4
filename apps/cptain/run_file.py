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
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cptain import atomic
from cptain.errors import bad_usage
from cptain.run_data import Data
from cptain.run_model import Model
from cptain.run_train import HOW_LONG, Parallel, Train
from cptain.run_values import AbsolutePath, SiteNameOrFile, VariableName
from cptain.toml_file import Duration, Section, read_toml, shown, table_of, validate

CHECKPOINTS = "checkpoints"  # of a run's folder


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
                kind: Any = cls
                for key in dotted.split("."):
                    table = table_of(kind)
                    if table is None or key not in table.by_key() or dotted == "sweep":
                        raise ValueError(f'no key "{dotted}" in a run file')
                    kind = table.by_key()[key].annotation
            for row in rows if "," in keys else ():
                if not isinstance(row, list) or len(row) != len(sweep_keys(keys)):
                    raise ValueError(f'"{keys}": allowed: lists of {len(sweep_keys(keys))} values; not {shown(row)}')
        return sweep

    @model_validator(mode="after")
    def _repeats_say_how_long(self) -> Self:
        if self.data.stage and self.train.epochs is not None:
            raise ValueError("train.epochs: stages see each part another number of times: give train.steps or .tokens")
        if self.data.stage and self.train.script is not None:
            raise ValueError("data.stage: only cptain's own training script reads stages, and not train.script")
        if self.data.repeats and self.train.epochs is None and not self.data.stage:
            raise ValueError(
                "data.mix: repeat says how often documents are seen in an epoch: say how long with train.epochs = 1"
            )
        return self

    @model_validator(mode="after")
    def _validates_with_its_sets(self) -> Self:
        if self.data.validation and not self.train.eval_steps:
            raise ValueError("train.eval_steps = 0: no validation is made, and data.validation is given: leave one out")
        return self

    @model_validator(mode="after")
    def _masks_where_it_can(self) -> Self:
        if self.data.documents == "masked" and self.train.script is not None:
            raise ValueError(
                'data.documents = "masked": only cptain\'s own training script masks, and not train.script'
            )
        if self.data.documents == "masked" and self.parallel.context > 1 and self.parallel.pipeline > 1:
            raise ValueError(
                f'parallel.context = {self.parallel.context}: not with data.documents = "masked" and pipeline stages: '
                "documents are filled to multiples of 2 × context, and a pipeline takes no batches of many lengths"
            )
        return self

    @model_validator(mode="after")
    def _branches_off_another(self) -> Self:
        if self.train.from_ and self.train.from_.run == self.folder:
            raise ValueError(f"train.from.run = {self.folder} is the run itself: give this one another name")
        return self

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
        return self.folder / CHECKPOINTS

    @property
    def hf_folder(self) -> Path:
        """Where exported models are."""
        return self.folder / "hf"

    @property
    def logs_folder(self) -> Path:
        """Where the logs are."""
        return self.folder / "logs"

    @property
    def tokenizers_folder(self) -> Path:
        """Where what takes long to find out about tokenizers is kept for all runs of the work_dir."""
        return self.work_dir / ".tokenizers"

    @property
    def base_tokenizer(self) -> str:
        """Local folder or hub id of the tokenizer that the model has before [model.vocabulary] extends it."""
        return self.model.tokenizer or self.model.hf

    @property
    def tokenizer(self) -> str:
        """Local folder or hub id of the tokenizer that the run trains with. `cptain.data.vocabulary` makes an extended
        one."""
        return str(self.folder / "tokenizer") if self.model.vocabulary else self.base_tokenizer


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
    if path[:-1] == ["train"] and path[-1] in HOW_LONG:
        for key in HOW_LONG:
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
