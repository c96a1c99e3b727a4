"""Legacy torch checkpoints: those that the real Megatron saves, in parts, and damaged or hostile ones."""

import argparse
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, cptain, write_run_file
from cptain.checkpoint.legacy import LegacyReader
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import write_tracker
from cptain.checkpoint.verify import compare_tensors, tensors
from cptain.errors import CptainError
from cptain.run_file import load_run

EMBEDDING = "embedding.word_embeddings.weight"
RANK = "mp_rank_01_001/model_optim_rng.pt"


# In a process of its own: these pickles name classes of Megatron's, which is imported to load them.
SAY_ITERATION_1 = """
import sys, torch
from cptain.megatron.importing import before_import
before_import(cpu=True)
for file in sys.argv[1:]:
    torch.save({**torch.load(file, weights_only=False), "iteration": 1}, file)
"""


@pytest.fixture(scope="module")
def legacy_run(
    tmp_path_factory: pytest.TempPathFactory, model: Path, run_content: dict[str, Any], ready_run: Path
) -> Path:
    """A run file whose checkpoint Megatron saved in its legacy format, cut in four."""
    shared = ready_run.parent / "runs" / "run"
    changes = {"data.output": str(shared / "data"), "model.megatron": str(shared / "megatron"), "train.steps": 1}
    changes |= {"train.warmup_steps": 0, "parallel.tensor": 2, "parallel.pipeline": 2}
    file = write_run_file(tmp_path_factory.mktemp("legacy"), run_content, changes)
    target = file.parent / "converted"
    words = ["--ckpt-convert-format", "torch", "--ckpt-convert-save", str(target)]
    result = cptain("train", file, "--cpu", "--set", f"train.megatron_args={json.dumps(words)}")
    assert "Megatron gave up before the first step" in result.output  # it saves what it loaded, and ends
    checkpoints = load_run(file).checkpoints_folder
    checkpoints.mkdir(exist_ok=True)
    (target / "torch" / "iter_0000000").rename(checkpoints / "iter_0000001")
    parts = map(str, checkpoints.glob("iter_0000001/*/*.pt"))
    subprocess.run([sys.executable, "-c", SAY_ITERATION_1, *parts], check=True)
    write_tracker(checkpoints, 1)
    return file


def read(
    reader: TorchDistReader | LegacyReader, key: str, first: int = 0, stop: int | None = None, layer: int | None = None
) -> torch.Tensor:
    """Rows of a tensor, or of one layer of it; all of them unless told."""
    shape = reader.shape(key)[0 if layer is None else 1 :]
    rows = torch.empty(((shape[0] if stop is None else stop) - first, *shape[1:]), dtype=reader.dtype(key))
    reader.read(key, () if layer is None else (layer,), first, first + len(rows), rows.view(-1).view(torch.uint8))
    return rows


def test_what_megatron_saved_in_four_parts_is_the_model_bit_for_bit(legacy_run: Path, model: Path) -> None:
    root = load_run(legacy_run).checkpoints_folder
    assert sorted(path.name for path in (root / "iter_0000001").iterdir()) == [
        f"mp_rank_0{tensor}_00{pipeline}" for tensor in (0, 1) for pipeline in (0, 1)
    ]
    result = cptain("verify", root, model)
    assert result.exit_code == 0, result.output
    assert "21 of 21 tensors bit-equal" in result.output


def test_a_legacy_checkpoint_is_exported_and_the_export_converts_to_torch_dist(
    legacy_run: Path, model: Path, make_run: RunFileMaker
) -> None:
    assert " → " in cptain("export", legacy_run).output
    assert "is done: it is what would be written" in cptain("export", legacy_run).output
    exported = load_run(legacy_run).hf_folder / "iter_0000001"
    assert cptain("verify", exported, model).exit_code == 0
    file = make_run(model__hf=str(exported))
    assert cptain("convert", file).exit_code == 0
    assert cptain("verify", load_run(file).megatron_folder, model).exit_code == 0


def test_legacy_and_torch_dist_checkpoints_are_compared_under_megatrons_names(
    legacy_run: Path, ready_run: Path
) -> None:
    release, legacy = load_run(ready_run).megatron_folder / "release", load_run(legacy_run).checkpoints_folder
    with TorchDistReader(release) as a, LegacyReader(legacy / "iter_0000001") as b:
        rows = {row.name: row for row in compare_tensors(tensors(a), tensors(b))}
        for first, stop in ((200, 300), (255, 256), (256, 257)):  # each tensor-parallel rank has 256 rows
            assert read(b, EMBEDDING, first, stop).equal(read(a, EMBEDDING, first, stop))
    assert [name for name, row in rows.items() if not row.equal] == [EMBEDDING, "output_layer.weight"]
    assert rows["output_layer.weight"].shape == "[500, 64] ≠ [512, 64]"


def test_any_rows_of_any_layer_are_read_from_the_ranks_that_have_them(legacy_run: Path, ready_run: Path) -> None:
    release, legacy = load_run(ready_run).megatron_folder / "release", load_run(legacy_run).checkpoints_folder
    with TorchDistReader(release) as a, LegacyReader(legacy / "iter_0000001") as b:
        layered = [key for key in a.names() if key.startswith("decoder.layers.")]
        assert len(layered) == 6
        for key in layered:
            height = a.shape(key)[1]
            for first, stop in ((0, 1), (height // 4 - 1, height // 4 + 1), (1, height - 1), (height - 1, height)):
                for layer in range(2):
                    assert read(b, key, first, stop, layer).equal(read(a, key, first, stop, layer)), (key, first)


def save_one_rank(folder: Path, content: Any, rank: int = 0) -> None:
    """Save what one tensor-parallel rank has."""
    (folder / f"mp_rank_0{rank}").mkdir(parents=True)
    torch.save(content, folder / f"mp_rank_0{rank}" / "model_optim_rng.pt")


def test_fused_names_extra_states_and_views_of_one_buffer_are_read(
    ready_run: Path, model: Path, tmp_path: Path
) -> None:
    """As Transformer Engine's layers under the distributed optimizer have them."""
    older = io.BytesIO()
    torch.save(None, older)
    state: dict[str, Any] = {"decoder.layers.0.mlp.linear_fc1._extra_state": older}
    state["decoder.layers.0.mlp.linear_fc2._extra_state"] = torch.empty(0, dtype=torch.uint8)
    with TorchDistReader(load_run(ready_run).megatron_folder / "release") as reader:
        for key in reader.names():
            tensor = read(reader, key)
            buffer = torch.cat([torch.zeros(7), tensor.flatten()])
            tensor = buffer[7:].view(tensor.shape)
            if key.startswith("decoder.layers."):
                rest = key.removeprefix("decoder.layers.")
                state |= {f"decoder.layers.{layer}.{rest}": one for layer, one in enumerate(tensor)}
            else:
                state[key] = torch.nn.Parameter(tensor)
    save_one_rank(tmp_path / "release", {"checkpoint_version": 3.0, "model": state})
    write_tracker(tmp_path, None)
    result = cptain("verify", tmp_path, model)
    assert result.exit_code == 0, result.output


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / name) if "." not in name else (folder / name).unlink()


def truncate(folder: Path) -> None:
    os.truncate(folder / RANK, os.path.getsize(folder / RANK) // 2)


def cut_otherwise(folder: Path) -> None:
    for name in ("mp_rank_00_001", "mp_rank_01_001"):
        shutil.rmtree(folder / name)


def make_hostile(folder: Path) -> None:
    """Replace the pickle of one rank's archive by one that creates a file when it is loaded."""

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch '{folder}/ran'",)

    with zipfile.ZipFile(folder / RANK) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / RANK, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(Runs()) if name.endswith("/data.pkl") else content)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (remove("mp_rank_01_001"), "it has no mp_rank of tensor rank 1, pipeline rank 1: incomplete"),
        (remove(RANK), f"{RANK}: missing: the checkpoint is incomplete"),
        (truncate, f"{RANK}: cannot be read: "),
        (cut_otherwise, "cannot be read: pipeline parallel size 2, where there are folders for 1"),
        (make_hostile, f"{RANK}: cannot be read: it asks for posix.system, which a checkpoint does not need"),
        (lambda folder: (folder / "mp_rank_00_000_000").mkdir(), "expert parallel checkpoints are not read"),
    ],
)
def test_a_damaged_or_hostile_legacy_checkpoint_is_refused_and_runs_nothing(
    legacy_run: Path, model: Path, tmp_path: Path, edit: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "iter_0000001"
    shutil.copytree(load_run(legacy_run).checkpoints_folder / "iter_0000001", folder)
    edit(folder)
    result = cptain("verify", folder, model)
    assert result.exit_code == 1
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], 'it has no "model"'),
        ({"model0": {}, "model1": {}}, "virtual pipeline stages are not read"),
        ({"model": {"language_model": {}}}, "it is of a model from before megatron.core (language_model)"),
        ({"model": {}}, "it holds no tensors of a model"),
        (
            {"model": {"decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight": torch.zeros(2, 3)}},
            "a mixture of experts is read from torch_dist alone",
        ),
        ({"model": {"output_layer.weight": 1}}, "'output_layer.weight': not a tensor"),
        ({"model": {"a\nb": torch.zeros(2)}}, r"'a\nb': not a tensor"),
        ({"model": {"output_layer.weight": torch.zeros(0, 3)}}, "output_layer.weight: a part of shape [0, 3]"),
        ({"model": {"output_layer.weight": torch.zeros(2, 3).t()}}, "a tensor of [3, 2] that is not contiguous"),
        (
            {"model": {f"decoder.layers.{layer}.input_layernorm.weight": torch.zeros(2) for layer in (0, 2)}},
            "linear_qkv.layer_norm_weight: 2 of 3 layers have it",
        ),
        (
            {"model": {"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(2)}},
            "decoder.layers.mlp.linear_fc2.weight: a part of shape [2]",
        ),
        ({"model": {}, "args": argparse.Namespace(swiglu=False)}, "its MLP is not gated"),
    ],
)
def test_what_is_no_model_of_megatron_core_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    save_one_rank(tmp_path, content)
    with pytest.raises(CptainError, match=re.escape(message)):
        LegacyReader(tmp_path)


def test_ranks_that_should_have_the_same_norm_and_do_not_are_refused(tmp_path: Path) -> None:
    norm = "decoder.final_layernorm.weight"
    for rank in range(2):
        save_one_rank(tmp_path, {"model": {norm: torch.full((4,), 1.0 + rank)}}, rank)
    with (
        LegacyReader(tmp_path) as reader,
        pytest.raises(CptainError, match=f"{norm}: the tensor-parallel ranks differ"),
    ):
        read(reader, norm)


def test_logits_of_a_legacy_checkpoint_are_refused(legacy_run: Path, model: Path) -> None:
    result = cptain("verify", model, load_run(legacy_run).checkpoints_folder, "--logits")
    assert result.exit_code == 1
    assert "--logits: not of a legacy torch checkpoint" in result.output
