"""convert, export and verify against `cp -r` and fsync of the same bytes: wall seconds and peak memory.

    make bench BENCH='checkpoint --gigabytes 3 --peer fork=/path/to/Megatron-LM,/path/to/python'

The model is a random Llama of Llama-3.1-8B's width with as many layers as fill --gigabytes, in bf16. Each repeat runs
cp and the stages in turn, and ratios are taken within a repeat, so that a busy disk disturbs both alike; the medians
are shown. The page cache is as the runs before leave it, for cp as for the rest. Peak memory is the sum over the
process tree, sampled, with a page that several processes share counted once; for cptain what `import torch` takes is
shown apart.

A peer is a tree of Megatron-LM that still has a Hugging Face loader for tools/checkpoint/convert.py, or one of Megatron
Bridge with its submodule, and a Python with what it imports. Both run on the CPU, without Transformer Engine, where
cptain's own `megatron/cpu.py` answers for CUDA. A peer need not flush what it writes; that is done untimed, and before
the next command. `same values` is what `cptain verify` says of the model and of what was written.
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
# convert.py asks for Transformer Engine's version even where it builds layers without it, and gives Megatron arguments
# of its own, to which these are added.
MEGATRON_LM = """
import importlib.metadata, runpy, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "2" if name == "transformer-engine" else version(name)
from cptain.megatron.importing import before_import, import_megatron
before_import(cpu=True)
import_megatron(cpu=True)
from megatron.training import arguments
parse_args = arguments.parse_args
def parse_args_for_cpu():
    sys.argv += ["--no-rope-fusion", "--no-gradient-accumulation-fusion", "--no-persist-layer-norm"]
    return parse_args()
arguments.parse_args = parse_args_for_cpu
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Megatron Bridge imports two packages that it does not call here; megatron.core must not find them.
BRIDGE = """
import sys
from unittest.mock import MagicMock
from cptain.megatron.importing import before_import
before_import(cpu=True)
import megatron.core.models.gpt.gpt_layer_specs, modelopt.torch
for package, module in (("transformer_engine", "pytorch"), ("nvidia_resiliency_ext", "inprocess")):
    for name in (package, f"{package}.{module}"):
        sys.modules[name] = MagicMock(__path__=[], __spec__=None, __version__="2")
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import local_layer_spec
to_megatron_provider = AutoBridge.to_megatron_provider
def to_cpu_provider(*args, **kwargs):
    provider = to_megatron_provider(*args, **kwargs)
    provider.transformer_layer_spec = local_layer_spec
    provider.apply_rope_fusion = provider.gradient_accumulation_fusion = provider.persist_layer_norm = False
    return provider
AutoBridge.to_megatron_provider = to_cpu_provider
call, model, checkpoint, exported = sys.argv[1:]
if call == "import_ckpt":
    AutoBridge.import_ckpt(model, checkpoint)
else:
    AutoBridge.from_hf_pretrained(model).export_ckpt(checkpoint, exported)
"""


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


def run(command: list[str], log: Path) -> tuple[float, int]:
    """Wall seconds and peak memory of a command that must succeed."""
    began, peak, ended = time.monotonic(), 0, threading.Event()
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
    return wall, peak


def copy(source: Path, target: Path, log: Path) -> tuple[float, int]:
    """`cp -r` and fsync of every file."""
    shutil.rmtree(target, ignore_errors=True)
    return run(["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(source), str(target)], log)


def revision(tree: Path) -> str:
    """The commit of a tree, if it is one."""
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "?"


def peer(described: str, source: Path, folder: Path) -> list[tuple[str, list[str], Path]]:
    """What a peer converts with and what it exports with: each a row's name, a command and what that writes.

    Args:
        described: NAME=TREE[,PYTHON].
        source: the model.
        folder: where it writes.
    """
    name, _, rest = described.partition("=")
    path, _, python = rest.partition(",")
    tree, megatron, exported = Path(path).resolve(), folder / name / "megatron", folder / name / "hf"
    paths, tools = [Path(__file__).resolve().parent.parent / "apps"], tree / "tools" / "checkpoint"
    if (tree / "src" / "megatron" / "bridge").is_dir():
        paths += [tree / "src", tree / "3rdparty" / "Megatron-LM"]
        calls = {
            f"AutoBridge.{call}": ["-c", BRIDGE, call, str(source), str(megatron), str(exported)]
            for call in ("import_ckpt", "export_ckpt")
        }
    elif (tools / "loader_llama_mistral.py").exists():
        paths += [tree, tools]
        layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
        command = ["-c", MEGATRON_LM, str(tools / "convert.py"), "--model-type", "GPT"]
        there = "--loader llama_mistral --model-size llama3 --checkpoint-type hf --bf16 --saver mcore "
        there += f"--saver-transformer-impl local --target-pipeline-parallel-size {2 - layers % 2} --tokenizer-model"
        back = "--loader core --loader-transformer-impl local --saver llama3_hf --hf-tokenizer-path"
        calls = {
            call: [*command, *options.split(), str(source), "--load-dir", str(read), "--save-dir", str(written)]
            for call, options, read, written in (
                ("convert.py", there, source, megatron),
                ("convert.py, back", back, megatron, exported),
            )
        }
    else:
        sys.exit(f"{tree}: neither Megatron Bridge nor a Megatron-LM with tools/checkpoint/loader_llama_mistral.py")
    start = ["env", f"PYTHONPATH={os.pathsep.join(map(str, paths))}", "CUDA_VISIBLE_DEVICES=", python or sys.executable]
    return [
        (f"{call}, {name} ({revision(tree)})", [*start, *command], written)
        for (call, command), written in zip(calls.items(), (megatron, exported), strict=True)
    ]


class Figures:
    """What was measured of each command, by its row's name."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.walls: dict[str, list[float]] = {}
        self.ratios: dict[str, list[float]] = {}
        self.peaks: dict[str, int] = {}
        self.same: dict[str, bool] = {}

    def add(self, name: str, measured: tuple[float, int], against: float | None = None) -> float:
        """Note wall seconds and peak memory; the ratio is to `against` seconds. Gives the seconds."""
        wall, peak = measured
        self.walls.setdefault(name, []).append(wall)
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
        print("| | wall s | GB/s | times cp | peak MB | above import torch | same values |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name, seconds in self.walls.items():
            wall, above = statistics.median(seconds), ""
            if name.startswith("cptain"):
                above = f"{(self.peaks[name] - torch_alone) / 1e6:.0f}"
            figures = [f"{wall:.1f}", f"{size / wall / 1e9:.2f}", f"{statistics.median(self.ratios[name]):.2f}"]
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
        help="a tree of Megatron-LM or of Megatron Bridge",
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
    torch_alone = run([sys.executable, "-c", "import torch"], log)[1]
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
