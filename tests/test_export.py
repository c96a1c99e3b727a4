"""export: which checkpoints, in which dtype and files, and what stands beside the weights."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain, say_iteration, write_run_file
from cptain.history import Start, write_history
from cptain.model.architecture import read_architecture
from cptain.run_file import load_run
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture
def file(make_ready_run: RunFileMaker) -> Path:
    """A run file whose checkpoints are those of steps 1, 2 and 30, and a broken one of step 3."""
    file = make_ready_run()
    as_if_trained(file, 1, 2, 3, 30)
    (load_run(file).checkpoints_folder / "iter_0000003" / "metadata.json").unlink()
    return file


def exported(file: Path) -> list[str]:
    return sorted(path.name for path in load_run(file).hf_folder.iterdir())


def export(file: Path, *options: object) -> Path:
    """Export step 1, and give its folder."""
    result = cptain("export", file, "--iteration", 1, *options)
    assert result.exit_code == 0, result.output
    return load_run(file).hf_folder / "iter_0000001"


def test_all_exports_every_complete_checkpoint_and_names_the_others(file: Path) -> None:
    result = cptain("export", file, "--iteration", "all")
    assert result.exit_code == 0
    assert exported(file) == ["iter_0000001", "iter_0000002", "iter_0000030"]
    assert f"{load_run(file).checkpoints_folder / 'iter_0000003'}: incomplete, left out" in result.output
    again = cptain("export", file, "--iteration", "all")
    assert again.output.count("is done: it is what would be written") == 3


def test_all_of_nothing_is_one_line(make_run: RunFileMaker) -> None:
    file = make_run()
    result = cptain("export", file, "--iteration", "all")
    assert result.exit_code == 1
    assert result.output == f"cptain: {load_run(file).checkpoints_folder}: no complete checkpoint in it\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_as_torch_rounds_them_and_config_json_says_to_what(
    file: Path, model: Path, dtype: str
) -> None:
    folder = export(file, "--dtype", dtype)
    before, after = load_file(model / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].to(getattr(torch, dtype)), after[name]) for name in before)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype


def test_a_value_that_float16_cannot_hold_is_refused_by_name(file: Path, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = Path(shutil.copytree(model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, other / "model.safetensors")
    options = ("--set", f"model.hf='{other}'", "--set", f"model.megatron='{tmp_path}/megatron'")
    assert cptain("convert", file, *options).exit_code == 0
    shutil.rmtree(load_run(file).checkpoints_folder / "iter_0000001")
    folder = shutil.copytree(tmp_path / "megatron" / "release", load_run(file).checkpoints_folder / "iter_0000001")
    say_iteration(folder / "common.pt", 1)
    result = cptain("export", file, "--iteration", 1, "--dtype", "float16", *options)
    assert result.exit_code == 1
    assert "model.norm.weight: has values that float16 cannot hold" in result.output
    assert exported(file) == []
    assert cptain("export", file, "--iteration", 1, "--dtype", "bfloat16", *options).exit_code == 0


def test_files_of_weights_have_the_size_asked_for_and_a_loader_finds_each_tensor_by_the_index(file: Path) -> None:
    folder = export(file, "--shard-size", "0.2MB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert {path.name for path in folder.glob("*.safetensors")} == set(weight_map.values())
    for shard in set(weight_map.values()):
        with safe_open(folder / shard, "pt") as opened:
            assert {name for name, where in weight_map.items() if where == shard} == set(opened.keys())
    assert cptain("verify", folder, load_run(file).checkpoints_folder / "iter_0000001").exit_code == 0


@pytest.mark.parametrize("size", ["5", "GB", "0GB", "-1GB", "5XB", "5 000MB"])
def test_a_size_that_makes_no_sense_is_bad_usage(file: Path, size: str) -> None:
    result = cptain("export", file, "--shard-size", size)
    assert result.exit_code == 2
    assert "allowed: a number with MB, GB or TB, such as 5GB" in result.output


def test_other_options_or_a_damaged_export_are_exported_again(file: Path) -> None:
    def says(*options: object) -> bool:
        result = cptain("export", file, "--iteration", 1, *options)
        assert result.exit_code == 0
        return "is done: it is what would be written" in result.output

    assert not says()
    assert says()
    assert not says("--dtype", "bfloat16")
    assert not says("--dtype", "float16")  # as large as bfloat16
    assert says("--dtype", "float16")
    assert not says("--shard-size", "0.2MB")
    assert says("--shard-size", "0.2MB")
    folder = load_run(file).hf_folder / "iter_0000001"
    next(folder.glob("model-00002*")).unlink()
    assert not says("--shard-size", "0.2MB")
    (folder / "config.json").write_text("{}")
    assert not says("--shard-size", "0.2MB")
    assert cptain("verify", folder, load_run(file).checkpoints_folder / "iter_0000001").exit_code == 0


@pytest.mark.parametrize("words", [4, 5])
def test_config_json_says_the_rotation_and_the_dtype_in_the_words_of_both_versions_of_transformers(
    file: Path, model: Path, tmp_path: Path, words: int
) -> None:
    from transformers import AutoConfig

    base = Path(shutil.copytree(model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    rotation = (
        {"rope_theta": theta, "rope_scaling": rope}
        if words == 4
        else {"rope_parameters": {**rope, "rope_theta": theta}}
    )
    (base / "config.json").write_text(json.dumps({**config, **rotation}))
    folder = export(file, "--set", f"model.hf='{base}'")
    written = json.loads((folder / "config.json").read_text())
    assert theta == 500000.0
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta
    assert written["rope_scaling"] == rope
    assert written["rope_parameters"] == {**rope, "rope_theta": theta}
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert read_architecture(folder) == read_architecture(model)
    assert AutoConfig.from_pretrained(folder).rope_parameters == AutoConfig.from_pretrained(model).rope_parameters


def test_the_model_card_says_what_the_model_was_made_from_and_how(own_trained_run: Path) -> None:
    assert cptain("export", own_trained_run).exit_code == 0
    folder = load_run(own_trained_run).hf_folder / "iter_0000008"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "base_model" not in card.data.to_dict()
    assert "/" not in card.text  # no path of this machine
    for row in (
        "| architecture | LlamaForCausalLM |",
        "| steps | 8 of 8 |",
        "| tokens seen | 4.1k (4,096) |",
        "| global batch size | 8 sequences |",
        "| learning rate | 0.001, cosine to 0.0001, 1 steps of warm-up |",
        f"| software | Megatron-LM {version('megatron-core')}, cptain {version('cptain')}, torch {version('torch')}, ",
    ):
        assert row in card.text, card.text
    assert card.text.strip().startswith(
        "# run\n\nmodel after continual pre-training with Megatron-LM: the checkpoint of step 8"
    )


def test_the_model_card_names_the_base_on_the_hub_and_keeps_its_licence(
    file: Path, model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "hub" / "models--an-owner--A-Model-8B" / "snapshots" / "0123"
    shutil.copytree(model, base)
    (base / "README.md").write_text("---\nlicense: llama3.1\nlanguage: [ja, en]\nwidget: [x]\n---\nThe base.")
    for name in ("LICENSE", "USE_POLICY.md", "chat_template.jinja"):
        (base / name).write_text(name)
    run = load_run(file)
    trained = run.model_dump(mode="json")
    trained["train"]["megatron_args"] = ["--x", "/secret/path"]
    layout = {"processes": 1, "nodes": 1, "tensor": 1, "pipeline": 1, "context": 1}
    write_history(run.folder, [Start("", 0, 8, trained, {}, layout, {}, last=1)])
    folder = export(file, "--set", f"model.hf='{base}'")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "an-owner/A-Model-8B"
    assert card.data.license == "llama3.1"
    assert card.data.language == ["ja", "en"]
    assert "widget" not in card.data.to_dict()
    assert "The base." not in card.text
    assert "/secret" not in card.text
    assert "| other Megatron arguments | `--x` `…` |" in card.text
    for name in ("LICENSE", "USE_POLICY.md", "chat_template.jinja"):
        assert (folder / name).read_text() == name


def test_nothing_of_the_base_comes_along_that_is_secret_or_of_its_own_weights(
    file: Path, model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    others = (".env", "trainer_state.json", "optimizer.pt", "tf_model.h5", "model.onnx", "verify.json", "x.index.json")
    for name in others:
        (base / name).write_text(name)
    folder = export(file, "--set", f"model.hf='{base}'")
    assert {path.name for path in folder.iterdir()} == {
        *({path.name for path in model.iterdir()} | {"README.md", "model.safetensors.index.json", "verify.json"})
    }
    (folder / "tokenizer.json").unlink()
    (folder / "README.md").write_text("edited")
    assert " → " in cptain("export", file, "--iteration", 1, "--set", f"model.hf='{base}'").output
    assert (folder / "tokenizer.json").exists()
    assert (folder / "README.md").read_text() == "edited"
    export(file, "--set", f"model.hf='{base}'", "--force")
    assert (folder / "README.md").read_text() != "edited"


def test_all_exports_what_it_can_where_one_checkpoint_is_damaged(file: Path) -> None:
    (load_run(file).checkpoints_folder / "iter_0000002" / ".metadata").unlink()
    result = cptain("export", file, "--iteration", "all")
    assert result.exit_code == 1
    assert exported(file) == ["iter_0000001", "iter_0000030"]
    assert "iter_0000002: not a complete torch_dist checkpoint: it has no .metadata" in result.output
    assert result.output.endswith("cptain: export: 1 of 3 could not be exported\n")


def test_verify_json_names_no_path_of_this_machine_and_a_quick_look_does_not_replace_it(file: Path) -> None:
    folder = export(file)
    checkpoint = load_run(file).checkpoints_folder / "iter_0000001"
    assert cptain("verify", folder, checkpoint).exit_code == 0
    record = json.loads((folder / "verify.json").read_text())
    assert (record["a"], record["b"], record["sample"]) == (".", "../../checkpoints/iter_0000001", False)
    assert cptain("verify", folder, checkpoint, "--sample").exit_code == 0
    assert json.loads((folder / "verify.json").read_text()) == record


def test_a_card_of_the_base_that_cannot_be_read_is_no_obstacle(file: Path, model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "README.md").write_bytes(b"---\n\xff: [\n---\n")
    assert "license" not in ModelCard.load(export(file, "--set", f"model.hf='{base}'") / "README.md").data.to_dict()


def change(name: str, **values: object) -> Callable[[Path], None]:
    """Set keys of a JSON file; None takes one away, and a dot leads into an object."""

    def plant(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        for dotted, value in values.items():
            *path, key = dotted.split("__")
            target = content
            for step in path:
                target = target[step]
            if value is None:
                target.pop(key)
            else:
                target[key] = value
        (folder / name).write_text(json.dumps(content))

    return plant


def swap_two_ids(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    one, other = sorted(vocabulary)[200:202]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def lose_added_tokens(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))


BOTH_ROTATIONS = {"rope_theta": 1e4, "rope_parameters__rope_theta": 1e4}
# What is planted in an export, and what verify says of it: beside the base model, and beside the checkpoint that it was
# made of (None: a checkpoint does not hold it).
FAULTS: dict[str, tuple[Callable[[Path], None], str, str | None]] = {
    "rope_theta, in the words of 4": (change("config.json", rope_theta=1e4), "rope_theta: 10000.0 by", "rope_theta"),
    "rope_theta, in the words of 5": (
        change("config.json", rope_parameters__rope_theta=1e4),
        "10000.0 by rope_parameters",
        "rope_theta",
    ),
    "rope_theta, in both": (change("config.json", **BOTH_ROTATIONS), "rotary_base", "rope"),
    "rope factor": (change("config.json", rope_scaling__factor=9.0), "factor: 9.0 by", "factor"),
    "scaling removed": (change("config.json", rope_scaling=None), "rope_type: default by", "rope_type"),
    "rms_norm_eps": (change("config.json", rms_norm_eps=1e-6), "norm_epsilon: 1e-06 ≠ 1e-05", "eps"),
    "torch_dtype": (change("config.json", torch_dtype="float16"), "dtype", "dtype: float16 and float32"),
    "dtype, in both": (change("config.json", torch_dtype="float16", dtype="float16"), "dtype", "dtype: float16, and"),
    "max_position_embeddings": (
        change("config.json", max_position_embeddings=99),
        "max_position_embeddings",
        "max_position_embeddings",
    ),
    "eos id": (change("config.json", eos_token_id=7), "eos_token_id: 7 ≠", None),
    "attention_dropout": (change("config.json", attention_dropout=0.1), "attention_dropout: 0.1 ≠", None),
    "generation_config": (change("generation_config.json", temperature=0.1), "temperature: 0.1 ≠ ", None),
    "generation_config lost": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config", None),
    "two tokenizer ids swapped": (swap_two_ids, "tokenizer.json: differs", None),
    "added_tokens lost": (lose_added_tokens, "tokenizer.json: differs", None),
    "tokenizer_config lost": (lambda folder: (folder / "tokenizer_config.json").unlink(), "only in B", None),
}


@pytest.fixture(scope="module")
def sound(session_folder: Path, ready_run: Path, run_content: dict[str, Any]) -> tuple[Path, Path]:
    """An export of what was converted, and the checkpoint."""
    changes = {"model.megatron": str(ready_run.parent / "runs" / "run" / "megatron")}
    file = write_run_file(session_folder / "faults", run_content, changes)
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    return exported, load_run(file).checkpoints_folder / exported.name


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_finds_what_is_wrong_in_an_export_whose_tensors_are_equal(
    sound: tuple[Path, Path], model: Path, tmp_path: Path, fault: str
) -> None:
    plant, beside_the_base, beside_the_checkpoint = FAULTS[fault]
    export, checkpoint = sound
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    base = Path(shutil.copytree(model, tmp_path / "base"))
    for side in (folder, base):
        change("generation_config.json", eos_token_id=2)(side)
    assert cptain("verify", folder, base).exit_code == 0
    plant(folder)
    result = cptain("verify", folder, base)
    assert result.exit_code == 1
    assert beside_the_base in result.output.splitlines()[-1]
    result = cptain("verify", folder, checkpoint)
    assert result.exit_code == (beside_the_checkpoint is not None), result.output
    assert (beside_the_checkpoint or "") in result.output.splitlines()[-1]
