"""What `cptain plan` computes of memory and of a step's time, beside what trainings measure.

    make bench BENCH='plan'

A training a shape, on one GPU each, side by side. Rows are those of train.py: random weights, ten steps timed.
Memory is computed from the shape alone; time is scaled from the
nearest training in rates.toml that is not the row's own. With --cpu the shapes are tiny, to try the script out.
"""

import argparse
import json
import os
import queue
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from inputs import INSTALLED, make_run
from train import Bench, machine


@dataclass(frozen=True)
class Shape:
    """A training to plan and to measure.

    Attributes:
        model: of `inputs.SHAPES`.
        layers: of it.
        seq: tokens of a sequence.
        batch: sequences of a step.
        settings: more of --set.
    """

    model: str
    layers: int
    seq: int
    batch: int
    settings: list[str] = field(default_factory=list)


FP8, MICRO_BATCH = 'train.precision="fp8"', "train.micro_batch_size="
SHAPES = {
    "Llama 3.2 1B": Shape("1b", 16, 4096, 16, [f"{MICRO_BATCH}4"]),
    "Llama 3.1 8B, 4 layers": Shape("8b", 4, 8192, 8),
    "the same, micro batch 4": Shape("8b", 4, 8192, 8, [f"{MICRO_BATCH}4"]),
    "the same, micro batch 2, all recomputed": Shape("8b", 4, 8192, 8, [f"{MICRO_BATCH}2", 'train.recompute="full"']),
    "the same in fp8, micro batch 2": Shape("8b", 4, 8192, 8, [FP8, f"{MICRO_BATCH}2"]),
    "Qwen2.5 7B, 4 layers, micro batch 2": Shape("qwen2.5-7b", 4, 4096, 16, [f"{MICRO_BATCH}2"]),
    "Qwen3 8B, 5 layers in fp8": Shape("qwen3-8b", 5, 4096, 16, [FP8]),
    "Llama 3.1 8B, 12 layers, 32,000 words, 4 recomputed": Shape("8b-32k", 12, 8192, 8, ["train.recompute=4"]),
    "width 1024, 24 layers, micro batch 8": Shape("0.3b", 24, 2048, 64, [f"{MICRO_BATCH}8"]),
    "Llama 3.1 70B, 1 layer": Shape("70b", 1, 8192, 8),
    "width 1024, 24 layers, micro batch 2": Shape("0.3b", 24, 2048, 16, [f"{MICRO_BATCH}2"]),
    "Llama 3.2 1B, micro batch 1": Shape("1b", 16, 4096, 16),
    "Llama 3.2 1B in fp8": Shape("1b", 16, 4096, 16, [FP8, f"{MICRO_BATCH}4"]),
}


def make(options: argparse.Namespace, name: str, number: int) -> Bench:
    """Model, data and checkpoint of a shape."""
    shape = SHAPES[name]
    folder = options.out.resolve() / f"plan-{number}"
    made = argparse.Namespace(**vars(options), folder=folder, seq=64 if options.cpu else shape.seq, peer=[])
    bench = Bench(made, {"plan": shape.settings})
    bench.global_batch = shape.batch
    train = {
        "seq_length": made.seq,
        "global_batch_size": shape.batch,
        "steps": options.steps,
        "lr": 1e-5,
        "precision": "bf16",
        "recompute": "none",
        "save_interval": options.steps,
        "eval_interval": options.steps,
    }
    model, layers = ("tiny", 2) if options.cpu else (shape.model, shape.layers)
    bench.file = make_run(folder, model, layers, options.megabytes, train)
    return bench


def over(planned: float | None, measured: float) -> str:
    """By how much it was computed too high, in percent."""
    return f"{100 * (planned / measured - 1):+.1f} %" if planned and measured else ""


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| shape | peak, GB | computed | ms a step | computed | tokens/s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['shape']} | {result['error']} | | | | |")
            continue
        memory, time = (over(result[f"planned_{of}"], result[by]) for of, by in (("gb", "allocated_gb"), ("ms", "ms")))
        lines.append(
            f"| {result['shape']} | {result['allocated_gb']} | {memory} | {result['ms']:,.0f} | {time} | "
            f"{result['tokens_per_s']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure the shapes, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/plan"), metavar="DIR")
    parser.add_argument("--shapes", help="1,2,…: only these of the list")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--megabytes", type=int, default=10, help="of text")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="of one training")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    waiting: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    wanted = [int(number) for number in options.shapes.split(",")] if options.shapes else range(1, len(SHAPES) + 1)
    for number, name in enumerate(SHAPES, 1):
        if number in wanted:
            waiting.put((number, name))
    results: dict[str, dict[str, Any]] = {}
    making = threading.Lock()  # transformers' lazy imports fail where two threads ask for them at once

    def work(gpu: str) -> None:
        while True:
            try:
                number, name = waiting.get_nowait()
            except queue.Empty:
                return
            with making:
                bench = make(options, name, number)
            results[name] = {"shape": name, **bench.measure(f"plan@{INSTALLED}", gpu)}
            print(json.dumps({key: value for key, value in results[name].items() if key != "losses"}), flush=True)

    gpus = [""] if options.cpu else [str(gpu) for gpu in range(torch.cuda.device_count())]
    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ordered = [results[name] for name in SHAPES if name in results]
    (options.out / "plan.json").write_text(json.dumps({**machine(options.cpu), "rows": ordered}, indent=1))
    print(table(ordered))
    if any("error" in result for result in ordered):
        sys.exit("plan: not every shape was measured")


if __name__ == "__main__":
    main()
