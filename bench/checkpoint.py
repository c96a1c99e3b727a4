"""convert, export and verify against `cp -r` and fsync of the same bytes: wall seconds and peak memory.

    make bench BENCH='checkpoint --gigabytes 3'

The model is a random Llama of Llama-3.1-8B's width with as many layers as fill --gigabytes, in bf16. Each repeat runs
cp and the stages in turn, and ratios are taken within a repeat, so that a busy disk disturbs both alike; the medians
are shown. The page cache is as the runs before leave it, for cp as for the rest. Peak memory is the process tree's
resident set, sampled; for cptain what `import torch` takes is shown apart.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

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
    if not (folder / "config.json").exists():
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
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
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
            "max_position_embeddings": 8192,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config))
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
    """Bytes resident in a process and all its descendants."""
    total, waiting = 0, [process]
    while waiting:
        one = waiting.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total


def run(command: list[str], log: Path) -> tuple[float, int]:
    """Wall seconds and peak memory of a command that must succeed."""
    began, peak, ended = time.monotonic(), 0, threading.Event()
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.02):
                peak = max(peak, resident(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        wall = time.monotonic() - began
        ended.set()
        watcher.join()
    if status:
        sys.exit(f"{' '.join(command)}: exit status {status}:\n{log.read_text()[-2000:]}")
    return wall, peak


def copy(source: Path, target: Path, log: Path) -> tuple[float, int]:
    """`cp -r` and fsync of every file."""
    shutil.rmtree(target, ignore_errors=True)
    return run(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(target)], log)


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    cptain, root = [sys.executable, "-m", "cptain"], work / "bench"
    converted, workers = root / "megatron" / "release", ["--workers", str(arguments.workers)]
    exported = root / "hf" / "iter_0000001"
    torch_alone = run([sys.executable, "-c", "import torch"], log)[1]
    walls: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for _ in range(arguments.repeat):
        shutil.rmtree(work, ignore_errors=True)

        def measure(name: str, measured: tuple[float, int], against: float | None) -> float:
            wall, peak = measured
            walls.setdefault(name, []).append(wall)
            ratios.setdefault(name, []).append(wall / (against or wall))
            peaks[name] = max(peaks.get(name, 0), peak)
            return wall

        plain = measure("cp -r of the model, fsync", copy(source, folder / "copy", log), None)
        shutil.rmtree(folder / "copy")
        command = [*cptain, "convert", str(folder / "run.toml"), *workers]
        measure("cptain convert", run(command, log), plain)
        plain = measure("cp -r of the checkpoint, fsync", copy(converted, folder / "copy", log), None)
        shutil.rmtree(folder / "copy")
        (root / "checkpoints").mkdir()
        converted.rename(root / "checkpoints" / "iter_0000001")
        (root / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
        command = [*cptain, "export", str(folder / "run.toml"), *workers]
        measure("cptain export", run(command, log), plain)
        measure("cptain verify", run([*cptain, "verify", str(source), str(exported), *workers], log), plain)
        command = [*cptain, "verify", str(exported), str(root / "checkpoints"), *workers]
        measure("cptain verify, both formats", run(command, log), plain)
    shutil.rmtree(work, ignore_errors=True)
    print(
        f"{size / 1e9:.1f} GB; {platform.machine()}, {arguments.workers} workers, Python {platform.python_version()},"
    )
    print(f"torch {version('torch')}, whose import takes {torch_alone / 1e6:.0f} MB; median of {arguments.repeat}\n")
    print("| | wall s | GB/s | times cp | peak MB | above import torch |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, seconds in walls.items():
        wall, above = statistics.median(seconds), ""
        if name.startswith("cptain"):
            above = f"{(peaks[name] - torch_alone) / 1e6:.0f}"
        figures = [f"{wall:.1f}", f"{size / wall / 1e9:.2f}", f"{statistics.median(ratios[name]):.2f}"]
        print(f"| {name} | {' | '.join(figures)} | {peaks[name] / 1e6:.0f} | {above} |")


if __name__ == "__main__":
    main()
