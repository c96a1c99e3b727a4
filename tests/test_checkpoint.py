"""convert, export and verify: bit for bit, against transformers and the real Megatron, and with damaged input."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain, rows_of
from cptain.checkpoint.safetensors_folder import SafetensorsReader, SafetensorsWriter
from cptain.checkpoint.streaming import write_files
from cptain.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from cptain.checkpoint.verify import compare_tensors, tensors
from cptain.progress import Progress
from cptain.run_file import load_run
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def test_convert_then_export_gives_every_tensor_back_bit_for_bit(
    ready_run: Path, make_ready_run: RunFileMaker, model: Path
) -> None:
    file = make_ready_run()
    exported = as_if_trained(file)
    assert cptain("export", file).exit_code == 0
    result = cptain("verify", model, exported)
    assert result.exit_code == 0
    assert "21 of 21 tensors bit-equal" in result.output
    assert "equal" not in json.loads((exported / "verify.json").read_text())
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
    writer.add_object("a._extra_state", (0,), (1,), None)
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
