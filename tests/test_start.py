"""Where a training begins: what a lost tracker or a half-written checkpoint means."""

import shutil
from pathlib import Path

import pytest
from conftest import RunFileMaker, as_if_trained
from cptain.checkpoint.tracker import iteration_folder
from cptain.errors import CptainError
from cptain.model.architecture import read_architecture
from cptain.run_file import RunFile, load_run
from cptain.training.start import Beginning, beginning


@pytest.fixture
def run(make_ready_run: RunFileMaker) -> RunFile:
    """A run with two checkpoints, of the steps 3 and 6."""
    file = make_ready_run()
    as_if_trained(file, 3, 6)
    return load_run(file)


def found(run: RunFile) -> Beginning:
    return beginning(run, read_architecture(Path(run.model.hf)))


def test_the_tracker_names_where_training_goes_on(run: RunFile) -> None:
    assert found(run) == Beginning(iteration_folder(run.checkpoints_folder, 6), 6, [])


@pytest.mark.parametrize("content", [None, "", "six"])
def test_a_lost_tracker_loses_no_checkpoint(run: RunFile, content: str | None) -> None:
    """With no tracker Megatron began again at step 0 and wrote over both, with status 0."""
    tracker = run.checkpoints_folder / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    if content is not None:
        tracker.write_text(content)
    begins = found(run)
    assert (begins.iteration, begins.repair_tracker) == (6, True)
    assert "latest_checkpointed_iteration.txt: " in begins.lines[0]
    assert begins.lines[-1].endswith("iter_0000006, the last whole checkpoint")


def test_a_half_written_checkpoint_is_passed_over_and_named(run: RunFile) -> None:
    (run.checkpoints_folder / "iter_0000006" / "metadata.json").unlink()
    begins = found(run)
    assert (begins.iteration, begins.repair_tracker) == (3, True)
    assert "iter_0000006: not a complete torch_dist checkpoint" in begins.lines[0]
    assert begins.lines[1].endswith("iter_0000003, the last whole checkpoint")


def test_what_the_tracker_does_not_name_yet_is_trained_again_and_said(run: RunFile) -> None:
    (run.checkpoints_folder / "latest_checkpointed_iteration.txt").write_text("3")
    begins = found(run)
    assert (begins.iteration, begins.repair_tracker) == (3, False)
    assert begins.lines == [
        f"{run.checkpoints_folder}/iter_0000006: not named by latest_checkpointed_iteration.txt: left out, and written "
        "again"
    ]
    (run.checkpoints_folder / "iter_0000006" / "metadata.json").unlink()
    (line,) = found(run).lines
    assert "iter_0000006: not a complete torch_dist checkpoint" in line
    assert line.endswith(": left out, and written again")


def test_a_training_that_was_killed_in_its_first_save_begins_again(run: RunFile) -> None:
    shutil.rmtree(run.checkpoints_folder / "iter_0000003")
    (run.checkpoints_folder / "iter_0000006" / ".metadata").unlink()
    (run.checkpoints_folder / "latest_checkpointed_iteration.txt").unlink()
    begins = found(run)
    assert begins.iteration is None
    assert "iter_0000006: not a complete" in begins.lines[0]


def test_a_damaged_checkpoint_with_none_before_it_is_an_error(run: RunFile) -> None:
    shutil.rmtree(run.checkpoints_folder / "iter_0000003")
    (run.checkpoints_folder / "iter_0000006" / ".metadata").unlink()
    with pytest.raises(CptainError, match="iter_0000006: not a complete"):
        found(run)
