"""A model larger than the disk, converted in parts: wall seconds, and the memory of each part's process.

    make bench BENCH='scale --shape 405b --folder /dev/shm/scale'

The source is sparse: it has the sizes of the real model, and in all its zeros a few bytes of its own every --stride.
Each part of the files is planned and written by a process of its own, with the functions of `cptain convert`, and its
zeros are punched out again (`fallocate --dig-holes`), so that the whole checkpoint fits too. In the end torch's own
reader finds the metadata, and --samples of the source's bytes are looked up in the checkpoint by Megatron's layout,
computed here; `cptain verify` compares all of both.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex

HEAD, VOCABULARY, KEY_HEADS = 128, 128256, 8
SHAPES = {"8b": (32, 4096, 14336), "70b": (80, 8192, 28672), "405b": (126, 16384, 53248)}  # layers, hidden, FFN


class Source:
    """The sparse model.

    Args:
        folder: where it goes.
        shape: a key of SHAPES.
        stride: bytes from one mark to the next.
    """

    def __init__(self, folder: Path, shape: str, stride: int) -> None:
        self.folder, self.stride = folder, stride
        self.layers, self.hidden, self.ffn = SHAPES[shape]
        keys = KEY_HEADS * HEAD
        self.layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        self.bytes = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        folder.mkdir(parents=True)
        weight_map = {}
        for number, part in enumerate(self._files()):
            file = f"model-{number + 1:05d}.safetensors"
            self._write(folder / file, part)
            weight_map |= dict.fromkeys(part, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // HEAD,
            "num_key_value_heads": KEY_HEADS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "vocab_size": VOCABULARY,
        }
        (folder / "config.json").write_text(json.dumps(config))

    def _files(self) -> Iterator[dict[str, tuple[int, ...]]]:
        for number in range(self.layers):
            yield {f"model.layers.{number}.{name}.weight": shape for name, shape in self.layer.items()}
        yield {
            **dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCABULARY, self.hidden)),
            "model.norm.weight": (self.hidden,),
        }

    def _write(self, file: Path, tensors: dict[str, tuple[int, ...]]) -> None:
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        with open(file, "wb") as raw:
            raw.write(struct.pack("<Q", len(encoded)) + encoded)
            raw.truncate(8 + len(encoded) + end)
            for name, shape in tensors.items():
                for value in self.marked(name, shape):
                    raw.seek(8 + len(encoded) + header[name]["data_offsets"][0] + 2 * value)
                    raw.write(self.mark(name, value))
        self.shapes |= tensors
        self.bytes += end

    def marked(self, name: str, shape: tuple[int, ...]) -> range:
        """The values of a tensor, counted row by row, that are not zero."""
        first = random.Random(name).randrange(min(math.prod(shape), self.stride // 2))
        return range(first, math.prod(shape), self.stride // 2)

    def mark(self, name: str, value: int) -> bytes:
        """The two bytes of a marked value: a bf16 between 2^-8 and 2^-6."""
        return struct.pack("<H", random.Random(f"{name} {value}").getrandbits(16) & 0x80FF | 0x3B80)

    def place(self, name: str, row: int) -> tuple[str, int, int]:
        """Where Megatron has a row: key, layer, and row of the layer."""
        if not name.startswith("model.layers."):
            ends = {
                "model.embed_tokens.weight": "embedding.word_embeddings.weight",
                "model.norm.weight": "decoder.final_layernorm.weight",
                "lm_head.weight": "output_layer.weight",
            }
            return ends[name], 0, row
        _, _, layer, *middle, _ = name.split(".")
        kind, of_group = middle[-1], self.hidden // HEAD // KEY_HEADS
        head, channel = divmod(row, HEAD)
        attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
        qkv = f"{attention}.linear_qkv.weight"
        group = (head // of_group if kind == "q_proj" else head) * (of_group + 2)
        key, place = {
            "q_proj": (qkv, (group + head % of_group) * HEAD + channel),
            "k_proj": (qkv, (group + of_group) * HEAD + channel),
            "v_proj": (qkv, (group + of_group + 1) * HEAD + channel),
            "o_proj": (f"{attention}.linear_proj.weight", row),
            "gate_proj": (f"{mlp}.linear_fc1.weight", row),
            "up_proj": (f"{mlp}.linear_fc1.weight", self.ffn + row),
            "down_proj": (f"{mlp}.linear_fc2.weight", row),
            "input_layernorm": (f"{attention}.linear_qkv.layer_norm_weight", row),
            "post_attention_layernorm": (f"{mlp}.linear_fc1.layer_norm_weight", row),
        }[kind]
        return key, int(layer), place


def check(source: Source, release: Path, samples: int) -> int:
    """Look marks up in the checkpoint with torch's own reader; gives how many were right, which must be all."""
    metadata = FileSystemReader(release).read_metadata()
    names, dice = sorted(source.shapes), random.Random(0)
    for number in range(samples):
        name = dice.choice(names)
        shape = source.shapes[name]
        value = dice.choice(source.marked(name, shape))
        columns = math.prod(shape[1:])
        key, layer, row = source.place(name, value // columns)
        at = (layer, row) if key.startswith("decoder.layers.") else (row,)
        at += (value % columns,) if len(shape) == 2 else ()
        chunk = next(
            chunk
            for chunk in metadata.state_dict_metadata[key].chunks
            if all(
                begin <= place < begin + size for begin, size, place in zip(chunk.offsets, chunk.sizes, at, strict=True)
            )
        )
        stored = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        with open(release / stored.relative_path, "rb") as raw:
            raw.seek(stored.offset)
            tensor = torch.load(io.BytesIO(raw.read(stored.length)), weights_only=True)
        found = tensor[tuple(place - begin for place, begin in zip(at, chunk.offsets, strict=True))]
        expected = torch.from_numpy(np.frombuffer(source.mark(name, value), np.int16).copy()).view(torch.bfloat16)
        if found != expected[0]:
            sys.exit(f"sample {number}: {name}: value {value}: {found} in {key} at {at}, where {expected[0]} was due")
    return samples


# Writes part I of N of the checkpoint's files; the last makes the folder a checkpoint.
PART = """
import sys
from pathlib import Path
from cptain.checkpoint.convert import complete, plan
from cptain.checkpoint.release import source_of
from cptain.checkpoint.safetensors_folder import SafetensorsReader
from cptain.checkpoint.streaming import write_files
from cptain.checkpoint.tracker import RELEASE, write_tracker
from cptain.model.architecture import read_architecture

model, root, (part, parts, workers) = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
release, architecture = root / RELEASE, read_architecture(model)
release.mkdir(parents=True, exist_ok=True)
with SafetensorsReader(model) as reader:
    writer = plan(reader, architecture)
    total, before, files = sum(file.bytes for file in writer.files), 0, []
    for file in writer.files:
        if (2 * before + file.bytes) * parts // (2 * total) == part - 1:
            files.append(file)
        before += file.bytes
    write_files(release, files, workers, lambda count, name: None)
    if part == parts:
        complete(release, writer, source_of(model, reader), architecture)
        write_tracker(root, None)
"""

# Run by a small process between: to Linux, what a process was before it became another program counts too.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def run(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a process that must succeed."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURED, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}:\n{done.stderr[-2000:]}")
    return time.monotonic() - began, int(done.stdout) * 1024


def main() -> None:
    """Measure, and print a row in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="70b")
    parser.add_argument("--parts", type=int, help="default: of 5 GB")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--stride", type=int, default=4 << 20)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/scale"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    source = Source(folder / "model", arguments.shape, arguments.stride)
    parts = arguments.parts or -(-source.bytes // 5_000_000_000)
    root, workers = folder / "megatron", str(arguments.workers)
    alone = run([sys.executable, "-c", "import torch"])[1]
    walls, peaks, punched = [], [], set()
    for number in range(1, parts + 1):
        part = [str(source.folder), str(root), str(number), str(parts), workers]
        wall, peak = run([sys.executable, "-c", PART, *part])
        walls.append(wall)
        peaks.append(peak)
        for file in {*root.rglob("*.distcp")} - punched:
            subprocess.run(["fallocate", "--dig-holes", file], check=True)
            punched.add(file)
    checked = check(source, root / "release", arguments.samples)
    wall, peak = run([sys.executable, "-m", "cptain", "verify", str(source.folder), str(root), "--workers", workers])
    print(
        "| model | GB | parts | wall s | GB/s | peak MB above import torch | samples right | verify s | its peak MB |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    above, its = ((one - alone) / 1e6 for one in (max(peaks), peak))
    print(
        f"| {arguments.shape} | {source.bytes / 1e9:.0f} | {parts} | {sum(walls):.0f} | "
        f"{source.bytes / sum(walls) / 1e9:.2f} | {min(peaks) / 1e6 - alone / 1e6:.0f} to {above:.0f} | {checked} | "
        f"{wall:.0f} | {its:.0f} |"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
