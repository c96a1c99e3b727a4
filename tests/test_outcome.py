"""The verdict on a training that has ended, and what a chain of jobs makes of it: on the words of real trainings."""

import json
from io import FileIO
from pathlib import Path

import pytest
from conftest import RunFileMaker
from cptain.checkpoint.tracker import write_tracker
from cptain.errors import CptainError
from cptain.history import read_history
from cptain.progress import Progress
from cptain.run_file import RunFile, load_run
from cptain.training.attempt import Attempt
from cptain.training.follow import Follower
from cptain.training.nodes import Nodes
from cptain.training.outcome import Ended, verdict
from cptain.training.prepare import Command
from cptain.training.record import TrainingRecord
from cptain.training.stopping import Stop

STEP = (
    "[2026-11-23 22:44:21] iteration {0}/ 8 | consumed samples: {0} | elapsed time per iteration (ms): 3.1 | "
    "learning rate: 1.0E-06 | global batch size:     8 | lm loss: 1.67E+00 | grad norm: 0.3 |\n"
)


@pytest.fixture
def run(make_run: RunFileMaker) -> RunFile:
    return load_run(make_run())


def follower(output: str = "") -> Follower:
    followed = Follower(FileIO("/dev/null", "w"), Progress("train", 8, "step"), 64)
    followed.follow(output.splitlines(keepends=True))
    return followed


def end(
    run: RunFile,
    output: str = STEP.format(3),
    *,
    start: int = 0,
    saved: int | None = None,
    status: int = 0,
    signal_name: str = "",
    error: str = "",
    at_once: bool = False,
) -> CptainError | None:
    """End a training that began at `start`, and give the error of the verdict."""
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(run, start)
    try:
        attempt.begin()
    except CptainError as raised:
        return raised
    if saved is not None:
        write_tracker(run.checkpoints_folder, saved)
    error_file = run.logs_folder / "error.json"
    error_file.write_text(json.dumps({"message": error}))
    command = Command([], Path("pretrain.py"), [], steps=8, start=start)
    how = Ended(status, signal_name, at_once, error_file, run.logs_folder / "train.log")
    try:
        verdict(run, command, follower(output), how, attempt, TrainingRecord(run, command))
    except CptainError as raised:
        return raised
    return None


def test_a_save_that_failed_is_not_hidden_by_the_signal_that_asked_for_it(run: RunFile) -> None:
    ended = end(run, status=1, signal_name="SIGTERM", error="OSError: [Errno 28] No space left on device")
    assert ended is not None
    assert ended.exit_status == 1
    assert str(ended).startswith(f"train: after SIGTERM: {run.checkpoints_folder}: cannot be written (")
    assert "No space left on device" in str(ended)
    assert read_history(run.folder)[-1].outcome.startswith("failed: after SIGTERM: ")


def test_a_save_that_fails_for_want_of_room_names_the_folder(run: RunFile) -> None:
    ended = end(run, status=1, error="OSError: [Errno 28] No space left on device")
    assert str(ended).startswith(f"train: {run.checkpoints_folder}: cannot be written (")


@pytest.mark.parametrize("said", ["", "SIGTERM", "RuntimeError: Connection closed by peer [127.0.0.1]:4"])
def test_a_rank_that_a_signal_ends_before_it_can_save_has_not_failed(run: RunFile, said: str) -> None:
    output = "" if said != "SIGTERM" else "  Signal 15 (SIGTERM) received by PID 1\n"
    ended = end(run, output, status=0 if not said else 1, signal_name="SIGTERM", error=said)
    assert ended is not None
    assert (ended.exit_status, str(ended)) == (
        75,
        "train: stopped by SIGTERM; nothing saved yet; the same command continues",
    )


def test_a_chain_gives_up_after_two_signals_with_nothing_saved_between(
    run: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three walltime kills in a row gave up nothing: each was a stop that the next job would continue."""
    monkeypatch.setenv("CPTAIN_LINK", "2")
    for _ in range(2):
        ended = end(run, start=4, saved=4, signal_name="SIGTERM")
        assert ended is not None
        assert ended.exit_status == 75
    ended = end(run, start=4, saved=4, signal_name="SIGTERM")
    assert ended is not None
    assert ended.exit_status == 1
    assert str(ended).startswith("train: failed 2 times at step 4 with nothing new saved")
    assert "stopped by SIGTERM before anything was saved" in str(ended)


def test_a_training_that_is_killed_without_a_word_counts_too(run: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPTAIN_LINK", "3")
    Attempt(run, 4).begin()
    Attempt(run, 4).begin()
    with pytest.raises(CptainError, match=r"failed 2 times at step 4 .* the last was killed, and said nothing"):
        Attempt(run, 4).begin()
    Attempt(run, 6).begin()  # another place


def test_the_reason_of_a_failure_is_still_there_while_the_next_attempt_runs(run: RunFile) -> None:
    end(run, status=1, error="ValueError: a reason")
    again = Attempt(run, 0)
    again.begin()
    assert json.loads((run.logs_folder / "train-failed.json").read_text())["reason"] == "ValueError: a reason"
    assert again.failure == ""


def test_what_is_saved_between_makes_a_chain_forget(run: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPTAIN_LINK", "2")
    for step in (1, 2, 3, 4):
        ended = end(run, start=step - 1, saved=step, signal_name="SIGTERM")
        assert ended is not None
        assert f"saved at step {step} of 8" in str(ended)


def test_the_node_that_has_the_reason_is_heard_and_not_the_one_that_lost_its_peer(run: RunFile) -> None:
    attempt = Attempt(run, 0)
    attempt.begin()
    attempt.failed("a: CUDA error", only_if_unsaid=False)
    attempt.failed("b: Connection closed by peer", only_if_unsaid=True)
    assert json.loads((run.logs_folder / "train-failed.json").read_text())["reason"] == "a: CUDA error"


def test_all_steps_saved_is_done_and_everything_else_is_not(run: RunFile) -> None:
    assert end(run, STEP.format(8), saved=8) is None
    assert read_history(run.folder)[-1].outcome == "done"
    assert end(run, STEP.format(8), saved=8, status=1, error="ValueError: late") is not None


def test_a_log_that_cannot_be_written_is_said_once_and_ends_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    followed = Follower(FileIO("/dev/full", "w"), Progress("train", 8, "step"), 64)
    followed.follow([STEP.format(1), STEP.format(2)])
    assert followed.last is not None
    assert followed.last.number == 2
    said = capsys.readouterr().err
    assert said == (
        "train: /dev/full: cannot be written: No space left on device: training goes on, and its output is kept no "
        "more\n"
    )


def test_signals_within_fifteen_seconds_are_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stop = Stop()
    for after in (0.0, 0.00015, 0.021, 5.0, 14.9):
        now = 100.0 + after
        stop.note(15, None)
    assert (stop.signal_name, stop.at_once) == ("SIGTERM", False)
    now = 115.0
    stop.note(2, None)
    assert (stop.signal_name, stop.at_once) == ("SIGTERM", True)


def test_a_node_that_is_stopped_because_another_failed_gives_that_one_s_reason(run: RunFile) -> None:
    run.logs_folder.mkdir(parents=True)
    attempt = Attempt(run, 0)
    attempt.begin()
    error_file = run.logs_folder / "error.json"
    error_file.write_text(json.dumps({"message": "SignalException: SIGTERM"}))
    command = Command([], Path("pretrain.py"), [], steps=8, start=0, nodes=Nodes("1", ["a", "b"], [], 1))
    how = Ended(1, "SIGTERM", False, error_file, run.logs_folder / "train.log")

    def said() -> str:
        with pytest.raises(CptainError) as raised:
            verdict(run, command, follower(), how, attempt, TrainingRecord(run, command))
        return str(raised.value)

    assert said() == "train: stopped by SIGTERM; nothing saved yet; the same command continues"
    attempt.failed("a: SIGKILL", only_if_unsaid=False)
    assert said() == (
        "train: stopped by SIGTERM, because another node failed: a: SIGKILL; nothing saved yet; "
        "the same command continues"
    )


def test_a_link_that_failed_says_what_the_next_one_does(
    run: RunFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CPTAIN_LINK", "1")
    for start, says in (
        (0, "goes on from step 4"),  # it saved some
        (4, "goes on from step 4"),
        (4, "gives up: 2 trainings failed at step 4: ValueError: a reason"),
    ):
        end(run, start=start, saved=4, status=1, error="ValueError: a reason")
        assert f"train: the next job of the chain {says}\n" in capsys.readouterr().err
