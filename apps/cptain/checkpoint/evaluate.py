"""The command eval: what a run's models score in tasks of lm-evaluation-harness, the base model beside the exports.

The harness loads the tasks and runs the models; what is cptain's own is which models, what is done already, and the
table that says what was won and what was forgotten. <run>/eval.json keeps every score with all that it depends on.
"""

import difflib
import hashlib
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cptain import atomic
from cptain.errors import CptainError, bad_usage, one_line
from cptain.lock import lock
from cptain.run_file import RunFile

BASE = "base"
_BRING = "bring the data where there is a network, by the same command with --limit 1; $HF_HOME keeps them"
_ABOUT = ("README.md", "verify.json")  # of a model and no part of it: cptain verify, too, writes the last
_CLEAR = 2.0  # standard errors of a difference beyond which it is marked


@dataclass(frozen=True)
class Settings:
    """What a score depends on beside model and task.

    Attributes:
        few_shot: examples before each question; None: as the task says.
        limit: questions of each task; None: all.
    """

    few_shot: int | None
    limit: int | None


@dataclass(frozen=True)
class Score:
    """A metric of a task.

    Attributes:
        model: "base", or the export's folder, as in "iter_0003600".
        weights: a hash of the names, sizes and dates of its files.
        asked: the task or group that was asked for.
        task: the same, or one of the group; as the harness calls it.
        version: of the task.
        harness: version of lm-evaluation-harness.
        metric: with its filter, as in "acc,none".
        value: of it.
        error: standard error; None where the harness gives none.
        samples: questions.
        higher_is_better: whether it is.
        few_shot: see `Settings`.
        limit: see `Settings`.
    """

    model: str
    weights: str
    asked: str
    task: str
    version: str
    harness: str
    metric: str
    value: float
    error: float | None
    samples: int
    higher_is_better: bool
    few_shot: int | None
    limit: int | None

    def is_of(self, settings: Settings) -> bool:
        """Whether it was made with them."""
        return (self.few_shot, self.limit) == (settings.few_shot, settings.limit)


def scores_file(run: RunFile) -> Path:
    """<run>/eval.json."""
    return run.folder / "eval.json"


def read_scores(run: RunFile) -> list[Score]:
    """All scores of a run's models so far.

    Raises:
        CptainError: the file is none of ours.
    """
    try:
        return [Score(**one) for one in json.loads(scores_file(run).read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise CptainError(f"{scores_file(run)}: {one_line(error)}: take it away to evaluate anew") from error


def _models(run: RunFile) -> dict[str, str]:
    """The base model and every export, each a folder or hub id."""
    exports = sorted(file.parent for file in run.hf_folder.glob("iter_*/config.json"))
    return {BASE: run.model.hf, **{folder.name: str(folder) for folder in exports}}


def _weights(model: str) -> str:
    """A hash by which one knows that a model's files were written anew; of a hub id, of its name."""
    files = sorted(Path(model).iterdir()) if Path(model).is_dir() else []
    marks = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in files
        if file.is_file() and file.name not in _ABOUT
    ]
    return hashlib.sha256(json.dumps([marks or model]).encode()).hexdigest()


def _harness(tasks: list[str], folder: Path | None) -> tuple[Any, Any]:
    """lm_eval, and its task manager, which knows all `tasks`."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import lm_eval
        from lm_eval import evaluator
        from lm_eval.models import huggingface  # noqa: F401  which needs more than lm_eval alone
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise CptainError(
            f"eval: {one_line(error)}: it needs lm-evaluation-harness: pip install 'cptain[eval]'"
        ) from None
    evaluator.get_git_commit_hash = lambda: None  # it asks git for the commit of the current folder, which is not its
    if folder:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(manager.match_tasks([task]) for task in tasks):
            return lm_eval, manager  # without the 5 s that it takes to read what the harness has
    manager = TaskManager(include_path=str(folder) if folder else None)
    for task in tasks:
        if not manager.match_tasks([task]):
            close = ", ".join(difflib.get_close_matches(task, manager.all_tasks, 3))
            bad_usage(
                f"eval: {task}: no such task{f' (alike: {close})' if close else ''}: lm_eval ls tasks lists the "
                "harness's own, and --tasks-folder takes a folder of others"
            )
    return lm_eval, manager


def _scores(results: dict[str, Any], of: dict[str, Any]) -> list[Score]:
    """What the harness found, as scores of a model and settings; errors and names of metrics are not scores."""
    scores = []
    for task, values in results["results"].items():
        for metric, value in values.items():
            name, comma, which = metric.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{name}_stderr,{which}")
            scores.append(
                Score(
                    task=task,
                    version=str(results["versions"].get(task, "")),
                    harness=results["lm_eval_version"],
                    metric=metric,
                    value=float(value),
                    error=float(error) if isinstance(error, (int, float)) else None,
                    samples=results["n-samples"].get(task, {}).get("effective", 0),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(name) is not False,
                    **of,
                )
            )
    return scores


def _evaluate(harness: tuple[Any, Any], model: Any, asked: str, settings: Settings, of: dict[str, Any]) -> list[Score]:
    lm_eval, manager = harness
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[asked],
        task_manager=manager,
        num_fewshot=settings.few_shot,
        limit=settings.limit,
        log_samples=False,
    )
    return _scores(results, {**of, "asked": asked, **asdict(settings)})


def _open(model: str, batch_size: int | None) -> Any:
    """A model as the harness runs it."""
    import torch
    from lm_eval.models.huggingface import HFLM

    cuda = torch.cuda.is_available()
    size = batch_size or ("auto" if cuda else 1)
    return HFLM(pretrained=model, dtype="auto", batch_size=size, device="cuda" if cuda else "cpu")


def evaluate(
    run: RunFile,
    tasks: list[str],
    settings: Settings,
    tasks_folder: Path | None = None,
    batch_size: int | None = None,
    force: bool = False,
) -> list[Score]:
    """Score the base model and every export of a run in tasks, unless that is done.

    Args:
        run: the run.
        tasks: names of the harness's tasks or groups.
        settings: how.
        tasks_folder: a folder of more tasks (the harness's YAML).
        batch_size: questions at once; None: what fits on a GPU, and 1 without.
        force: do again what is done.

    Returns:
        The scores of these models, tasks and settings, those of earlier calls included.

    Raises:
        CptainError: no harness, no such task, or a model or task that cannot be run.
    """
    models = _models(run)
    if len(models) == 1:
        print(f"eval: no export in {run.hf_folder} yet: the base model alone", file=sys.stderr)
    run.folder.mkdir(parents=True, exist_ok=True)
    with lock(run.folder / ".eval.lock", f"eval: {run.folder}"):
        weights = {name: _weights(model) for name, model in models.items()}
        scores = [
            one
            for one in read_scores(run)
            if weights.get(one.model) == one.weights and not (force and one.asked in tasks and one.is_of(settings))
        ]
        done = {(one.model, one.asked) for one in scores if one.is_of(settings)}
        harness: tuple[Any, Any] | None = None
        for name, model in models.items():
            opened = None
            for asked in tasks:
                if (name, asked) in done:
                    continue
                harness = harness or _harness(tasks, tasks_folder)
                print(f"eval: {name}: {asked}", file=sys.stderr)
                try:
                    opened = opened or _open(model, batch_size)
                    of = {"model": name, "weights": weights[name]}
                    scores += _evaluate(harness, opened, asked, settings, of)
                except Exception as error:  # the harness's, a task's, or transformers'
                    hint = f": {_BRING}" if isinstance(error, ConnectionError) else ""
                    raise CptainError(f"eval: {name}: {asked}: {one_line(error)}{hint}") from error
                atomic.write_json(scores_file(run), [asdict(one) for one in scores])
    return [one for one in scores if one.is_of(settings) and one.asked in tasks]


def table(scores: list[Score]) -> str:
    """Scores as lines: `rows` under their headings."""
    of_rows = rows(scores)
    cells = [list(of_rows[0]), *(list(row.values()) for row in of_rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if any(line.endswith("*") for line in lines):
        lines.append(f"* beyond {_CLEAR:g} standard errors of the difference")
    return "\n".join(lines)


def rows(scores: list[Score]) -> list[dict[str, str]]:
    """Scores of equal settings: a metric a row and a model a column, and what the last model gained or lost.

    Of a group the row is the group's own, where it has one.
    """
    groups = {one.asked for one in scores if one.task == one.asked}
    shown = [one for one in scores if one.task == one.asked or one.asked not in groups]
    models = list(dict.fromkeys(one.model for one in shown))
    by_row: dict[tuple[str, str], dict[str, Score]] = {}
    for one in shown:
        by_row.setdefault((one.task, one.metric), {})[one.model] = one
    found = []
    for (task, metric), of_model in by_row.items():
        some = next(iter(of_model.values()))
        row = {"task": task, "metric": metric.removesuffix(",none"), "questions": str(some.samples)}
        row |= {model: _value(of_model[model]) if model in of_model else "" for model in models}
        if len(models) > 1:
            row["change"] = _change(of_model.get(models[0]), of_model.get(models[-1]))
        found.append(row)
    return found


def rows_by_settings(run: RunFile) -> dict[str, list[dict[str, str]]]:
    """All scores of <run>/eval.json as `rows`, by the settings that they have alike, in words."""
    by_settings: dict[str, list[Score]] = {}
    for one in read_scores(run):
        few = "" if one.few_shot is None else f", {one.few_shot} examples before each question"
        limit = "" if one.limit is None else f", the first {one.limit} questions"
        by_settings.setdefault(few + limit, []).append(one)
    return {words: rows(scores) for words, scores in by_settings.items()}


def _value(score: Score) -> str:
    return f"{score.value:.4g}" + (f" ± {score.error:.2g}" if score.error is not None else "")


def _change(first: Score | None, last: Score | None) -> str:
    if first is None or last is None:
        return ""
    difference = last.value - first.value
    if not difference:
        return "equal"
    better = (difference > 0) == last.higher_is_better
    clear = (
        first.error is not None
        and last.error is not None
        and abs(difference) > _CLEAR * math.hypot(first.error, last.error)
    )
    return f"{difference:+.4g} {'better' if better else 'worse'}{' *' if clear else ''}"
