"""verify.json of an export: what was written and of what, checked again from the files alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, as_if_trained, cptain
from cptain.run_file import load_run


@pytest.fixture
def export(model: Path, ready_run: Path, tmp_path: Path, make_run: RunFileMaker) -> Path:
    """An export of a run whose base model is a copy of its own."""
    base = Path(shutil.copytree(model, tmp_path / "base"))
    shared = load_run(ready_run)
    shutil.copytree(shared.tokenizers_folder, tmp_path / "runs" / ".tokenizers")
    file = make_run(model__hf=str(base), data__output=str(shared.data_folder))
    assert cptain("convert", file).exit_code == 0
    folder = as_if_trained(file)
    result = cptain("export", file)
    assert result.exit_code == 0, result.output
    return folder


def _verify(folder: Path) -> tuple[int, str]:
    result = cptain("verify", folder)
    return result.exit_code, result.output


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_an_export_is_checked_from_its_files_and_what_it_was_made_of(export: Path, tmp_path: Path) -> None:
    status, output = _verify(export)
    assert status == 0, output
    assert [line for line in output.splitlines() if line.endswith(": unchanged")] == [
        "base model (../../../../base): unchanged",
        "checkpoint (../../checkpoints/iter_0000001): unchanged",
        "begun with (../../megatron/release): unchanged",
        output.splitlines()[3],
    ]
    assert output.splitlines()[3].startswith("data (")
    certificate = json.loads((export / "verify.json").read_text())["certificate"]
    names = {path.name for path in export.iterdir()} - {"verify.json"}
    assert certificate["files"].keys() == names
    assert {len(one["sha256"]) for one in certificate["files"].values()} == {64}
    assert str(tmp_path) not in (export / "verify.json").read_text()
    moved = Path(shutil.copytree(export, tmp_path / "elsewhere" / "model"))
    (moved / ".gitattributes").touch()  # a download has such files
    (moved / "README.md").write_text("edited, as a card may be")
    status, output = _verify(moved)
    assert status == 0, output
    assert "checkpoint (../../checkpoints/iter_0000001): not here: not checked" in output
    assert "verify: README.md was edited, as it may be" in output


def test_a_comparison_is_added_to_the_certificate_and_an_earlier_export_gets_one(export: Path) -> None:
    file = export.parents[3] / "run.toml"
    written = json.loads((export / "verify.json").read_text())
    assert cptain("verify", export, load_run(file).checkpoints_folder, "--sample").exit_code == 0
    assert cptain("verify", export, load_run(file).checkpoints_folder).exit_code == 0
    record = json.loads((export / "verify.json").read_text())
    assert (record["sample"], record["equal"], record["certificate"]) == (False, 21, written["certificate"])
    assert _verify(export)[0] == 0
    del record["certificate"]
    (export / "verify.json").write_text(json.dumps(record))
    status, output = _verify(export)
    assert status == 1
    assert output == (
        f"cptain: {export}/verify.json: no certificate of a model that cptain exported or merged, or a damaged one\n"
    )
    again = cptain("export", file)
    assert "is done: it is what would be written" in again.output
    assert _verify(export)[0] == 0
    assert json.loads((export / "verify.json").read_text())["equal"] == 21


FAULTS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda export: _flip(export / "model.safetensors"), "model.safetensors: changed"),
    (lambda export: (export / "config.json").write_text("{}"), "config.json: changed"),
    (lambda export: (export / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    (lambda export: (export / "model-00002.safetensors").touch(), "model-00002.safetensors: added"),
    (lambda export: (export / "code").mkdir() or (export / "code" / "x.py").touch(), "code/x.py: added"),
    (
        lambda export: _flip(export.parents[3] / "base" / "model.safetensors"),
        "base model (../../../../base): model.safetensors: changed",
    ),
    (
        lambda export: _flip(export.parents[1] / "checkpoints" / "iter_0000001" / ".metadata"),
        "checkpoint (../../checkpoints/iter_0000001): ",
    ),
]


def test_each_fault_is_named_and_nothing_else(export: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name} whole"))
    for plant, line in FAULTS:
        plant(export)
        status, output = _verify(export)
        assert status == 1, output
        assert f"verify: {export}: not what was written: {line}" in output.splitlines()[-1]
        assert ", and " not in output.splitlines()[-1]
        for name in ("base", "runs"):
            shutil.rmtree(tmp_path / name)
            shutil.copytree(tmp_path.with_name(f"{tmp_path.name} whole") / name, tmp_path / name)
    shutil.rmtree(tmp_path.with_name(f"{tmp_path.name} whole"))


def test_a_folder_without_or_with_a_damaged_certificate_is_refused_in_a_line(model: Path, tmp_path: Path) -> None:
    assert cptain("verify", tmp_path / "none").exit_code == 2
    assert cptain("verify", model, "--logits").exit_code == 2
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    for content in ("{", "[]", "{}", '{"certificate": 3}', '{"certificate": {"files": {}, "made_of": [1]}}'):
        (folder / "verify.json").write_text(content)
        result = cptain("verify", folder)
        assert result.exit_code == 1
        assert f"{folder}/verify.json: " in result.output
        assert "defect" not in result.output
        assert len(result.output.splitlines()) == 1
