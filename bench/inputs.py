"""What train.py and its kin train: models of random weights, and text that every Python carries.

The weights are written by hand, a file a layer: transformers would hold a whole 8B in fp32 and take minutes.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runs"))
from demo import make_model, make_text

CPTAIN = [sys.executable, "-m", "cptain"]
INSTALLED = "installed"  # the Megatron that is

# Keys of config.json; Llama's where none says otherwise. "tiny" is for a dry run on the CPU.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8b-32k": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "0.3b": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "small": {
        "vocab_size": 4096,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a layer."""
    hidden, ffn, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    sizes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if kind == "qwen2":
        sizes |= {f"self_attn.{name}_proj.bias": sizes[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    if kind == "qwen3":
        sizes |= {f"self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
    return sizes


def write_model(folder: Path, texts: list[str], shape: str, layers: int) -> None:
    """A model in bf16, N(0, 0.02), and a tokenizer of 4,000 entries made of the texts; equal calls, equal models."""
    make_model(folder, texts, hidden_size=64, intermediate_size=64, num_hidden_layers=1)  # its tokenizer is kept
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {**SHAPES[shape], "num_hidden_layers": layers, "dtype": "bfloat16"}
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config["model_type"] != "llama":  # whose scaling it is
        config.pop("rope_scaling", None)
        if "rope_parameters" in config:
            config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(0)
    weight_map = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for name, size in shapes.items():
            if len(size) == 1:
                tensors[name] = torch.full(size, float(name.endswith("weight")), dtype=torch.bfloat16)
            else:
                values = torch.randn(size, generator=random, device=device, dtype=torch.float32)
                tensors[name] = (0.02 * values).to("cpu", torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    table = (config["vocab_size"], config["hidden_size"])
    save("model-embedding.safetensors", {"model.embed_tokens.weight": table})
    head = {} if config.get("tie_word_embeddings") else {"lm_head.weight": table}
    save("model-output.safetensors", {"model.norm.weight": (config["hidden_size"],), **head})
    sizes = layer_shapes(config)
    for number in range(layers):
        layer = {f"model.layers.{number}.{name}": size for name, size in sizes.items()}
        save(f"model-layer-{number:03}.safetensors", layer)
    total = sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_text(folder: Path, megabytes: int) -> list[str]:
    """The demo's text, which is returned, and in library.jsonl Python's standard library, up to so many MB of it."""
    texts = make_text(folder)
    left = megabytes * 1_000_000
    library = Path(sysconfig.get_path("stdlib"))
    with open(folder / "library.jsonl", "w", encoding="utf-8") as lines:
        for file in sorted(library.rglob("*.py")):
            if left <= 0:
                break
            text = file.read_text(encoding="utf-8", errors="ignore")
            left -= len(text)
            lines.write(json.dumps({"text": text}) + "\n")
    return texts


def environment(tree: str | None, gpus: str) -> dict[str, str]:
    """For cptain, with a tree of Megatron-LM before the installed one, and some of the GPUs."""
    paths = [tree, str(Path(__file__).resolve().parent.parent / "apps"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": gpus}


def make_run(
    folder: Path, shape: str, layers: int, megabytes: int, train: dict[str, Any], pair: Path | None = None
) -> Path:
    """Begin an empty folder with model, text, run file, tokenized data and converted checkpoint; gives the run file.

    Args:
        folder: emptied first.
        shape: of `SHAPES`.
        layers: of the model.
        megabytes: of text.
        train: keys of [train].
        pair: a .bin/.idx pair to train on, all of it, in the place of the text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "model", write_text(folder / "text", megabytes), shape, layers)
    # One file: Megatron's own data sets wait for ever on a file too short to have a validation part, as the demo's are.
    data: dict[str, Any] = {"input": [str(folder / "text" / "library.jsonl")], "split": "970,30,0"}
    if pair:
        data = {"tokenized": [str(pair)], "split": "1,0,0", "max_epochs": 1e6}
    content = {
        "name": "bench",
        "work_dir": str(folder),
        "model": {"hf": str(folder / "model"), "megatron": str(folder / "megatron")},
        "data": {**data, "output": str(folder / "data")},
        "train": train,
    }
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(content))
    for stage in ("preprocess", "convert"):
        subprocess.run([*CPTAIN, stage, str(file)], check=True, env=environment(None, ""))
    return file
