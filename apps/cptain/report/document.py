"""What a run left, as the report shows it: plain values, by name.

The numbers of plots and finals are those of <run>/logs/metrics.jsonl, through `read_metrics`, and of nothing else. What
else is shown is what the stages recorded: history, manifest, plan.jsonl, verify.json, eval.json, and the first lines of
the log.
"""

import json
import math
import re
import statistics
from datetime import datetime
from pathlib import Path
from typing import Any

import tomli_w

from cptain.checkpoint.evaluate import rows_by_settings
from cptain.data.epochs import exposures
from cptain.data.manifest import read_manifest
from cptain.data.steps import known_steps
from cptain.errors import CptainError, bad_usage
from cptain.history import Start, read_history
from cptain.megatron.log import train_logs
from cptain.run_file import RunFile, load_run
from cptain.scheduling.chain import Times
from cptain.scheduling.overview import load_left, look_closely
from cptain.scheduling.sweep import expand
from cptain.training.metrics import metrics_file, read_metrics
from cptain.training.rates import read_plan_log

Values = dict[str, Any]
_TITLES = {  # of figures, in their order; the loss of each domain or set comes after that of all
    "loss": "Loss, nats a token",
    "loss/": "Loss: ",
    "validation_loss": "Validation loss, nats a token",
    "validation_loss/": "Validation loss: ",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "tokens_per_second": "Tokens a second",
}
NOISY = ("loss", "grad_norm", "tokens_per_second")  # of which a mean can be drawn, by what stands before a /
# Names begin so: two say what tokens a second say, and the last two grow with the steps, and have a table.
_NOT_DRAWN = ("time", "step_seconds", "tflops_per_gpu", "tokens/", "epochs/")
_RECENT = 100  # steps whose mean says more of a loss than its last step
_NOT_COMPARED = ("name", "work_dir", "jobs", "wandb", "output", "megatron")  # keys that change no number


def load_runs(path: Path) -> tuple[Path, list[RunFile]]:
    """The runs that a run file (all of its [sweep]) or a run's folder means, and the folder that bears their name.

    Raises:
        CptainError: exit status 2, one line an error of the run file.
    """
    if path.is_dir():
        if run := load_left(path.resolve()):
            return run.folder, [run]
        bad_usage(f"{path}: not a run's folder: it has no run.toml")
    run = load_run(path)
    return run.folder, expand(run, path)


def _counted(metrics: dict[int, Values], starts: list[Start]) -> dict[int, Values]:
    """The metrics in the order of steps, but for what an earlier start did beyond the step that the last one began at:
    it was not saved, and is done again."""
    last = starts[-1] if starts else None
    began = datetime.fromisoformat(last.began).timestamp() if last else 0.0
    return {
        step: metrics[step]
        for step in sorted(metrics)
        if last is None or step <= last.start or metrics[step]["time"] >= began
    }


def _columns(metrics: dict[int, Values]) -> dict[str, list[Any]]:
    """The numbers that are drawn, by name, a value a step; None where a step has none that JSON can say."""
    names = dict.fromkeys(name for values in metrics.values() for name in values if not name.startswith(_NOT_DRAWN))
    return {
        name: [value if math.isfinite(value := values.get(name, math.nan)) else None for values in metrics.values()]
        for name in names
    }


def titles(runs: list[Values]) -> dict[str, str]:
    """The metrics of the documents of runs, in the order of their figures, and the title of each."""
    order = list(_TITLES)
    found: list[tuple[int, str, str]] = []
    for name in dict.fromkeys(name for run in runs for name in run["columns"]):
        family, slash, of = name.partition("/")
        if (known := family + slash) in _TITLES:
            found.append((order.index(known), name, _TITLES[known] + of))
        elif name not in ("step", "tokens"):
            found.append((len(order), name, name.replace("_", " ")))
    return {name: title for _, name, title in sorted(found, key=lambda one: one[0])}


def _finals(metrics: dict[int, Values], times: Times) -> Values:
    """What came of the run: the last losses, the medians of speeds, and how much of its time went into training."""
    steps = [values for values in metrics.values() if "loss" in values]
    found: Values = {"steps": steps[-1]["step"], "tokens": steps[-1]["tokens"], "loss": steps[-1]["loss"]}
    found[f"loss, mean of the last {_RECENT}"] = statistics.fmean(values["loss"] for values in steps[-_RECENT:])
    for values in metrics.values():
        found |= {name.replace("_", " "): values[name] for name in values if name.startswith("validation_loss")}
    for title, name in (("tokens/s", "tokens_per_second"), ("TFLOP/s a GPU", "tflops_per_gpu")):
        if known := [values[name] for values in steps if values.get(name)]:  # Megatron says 0 on the CPU
            found[title] = statistics.median(known)
    if times.whole:
        found |= {"hours": times.whole / 3600, "% of them trained": 100 * times.trained / times.whole}
    return found


def _starts(starts: list[Start]) -> list[Values]:
    return [
        {
            "began": start.began[:16],
            "ended": start.ended[:16] or None,
            "steps": f"{start.start + 1:,} to {start.last:,}",
            "saved": start.saved,
            "how it ended": start.outcome,
            "layout": ", ".join(f"{name} {size}" for name, size in start.layout.items()),
            "tokens of data": start.data.get("tokens"),
            "Megatron": start.versions.get("megatron"),
            "torch": start.versions.get("packages", {}).get("torch"),
            "cptain": start.versions.get("cptain"),
            "accepted": "; ".join(start.accepted) or None,
        }
        for start in starts
    ]


def _mix(run: RunFile, steps: int, done: int) -> list[Values]:
    """The parts of the mix; where the data is not to be seen from here, why."""
    try:
        records = read_manifest(run.data_folder, run.data.sources)
        so_far, found = exposures(run, records, steps, done), exposures(run, records, steps)
    except CptainError as error:
        return [{"not known": str(error)}]
    return [
        {
            "part": part.name,
            "documents": part.documents,
            "tokens to train on": part.tokens,
            "share of training": f"{part.share:.1%}",
            "epochs so far": round(now.epochs, 3),
            "epochs at the end": round(part.epochs, 3),
        }
        for now, part in zip(so_far, found, strict=True)
    ]


def _domains(metrics: dict[int, Values]) -> list[Values]:
    """The ledger: what each domain of the training data was seen, and its loss."""
    steps = [values for values in metrics.values() if "loss" in values]
    names = [name[7:] for name in (steps[-1] if steps else {}) if name.startswith("tokens/")]
    found = []
    for name in names:
        epochs = steps[-1].get(f"epochs/{name}")
        losses = [values[key] for values in steps if (key := f"loss/{name}") in values]
        found.append(
            {
                "domain": name,
                "tokens so far": steps[-1][f"tokens/{name}"],
                "epochs so far": None if epochs is None else round(epochs, 3),
                "first loss": losses[0] if losses else None,
                f"loss, mean of the last {_RECENT} steps": statistics.fmean(losses[-_RECENT:]) if losses else None,
            }
        )
    return found


def _validated(metrics: dict[int, Values]) -> list[Values]:
    """What was learnt and what was forgotten: the loss of each validation set, first, lowest and last."""
    names = dict.fromkeys(name for values in metrics.values() for name in values if name.startswith("validation_loss"))
    found = []
    for name in names:
        losses = [(step, values[name]) for step, values in metrics.items() if name in values]
        (first, begun), (lowest, least), (last, ended) = losses[0], min(losses, key=lambda one: one[1]), losses[-1]
        found.append(
            {
                "set": name.removeprefix("validation_loss").removeprefix("/") or "all",
                "first loss": begun,
                "at step": first,
                "lowest": least,
                "of step": lowest,
                "last": ended,
                "step": last,
                "last against first": f"{ended - begun:+.4f}",
            }
        )
    return found


def _plan(run: RunFile) -> list[Values]:
    """Time and memory of each start on GPUs, as plan.jsonl has them."""
    return [
        {
            "start": line["where"],
            "card": line["card"],
            "": name,
            "planned": both["predicted"],
            "measured": both["measured"],
        }
        for line in read_plan_log(run)
        for name, both in [
            ("seconds a step", line["seconds"]),
            *((f"peak of stage {stage['stage']}, GiB", stage) for stage in line["peak_gib"]),
        ]
    ]


def _checkpoints(run: RunFile, metrics: dict[int, Values]) -> list[Values]:
    """Every checkpoint that is there or was exported."""
    roots = (run.checkpoints_folder, run.hf_folder)
    names = {folder.name for root in roots for folder in root.glob("iter_*") if folder.name[5:].isdigit()}
    found = []
    for name in sorted(names):
        saved, exported = (root / name for root in roots)
        whole = (saved / "metadata.json").is_file() or any(saved.glob("mp_rank_*"))  # torch_dist, or legacy
        known = metrics.get(int(name[5:]), {})
        found.append(
            {
                "step": int(name[5:]),
                "tokens": known.get("tokens"),
                "validation loss": known.get("validation_loss"),
                "checkpoint": "whole" if whole else "incomplete" if saved.is_dir() else "removed",
                "exported": "yes" if (exported / "config.json").is_file() else "no",
                "verified": _verified(exported / "verify.json"),
            }
        )
    return found


def _verified(file: Path) -> str:
    """What `cptain verify` found, for people."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        looked = " as far as 1 MB of each shows" if record["sample"] else ""
        files = f"; {len(record['files'])} other files differ" if record["files"] else ""
        logits = f"; logits differ by {record['logits']['max_abs_difference']:.2g}" if "logits" in record else ""
        return f"{record['equal']} of {record['tensors']} tensors bit-equal{looked}{files}{logits}"
    except (OSError, ValueError, KeyError, TypeError):
        return "no"


def _command(run: RunFile) -> str:
    """The Megatron command of the last start, with which its log begins; empty where there is no log."""
    for log in train_logs(run.logs_folder)[-1:]:
        with open(log, encoding="utf-8", errors="replace") as text:
            if match := re.match(r"(?:.*\\\n)*.*", text.read(1 << 16)):
                return match[0]
    return ""


def _settings(resolved: Values, prefix: str = "") -> Values:
    """The keys of a run file that may change what comes of it, dotted, and their values."""
    found: Values = {}
    for key, value in resolved.items():
        if key not in _NOT_COMPARED:
            found |= _settings(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def document(run: RunFile) -> Values | None:
    """All that the report shows of a run; None where nothing was trained yet.

    Raises:
        CptainError: a history or an eval.json that cannot be read.
    """
    starts = read_history(run.folder)
    metrics = _counted(read_metrics(metrics_file(run)), starts)
    if not any("loss" in values for values in metrics.values()):
        return None
    times = look_closely(run).times
    finals = _finals(metrics, times)
    done, steps = finals["steps"], (starts[-1].steps if starts else known_steps(run)) or finals["steps"]
    resolved = starts[-1].run if starts else run.model_dump(mode="json", exclude_none=True)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "about": f"{done:,} of {steps:,} steps",
        "columns": _columns(metrics),
        "restarts": [
            {"step": start.start, "tokens": metrics.get(start.start, {}).get("tokens")} for start in starts[1:]
        ],
        "finals": finals,
        "settings": _settings(resolved),
        "tables": {
            "Starts of training": _starts(starts),
            "Where the time went": [{"": name, "time": time, "share": share} for name, time, share in times.lines()],
            "Data": _mix(run, steps, done),
            "Domains": _domains(metrics),
            "Validation": _validated(metrics),
            "As planned and as measured": _plan(run),
            "Checkpoints": _checkpoints(run, metrics),
            **{f"Tasks{settings}": rows for settings, rows in rows_by_settings(run).items()},
        },
        "texts": {
            "Run file, as it was resolved": tomli_w.dumps(resolved),
            "Megatron command of the last start": _command(run),
        },
    }
