"""What the lab's fork's tools/checkpoint/convert.py writes for tensor and pipeline parallel size 2, recorded.

The recording has every key, shape and CRC-32 of what the real tool made of the model below (docs/checks.md); here the
same is written again, and read.
"""

import argparse
import json
import shutil
import zlib
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROJECT, RunFileMaker, cptain
from cptain.checkpoint.mapping import model_order
from cptain.checkpoint.tracker import write_tracker
from cptain.model.architecture import read_architecture
from cptain.run_file import load_run
from safetensors.torch import save_file

RECORDED: dict[str, Any] = json.loads(
    (PROJECT / "tests" / "recordings" / "legacy" / "convert-tp2-pp2.json").read_text(encoding="utf-8")
)
LAYERS, HEADS, GROUPS = 4, 4, 2


@pytest.fixture
def converted(model: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The model that the tool converted: of every tensor, the bits follow from its place among the names."""
    folder = Path(shutil.copytree(model, tmp_path / "converted"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    architecture, tensors = read_architecture(folder), {}
    shapes = {
        name: shape
        for rule, layer in model_order(architecture)
        for name, shape in zip(rule.hf_names(layer), rule.hf_shapes(architecture), strict=True)
    }
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        bits = (torch.arange(prod(shape), dtype=torch.int32) * 7 + number * 1009) % 0x3F80  # positive and finite
        tensors[name] = bits.to(torch.int16).view(torch.bfloat16).reshape(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, tensors


def of_rank(tensors: dict[str, torch.Tensor], key: str, rank: int, stage: int) -> torch.Tensor:
    """A tensor of one rank's file, cut as Megatron cuts it."""
    if key.startswith(("embedding.", "output_layer.")):
        whole = tensors["model.embed_tokens.weight" if key.startswith("embedding.") else "lm_head.weight"]
        padding = whole[-1:].expand(512 - len(whole), -1)  # the tool repeats the last row
        return torch.cat([whole, padding]).chunk(2)[rank]
    if key == "decoder.final_layernorm.weight":
        return tensors["model.norm.weight"]
    _, _, layer, rest = key.split(".", 3)
    of_layer = f"model.layers.{int(layer) + stage * LAYERS // 2}."
    names = {
        "input_layernorm.weight": "input_layernorm",
        "pre_mlp_layernorm.weight": "post_attention_layernorm",
        "self_attention.linear_proj.weight": "self_attn.o_proj",
        "mlp.linear_fc2.weight": "mlp.down_proj",
    }
    if rest in names:
        found = tensors[f"{of_layer}{names[rest]}.weight"]
        return found if found.dim() == 1 else found.chunk(2, dim=1)[rank]
    if rest == "mlp.linear_fc1.weight":
        return torch.cat([tensors[f"{of_layer}mlp.{one}_proj.weight"].chunk(2)[rank] for one in ("gate", "up")])
    query, key_, value = (tensors[f"{of_layer}self_attn.{one}_proj.weight"].chunk(GROUPS)[rank] for one in "qkv")
    return torch.cat([query, key_, value])  # each rank has one query group


def test_what_the_fork_s_convert_wrote_is_read_and_exported_bit_for_bit(
    converted: tuple[Path, dict[str, torch.Tensor]], make_run: RunFileMaker
) -> None:
    folder, tensors = converted
    file = make_run(model__hf=str(folder))
    root = load_run(file).checkpoints_folder
    for name, recorded in RECORDED["ranks"].items():
        rank, stage = (int(number) for number in name.removeprefix("mp_rank_").split("_"))
        state: dict[str, Any] = {}
        for key, described in recorded.items():
            state[key] = None
            if described:
                state[key] = of_rank(tensors, key, rank, stage).contiguous()
                crc = zlib.crc32(state[key].view(torch.uint8).numpy())
                assert [list(state[key].shape), crc] == described, (name, key)
        saved = dict.fromkeys(RECORDED["keys"]) | {"checkpoint_version": 3.0, "iteration": 1, "model": state}
        (root / "iter_0000001" / name).mkdir(parents=True)
        saved["args"] = argparse.Namespace(**RECORDED["args"])
        torch.save(saved, root / "iter_0000001" / name / "model_optim_rng.pt")
    write_tracker(root, 1)
    result = cptain("verify", root, folder)
    assert result.exit_code == 0, result.output
    assert "39 of 39 tensors bit-equal" in result.output
    assert cptain("export", file).exit_code == 0
    assert cptain("verify", load_run(file).hf_folder / "iter_0000001", folder).exit_code == 0
