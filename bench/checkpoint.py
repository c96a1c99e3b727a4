"""convert, export and verify against `cp -r` and fsync of the same bytes: wall and CPU seconds and peak memory.

    make bench BENCH='checkpoint --gigabytes 3 --peer fork=/path/to/Megatron-LM,/path/to/python'

The model is a random Llama of Llama-3.1-8B's width with as many layers as fill --gigabytes, in bf16. Each repeat runs
cp and the stages in turn, and ratios are taken within a repeat, so that a busy disk disturbs both alike; the medians
are shown. CPU seconds, of the whole process tree, tell more than wall seconds where others use the machine. The page
cache is as the runs before leave it, for cp as for the rest. Peak memory is the sum over the process tree, sampled,
with a page that several processes share counted once; for cptain what `import torch` takes is shown apart.

A peer is a tree, of a kind that `checkpoint_peers.py` names, and a Python with what it imports. A peer need not flush
what it writes; that is done untimed, and before the next command. `same values` is what `cptain verify` says of the
model and of what was written.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from checkpoint_peers import peer

CPTAIN = [sys.executable, "-m", "cptain"]
HIDDEN, FFN, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


def model(folder: Path, gigabytes: float) -> int:
    """Make the model, one file a layer; gives its bytes. Equal calls make equal models, and a model there is kept."""
    ends = 2 * 2 * VOCABULARY * HIDDEN + 2 * HIDDEN
    layer_bytes = sum(2 * int(np.prod(shape)) for shape in LAYER.values())
    layers = max(1, round((gigabytes * 1e9 - ends) / layer_bytes))
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        random = np.random.default_rng(0)

        def values(shape: tuple[int, ...]) -> np.ndarray:
            # Random bits would hold NaNs, which no trained model has: bf16 between 2^-8 and 2^-6, of either sign.
            bits = random.integers(0, 1 << 16, int(np.prod(shape)), dtype=np.uint16)
            return (bits & 0x80FF | 0x3B80).reshape(shape)

        parts = [
            {f"model.layers.{number}.{name}.weight": shape for name, shape in LAYER.items()} for number in range(layers)
        ]
        parts.append(dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, HIDDEN)))
        parts[-1]["model.norm.weight"] = (HIDDEN,)
        weight_map = {}
        for number, part in enumerate(parts):
            file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
            save_bf16({name: values(shape) for name, shape in part.items()}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": None,
            "max_position_embeddings": 8192,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config))
        # Peers take the size of the vocabulary from the tokenizer.
        words = {str(number): number for number in range(VOCABULARY)}
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "0"}'
        )
        (folder / "tokenizer.json").write_text(
            json.dumps({"added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}})
        )
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def save_bf16(tensors: dict[str, np.ndarray], file: Path) -> None:
    """A safetensors file; its own library's writer for numpy knows no bf16."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with open(file, "wb") as raw:
        raw.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            tensor.tofile(raw)


def resident(process: int) -> int:
    """Bytes resident in a process and all its descendants: the kernel's proportional set size, summed."""
    total, waiting = 0, [process]
    while waiting:
        one = waiting.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError, StopIteration):  # it has ended
            continue
    return total


def cpu_seconds() -> float:
    """What all ended child processes used of the CPU, in user and kernel mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: list[str], log: Path) -> tuple[float, float, int]:
    """Wall and CPU seconds and peak memory of a command that must succeed."""
    began, used, peak, ended = time.monotonic(), cpu_seconds(), 0, threading.Event()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

        def watch() -> None:
            nonlocal peak
            pause = 0.02
            while not ended.wait(pause):
                asked = time.monotonic()
                peak = max(peak, resident(process.pid))
                pause = max(0.02, 4 * (time.monotonic() - asked))  # the kernel walks every page

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        wall = time.monotonic() - began
        ended.set()
        watcher.join()
    if status:
        sys.exit(f"{' '.join(command)}: exit status {status}:\n{log.read_text()[-2000:]}")
    return wall, cpu_seconds() - used, peak


def copy(source: Path, target: Path, log: Path) -> tuple[float, float, int]:
    """`cp -r` and fsync of every file."""
    shutil.rmtree(target, ignore_errors=True)
    return run(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(target)], log)


class Figures:
    """What was measured of each command, by its row's name."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.walls: dict[str, list[float]] = {}
        self.cpus: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.same: dict[str, bool] = {}

    def add(self, name: str, measured: tuple[float, float, int], against: float | None = None) -> float:
        """Note wall and CPU seconds and peak memory; the ratio is to `against` seconds. Gives the wall's."""
        wall, used, peak = measured
        self.walls.setdefault(name, []).append(wall)
        self.cpus.setdefault(name, []).append(used)
        self.ratios.setdefault(name, []).append(wall / (against or wall))
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        return wall

    def add_cptain(self, words: list[str], against: float, name: str = "") -> None:
        """Measure a command of cptain's, which fails where its values are not the model's."""
        name = f"cptain {name or words[0]}"
        self.add(name, run([*CPTAIN, *words], self._log), against)
        if words[0] != "verify":
            self.same[name] = True

    def add_peer(self, name: str, command: list[str], written: Path, source: Path, against: float) -> None:
        """Measure a peer's command, and ask `cptain verify` of what it wrote."""
        self.add(name, run(command, self._log), against)
        os.sync()
        verify = subprocess.run([*CPTAIN, "verify", str(source), str(written)], capture_output=True, text=True)
        if verify.returncode:  # a peer's files beside the weights may differ
            print(f"{name}: {verify.stderr}", file=sys.stderr)
        self.same[name] = self.same.get(name, True) and (not verify.returncode or "tensors are equal" in verify.stderr)

    def table(self, size: int, torch_alone: int) -> None:
        """Print medians in Markdown, of a model of `size` bytes; `import torch` alone takes `torch_alone`."""
        print("| | wall s | CPU s | GB/s | times cp | peak MB | above import torch | same values |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, seconds in self.walls.items():
            wall, above = statistics.median(seconds), ""
            if name.startswith("cptain"):
                above = f"{(self.peaks[name] - torch_alone) / 1e6:.0f}"
            figures = [f"{wall:.1f}", f"{statistics.median(self.cpus[name]):.1f}", f"{size / wall / 1e9:.2f}"]
            figures.append(f"{statistics.median(self.ratios[name]):.2f}")
            figures += [f"{self.peaks[name] / 1e6:.0f}", above, {True: "yes", False: "NO"}.get(self.same.get(name), "")]
            print(f"| {name} | {' | '.join(figures)} |")


def repeat(folder: Path, workers: list[str], peers: list[list[tuple[str, list[str], Path]]], figures: Figures) -> None:
    """Measure every command once."""
    source, work, log, run_file = folder / "model", folder / "work", folder / "log", str(folder / "run.toml")
    root = work / "bench"
    converted, checkpoints, exported = root / "megatron" / "release", root / "checkpoints", root / "hf" / "release"
    shutil.rmtree(work, ignore_errors=True)
    plain = figures.add("cp -r of the model, fsync", copy(source, folder / "copy", log))
    shutil.rmtree(folder / "copy")
    figures.add_cptain(["convert", run_file, *workers], plain)
    for there, _ in peers:
        figures.add_peer(*there, source, plain)
    plain = figures.add("cp -r of the checkpoint, fsync", copy(converted, folder / "copy", log))
    shutil.rmtree(folder / "copy")
    checkpoints.mkdir()
    converted.rename(checkpoints / "release")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("release")
    figures.add_cptain(["export", run_file, *workers], plain)
    for _, back in peers:
        figures.add_peer(*back, source, plain)
    figures.add_cptain(["verify", str(source), str(exported), *workers], plain)
    figures.add_cptain(["verify", str(exported), str(checkpoints), *workers], plain, "verify, both formats")


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=TREE[,PYTHON]",
        help="a tree of Megatron-LM, Megatron Bridge, mbridge or mcore-bridge",
    )
    parser.add_argument("--gigabytes", type=float, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/checkpoint"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve() / f"{arguments.gigabytes:g}"
    source, work, log = folder / "model", folder / "work", folder / "log"
    size = model(source, arguments.gigabytes)
    (folder / "run.toml").write_text(
        f'name = "bench"\nwork_dir = "{work}"\n[model]\nhf = "{source}"\n[data]\ninput = ["x"]\n'
        "[train]\nseq_length = 8\nglobal_batch_size = 1\nsteps = 1\nlr = 1\n"
    )
    peers = [peer(one, source, work / "peers") for one in arguments.peer]
    torch_alone = run([sys.executable, "-c", "import torch"], log)[2]
    figures = Figures(log)
    for _ in range(arguments.repeat):
        repeat(folder, ["--workers", str(arguments.workers)], peers, figures)
    shutil.rmtree(work, ignore_errors=True)
    print(
        f"{size / 1e9:.1f} GB; {platform.machine()}, {arguments.workers} workers, Python {platform.python_version()},"
    )
    print(f"torch {version('torch')}, whose import takes {torch_alone / 1e6:.0f} MB; median of {arguments.repeat}\n")
    figures.table(size, torch_alone)


if __name__ == "__main__":
    main()
