"""A whole Llama 3.1 8B on all GPUs of a host, made for eight H100s: speed by layout, beside plan and the lab's flags.

    make bench BENCH='eight --peer fork=TREE'
    make bench BENCH='layouts --gpus 8 --runs reference,walk,killed-saving'

Rows are train.py's, each on all GPUs, but for those that scale four layers from one GPU on, as many sequences each.
`plan` is the layout that `cptain plan` finds fastest, `dp`, `tp2` and `cp2` are cut as they say, all with nothing
recomputed that fits without; `lab@fork` are the lab's flags at pipeline parallel 2, as their 8B was trained. NVIDIA's
published 10,254 tokens/s a GPU (bf16) had context parallel 2, as `cp2`. `70b` has that shape in some layers, at tensor
parallel 4 and pipeline parallel 2. --gpus 2 --layers 8 tries the script out on two, --cpu without any.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from cptain.data.vocabulary import run_architecture
from cptain.run_file import load_run
from cptain.training.layouts import fastest
from cptain.training.rates import known_rates
from inputs import INSTALLED, make_run
from train import Bench, machine, table

FP8 = 'train.precision="fp8"'
LAB = ("--pipeline-model-parallel-size", "2")
CUTS = {"dp": [], "tp2": ["parallel.tensor=2"], "cp2": ["parallel.context=2"]}


def proposed(file: Path, precision: str, gpus: int) -> list[str]:
    """The fastest layout that fits, as --set."""
    run = load_run(file, (f'train.precision="{precision}"', 'train.micro_batch_size="auto"'))
    memory = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 80 * 2**30
    found = fastest(run, run_architecture(run), gpus, 1, memory, known_rates())
    if not found:
        sys.exit(f"eight: no layout of {precision} fits {gpus} GPUs: give fewer --layers")
    layout = found[0].layout
    cut = [f"parallel.{name}={getattr(layout, name)}" for name in ("tensor", "pipeline", "context")]
    recompute = layout.recompute if isinstance(layout.recompute, int) else f'"{layout.recompute}"'
    return [*cut, f"train.micro_batch_size={layout.micro_batch_size}", f"train.recompute={recompute}"]


class Eight:
    """Rows on all GPUs.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.results = options, list[dict[str, Any]]()
        options.folder.mkdir(parents=True, exist_ok=True)

    def bench(self, name: str, shape: str, layers: int, variants: dict[str, list[str]], batch: int = 0) -> Bench:
        """Model, data and checkpoint of some rows."""
        options = self.options
        batch = batch or options.batch
        folder = options.folder.resolve() / name
        bench = Bench(argparse.Namespace(**{**vars(options), "folder": folder, "layers": layers}), variants, LAB)
        bench.global_batch = batch
        train = {
            "seq_length": options.seq,
            "global_batch_size": batch,
            "steps": options.steps,
            "lr": options.lr,
            "min_lr": options.lr / 10,
            "warmup_steps": max(1, options.steps // 10),
            "precision": "bf16",
            "save_interval": options.steps,
            "eval_interval": options.steps,
        }
        bench.file = make_run(folder, "tiny" if options.cpu else shape, layers, options.megabytes, train)
        gpus = bench.environment(INSTALLED, self.numbers(options.gpus))
        bench.cptain("bench", next(iter(variants)), gpus, options.gpus)  # writes the blend, which the lab's row needs
        return bench

    def numbers(self, gpus: int) -> str:
        """Those of the first GPUs."""
        return ",".join(map(str, range(gpus)))

    def rows(self, bench: Bench, rows: list[str], gpus: int, name: str = "") -> None:
        """Measure some on the first `gpus` GPUs, one after the other, and keep each."""
        for row in rows:
            result = bench.measure(row, self.numbers(gpus))
            if name:
                result["row"] = name
            self.results.append(result)
            print(json.dumps({key: value for key, value in result.items() if key != "losses"}), flush=True)
            found = {**machine(self.options.cpu), "gpus": self.options.gpus, "rows": self.results}
            (self.options.folder / "eight.json").write_text(json.dumps(found, indent=1))

    def whole(self) -> None:
        """The 8B."""
        options = self.options
        variants = dict(CUTS) | {f"{name}-fp8": [*cut, FP8] for name, cut in CUTS.items()}
        bench = self.bench("whole", "8b", options.layers, variants)
        if not options.cpu:
            variants["plan"] = proposed(bench.file, "bf16", options.gpus)
            variants["plan-fp8"] = [*proposed(bench.file, "fp8", options.gpus), FP8]
        rows = [f"{name}@{INSTALLED}" for name in variants if not (options.cpu and ("cp2" in name or "fp8" in name))]
        rows += ["lab@fork"] if "fork" in bench.trees else []
        self.rows(bench, [row for row in rows if row.partition("@")[0] in (options.rows or row)], options.gpus)

    def scaling(self) -> None:
        """Some layers on one, two and all GPUs, each with its own batch."""
        layers, each = min(4, self.options.layers), max(1, self.options.batch // self.options.gpus)
        for gpus in sorted({1, 2, self.options.gpus}):
            bench = self.bench("scaling", "8b", layers, {"scaling": []}, each * gpus)
            self.rows(bench, [f"scaling@{INSTALLED}"], gpus, f"{layers} layers on {gpus}")

    def large(self) -> None:
        """70B's shape."""
        options = self.options
        pipeline = min(2, options.gpus // 2) or 1
        cut = [f"parallel.tensor={min(4, options.gpus // pipeline)}", f"parallel.pipeline={pipeline}"]
        bench = self.bench("large", "70b", options.large_layers, {"70b": cut})
        self.rows(bench, [f"70b@{INSTALLED}"], options.gpus)


def main() -> None:
    """Measure, print and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=TREE", help="a tree of Megatron-LM")
    parser.add_argument("--only", choices=["whole", "scaling", "large"])
    parser.add_argument("--rows", type=lambda rows: rows.split(","), help="of the whole 8B: dp,tp2-fp8,plan,lab,…")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--large-layers", type=int, default=20, help="of 70B's shape")
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=32, help="sequences a step, of all GPUs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--megabytes", type=int, default=20, help="of text")
    parser.add_argument("--timeout", type=int, default=180, metavar="SECONDS", help="of one row")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/eight"))
    options = parser.parse_args()
    eight = Eight(options)
    for part in ("whole", "scaling", "large"):
        if options.only in (None, part):
            getattr(eight, part)()
    print(table(eight.results))
    if wrong := [result["row"] for result in eight.results if "error" in result]:
        sys.exit(f"eight: not measured: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
