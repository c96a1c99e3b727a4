"""merge: an average of models, streamed, against one that is computed whole; what is unlike is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain, leftovers
from cptain.checkpoint.streaming import write_files
from cptain.run_file import load_run, write_resolved
from safetensors.torch import load_file, save_file


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture
def models(model: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """Copies of the model with other weights, in one dtype."""

    def make(dtype: torch.dtype, count: int = 3) -> list[Path]:
        folders = []
        for number in range(count):
            folder = Path(shutil.copytree(model, tmp_path / f"m{number}"))
            noise = torch.Generator().manual_seed(number)
            weights = {
                name: (tensor.float() + 0.1 * torch.randn(tensor.shape, generator=noise)).to(dtype)
                for name, tensor in _weights(model).items()
            }
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
            config = json.loads((folder / "config.json").read_text())
            config.pop("torch_dtype", None)
            (folder / "config.json").write_text(json.dumps({**config, "dtype": str(dtype)[6:]}))
            folders.append(folder)
        return folders

    return make


def _plain(folders: list[Path], weights: list[float], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """numpy's own weighted average of whole tensors, in fp64."""
    sides = [_weights(folder) for folder in folders]
    return {
        name: torch.from_numpy(np.average([side[name].double().numpy() for side in sides], axis=0, weights=weights))
        .float()
        .to(dtype)
        for name in sides[0]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_the_plain_average_bit_for_bit_and_its_certificate_holds(
    models: Callable[..., list[Path]], dtype: torch.dtype, tmp_path: Path
) -> None:
    folders, out = models(dtype), tmp_path / "soup"
    command = ("merge", out, folders[0], f"{folders[1]}=2", f"{folders[2]}=0.5", "--shard-size", "1MB")
    result = cptain(*command)
    assert result.exit_code == 0, result.output
    found, expected = _weights(out), _plain(folders, [1, 2, 0.5], dtype)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in found)
    card = (out / "README.md").read_text()
    assert "| m1 | 2 | 57.14% | `" in card
    assert str(tmp_path) not in card + (out / "verify.json").read_text()
    assert cptain(*command).output.endswith("soup is done: it is what would be written, bit for bit\n")
    verified = cptain("verify", out)
    assert verified.exit_code == 0, verified.output
    assert "merged model (../m2): unchanged" in verified.output
    other = cptain(*command[:-3])
    assert other.exit_code == 1
    assert other.output.endswith("soup: is there, and not what would be written: --force replaces it\n")
    assert cptain(*command[:-3], "--force").exit_code == 0
    shutil.rmtree(folders[0])
    save_file({}, folders[1] / "model.safetensors")
    stale = cptain("verify", out)
    assert stale.exit_code == 1
    assert "merged model (../m0): not here: not checked" in stale.output
    assert "merged model (../m1): model.safetensors: changed" in stale.output


def test_equal_models_merge_to_themselves(models: Callable[..., list[Path]], tmp_path: Path) -> None:
    (folder,) = models(torch.bfloat16, 1)
    weights = _weights(folder)
    next(iter(weights.values())).view(-1)[0] = -0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    copies = [Path(shutil.copytree(folder, tmp_path / name)) for name in "abc"]
    assert cptain("merge", tmp_path / "out", *copies).exit_code == 0
    found = _weights(tmp_path / "out")
    assert all(torch.equal(found[name].view(torch.int16), weights[name].view(torch.int16)) for name in weights)


def test_checkpoints_of_a_run_merge_as_their_exports_do(make_ready_run: RunFileMaker, tmp_path: Path) -> None:
    file = make_ready_run()
    as_if_trained(file, 1, 2)
    write_resolved(load_run(file))  # as every stage before does
    run = tmp_path / "runs" / "run"
    assert cptain("export", file, "--iteration", "all").exit_code == 0
    exports = [run / "hf" / f"iter_000000{number}" for number in (1, 2)]
    checkpoints = [run / "checkpoints" / export.name for export in exports]
    assert cptain("merge", tmp_path / "a", *exports).exit_code == 0
    result = cptain("merge", tmp_path / "b", checkpoints[0], f"{exports[1]}=1")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "a").iterdir()} - {"verify.json", "README.md"}
    assert names == {path.name for path in (tmp_path / "b").iterdir()} - {"verify.json", "README.md"}
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert cptain("verify", tmp_path / "b").exit_code == 0
    assert "| run, iter_0000001 | 1 | 50.00% |" in (tmp_path / "b" / "README.md").read_text()


def _edit(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**content, **values}))

    return edit


def _weight(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = _weights(folder)
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return edit


UNLIKE: list[tuple[Callable[[Path], Any], str]] = [
    (_edit("config.json", rms_norm_eps=1e-3), "config.json: norm_epsilon"),
    (_edit("generation_config.json", temperature=0.123), "generation_config.json: temperature"),
    (_edit("tokenizer_config.json", model_max_length=7), "tokenizer_config.json: differs"),
    (_weight(lambda weights: weights.pop("model.norm.weight")), "model.norm.weight is in one of them alone"),
    (
        _weight(lambda weights: weights.update({"model.norm.weight": torch.ones(65)})),
        "model.norm.weight: float32 [64] and float32 [65]",
    ),
    (
        _weight(lambda weights: weights.update({"model.norm.weight": torch.ones(64).half()})),
        "model.norm.weight: float32 [64] and float16 [64]",
    ),
    (
        _weight(lambda weights: weights["model.norm.weight"].fill_(float("nan"))),
        "model.norm.weight: has a value that is no finite number",
    ),
]


def test_models_that_are_unlike_are_refused_by_name_and_leave_nothing(
    models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    a, b = models(torch.float32, 2)
    for plant, reason in UNLIKE:
        other = Path(shutil.copytree(b, tmp_path / "other"))
        plant(other)
        result = cptain("merge", tmp_path / "out", a, other)
        assert result.exit_code == 1, result.output
        assert reason in result.output.splitlines()[-1]
        assert not (tmp_path / "out").exists()
        assert not leftovers(tmp_path)
        shutil.rmtree(other)


def test_a_model_that_is_replaced_while_it_is_read_gives_no_merged_model(
    models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, out = models(torch.float32, 2), tmp_path / "soup"
    weights = folders[1] / "model.safetensors"

    def replaced(*arguments: Any) -> None:
        copy = shutil.copyfile(weights, tmp_path / "copy")  # even one of the same bytes
        write_files(*arguments)
        copy.replace(weights)

    monkeypatch.setattr("cptain.checkpoint.merge.write_files", replaced)
    refused = cptain("merge", out, *folders)
    assert refused.exit_code == 1
    assert refused.output.endswith(f"cptain: merge: {weights}: changed while it was read: run it again\n")
    assert not out.exists()
    assert not leftovers(tmp_path)


def test_what_cannot_be_meant_is_refused(models: Callable[..., list[Path]], tmp_path: Path) -> None:
    a, b = models(torch.float32, 2)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    for arguments, reason in (
        ((tmp_path / "out", a), "allowed: two models or more"),
        ((tmp_path / "out", a, b, a), f"{a} is named twice"),
        ((tmp_path / "out", a, f"{b}=-1"), "with a weight over 0"),
        ((tmp_path / "out", a, f"{b}=much"), "with a weight over 0"),
        ((a, a, b, "--force"), f"{a} is, holds or lies in {a}"),
        ((tmp_path, a, b, "--force"), "is, holds or lies in"),
        ((tmp_path / "home", a, b, "--force"), "is there, and no model"),
    ):
        result = cptain("merge", *arguments)
        assert result.exit_code == 2, result.output
        assert reason in result.output
    gone = cptain("merge", tmp_path / "out", a, tmp_path / "nothing")
    assert gone.output.endswith(f"merge: {tmp_path}/nothing: no such folder\n")
