"""Trained by Megatron-LM from our conversion, exported, and compared: the same run with several trees of Megatron-LM.

    make bench BENCH='trained --steps 50 --megatron fork=TREE --megatron main=TREE'
    make bench BENCH='trained --steps 50 --experts qwen3_moe --expert-parallel 1'
    make bench BENCH='trained --steps 50 --words 300'

The model is a Llama 3.1 of random weights, or a mixture of experts, its vocabulary as it is or with new words; the text
is what every Python carries (`runs/demo.py`). Each Megatron begins from the same converted checkpoint; its last
checkpoint is exported, every tensor of the export compared with it bit by bit, and the logits of transformers with
megatron.core's on the same tokens (`cptain verify --logits`). Without --cpu it trains as runs do: on the GPU, in bf16,
with Transformer Engine.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import tomli_w
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import RunFile, load_run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runs"))
from demo import make_model, make_text

CPTAIN = [sys.executable, "-m", "cptain"]


def run(command: list[str], megatron: str | None) -> None:
    """Run a command that must succeed, with a tree of Megatron-LM or the installed one."""
    paths = [megatron, os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit status {done.returncode}:\n{done.stdout[-3000:]}")


def measure(file: Path, megatron: str | None, cpu: list[str]) -> RunFile:
    """Train, export and verify a run; gives it."""
    for stage in ("preprocess", "convert", "train", "export"):
        run([*CPTAIN, stage, str(file), *(cpu if stage == "train" else [])], megatron)
    described = load_run(file)
    (exported,) = described.hf_folder.iterdir()
    run([*CPTAIN, "verify", str(exported), str(described.checkpoints_folder), "--logits"], None)
    return described


def make_experts(folder: Path, kind: str, sizes: dict[str, int]) -> None:
    """Put a mixture of experts in the place of a model, whose tokenizer stays: 16 experts, of which a token gets 4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    same = {name: config[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    experts = {"num_local_experts": 16, "num_experts_per_tok": 4, "router_aux_loss_coef": 0.01}
    if kind == "qwen3_moe":
        experts |= {"num_experts": 16, "moe_intermediate_size": sizes["intermediate_size"] // 4, "norm_topk_prob": True}
        del experts["num_local_experts"]
    torch.manual_seed(1234)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **same, **experts)).save_pretrained(folder)


def new_words(model: Path, texts: list[str], count: int) -> list[str]:
    """The most frequent words of over five letters that the model's tokenizer has not."""
    known = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    found = Counter(word for text in texts for word in re.findall(r"[A-Za-z]{6,}", text) if word not in known)
    return [word for word, _ in found.most_common(count)]


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", action="append", default=[], metavar="NAME=TREE", help="beside the installed one")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--experts", choices=["qwen3_moe", "mixtral"], help="a mixture of experts of this kind")
    parser.add_argument("--expert-parallel", type=int, default=1, help="parallel.expert")
    parser.add_argument("--words", type=int, default=0, help="so many new tokens ([model.vocabulary])")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/trained"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    heads = max(1, arguments.hidden // 64)
    sizes = {
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 11 // 4,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
    }
    texts = make_text(folder / "text")
    make_model(folder / "model", texts, **sizes)
    if arguments.experts:
        make_experts(folder / "model", arguments.experts, sizes)
    model: dict[str, object] = {"hf": str(folder / "model"), "megatron": str(folder / "megatron")}
    if arguments.words:
        (folder / "words.txt").write_text(
            "\n".join(new_words(folder / "model", texts, arguments.words)), encoding="utf-8"
        )
        model["vocabulary"] = {"add": str(folder / "words.txt")}
    content = {
        "parallel": {"expert": arguments.expert_parallel},
        "work_dir": str(folder),
        "model": model,
        "data": {
            "input": [str(folder / "text" / "**" / "*.jsonl*")],
            "output": str(folder / "data"),
            "split": "95,5,0",
        },
        "train": {
            "seq_length": arguments.seq_length,
            "global_batch_size": 16,
            "steps": arguments.steps,
            "lr": 1e-3,
            "min_lr": 1e-4,
            "warmup_steps": min(5, arguments.steps - 1),
            "precision": "fp32" if arguments.cpu else "bf16",
            "save_interval": arguments.steps,
            "eval_interval": arguments.steps,
        },
    }
    trees: dict[str, str | None] = {"installed": None}
    trees |= dict(tree.split("=", 1) for tree in arguments.megatron)
    print("| Megatron-LM | steps | loss, first → last | tensors bit-equal | logits differ by at most | same argmax |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, tree in trees.items():
        file = folder / f"{name}.toml"
        file.write_text(tomli_w.dumps({"name": name, **content}))
        described = measure(file, tree, ["--cpu"] if arguments.cpu else [])
        steps = read_steps(train_logs(described.logs_folder))
        (record,) = described.hf_folder.glob("*/verify.json")
        verified = json.loads(record.read_text())
        logits = verified["logits"]
        print(
            f"| {name} | {steps[-1].number} | {steps[0].loss:.3f} → {steps[-1].loss:.3f} | "
            f"{verified['equal']} of {verified['tensors']} | {logits['max_abs_difference']:.1e} of "
            f"{logits['max_abs']:.3g} | {logits['same_argmax']} of {logits['tokens']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
