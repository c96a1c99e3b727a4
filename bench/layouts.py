"""A run on two GPUs that changes its layout every few steps, or is killed, against one that nothing disturbs.

    make bench BENCH='layouts --peer fork=TREE --peer main=TREE'

With each Megatron, from one converted checkpoint: `reference` trains on two data-parallel GPUs; `again` is the same
again; `walk` is tensor-, pipeline-, context- and again data-parallel, as long each; `terminated` gets SIGTERM at a
random moment; `deadline` is a job whose deadline comes when the reference was half done; `killed` loses a random rank
to SIGKILL at a random moment, `killed-saving` while a checkpoint is half-written. Every one is a run of `cptain train`,
started again until its steps are done; of a step that was trained twice the second counts. Losses are compared as
Megatron logs them, with seven digits; with --set train.deterministic=true, undisturbed ones have the same.

--cpu does the same over gloo in fp32, less the context-parallel part, which Megatron's attention does not have there.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptain.megatron.log import Step, read_steps, train_logs
from cptain.training.metrics import read_metrics
from inputs import CPTAIN, INSTALLED, environment, make_run

WALK = {
    "TP 2": ["parallel.tensor=2"],
    "PP 2": ["parallel.pipeline=2"],
    "CP 2": ["parallel.context=2"],
    "DP 2": [],
}
WALK_OF_EIGHT = {
    "TP 2 × PP 2 × DP 2": ["parallel.tensor=2", "parallel.pipeline=2"],
    "TP 4 × DP 2": ["parallel.tensor=4"],
    "DP 8": [],
}
CHAINS = ("reference", "walk", "deadline", "killed-saving", "killed", "terminated", "again")  # the longest first
STARTS = 3  # of an interrupted run, at most


@dataclass
class Chain:
    """One run, from its first start to its last step.

    Attributes:
        megatron: by name.
        what: of `CHAINS`.
        starts: exit status, seconds and last line of each `cptain train`.
        done_to_it: what interrupted it, and when.
        steps: that were trained.
    """

    megatron: str
    what: str
    starts: list[dict[str, Any]] = field(default_factory=list)
    done_to_it: str = ""
    steps: list[Step] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the run."""
        return f"{self.megatron}-{self.what}"


def ranks(cptain: int) -> list[int]:
    """The training processes of a `cptain train`: torchrun's children."""
    found = [cptain]
    for _ in ("torchrun", "ranks"):
        command = ["pgrep", "-f", "-P", ",".join(map(str, found)), "pretrain.py"]
        found = [int(word) for word in subprocess.run(command, capture_output=True, text=True).stdout.split()]
    return found


class Bench:
    """The inputs of all runs, and one run at a time.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.folder.resolve()
        self.trees: dict[str, str] = dict(peer.split("=", 1) for peer in options.peer)
        walk = WALK if options.gpus == 2 else WALK_OF_EIGHT
        self.layouts = {name: sets for name, sets in walk.items() if not (options.cpu and name == "CP 2")}
        self.stretch = options.steps // len(self.layouts)
        self.began: dict[str, float] = {}  # when the last start of a chain did, in seconds since the epoch

    def make_inputs(self) -> None:
        """Model, text, tokenized data and converted checkpoint."""
        cpu, steps = self.options.cpu, self.options.steps
        train = {
            "seq_length": 64 if cpu else 512,
            "micro_batch_size": 4,
            "global_batch_size": 16,
            "steps": steps,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "warmup_steps": 3,
            "precision": "fp32" if cpu else "bf16",
            "save_interval": self.stretch,
            "eval_interval": 10 * steps,
        }
        self.file = make_run(self.folder, "tiny" if cpu else "small", layers=4, megabytes=2, train=train)

    def start(
        self,
        chain: Chain,
        settings: list[str],
        meanwhile: Callable[[int], str] | None = None,
        variables: dict[str, str] | None = None,
    ) -> None:
        """One `cptain train`; `meanwhile` gets its process id, and says what it did to it."""
        command = [*CPTAIN, "train", str(self.file), "--nproc-per-node", str(self.options.gpus)]
        command += ["--cpu"] if self.options.cpu else []
        settings = [f'name="{chain.name}"', *self.options.set, *settings]
        command += [word for setting in settings for word in ("--set", setting)]
        log, began = self.folder / f"{chain.name}-{len(chain.starts) + 1}.log", time.monotonic()
        gpus = "" if self.options.cpu else ",".join(map(str, range(self.options.gpus)))
        variables = environment(self.trees.get(chain.megatron), gpus) | (variables or {})
        self.began[chain.name] = time.time()
        with open(log, "wb") as output:
            process = subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None and time.monotonic() < began + self.options.timeout:
                if meanwhile and not chain.done_to_it:
                    chain.done_to_it = meanwhile(process.pid)
                time.sleep(0.005)
            process.kill()  # nothing, where it has ended; its torchrun ends with it
            status = process.wait()
        chain.steps = read_steps(train_logs(self.folder / chain.name / "logs"))
        lines = log.read_text(errors="replace").strip().splitlines() or [""]
        passed_over = [line for line in lines if "continuing from" in line or "beginning again" in line]
        said = " / ".join([*passed_over, lines[-1]])
        chain.starts.append({"status": status, "seconds": round(time.monotonic() - began, 1), "said": said[:300]})

    def interruption(self, chain: Chain) -> Callable[[int], str]:
        """What is done to a run: looked at every 5 ms, and empty until it is done."""
        dice = random.Random(f"{self.options.seed} {chain.name}")
        run = self.folder / chain.name
        step, saving = dice.randint(1, self.options.steps - 2), self.stretch * dice.randint(2, len(self.layouts) - 1)

        there: list[int] = []

        def kill_rank(process: int, when: str) -> str:
            there[:] = there or ranks(process)
            if not there:
                return ""
            number = dice.randrange(len(there))
            os.kill(there[number], signal.SIGKILL)
            return f"rank {number} killed {when}"

        def while_saving(process: int) -> str:
            folder = run / "checkpoints" / f"iter_{saving:07d}"
            if not there and folder.with_name(f"iter_{self.stretch:07d}").is_dir():
                there.extend(ranks(process))  # now: a small checkpoint is written sooner than they are found
            if not folder.is_dir() or (folder / "metadata.json").exists() or not any(folder.iterdir()):
                return ""
            return kill_rank(process, f"while step {saving} was saved")

        def after_step(process: int) -> str:
            steps = read_steps(train_logs(run / "logs"))
            if not steps or steps[-1].number < step:
                return ""
            wait = dice.uniform(0, steps[-1].seconds)
            time.sleep(wait)
            when = f"{wait:.3f} s after step {steps[-1].number}"
            if chain.what == "killed":
                return kill_rank(process, when)
            os.kill(process, signal.SIGTERM)
            return f"SIGTERM {when}"

        return while_saving if chain.what == "killed-saving" else after_step

    def half(self, chain: Chain) -> float:
        """How many seconds after its start the reference of the same Megatron had half its steps done; waits for it."""
        reference, half = Chain(chain.megatron, "reference").name, self.options.steps // 2
        until = time.monotonic() + self.options.timeout
        while half not in (steps := read_metrics(self.folder / reference / "logs" / "metrics.jsonl")):
            if time.monotonic() > until:
                raise OSError(f"{reference} did not reach step {half}")
            time.sleep(0.5)
        return float(steps[half]["time"]) - self.began[reference]

    def run(self, chain: Chain) -> None:
        """A chain from its first start to its last."""
        if chain.what == "walk":
            for layout, settings in self.layouts.items():
                self.start(chain, [*settings, f'train.megatron_args=["--exit-interval","{self.stretch}"]'])
                chain.done_to_it += f"{' → ' if chain.done_to_it else ''}{layout}"
        elif chain.what in ("reference", "again"):
            self.start(chain, [])
        elif chain.what == "deadline":
            seconds = self.half(chain)
            self.start(chain, [], variables={"CPTAIN_DEADLINE": str(time.time() + seconds)})
            chain.done_to_it = f"a deadline {seconds:.0f} s after its start"
            self.start(chain, [])
        else:
            self.start(chain, [], self.interruption(chain))
            checkpoints = sorted((self.folder / chain.name / "checkpoints").glob("iter_*"))
            halves = [folder.name for folder in checkpoints if not (folder / "metadata.json").exists()]
            chain.done_to_it = f"{chain.done_to_it or 'it ended first'}; half-written: {', '.join(halves) or 'none'}"
            while chain.starts[-1]["status"] != 0 and len(chain.starts) < STARTS:
                self.start(chain, [])


def compared(chain: Chain, chains: list[Chain]) -> dict[str, Any]:
    """A chain's result: its losses, and how far they are from the reference's of the same Megatron."""
    (reference,) = (one for one in chains if (one.megatron, one.what) == (chain.megatron, "reference"))
    expected = {step.number: step.loss for step in reference.steps}
    losses = {step.number: step.loss for step in chain.steps}
    both = sorted(expected.keys() & losses.keys())
    return {
        "megatron": chain.megatron,
        "run": chain.what,
        "done_to_it": chain.done_to_it,
        "starts": chain.starts,
        "compared": len(both),
        "largest_difference": max((abs(expected[step] - losses[step]) for step in both), default=None),
        "losses": losses,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| Megatron | run | what was done | exit statuses | steps compared | loss, first → last | largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        losses = list(result["losses"].values()) or [float("nan")]
        difference = result["largest_difference"]
        lines.append(
            f"| {result['megatron']} | {result['run']} | {result['done_to_it']} | "
            f"{', '.join(str(start['status']) for start in result['starts'])} | {result['compared']} | "
            f"{losses[0]:.4f} → {losses[-1]:.4f} | {'' if difference is None else format(difference, '.1e')} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the chains, as many side by side as asked for; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=TREE", help="a tree of Megatron-LM")
    parser.add_argument("--steps", type=int, default=24, help="a multiple of 12")
    parser.add_argument("--runs", default=",".join(CHAINS), help=f"of {', '.join(CHAINS)}; the first with any")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every `cptain train`")
    parser.add_argument("--gpus", type=int, choices=[2, 8], default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(1000), help="of the random moments")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="RUNS", help="on the same two GPUs")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="of one start")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/layouts"))
    options = parser.parse_args()
    bench = Bench(options)
    bench.make_inputs()
    chains = [Chain(megatron, what) for what in options.runs.split(",") for megatron in (INSTALLED, *bench.trees)]
    writing = threading.Lock()

    def keep() -> str:
        started = sorted((chain for chain in chains if chain.starts), key=lambda chain: chain.megatron)
        results = [compared(chain, chains) for chain in started]
        (bench.folder / "results.json").write_text(json.dumps({"seed": options.seed, "runs": results}, indent=1))
        shown = f"{options.steps} steps, seed {options.seed}\n\n{table(results)}\n"
        (bench.folder / "table.md").write_text(shown)
        return shown

    def work(chain: Chain) -> None:
        try:
            bench.run(chain)
        except OSError as error:
            chain.done_to_it += f" {type(error).__name__}: {error}"
        with writing:
            print(chain.name, json.dumps(chain.starts), file=sys.stderr, flush=True)
            keep()

    with ThreadPoolExecutor(options.side_by_side) as pool:
        list(pool.map(work, chains))
    print(keep())


if __name__ == "__main__":
    main()
