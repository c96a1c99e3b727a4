"""What a checkpoint's files were when it was saved is kept in its folder, and asked before anything is believed."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, as_if_trained, cptain, write_run_file
from cptain.checkpoint.saved_files import RECORD
from cptain.checkpoint.torch_dist import TorchDistReader
from cptain.checkpoint.tracker import read_tracker
from cptain.errors import CptainError
from cptain.run_file import load_run
from cptain.training.start import begin_from, check_files
from test_damage import flip

NOT_SAVED = f"not as it was saved ({RECORD}): damaged, or of another iteration"


@pytest.fixture
def trained(tmp_path: Path, trained_run: Path, run_content: dict[str, Any]) -> tuple[Path, Path]:
    """A copy of the trained run, to damage and to train on, and its folder of checkpoints."""
    shared = trained_run.parent.parent / "ready" / "runs" / "run"
    changes = {"data.output": str(shared / "data"), "model.megatron": str(shared / "megatron"), "train.steps": 12}
    file = write_run_file(tmp_path, run_content, changes)
    shutil.copytree(trained_run.parent / "runs" / "run", load_run(file).folder)
    return file, load_run(file).checkpoints_folder


def refusals(file: Path, folder: Path, model: Path) -> list[str]:
    """The last lines of what would use an iteration's folder, each of which must refuse it."""
    lines = []
    for command in (("export", file), ("verify", model, folder), ("verify", model, folder, "--sample")):
        result = cptain(*command)
        assert result.exit_code == 1, result.output
        lines.append(result.output.strip().splitlines()[-1])
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 1, result.output
    return [*lines, result.output.strip().splitlines()[-1]]


def test_every_checkpoint_that_training_saves_has_a_record_of_all_of_its_files(trained_run: Path) -> None:
    root = load_run(trained_run).checkpoints_folder
    for iteration in (4, 8):
        folder = root / f"iter_{iteration:07d}"
        record = json.loads((folder / RECORD).read_text())["files"]
        assert set(record) == {file.name for file in folder.iterdir()} - {RECORD}
        assert {".metadata", "metadata.json", "__0_0.distcp"} <= set(record)
        for name, one in record.items():
            assert one["bytes"] == (folder / name).stat().st_size


def test_a_bit_flipped_in_metadata_is_refused_before_it_is_believed(trained: tuple[Path, Path], model: Path) -> None:
    file, root = trained
    folder, dice = root / "iter_0000008", random.Random(0)
    metadata = folder / ".metadata"
    content = metadata.read_bytes()
    unnoticed = 0
    while unnoticed < 2:  # those of which nothing shows in what the file holds
        byte = dice.randrange(len(content))
        flip(metadata, byte)
        record = (folder / RECORD).rename(root / "record")
        try:
            TorchDistReader(folder).close()
        except Exception:
            record.rename(folder / RECORD)
        else:
            record.rename(folder / RECORD)
            unnoticed += 1
            for line in refusals(file, folder, model):
                assert f"{metadata}: {NOT_SAVED}" in line
        metadata.write_bytes(content)


def test_a_file_of_another_iteration_is_refused(trained: tuple[Path, Path], model: Path) -> None:
    file, root = trained
    folder = root / "iter_0000008"
    with TorchDistReader(folder) as reader:
        (common,) = (place for place, name in reader.archives.items() if name.startswith("common_state"))
    mixed, ours = root / "iter_0000004" / common.file, folder / common.file
    begin, end = common.offset, common.offset + common.length  # which would tell the iteration
    content = bytearray(mixed.read_bytes())
    content[begin:end] = ours.read_bytes()[begin:end]
    ours.write_bytes(content)
    for line in refusals(file, folder, model):
        assert f"{ours}: {NOT_SAVED}" in line


def test_a_bit_flipped_in_the_optimizer_s_state_is_refused_before_training_goes_on(
    trained: tuple[Path, Path],
) -> None:
    file, root = trained
    folder = root / "iter_0000008"
    with TorchDistReader(folder) as reader:
        place, key = next((place, key) for place, key in reader.archives.items() if "exp_avg_sq" in key)
        values = max(reader.directory(place)[1], key=lambda member: member.end - member.begin)
    flip(folder / place.file, values.end - 5, 3)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 1, result.output
    assert f"{folder / place.file}: {key}: damaged: " in result.output.strip().splitlines()[-1]
    assert cptain("export", file).exit_code == 0  # which reads the model's tensors alone


def test_a_checkpoint_without_a_record_is_used_and_the_lack_is_said(make_ready_run: RunFileMaker, model: Path) -> None:
    file = make_ready_run()
    as_if_trained(file, 1)
    folder = load_run(file).checkpoints_folder / "iter_0000001"
    (folder / RECORD).unlink()
    said = f"{folder}: it has no {RECORD}"
    for command in (("export", file), ("verify", model, folder)):
        result = cptain(*command)
        assert said in result.output
        assert result.exit_code == 0, result.output
    (line,) = check_files(folder, node=0, nodes=1)
    assert said in line


def test_what_convert_writes_has_a_record(ready_run: Path) -> None:
    release = load_run(ready_run).megatron_folder / "release"
    assert set(json.loads((release / RECORD).read_text())["files"]) == {
        file.name for file in release.iterdir() if file.name != RECORD
    }


def test_the_record_of_an_iteration_that_is_trained_again_is_forgotten(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 1, 2)
    root = load_run(file).checkpoints_folder
    begin_from(load_run(file), 1, repair_tracker=True)  # as where the save of step 2 was never named
    assert (root / "iter_0000001" / RECORD).exists()
    assert not (root / "iter_0000002" / RECORD).exists()
    assert read_tracker(root) == 1


def test_the_last_line_of_verify_says_what_was_not_compared(ready_run: Path, model: Path, tmp_path: Path) -> None:
    release = load_run(ready_run).megatron_folder
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / "generation_config.json").write_text('{"temperature": 9}')
    last = cptain("verify", copy, release).output.strip().splitlines()[-1]
    assert last.startswith("verify: equal; a Megatron checkpoint holds no tokenizer and no generation_config.json")
    for other, more in ((model, ""), (release, "; a Megatron checkpoint holds no tokenizer")):
        last = cptain("verify", model, other, "--sample").output.strip().splitlines()[-1]
        assert last.startswith(
            f"verify: equal as far as 1 MB of each tensor shows, of which no checksum was checked{more}"
        )


def test_the_nodes_of_a_job_share_the_files_and_leave_none_out(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 1)
    run = load_run(file)
    with TorchDistReader(run.checkpoints_folder / "iter_0000001") as reader:
        place = max(reader.archives, key=lambda place: place.length)
        values = max(reader.directory(place)[1], key=lambda member: member.end - member.begin)
    flip(reader.folder / place.file, values.begin)
    refused = 0
    for node in range(3):
        try:
            check_files(reader.folder, node, nodes=3)
        except CptainError:
            refused += 1
    assert refused == 1
