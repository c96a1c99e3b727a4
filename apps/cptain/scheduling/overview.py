"""How runs are, from what their stages left on disk: the table of `cptain status`.

Light to import, and little is read: of the metrics their end. The scheduler is asked on the host, where cptain is not:
`submit.sh --state` leaves its last words beside the scripts.
"""

import json
import shlex
import time
import tomllib
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cptain.checkpoint.tracker import TRACKER, read_tracker
from cptain.errors import CptainError, bad_usage, one_line
from cptain.history import KILLED, RUNNING, Start, moment, read_history
from cptain.progress import duration, human
from cptain.run_file import RunFile, load_run
from cptain.scheduling.chain import Times, spent
from cptain.scheduling.state import aligned, read_submitted, told_file
from cptain.toml_file import validate
from cptain.training.attempt import Attempt
from cptain.training.metrics import metrics_file, parse_lines, read_lines

_TAIL = 1 << 18  # bytes of the metrics: some thousand steps
_STEADY = 20  # steps, whose median is the time of one
_ALIVE = ("waiting", "queued", "running", "ending")


@dataclass(frozen=True)
class Overview:
    """How a run is; None where nothing is known.

    Attributes:
        name: the run's.
        stage: the first that is not done, or "done".
        job: the scheduler's id of that stage's job, or the last one's.
        word: how that job is, as the scheduler last told.
        told: when it did, seconds since 1970.
        step, steps: done, and in all.
        loss, validation: the last ones.
        tokens_per_second: a GPU.
        seconds_left: of training, at the pace of the last steps.
        checkpoint: the last step that is saved.
        exported: the last step that is.
        next: what to do.
    """

    name: str
    stage: str
    job: str | None = None
    word: str | None = None
    told: float | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    validation: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: int | None = None
    exported: int | None = None
    next: str = ""


def load_left(folder: Path) -> RunFile | None:
    """The run whose folder this is, as its last stage or its jobs left the run file; None where it is none's.

    Raises:
        CptainError: it cannot be read.
    """
    for file in (folder / "run.toml", folder / "jobs" / "run.toml"):
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error
        here = {"work_dir": str(folder.parent), "name": folder.name}  # a folder may have been moved
        return validate(RunFile, document | here, file)
    return None


def _last_lines(file: Path) -> list[dict[str, Any]]:
    """The last steps of the metrics, and the last validation, as far as it is not long ago."""
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, file.stat().st_size - _TAIL))
            lines = opened.read().splitlines()
    except OSError:
        return []
    steps = [line for line in lines if b'"loss"' in line][-_STEADY:]
    return parse_lines(b"\n".join([*steps, *[line for line in lines if b'"validation_loss"' in line][-1:]]))


def _saved(root: Path) -> int | None:
    try:
        return read_tracker(root) if (root / TRACKER).exists() else None
    except CptainError:
        return None  # it is just being written


def _exported(run: RunFile) -> int | None:
    names = [path.parent.name for path in run.hf_folder.glob("iter_*/config.json")]
    return max((int(name[5:]) for name in names if name[5:].isdigit()), default=None)


def _stage(run: RunFile, saved: int | None, steps: int | None, exported: int | None) -> str:
    """The first stage that is not done."""
    if not (run.data_folder / "manifest.json").exists():
        return "preprocess"
    if not (run.megatron_folder / TRACKER).exists():
        return "convert"
    if saved is None or steps is None or saved < steps:
        return "train"
    return "done" if exported == saved else "export"


def submissions(work_dir: Path) -> dict[Path, Path]:
    """For each folder of scripts under a work_dir the file of the last submission that it was in."""
    found: dict[Path, Path] = {}
    files = sorted(work_dir.glob("*/jobs/submitted"), key=lambda file: file.stat().st_mtime)
    for file in files:
        with suppress(CptainError):
            found |= {one.scripts.resolve(): file for one in read_submitted(file)}
    return found


@dataclass(frozen=True)
class _Job:
    """The job of a run that matters now.

    Attributes:
        id: the scheduler's; None where there is none.
        word: how it is; "submitted" where the scheduler has not told yet.
        told: when it has.
        blocked: the first job of the run that waits for one that never began, and would for ever.
    """

    id: str | None = None
    word: str | None = None
    told: float | None = None
    blocked: str | None = None


def _job(submitted: Path, scripts: Path, stage: str) -> _Job:
    told: dict[str, Any] = {"time": None, "words": {}}
    with suppress(OSError, ValueError):
        if told_file(submitted).stat().st_mtime >= submitted.stat().st_mtime:  # else of an earlier submission
            told = json.loads(told_file(submitted).read_text(encoding="utf-8"))
    words = told["words"]
    jobs = [
        one
        for one in read_submitted(submitted)
        # The runs of a sweep share the jobs that make their data and convert their model.
        if one.scripts.resolve() == scripts or one.name.startswith(("preprocess", "convert"))
    ]
    of_stage = [one.job for one in jobs if one.name.startswith(stage)] or [one.job for one in jobs[-1:]]
    alive = [job for job in of_stage if any(word in words.get(job, "") for word in _ALIVE)]
    job = next(iter(alive or of_stage[-1:]), None)
    blocked = next((one.job for one in jobs if words.get(one.job) == "blocked"), None)
    return _Job(job, words.get(job, "submitted") if job else None, told["time"], blocked)


def _next(run: RunFile, stage: str, job: _Job, saved: int, starts: list[Start]) -> str:
    """What to do."""
    word = job.word
    if stage == "done":
        return ""
    failed = stage == "train" and starts and starts[-1].outcome.startswith(("failed", "killed"))
    outlook = Attempt(run, saved).outlook() if failed else ""
    if word and any(one in word for one in _ALIVE):
        return outlook or "wait"
    if stage == "train" and starts and starts[-1].outcome == RUNNING:
        return "wait"
    submit = run.folder / "jobs" / "submit.sh"
    if word == "submitted":
        return f"bash {shlex.quote(str(submit))} --state"
    stages = {"train": " train export", "export": " export"}.get(stage, "")
    do = f"cptain {stage} {shlex.quote(str(run.folder / 'run.toml'))}"
    if submit.exists():
        do = f"bash {shlex.quote(str(submit))}{stages}"
    if job.blocked:  # PBS deletes those behind it with it
        do = f"qdel {job.blocked}, then {do}"
    return f"{starts[-1].outcome}; then {do}" if failed else do


def _over(starts: list[Start], job: _Job) -> list[Start]:
    """The same history; but what a killed job left as running has ended, where the scheduler has told since it began
    that no job of its stage is under way.
    """
    over = job.word not in (None, "submitted", "unknown") and not any(one in str(job.word) for one in _ALIVE)
    if starts and starts[-1].outcome == RUNNING and over and job.told and job.told > moment(starts[-1].began):
        return [*starts[:-1], replace(starts[-1], outcome=KILLED)]
    return starts


def look(run: RunFile, submitted: Path | None) -> Overview:
    """How a run is.

    Args:
        run: the run.
        submitted: submit.sh's record of the submission that it was in, if it was.

    Raises:
        CptainError: its history cannot be read.
    """
    history, lines = read_history(run.folder), _last_lines(metrics_file(run))
    steps = history[-1].steps if history else run.train.steps
    saved, exported = _saved(run.checkpoints_folder), _exported(run)
    stage = _stage(run, saved, steps, exported)
    done = [line for line in lines if "loss" in line]
    validated = [line["validation_loss"] for line in lines if "validation_loss" in line]
    job = _job(submitted, (run.folder / "jobs").resolve(), stage) if submitted else _Job()
    starts = _over(history, job)
    seconds = sorted(line["step_seconds"] for line in done)
    speeds = sorted(line["tokens_per_second"] for line in done)
    step = done[-1]["step"] if done else None
    processes = starts[-1].layout["processes"] if starts else 1
    left = max(0, steps - step) * seconds[len(seconds) // 2] if steps and step is not None else None
    return Overview(
        name=run.name,
        stage=stage,
        job=job.id,
        word=job.word,
        told=job.told,
        step=step,
        steps=steps,
        loss=done[-1]["loss"] if done else None,
        validation=validated[-1] if validated else None,
        tokens_per_second=speeds[len(speeds) // 2] / processes if speeds else None,
        seconds_left=left,
        checkpoint=saved,
        exported=exported,
        next=_next(run, stage, job, saved or 0, starts),
    )


def look_at_all(work_dir: Path) -> list[Overview]:
    """Every run under a work_dir, by name; of one that cannot be read, why."""
    found, submitted = [], submissions(work_dir)
    for folder in sorted(path for path in work_dir.iterdir() if path.is_dir()):
        try:
            if run := load_left(folder):
                found.append(look(run, submitted.get((folder / "jobs").resolve())))
        except CptainError as error:
            found.append(Overview(folder.name, "unknown", next=one_line(error)))
    return found


def _cells(one: Overview) -> dict[str, str]:
    """What the table says of a run."""

    def said(value: Any, form: str = "") -> str:
        return "" if value is None else format(value, form)

    ago = time.time() - one.told if one.told else 0.0
    told = f"{one.word} ({duration(ago)} ago)" if ago > 60 else one.word
    return {
        "run": one.name,
        "stage": one.stage,
        "job": f"{one.job} {told}" if one.job else "",
        "step": f"{one.step or 0:,} of {one.steps:,}" if one.steps else said(one.step, ","),
        "loss": said(one.loss, ".4f"),
        "validation": said(one.validation, ".4f"),
        "tokens/s/GPU": human(one.tokens_per_second) if one.tokens_per_second else "",
        "left": duration(one.seconds_left) if one.seconds_left is not None else "",
        "saved": said(one.checkpoint, ","),
        "exported": said(one.exported, ","),
        "next": one.next,
    }


def rows(overviews: list[Overview]) -> list[str]:
    """The table for people."""
    cells = [_cells(one) for one in overviews]
    return aligned([list(cells[0]), *(list(row.values()) for row in cells)]) if cells else ["no runs here"]


def shown(path: Path, as_json: bool) -> str:
    """What `cptain status` prints.

    Args:
        path: a run file, a run's folder, or a work_dir.
        as_json: for programs.

    Raises:
        CptainError: none of them, or one that cannot be read.
    """
    if not path.exists():
        bad_usage(f"{path}: no such run file or folder")
    run = load_run(path) if path.is_file() else load_left(path.resolve())
    if run:
        detail = look_closely(run)
        return json.dumps(detail.content()) if as_json else "\n".join(detail.lines())
    overviews = look_at_all(path.resolve())
    return json.dumps([asdict(one) for one in overviews]) if as_json else "\n".join(rows(overviews))


@dataclass(frozen=True)
class Detail:
    """A run, and where its time went.

    Attributes:
        overview: how it is.
        times: of all its starts.
        starts: its history.
    """

    overview: Overview
    times: Times
    starts: list[Start]

    def content(self) -> dict[str, Any]:
        """For --json."""
        keys = ("began", "ended", "start", "last", "saved", "outcome")
        starts = [{key: getattr(start, key) for key in keys} for start in self.starts]
        return {**asdict(self.overview), "times": asdict(self.times), "starts": starts}

    def lines(self) -> list[str]:
        """For people."""
        found = aligned([(name, cell) for name, cell in _cells(self.overview).items() if cell])
        for number, one in enumerate(self.starts, 1):
            ended = (
                f"{one.began[:16].replace('T', ' ')}: steps {one.start + 1:,} to {one.last:,}, saved at {one.saved:,}"
            )
            found.append(f"start {number}: {ended}: {one.outcome}")
        return [*found, *aligned(self.times.lines())]


def look_closely(run: RunFile) -> Detail:
    """How a run is, and where the time of its chain went.

    Raises:
        CptainError: its history cannot be read.
    """
    submitted = submissions(run.work_dir).get((run.folder / "jobs").resolve())
    overview = look(run, submitted)
    starts = _over(read_history(run.folder), _Job(overview.job, overview.word, overview.told))
    when = submitted.stat().st_mtime if submitted else None
    times = spent(starts, read_lines(metrics_file(run)), _saved(run.checkpoints_folder) or 0, when)
    return Detail(overview, times, starts)
