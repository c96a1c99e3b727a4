"""convert, export and verify: bit for bit, against transformers and the real Megatron, and with damaged input."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain, cptain_process, leftovers, rows_of
from cptain.checkpoint.safetensors_folder import SafetensorsReader, SafetensorsWriter
from cptain.checkpoint.streaming import write_files
from cptain.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from cptain.checkpoint.verify import compare_tensors, tensors
from cptain.model.architecture import read_architecture
from cptain.progress import Progress
from cptain.run_file import load_run
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader


@pytest.fixture
def make_model_run(model: Path, tmp_path: Path, make_run: RunFileMaker) -> Callable[..., Path]:
    """Copies the model, changes its config.json, and gives a run file for the copy."""

    def make(changes: dict[str, Any] | None = None, edit: Callable[[Path], None] = lambda folder: None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(model, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in (changes or {}).items():
            *path, last = key.split(".")
            section = config
            for step in path:
                section = section[step]
            section[last] = value
        (folder / "config.json").write_text(json.dumps(config))
        edit(folder)
        return make_run(model__hf=str(folder))

    return make


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def test_convert_then_export_gives_every_tensor_back_bit_for_bit(
    ready_run: Path, make_ready_run: RunFileMaker, model: Path
) -> None:
    file = make_ready_run()
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    result = cptain("verify", model, exported)
    assert result.exit_code == 0
    assert "21 of 21 tensors bit-equal" in result.output
    assert not (exported / "verify.json").exists()
    assert cptain("verify", exported, load_run(file).checkpoints_folder).exit_code == 0
    original, returned = load_file(model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[name], returned[name]) for name in original)
    assert json.loads((exported / "verify.json").read_text())["equal"] == 21


def test_the_export_is_a_whole_model_that_loads_without_a_warning(make_ready_run: RunFileMaker, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = make_ready_run()
    exported = as_if_trained(file)
    (model / "README.md").write_text("about the base model")
    assert cptain("export", file).exit_code == 0
    loaded, info = AutoModelForCausalLM.from_pretrained(str(exported), output_loading_info=True)
    assert not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs") if key in info
    )
    assert loaded.config.vocab_size == 500
    assert loaded.generation_config.temperature == 0.6
    assert (
        AutoTokenizer.from_pretrained(str(exported))("猫").input_ids
        == AutoTokenizer.from_pretrained(str(model))("猫").input_ids
    )
    assert "about the base model" not in (exported / "README.md").read_text()
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_megatron_and_transformers_compute_the_same_logits(ready_run: Path, model: Path) -> None:
    result = cptain("verify", model, load_run(ready_run).megatron_folder, "--logits")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("logits of ")]
    assert float(line.split("max |A−B| ")[1].split()[0]) < 1e-5


@pytest.mark.parametrize(("tied", "layers"), [(False, 3), (True, 3), (False, 1)])
def test_bf16_and_tied_models_come_back_and_compute_the_same(
    tmp_path: Path, make_run: RunFileMaker, tied: bool, layers: int
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": layers, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=200, tie_word_embeddings=tied, head_dim=16, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    file = make_run(model__hf=str(folder))
    assert cptain("convert", file).exit_code == 0
    result = cptain("verify", folder, load_run(file).megatron_folder, "--logits")
    assert result.exit_code == 0, result.output
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    assert cptain("verify", exported, folder).exit_code == 0
    saved = json.loads((exported / "config.json").read_text())
    assert saved.get("dtype", saved.get("torch_dtype")) == "bfloat16"


@pytest.mark.parametrize("rows", [499, 1])
def test_pieces_and_buffers_of_exactly_one_row_are_no_special_case(
    make_run: RunFileMaker, model: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Of the vocabulary's 500 rows of 256 bytes, the last piece has one; or every piece has. torch reads them too."""
    monkeypatch.setattr("cptain.checkpoint.mapping._PIECE_BYTES", rows * 256)
    monkeypatch.setattr("cptain.checkpoint.streaming._BUFFER", 256)
    file = make_run()
    assert cptain("convert", file, "--workers", 2).exit_code == 0
    exported = as_if_trained(file)
    assert cptain("export", file, "--workers", 2).exit_code == 0
    assert cptain("verify", model, load_run(file).megatron_folder).exit_code == 0
    original, returned = load_file(model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert all(torch.equal(original[name], returned[name]) for name in original)
    read = {"output_layer.weight": torch.empty(500, 64)}
    reader = FileSystemReader(load_run(file).megatron_folder / "release")
    chunks = reader.read_metadata().state_dict_metadata["output_layer.weight"].chunks
    assert [chunk.sizes[0] for chunk in chunks] == ([499, 1] if rows > 1 else [1] * 500)
    torch.distributed.checkpoint.load(read, storage_reader=reader, no_dist=True)
    assert torch.equal(read["output_layer.weight"], original["lm_head.weight"])


def test_a_second_convert_skips_and_a_changed_model_is_converted_again(make_model_run: Any) -> None:
    file = make_model_run()
    assert " → " in cptain("convert", file).output
    assert "is done and the model unchanged" in cptain("convert", file).output
    assert " → " in cptain("convert", file, "--force").output
    weights = Path(load_run(file).model.hf) / "model.safetensors"
    changed = load_file(weights)
    changed["model.norm.weight"] += 1
    save_file(changed, weights, {"format": "pt"})
    assert "unchanged" not in cptain("convert", file).output
    assert cptain("verify", weights.parent, load_run(file).megatron_folder).exit_code == 0


def test_a_release_without_its_common_state_is_converted_again(make_run: RunFileMaker) -> None:
    file = make_run()
    assert cptain("convert", file).exit_code == 0
    common = load_run(file).megatron_folder / "release" / "common.pt"
    common.unlink()
    result = cptain("verify", load_run(file).model.hf, load_run(file).megatron_folder)
    assert result.exit_code == 1
    assert "release: not a complete torch_dist checkpoint: it has no common.pt" in result.output
    assert " → " in cptain("convert", file).output
    assert common.exists()


def test_training_from_what_was_converted_from_another_or_a_changed_model_is_refused(
    make_model_run: Any, make_ready_run: RunFileMaker
) -> None:
    file = make_model_run()
    for stage in ("preprocess", "convert"):
        assert cptain(stage, file).exit_code == 0
    assert cptain("train", file, "--cpu", "--dry-run").exit_code == 0
    weights = Path(load_run(file).model.hf) / "model.safetensors"
    os.utime(weights)
    result = cptain("train", file, "--cpu", "--dry-run")
    assert result.exit_code == 1
    assert re.search(r"model.safetensors: changed since .*release was made of it: run convert again", result.output)
    weights.unlink()
    assert cptain("train", file, "--cpu", "--dry-run").exit_code == 0
    other = cptain("train", make_ready_run(), "--cpu", "--dry-run", "--set", f"model.hf='{weights.parent}'")
    assert "and model.hf is" in other.output, other.output


def test_convert_keeps_a_few_tensors_in_memory_whatever_the_model(tmp_path: Path, make_run: RunFileMaker) -> None:
    hidden, ffn, layers, vocabulary = 1024, 4096, 24, 1000
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden),
    }
    shapes |= {"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden)}
    shapes |= {"mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes_by_name = [("model.embed_tokens.weight", (vocabulary, hidden)), ("model.norm.weight", (hidden,))]
    shapes_by_name += [
        (f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in shapes.items()
    ]
    folder = tmp_path / "model"
    folder.mkdir()
    writer = SafetensorsWriter(
        [(*one, lambda first, stop, buffer: buffer.zero_()) for one in shapes_by_name], torch.bfloat16, 5 * 10**9
    )
    write_files(folder, writer.files, 1, Progress("test", 1, "B").advance)
    writer.finish(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "rms_norm_eps": 1e-5,
    }
    config |= {
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    script = """
import resource, sys, torch
from pathlib import Path
from cptain.run_file import load_run
from cptain.checkpoint.convert import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(load_run(Path(sys.argv[1])))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    file = make_run(model__hf=str(folder))
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    largest_layer = 2 * (4 * hidden * hidden + 3 * hidden * ffn)
    assert size > 15 * largest_layer
    assert int(done.stdout) < 3 * largest_layer, f"{int(done.stdout):,} bytes for a model of {size:,}"


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


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


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


@pytest.mark.parametrize("stage", ["convert", "export"])
def test_a_full_disk_leaves_no_checkpoint_and_no_debris(make_run: RunFileMaker, ready_run: Path, stage: str) -> None:
    file = make_run()
    if stage == "export":
        assert cptain("convert", file).exit_code == 0
        as_if_trained(file)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = cptain_process(stage, file, preexec_fn=limit)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    run = load_run(file)
    target = run.megatron_folder / "release" if stage == "convert" else run.hf_folder / "iter_0000001"
    assert last_line(output) == f"cptain: {target}: cannot be written: File too large"
    assert not target.exists()
    assert leftovers(run.folder) == []


@pytest.mark.parametrize("stage", ["convert", "export", "verify"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind_and_exits_75(
    make_run: RunFileMaker, tmp_path: Path, stage: str, signal_number: signal.Signals
) -> None:
    """Slowed to a tensor a tenth of a second, so that the signal arrives in the middle."""
    file = make_run()
    run = load_run(file)
    if stage != "convert":
        assert cptain("convert", file).exit_code == 0
        as_if_trained(file)
    slow = """
import sys, time
from cptain import progress
advance = progress.Progress.advance
def slowly(self, *arguments):
    advance(self, *arguments)
    print("working", flush=True)
    time.sleep(0.1)
progress.Progress.advance = slowly
from cptain.cli import main
main()
"""
    arguments = [str(run.model.hf), str(run.megatron_folder)] if stage == "verify" else [str(file)]
    process = subprocess.Popen(
        [sys.executable, "-c", slow, stage, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line == "working\n":
            break
    process.send_signal(signal_number)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 75
    assert last_line(rest) == f"cptain: stopped by {signal_number.name}; the same command continues"
    assert leftovers(run.folder) == []
    if stage != "verify":
        target = run.megatron_folder / "release" if stage == "convert" else run.hf_folder / "iter_0000001"
        assert not target.exists()
        assert cptain(stage, file).exit_code == 0
        assert target.exists()


def test_a_killed_convert_leaves_the_old_checkpoint_and_the_next_one_cleans_up(make_run: RunFileMaker) -> None:
    file = make_run()
    root = load_run(file).megatron_folder
    assert cptain("convert", file).exit_code == 0
    before = (root / "release" / ".metadata").read_bytes()
    killer = """
import os, signal
from cptain import progress
progress.Progress.advance = lambda self, *arguments: os.kill(os.getpid(), signal.SIGKILL)
from cptain.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", killer, "convert", str(file), "--force"], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert leftovers(root)
    assert (root / "release" / ".metadata").read_bytes() == before
    time.sleep(0.01)
    assert cptain("convert", file, "--force").exit_code == 0
    assert leftovers(root) == []


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


def test_export_takes_an_iteration_skips_what_is_done_and_redoes_a_newer_checkpoint(
    make_ready_run: RunFileMaker,
) -> None:
    file = make_ready_run()
    as_if_trained(file, 2)
    exported, checkpoints = as_if_trained(file), load_run(file).checkpoints_folder
    assert cptain("export", file, "--iteration", "2").exit_code == 0
    assert (exported.parent / "iter_0000002").exists()
    assert not exported.exists()
    assert "no such checkpoint (there: iter_0000001, iter_0000002)" in cptain("export", file, "--iteration", 3).output
    assert cptain("export", file, "--iteration", "soon").exit_code == 2
    assert " → " in cptain("export", file, "--iteration", "latest").output
    assert "is done: it is what would be written" in cptain("export", file).output
    assert " → " in cptain("export", file, "--force").output
    os.utime(checkpoints / "iter_0000001" / ".metadata")
    assert "is done: it is what would be written" in cptain("export", file).output


def test_metadata_has_every_chunk_and_object_and_its_place(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import filesystem, metadata

    writer = TorchDistWriter(100)
    for row in (0, 2):
        writer.add_chunk("a.weight", (4, 3), (row, 0), (2, 3), torch.bfloat16, 2, rows_of(torch.zeros(2, 3)))
    writer.add_object("a._extra_state", 0, 1, None)
    writer.finish(tmp_path, {})
    written = pickle.loads((tmp_path / ".metadata").read_bytes())
    size, boxes = torch.Size([4, 3]), [(torch.Size([row, 0]), torch.Size([2, 3])) for row in (0, 2)]
    chunks = [metadata.ChunkStorageMetadata(*box) for box in boxes]
    properties = metadata.TensorProperties(dtype=torch.bfloat16)
    expected = metadata.Metadata(
        {
            "a.weight": metadata.TensorStorageMetadata(properties, size, chunks),
            "a._extra_state/shard_0_1": metadata.BytesStorageMetadata(),
        }
    )
    expected.storage_data = {
        index: filesystem._StorageInfo(place.relative_path, place.offset, place.length)
        for index, place in written.storage_data.items()
    }
    assert written == expected
    assert set(written.storage_data) == {
        *(metadata.MetadataIndex("a.weight", offset) for offset, _ in boxes),
        metadata.MetadataIndex("a._extra_state/shard_0_1"),
    }


def test_verify_shows_what_differs_and_exits_1(model: Path, ready_run: Path, make_model_run: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.25
        tensors["lm_head.weight"][0, 0] = float("nan")
        tensors["model.layers.0.input_layernorm.weight"] = torch.zeros(65)
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
        tensors["extra"] = tensors.pop("model.layers.0.mlp.down_proj.weight")

    other = Path(load_run(make_model_run(edit=rewrite(change))).model.hf)
    for a, b in ((model, other), (load_run(ready_run).megatron_folder, other)):
        result = cptain("verify", a, b)
        assert result.exit_code == 1
        rows = {line.split()[0]: line for line in result.output.splitlines() if line}
        assert rows["model.norm.weight"].split()[-3:] == ["0.25", "0.00391", "≠"]
        assert rows["lm_head.weight"].split()[-3:] == ["inf", "inf", "≠"]
        assert "[64] ≠ [65]" in rows["model.layers.0.input_layernorm.weight"]
        assert "float32 ≠ bfloat16" in rows["model.layers.1.mlp.up_proj.weight"]
        assert "only in B" in rows["extra"]
        assert "only in A" in rows["model.layers.0.mlp.down_proj.weight"]
        assert last_line(result.output) == "cptain: verify: 6 of 22 tensors differ"
    assert not (model / "verify.json").exists()


def test_verify_tells_logits_of_different_models_apart(ready_run: Path, make_model_run: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] *= 1.5

    other = Path(load_run(make_model_run(edit=rewrite(change))).model.hf)
    result = cptain("verify", other, load_run(ready_run).megatron_folder, "--logits")
    assert result.exit_code == 1
    assert "logits of " in result.output


def test_verify_names_what_is_no_checkpoint(model: Path, tmp_path: Path) -> None:
    assert f"{tmp_path}/no: no such folder" in cptain("verify", model, tmp_path / "no").output
    assert (
        "neither a Hugging Face model (config.json) nor a torch_dist checkpoint"
        in cptain("verify", model, tmp_path).output
    )


def test_two_megatron_checkpoints_are_compared_under_their_own_names(ready_run: Path) -> None:
    release = load_run(ready_run).megatron_folder / "release"
    with TorchDistReader(release) as a, TorchDistReader(release) as b:
        rows = compare_tensors(tensors(a), tensors(b))
    assert "decoder.layers.self_attention.linear_qkv.weight" in {row.name for row in rows}
    assert all(row.equal for row in rows)


def test_a_single_value_is_compared_like_any_tensor(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.25)):
        writer = TorchDistWriter(4)
        writer.add_chunk("scale", (), (), (), torch.float32, 1, rows_of(torch.tensor([value])))
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, writer.files, 1, Progress("test", 1, "B").advance)
        writer.finish(tmp_path / name, {})
    assert cptain("verify", tmp_path / "a", tmp_path / "b").exit_code == 0
    (row, _) = re.findall("^scale .*", cptain("verify", tmp_path / "a", tmp_path / "c").output, re.MULTILINE)
    assert row.split() == ["scale", "[]", "float32", "1", "0.25", "0.25", "0"]


def test_shards_are_cut_by_size_and_the_index_names_them(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10, 25) for i in range(5)}
    planned = [(name, (10, 25), rows_of(tensor)) for name, tensor in tensors.items()]
    writer = SafetensorsWriter(planned, torch.float32, shard_bytes=2000)
    write_files(tmp_path, writer.files, 2, Progress("test", 1, "B").advance)
    writer.finish(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    for path in tmp_path.glob("*.safetensors"):
        for name, tensor in load_file(path).items():  # the safetensors library's own reader
            assert torch.equal(tensor, tensors[name])
    with SafetensorsReader(tmp_path) as reader:
        buffer = torch.empty(3 * 25 * 4, dtype=torch.uint8)
        reader.read("t4", 2, 5, buffer)
        assert torch.equal(buffer.view(torch.float32).reshape(3, 25), tensors["t4"][2:5])
        assert reader.bytes == 5000
