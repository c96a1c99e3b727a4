"""Models and checkpoints that convert and export refuse, before anything is written."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain
from cptain.model.architecture import read_architecture
from cptain.run_file import load_run
from safetensors.torch import load_file, save_file
from test_checkpoint import last_line, rewrite


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            'architectures = ["GemmaForCausalLM"]: not supported: supported: LlamaForCausalLM',
        ),
        ({"vocab_size": -1}, "vocab_size = -1: not supported: must be over 0"),
        ({"quantization_config": {"bits": 4}}, 'quantization_config = {"bits": 4}: not supported: only null'),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu": not supported: only "silu"'),
        ({"attention_bias": True}, "attention_bias = true: not supported: only false"),
        (
            {"rope_parameters.low_freq_factor": 2.0},
            "rope_scaling.low_freq_factor = 2.0: not supported: Megatron hard-codes 1",
        ),
        ({"rope_parameters.original_max_position_embeddings": 4096}, "= 4096: not supported: Megatron hard-codes 8192"),
        ({"rope_parameters.rope_type": "yarn"}, 'rope_scaling.rope_type = "yarn": not supported: Megatron knows'),
        ({"num_hidden_layers": "two"}, "config.json: a value has the wrong type: invalid literal for int()"),
    ],
)
def test_a_config_that_megatron_cannot_represent_is_refused_by_name(
    make_model_run: Any, changes: dict[str, Any], message: str
) -> None:
    result = cptain("convert", make_model_run(changes))
    assert result.exit_code == 1
    assert last_line(result.output).startswith("cptain: ")
    assert message in last_line(result.output)


def test_a_config_of_transformers_4_reads_like_one_of_5(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_architecture(tmp_path) == read_architecture(model)
    assert read_architecture(model).rotary_base == 500000
    assert read_architecture(model).rope_scaling_factor == 8


def reshard(folder: Path) -> None:
    """Split model.safetensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:10], names[10:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def lose_a_shard(folder: Path) -> None:
    reshard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def escape_the_folder(folder: Path) -> None:
    reshard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "../../etc/passwd"))


def cut(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize(folder / "model.safetensors") - 100)


def lie_about_the_header(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.write(struct.pack("<Q", 1 << 60))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "no model.safetensors and no model.safetensors.index.json in it",
        ),
        (lambda folder: (folder / "config.json").unlink(), "not a Hugging Face model: it has no config.json"),
        (lambda folder: shutil.rmtree(folder), "no such model folder"),
        (lose_a_shard, "model-00002-of-00002.safetensors: missing, and model.safetensors.index.json names it"),
        (escape_the_folder, "../../etc/passwd: a shard must lie beside its index"),
        (cut, "model.safetensors: not a valid safetensors file: truncated: "),
        (lie_about_the_header, "model.safetensors: not a valid safetensors file: its header claims "),
        (
            rewrite(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(63)})),
            "model.norm.weight: shape [63] where config.json needs [64]",
        ),
        (
            rewrite(lambda tensors: tensors.__delitem__("lm_head.weight")),
            "lm_head.weight: missing, and config.json needs it",
        ),
        (
            rewrite(lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)})),
            "model.layers.0.self_attn.q_proj.bias: a tensor that 21 known ones do not include",
        ),
        (
            rewrite(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)})),
            "model.norm.weight is I64, supported: F32, F16, BF16",
        ),
    ],
)
def test_a_damaged_model_is_refused_before_anything_is_written(
    make_model_run: Any, edit: Callable[[Path], None], message: str
) -> None:
    file = make_model_run(edit=edit)
    result = cptain("convert", file)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert message in result.output
    assert not load_run(file).megatron_folder.exists()


def test_a_sharded_model_converts_like_a_single_file(make_model_run: Any, model: Path) -> None:
    file = make_model_run(edit=reshard)
    assert cptain("convert", file).exit_code == 0
    assert cptain("verify", model, load_run(file).megatron_folder).exit_code == 0


class Runs:
    """Unpickled, it creates a file: what a hostile checkpoint would do."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.file}'",)


def test_a_checkpoint_that_runs_code_when_loaded_is_refused_and_runs_nothing(
    make_ready_run: RunFileMaker, tmp_path: Path
) -> None:
    file = make_ready_run()
    as_if_trained(file)
    folder = load_run(file).checkpoints_folder / "iter_0000001"
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    result = cptain("export", file)
    assert result.exit_code == 1
    assert (
        f"{folder}/.metadata: cannot be read: it asks for posix.system, which a checkpoint does not need"
        in result.output
    )
    assert not (tmp_path / "ran").exists()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(folder: Path) -> None:
    with open(folder / "__0_0.distcp", "r+b") as file:
        file.truncate(os.path.getsize(folder / "__0_0.distcp") // 2)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("metadata.json"), "iter_0000001: not a complete torch_dist checkpoint: it has no metadata.json"),
        (remove(".metadata"), "iter_0000001: not a complete torch_dist checkpoint: it has no .metadata"),
        (remove("__0_0.distcp"), "__0_0.distcp: missing, and .metadata needs it: the checkpoint is incomplete"),
        (truncate, "__0_0.distcp: truncated: "),
        (lambda folder: (folder / ".metadata").write_bytes(b"rubbish"), ".metadata: cannot be read: "),
        (lambda folder: (folder / ".metadata").write_bytes(b""), ".metadata: cannot be read: "),
        (shutil.rmtree, "iter_0000001: no such checkpoint (there: none)"),
        (
            lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").write_text("soon"),
            'latest_checkpointed_iteration.txt: must hold "release" or an iteration: ',
        ),
        (
            lambda folder: (folder.parent / "latest_checkpointed_iteration.txt").unlink(),
            "latest_checkpointed_iteration.txt: missing: there is no checkpoint in ",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_refused_before_anything_is_written(
    make_ready_run: RunFileMaker, edit: Callable[[Path], None], message: str
) -> None:
    file = make_ready_run()
    exported = as_if_trained(file)
    edit(load_run(file).checkpoints_folder / "iter_0000001")
    result = cptain("export", file)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not exported.exists()


def test_a_checkpoint_of_another_model_is_refused(make_ready_run: RunFileMaker, make_model_run: Any) -> None:
    file = make_ready_run()
    as_if_trained(file)
    other = Path(load_run(make_model_run({"intermediate_size": 192})).model.hf)
    result = cptain("export", file, "--set", f"model.hf='{other}'")
    assert result.exit_code == 1
    assert (
        "decoder.layers.mlp.linear_fc1.weight: shape [2, 352, 64] where config.json needs [2, 384, 64]" in result.output
    )
