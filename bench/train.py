"""Training on GPUs: the lab's flags on its fork of Megatron-LM, and cptain's with several Megatrons, in one run.

    make bench BENCH='train --peer fork=TREE --peer main=TREE'

A row is VARIANT@MEGATRON: a training of its own, from the same converted checkpoint on the same data, on one GPU; as
many run side by side as there are GPUs. (eight.py has rows of all GPUs of a host, plan.py of other shapes.) `lab@fork`
is pretrain_gpt.py with the flags of the lab's train_swallow_smbc scripts; `lab-fused@fork` is the same with weight
gradients fused, as Apex does in their image. Every other row is the command that `cptain train --dry-run` prints, less
--save. The model is a Llama 3.1 of random weights in 8B's shape, so that a few layers fit a GPU; losses show that the
rows compute the same. `ledger` counts tokens and loss of the mix's parts besides, and `stages` reads an order of
cptain's own. --cpu tries it all out on a tiny shape.

A row's time is the median of its last ten steps. TFLOP/s is what Megatron logs: 6 FLOPs a parameter and token, without
recomputation, and attention counted as causal. Memory is the largest that Megatron logs. Where it can log it after the
first step only (the fork), the peak is short of Adam's moments, which the first step's end allocates. Beside them is
what `cptain plan` computes: of memory, and of time from the nearest training in rates.toml that is not the same.
"""

import argparse
import json
import platform
import queue
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cptain.data.vocabulary import run_architecture
from cptain.megatron.log import read_steps
from cptain.run_file import load_run
from cptain.training.fit import settle
from cptain.training.launch import DETERMINISTIC
from cptain.training.memory import fullest
from cptain.training.rates import known_rates, nearest, shape_of, step_seconds
from inputs import CPTAIN, INSTALLED, environment, make_run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
GLOBAL_BATCH = 8
LIBRARY = 'data.mix=[{name="library", input="text/library.jsonl", weight=1}]'
VARIANTS: dict[str, list[str]] = {  # --set of cptain train
    "cptain": [],
    "again": [],  # the same once more: do the losses repeat?
    "ledger": [LIBRARY],
    "stages": [LIBRARY.replace(", weight=1", ""), "data.stage=[{step=0, weight={library=1}}]"],
    "deterministic": ["train.deterministic=true"],
    "deterministic-again": ["train.deterministic=true"],
    "unfused": ['train.megatron_args=["--no-gradient-accumulation-fusion"]'],
    "mb2": ["train.micro_batch_size=2"],
    "mb4": ["train.micro_batch_size=4"],
    "fp8": ['train.precision="fp8"'],
    "fp8-mb2": ['train.precision="fp8"', "train.micro_batch_size=2"],
    "fp8-mb4": ['train.precision="fp8"', "train.micro_batch_size=4"],
    "fp8-params-mb2": ['train.precision="fp8"', "train.micro_batch_size=2"],
    "fp8-delayed-mb2": [
        'train.precision="fp8"',
        "train.micro_batch_size=2",
        'train.fp8_recipe="delayed"',
    ],
}
REFUSED = {"fp8-params-mb2": ["--fp8-param-gather"]}  # what train.megatron_args may not hold, and why not
LAB = """
--use-distributed-optimizer --distributed-backend nccl --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1
--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --untie-embeddings-and-output-weights
--use-rotary-position-embeddings --position-embedding-type rope --use-mcore-models --normalization RMSNorm
--norm-epsilon 1e-5 --no-masked-softmax-fusion --attention-dropout 0.0 --hidden-dropout 0.0 --disable-bias-linear
--no-bias-gelu-fusion --swiglu --use-flash-attn --recompute-activations --recompute-granularity selective
--log-throughput --exit-on-missing-checkpoint --use-checkpoint-args --transformer-impl transformer_engine
--group-query-attention --rotary-base 500000 --rotary-percent 1.0 --use-rope-scaling --no-load-rng --no-load-optim
--log-interval 1 --eval-iters 1 --log-progress
"""
# Starts a script of Megatron-LM where Apex is missing or, on the CPU, where there is no GPU.
STARTER = """
import contextlib, runpy, sys
from cptain.megatron import importing, weight_gradient
_, how, script, *arguments = sys.argv
sys.argv[:] = [script, *arguments]
importing.before_import(cpu=how == "cpu")
if how == "fused":
    weight_gradient.install()
with contextlib.ExitStack() as answers:
    if how == "cpu":
        importing.import_megatron(cpu=True)
        from cptain.megatron.cpu import CudaToCpu
        answers.enter_context(CudaToCpu())
    runpy.run_path(script, run_name="__main__")
"""
CPU_FLAGS = """--transformer-impl local --distributed-backend gloo --use-cpu-initialization
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion --no-rope-fusion --num-workers 0"""


class Bench:
    """The inputs of all rows, and one row at a time.

    Args:
        options: of the command line.
        variants: --set of `cptain train` by variant.
        lab_flags: more of the lab's.
    """

    global_batch = GLOBAL_BATCH

    def __init__(
        self, options: argparse.Namespace, variants: dict[str, list[str]] | None = None, lab_flags: tuple[str, ...] = ()
    ) -> None:
        self.options, self.variants, self.lab_flags = options, variants or VARIANTS, lab_flags
        self.folder = options.folder.resolve()
        self.trees: dict[str, str] = dict(peer.split("=", 1) for peer in options.peer)
        self.file = self.folder / "run.toml"

    def environment(self, tree: str, gpu: str = "") -> dict[str, str]:
        """With a tree of Megatron-LM before the installed one, and one GPU."""
        return environment(self.trees.get(tree), gpu)

    def make_inputs(self) -> None:
        """Model, text, tokenized data and converted checkpoint."""
        options = self.options
        train = {
            "seq_length": options.seq,
            "global_batch_size": self.global_batch,
            "steps": options.steps,
            "lr": options.lr,
            "min_lr": options.lr / 10,
            "warmup_steps": max(1, options.steps // 10),
            "precision": "bf16",
            "recompute": "none",
            "save_interval": options.steps,
            "eval_interval": options.steps,
        }
        make_run(self.folder, "tiny" if options.cpu else "8b", options.layers, options.megabytes, train)

    def lab(self, tree: str, fused: bool, processes: int) -> list[str]:
        """The command of the lab's scripts, with this run's sizes, data and folders."""
        run, options = load_run(self.file), self.options
        files = json.loads((run.folder / "blend.json").read_text())["files"]
        blend = [word for weight, prefix in files for word in (str(weight), prefix)]
        config = json.loads((self.folder / "model" / "config.json").read_text())
        sizes = {
            "num-layers": options.layers,
            "hidden-size": config["hidden_size"],
            "ffn-hidden-size": config["intermediate_size"],
            "num-attention-heads": config["num_attention_heads"],
            "seq-length": options.seq,
            "max-position-embeddings": options.seq,
            "micro-batch-size": 1,
            "global-batch-size": self.global_batch,
            "train-iters": options.steps,
            "lr": options.lr,
            "min-lr": options.lr / 10,
            "lr-warmup-iters": max(1, options.steps // 10),
            "eval-interval": options.steps,
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": self.folder / "model",
            # Their tokenizer is as large as the vocabulary; the bench's is not.
            "make-vocab-size-divisible-by": config["vocab_size"],
            "load": run.megatron_folder,
            "data-cache-path": self.folder / "lab-data-cache",
            "split": run.data.split,
        }
        flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))] + shlex.split(LAB)
        if self.options.cpu:
            flags += shlex.split(CPU_FLAGS)
        elif not fused:
            flags += ["--no-gradient-accumulation-fusion"]
        starter = self.folder / "starter.py"
        starter.write_text(STARTER)
        how = "cpu" if self.options.cpu else "fused" if fused else "plain"
        script = str(Path(self.trees[tree]) / "pretrain_gpt.py")
        return [*TORCHRUN, str(processes), str(starter), how, script, *flags, *self.lab_flags, "--data-path", *blend]

    def cptain(self, row: str, variant: str, environment: dict[str, str], processes: int = 1) -> list[str]:
        """The command that `cptain train` would start, but for what it saves."""
        settings = [f'name="{row}"', *self.variants[variant]]
        command = [*CPTAIN, "train", str(self.file), "--dry-run", "--nproc-per-node", str(processes)]
        command += ["--cpu"] if self.options.cpu else []
        command += [word for setting in settings for word in ("--set", setting)]
        shown = subprocess.run(command, env=environment, capture_output=True, text=True)
        if shown.returncode:
            raise RuntimeError(shown.stderr.strip())
        words = shlex.split(shown.stdout.replace("\\\n", " "))
        for flag in ("--save", "--save-interval"):
            place = words.index(flag)
            del words[place : place + 2]
        return words + REFUSED.get(variant, []) + self.memory_flags(row.partition("@")[2])

    def memory_flags(self, tree: str) -> list[str]:
        """--log-memory-interval, which 0.19 has and the fork has not."""
        arguments = Path(self.trees.get(tree, "")) / "megatron" / "training" / "arguments.py"
        known = tree not in self.trees or "log_memory_interval" in arguments.read_text()
        return ["--log-memory-interval", "4"] if known else []

    def planned(self, variant: str, processes: int) -> dict[str, Any]:
        """GB that the fullest stage was computed to need, and ms of a step."""
        run = load_run(self.file, tuple(self.variants[variant]))
        architecture = run_architecture(run)
        gpu_bytes = None if self.options.cpu else torch.cuda.get_device_properties(0).total_memory
        layout, _ = settle(run, architecture, processes, gpu_bytes)
        others = [
            rate
            for rate in known_rates()
            if (shape_of(rate.architecture), rate.architecture.num_layers, rate.precision, rate.layout)
            != (shape_of(architecture), architecture.num_layers, run.train.precision, layout)
        ]
        near = nearest(others, architecture, run.train.precision, layout)
        return {
            "layout": str(layout),
            "planned_gb": round(fullest(run, architecture, layout)[0].peak / 2**20 / 1000, 1),
            "planned_ms": round(1000 * step_seconds(run, architecture, layout, near), 1) if near else None,
            "planned_from": str(near),
        }

    def measure(self, row: str, gpu: str) -> dict[str, Any]:
        """Train one row; gives what it measured, or why it did not.

        Args:
            row: VARIANT@MEGATRON.
            gpu: the GPUs' numbers, with commas between; empty for the CPU.
        """
        variant, _, tree = row.partition("@")
        environment, log = self.environment(tree, gpu), self.folder / f"{row}.log"
        began, processes, planned = time.monotonic(), gpu.count(",") + 1, dict[str, Any]()
        # As `cptain train` does.
        environment |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} if processes > 1 else {}
        environment |= DETERMINISTIC if "deterministic" in variant else {}
        try:
            if variant.startswith("lab"):
                command = self.lab(tree, variant == "lab-fused", processes)
            else:
                command = self.cptain(row, variant, environment, processes)
                planned = self.planned(variant, processes)
            with open(log, "w") as output:
                print(shlex.join(command), file=output, flush=True)
                with suppress(subprocess.TimeoutExpired):
                    subprocess.run(
                        command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=self.options.timeout
                    )
        except (RuntimeError, KeyError, OSError) as error:
            return {"row": row, "error": f"{type(error).__name__}: {error}"[:300]}
        wall = round(time.monotonic() - began, 1)
        return {"row": row, "gpu": gpu, "wall_s": wall, **self.read(log, processes), **planned}

    def read(self, log: Path, processes: int) -> dict[str, Any]:
        """What a log says of speed, loss and memory."""
        steps, text = read_steps([log]), log.read_text(errors="replace")
        if len(steps) < self.options.steps:
            errors = re.findall(r"^.*(?:Error|Exception|error)\b.*: .*$", text, re.MULTILINE)
            error = errors[0].strip()[:300] if errors else f"ended without an error after {len(steps)} steps"
            return {"error": error, "losses": [step.loss for step in steps]}
        tail = steps[max(1, len(steps) - 10) :]
        seconds = statistics.median(step.seconds for step in tail)
        teraflops = [float(value) for value in re.findall(r"throughput per GPU \(TFLOP/s/GPU\): ([\d.]+)", text)]
        memory = re.findall(r"max allocated: ([\d.]+) \|.*?max reserved: ([\d.]+)", text)
        peak = [max(float(pair[place]) for pair in memory) / 1000 for place in (0, 1)] if memory else [0.0, 0.0]
        return {
            "ms": round(1000 * seconds, 1),
            "tokens_per_s": round(self.global_batch * self.options.seq / seconds / processes),
            "tflops": statistics.median(teraflops[-len(tail) :]) if teraflops else 0.0,
            "loss_first": steps[0].loss,
            "loss_last": steps[-1].loss,
            "losses": [step.loss for step in steps],
            "allocated_gb": round(peak[0], 1),
            "reserved_gb": round(peak[1], 1),
        }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown; the ratio is to the lab's row of the same run."""
    lab = next((result.get("tokens_per_s") for result in results if result["row"].startswith("lab@")), None)
    lines = [
        "| row | tokens/s a GPU | × the lab's | ms a step | TFLOP/s | loss, first → last | allocated / reserved, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if "error" in result:
            lines.append(f"| {result['row']} | {result['error']} | | | | | |")
            continue
        ratio = f"{result['tokens_per_s'] / lab:.3f}" if lab else ""
        lines.append(
            f"| {result['row']} | {result['tokens_per_s']:,} | {ratio} | {result['ms']} | {result['tflops']:.0f} | "
            f"{result['loss_first']:.4f} → {result['loss_last']:.4f} | "
            f"{result['allocated_gb']} / {result['reserved_gb']} |"
        )
    return "\n".join(lines)


def machine(cpu: bool) -> dict[str, str]:
    """What it ran on."""
    found = {
        "device": platform.processor() or "CPU" if cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    for package in ("transformer_engine", "megatron-core"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return {**found, "python": platform.python_version()}


def main() -> None:
    """Measure the rows, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=TREE", help="a tree of Megatron-LM")
    parser.add_argument("--rows", help="VARIANT@MEGATRON,…; default: all variants that the peers allow")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--megabytes", type=int, default=20, help="of text")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="of one row")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/train"))
    options = parser.parse_args()
    bench = Bench(options)
    rows = options.rows.split(",") if options.rows else []
    if not rows:
        rows += ["lab@fork", "lab-fused@fork"] if "fork" in bench.trees else []
        rows += [f"cptain@{tree}" for tree in (INSTALLED, *bench.trees)]
        rows += [f"{variant}@{INSTALLED}" for variant in VARIANTS if variant != "cptain"]
    bench.make_inputs()
    # Writes the blend, which the lab's row needs.
    bench.cptain("bench", "cptain", bench.environment(INSTALLED, "" if options.cpu else "0"))
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for row in rows:
        waiting.put(row)
    results: dict[str, dict[str, Any]] = {}
    found = {**machine(options.cpu), "layers": options.layers, "seq": options.seq, "steps": options.steps}

    def keep() -> str:
        ordered = [results[row] for row in rows if row in results]
        (bench.folder / "results.json").write_text(json.dumps({**found, "rows": ordered}, indent=1))
        text = ", ".join(f"{name} {value}" for name, value in found.items()) + "\n\n" + table(ordered) + "\n"
        (bench.folder / "table.md").write_text(text)
        return text

    def work(gpu: str) -> None:
        while True:
            try:
                row = waiting.get_nowait()
            except queue.Empty:
                return
            results[row] = bench.measure(row, gpu)
            keep()
            shown = {key: value for key, value in results[row].items() if key != "losses"}
            print(json.dumps(shown), file=sys.stderr, flush=True)

    gpus = [""] if options.cpu else [str(gpu) for gpu in range(options.gpus or torch.cuda.device_count())]
    threads = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(keep())


if __name__ == "__main__":
    main()
