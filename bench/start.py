"""From the command to the end of the first step, and where the time goes: `cptain train`, and the lab's flags.

    make bench BENCH='start --peer fork=TREE --peer main=TREE'

One GPU, 4 layers of width 1024, steps of 16 sequences of 512 tokens, files in the page cache. `cptain@X` is the command
that people give; `lab@fork` is torchrun with pretrain_gpt.py and the lab's flags, which checks nothing of what it
loads. --cpu is a tiny shape.

Each row's time is cut where the next process starts and where Megatron says what it has done. Medians of --repeat.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from inputs import CPTAIN, INSTALLED, make_run
from train import Bench, machine

# What Megatron prints, and what is done by then. The rank's imports are all before the first.
MARKS = {
    "imports": r"^(?:INFO.*)?using world size: ",
    "initialized": r"^time to initialize megatron",
    "model": r"^\[after model, optimizer",
    "data": r"^\[after dataloaders are built\]",
    "first step": r"^ ?(?:\[[^\]]*\] )?iteration +1/",
}
PARTS = ("torchrun", "rank", *MARKS)
STEPS = 2  # the lab's rate would not warm up in fewer


def children(process: int) -> list[int]:
    """Those that train, torchrun and its ranks, and not what looks at the GPUs before."""
    found = []
    with suppress(OSError):  # it has ended
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"pretrain" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def watch(process: "subprocess.Popen[bytes]", logs: Path, pattern: str, deep: int) -> dict[str, float]:
    """Seconds from now until each of `PARTS`, by the time that the process ends.

    Args:
        process: just started.
        logs: where the rank's log will be.
        pattern: its glob there.
        deep: generations from the process to the rank.
    """
    began, found, at = time.monotonic(), dict[str, float](), 0
    parents, status = [process.pid], None
    while status is None:
        status = process.poll()
        if at < deep and (below := [child for parent in parents for child in children(parent)]):
            parents, at = below, at + 1
            found[PARTS[at + 1 - deep]] = time.monotonic() - began
        text = "".join(path.read_text(errors="replace") for path in logs.glob(pattern))
        for name, mark in MARKS.items():
            if name not in found and re.search(mark, text, re.MULTILINE):
                found[name] = time.monotonic() - began
        time.sleep(0.02)
    return found


class Start(Bench):
    """The rows.

    Args:
        options: of the command line.
    """

    global_batch = 16

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options, {"cptain": []})
        options.steps = STEPS

    def make_inputs(self) -> None:
        """Model, text, tokenized data and converted checkpoint."""
        train = {
            "seq_length": self.options.seq,
            "global_batch_size": self.global_batch,
            "steps": STEPS,
            "lr": self.options.lr,
            "precision": "fp32" if self.options.cpu else "bf16",
            "recompute": "none",
            "save_interval": STEPS,
            "eval_interval": 10,
        }
        self.file = make_run(self.folder, "tiny" if self.options.cpu else "small", self.options.layers, 2, train)

    def once(self, row: str, number: int) -> dict[str, float]:
        """Start a row, and wait for its end."""
        variant, _, tree = row.partition("@")
        gpu = "" if self.options.cpu else "0"
        variables = self.environment(tree, gpu) | {"PYTHONUNBUFFERED": "1"}
        if variant == "lab":
            command = self.lab(tree, False, 1)
        else:
            command = [*CPTAIN, "train", str(self.file), "--set", f'name="{row}-{number}"']
            command += ["--cpu"] if self.options.cpu else ["--nproc-per-node", "1"]
        log, name = self.folder / f"{row}-{number}.log", f"{row}-{number}"
        with open(log, "wb") as output:
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
        logs = (self.folder, log.name, 1) if variant == "lab" else (self.folder / name / "logs", "train-*.log", 2)
        found = watch(process, *logs)
        if process.returncode or "first step" not in found:
            raise RuntimeError(f"{log}: exit status {process.returncode}: {log.read_text()[-1500:]}")
        return found


def parts(found: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the seconds from each part to the next, by the name of what is then done."""
    known = [part for part in PARTS if all(part in one for one in found)]
    lasted = [
        [one[part] - (one[known[place - 1]] if place else 0) for one in found] for place, part in enumerate(known)
    ]
    result = {part: statistics.median(values) for part, values in zip(known, lasted, strict=True)}
    return result | {"to the first step": statistics.median(one["first step"] for one in found)}


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    names = ["to the first step", *PARTS]
    lines = [f"| seconds until | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for row, values in results.items():
        lines.append(f"| {row} | {' | '.join(f'{values[name]:.1f}' if name in values else '' for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=TREE", help="a tree of Megatron-LM")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/start"))
    options = parser.parse_args()
    options.seq, options.lr = 64 if options.cpu else 512, 1e-4
    bench = Start(options)
    rows = [f"cptain@{tree}" for tree in (INSTALLED, *bench.trees)]
    rows += ["lab@fork"] if "fork" in bench.trees else []
    bench.make_inputs()
    # Writes the blend, which the lab's row needs.
    bench.cptain("bench", "cptain", bench.environment(INSTALLED, "" if options.cpu else "0"))
    results, wrong = dict[str, dict[str, float]](), list[str]()
    found: dict[str, Any] = {**machine(options.cpu), "rows": results}
    for row in rows:
        try:
            bench.once(row, 0)  # the page cache, bytecode, and what Megatron keeps of the data
            results[row] = parts([bench.once(row, number + 1) for number in range(options.repeat)])
        except RuntimeError as error:
            wrong.append(f"start: {row}: {error}")
            continue
        print(json.dumps({row: results[row]}), flush=True)
        (bench.folder / "start.json").write_text(json.dumps(found, indent=1))
    print(table(results))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
