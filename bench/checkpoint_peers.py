"""The peers of `bench/checkpoint.py`: with what commands each converts a Hugging Face model, and exports it again.

A peer is a tree of Megatron-LM that still has a Hugging Face loader for tools/checkpoint/convert.py, of Megatron Bridge
with its submodule, of mbridge or of ms-swift's mcore-bridge; the last two also need megatron-core installed. All run on
the CPU in one process, with Megatron's own layers in the place of Transformer Engine's, where cptain's own
`megatron/cpu.py` answers for CUDA.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

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


def revision(tree: Path) -> str:
    """The commit of a tree, if it is one."""
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "?"


def megatron_lm(convert: Path, source: Path, megatron: Path, exported: Path) -> dict[str, list[str]]:
    """What convert.py is called with, by the row's name: the model to Megatron's legacy format, and that to a model."""
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    command = ["-c", MEGATRON_LM, str(convert), "--model-type", "GPT"]
    there = "--loader llama_mistral --model-size llama3 --checkpoint-type hf --bf16 --saver mcore "
    there += f"--saver-transformer-impl local --target-pipeline-parallel-size {2 - layers % 2} --tokenizer-model"
    back = "--loader core --loader-transformer-impl local --saver llama3_hf --hf-tokenizer-path"
    return {
        call: [*command, *options.split(), str(source), "--load-dir", str(read), "--save-dir", str(written)]
        for call, options, read, written in (
            ("convert.py", there, source, megatron),
            ("convert.py, back", back, megatron, exported),
        )
    }


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
    paths, tools, files = [HERE.parent / "apps"], tree / "tools" / "checkpoint", [source, megatron, exported]
    if (tree / "src" / "megatron" / "bridge").is_dir():
        paths += [tree / "src", tree / "3rdparty" / "Megatron-LM"]
        calls = {
            f"AutoBridge.{call}": ["-c", BRIDGE, call, *map(str, files)] for call in ("import_ckpt", "export_ckpt")
        }
    elif (tools / "loader_llama_mistral.py").exists():
        paths += [tree, tools]
        calls = megatron_lm(tools / "convert.py", *files)
    elif (tree / "src" / "mcore_bridge").is_dir() or (tree / "mbridge" / "core").is_dir():
        paths += [tree / "src", tree]
        kind = "mbridge" if (tree / "mbridge").is_dir() else "mcore-bridge"
        calls = {
            row: [str(HERE / "bridges.py"), kind, call, *map(str, files)]
            for call, row in (("there", "load_weights and save"), ("back", "load and save_weights"))
        }
    else:
        sys.exit(f"{tree}: a tree of no known peer; Megatron-LM needs tools/checkpoint/loader_llama_mistral.py")
    start = ["env", f"PYTHONPATH={os.pathsep.join(map(str, paths))}", "CUDA_VISIBLE_DEVICES=", python or sys.executable]
    return [
        (f"{call}, {name} ({revision(tree)})", [*start, *command], written)
        for (call, command), written in zip(calls.items(), (megatron, exported), strict=True)
    ]
