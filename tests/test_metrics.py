"""The numbers of a training: metrics.jsonl, TensorBoard's files and an offline run of Weights & Biases, read back."""

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.megatron.log import Step, read_steps, train_logs
from cptain.run_file import load_run
from cptain.training.metrics import Metrics, metrics_file, read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2


def step(number: int, loss: float = 2.0) -> Step:
    return Step(number, 20, loss, 1e-3, 0.5, 0.25, 8 * number, 8, 400.0)


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def offline_runs(folder: Path) -> list[dict[str, Any]]:
    """Id, project, config, and history of every offline start, oldest first."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        one: dict[str, Any] = {"history": [], "config": {}}
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                one |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                one["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                one["history"].append(
                    {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in items}
                )
        found.append(one)
    return found


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a folder: the value of every name at every tick of its axis."""
    shown = EventAccumulator(str(folder))
    shown.Reload()
    tags = shown.Tags()["scalars"]
    return {tag: {event.step: event.value for event in shown.Scalars(tag)} for tag in tags}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key and no home that could have one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def test_every_step_of_a_training_is_a_line_with_the_numbers_of_the_log(trained_run: Path) -> None:
    run = load_run(trained_run)
    metrics = read_metrics(metrics_file(run))
    steps = read_steps(train_logs(run.logs_folder))
    assert [metrics[one.number]["loss"] for one in steps] == [one.loss for one in steps]
    assert [metrics[one.number]["learning_rate"] for one in steps] == [one.learning_rate for one in steps]
    assert [metrics[one.number]["tokens"] for one in steps] == [8 * 64 * number for number in range(1, 9)]
    assert {4, 8} == {number for number, values in metrics.items() if "validation_loss" in values}


def test_a_restart_takes_the_place_of_steps_that_it_repeats_and_of_a_half_written_line(make_run: RunFileMaker) -> None:
    run = load_run(make_run())
    run.logs_folder.mkdir(parents=True)
    for first in (1, 2):
        metrics = Metrics(run, print)
        for number in range(first, first + 3):
            metrics.step(step(number, loss=10.0 * first + number))
        metrics.close()
        with open(metrics_file(run), "ab") as file:
            file.write(b'{"step": 9, "lo')
    assert {number: values["loss"] for number, values in read_metrics(metrics_file(run)).items()} == {
        1: 11.0,
        2: 22.0,
        3: 23.0,
        4: 24.0,
    }


def test_a_long_file_of_metrics_is_gone_on_with_and_not_read(make_run: RunFileMaker) -> None:
    """Of 2⁴⁰ bytes, none of them a line's end, the last one alone is looked at."""
    run = load_run(make_run())
    run.logs_folder.mkdir(parents=True)
    metrics_file(run).touch()
    os.truncate(metrics_file(run), 1 << 40)
    metrics = Metrics(run, print)
    metrics.step(step(1))
    metrics.close()
    with open(metrics_file(run), "rb") as file:
        file.seek(1 << 40)
        begin, line = file.read().splitlines()
    assert (begin, json.loads(line)["step"]) == (b"", 1)


def test_tensorboard_shows_the_numbers_of_a_training_on_an_axis_of_tokens(trained_run: Path) -> None:
    run = load_run(trained_run)
    shown = tensorboard(run.logs_folder)
    metrics = read_metrics(metrics_file(run))
    assert set(shown) == {name for line in metrics.values() for name in line} - {"step", "tokens", "time"}
    for name, values in shown.items():
        lines = {line["tokens"]: line[name] for line in metrics.values() if name in line}
        assert values == {tokens: pytest.approx(value, rel=1e-6) for tokens, value in lines.items()}


def test_tensorboard_takes_back_the_steps_that_a_restart_repeats(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(make_run())
    run.logs_folder.mkdir(parents=True)
    for first in (1, 3):
        monkeypatch.setattr("time.time", lambda first=first: 1e9 + first)
        metrics = Metrics(run, print)
        for number in range(first, first + 4):
            metrics.step(step(number, loss=10.0 * first + number))
        metrics.close()
    assert tensorboard(run.logs_folder)["loss"] == {
        tokens * 8 * 64: loss for tokens, loss in enumerate((11.0, 12.0, 33.0, 34.0, 35.0, 36.0), 1)
    }


def test_without_tensorboard_and_on_a_full_disk_training_goes_on(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(make_run())
    run.logs_folder.mkdir(parents=True)
    said: list[str] = []
    metrics = Metrics(run, said.append)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    metrics.step(step(1))
    metrics.close()
    monkeypatch.undo()
    assert (said, list(run.logs_folder.glob("events*"))) == ([], [])
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full_disk)
    metrics = Metrics(run, said.append)
    metrics.step(step(2))
    metrics.step(step(3))
    metrics.close()
    assert said == ["train: TensorBoard: [Errno 28] No space left on device: training goes on without it"]
    assert len(read_metrics(metrics_file(run))) == 3


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.usefixtures("offline")
def test_a_chain_is_one_run_on_wandb_offline_by_itself_with_tokens_as_its_axis(make_run: RunFileMaker) -> None:
    run = load_run(make_run(wandb__project="llm-cpt", wandb__entity="lab"))
    run.logs_folder.mkdir(parents=True)
    said: list[str] = []
    for first in (1, 4):
        metrics = Metrics(run, said.append)
        for number in range(first, first + 3):
            metrics.step(step(number))
        metrics.validation(first + 2, 3.0, {"ja": 2.5})
        metrics.close()
    one, other = offline_runs(run.folder)
    assert one["id"] == other["id"] == (run.folder / "wandb" / "id").read_text()
    assert (one["project"], one["name"]) == ("llm-cpt", "run")
    assert one["config"]["train"]["lr"] == 1e-3
    lines = [*one["history"], *other["history"]]
    assert len(lines) == 6
    for number, line in enumerate(lines, 1):
        assert (line["step"], line["_step"], line["tokens"]) == (number, number, number * 8 * 64)
        assert {"loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second", "tflops_per_gpu"} <= set(
            line
        )
    assert [line.get("validation_loss") for line in lines] == [None, None, 3.0, None, None, 3.0]
    assert [line.get("validation_loss/ja") for line in lines] == [None, None, 2.5, None, None, 2.5]
    assert said[0].startswith(
        "train: Weights & Biases is offline: no key (WANDB_API_KEY); to send it later: wandb sync "
    )


@pytest.mark.usefixtures("offline")
def test_without_a_way_out_wandb_is_offline_and_says_why(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run = load_run(make_run(wandb__project="llm-cpt"))
    run.logs_folder.mkdir(parents=True)
    said: list[str] = []
    metrics = Metrics(run, said.append)
    metrics.step(step(1))
    metrics.close()
    assert "offline: 127.0.0.1 cannot be reached from here (Connection refused)" in said[0]
    assert len(offline_runs(run.folder)) == 1


def test_whatever_wandb_does_training_goes_on(make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("wandb is broken\nin two lines")

    monkeypatch.setattr("wandb.init", broken)
    run = load_run(make_run(wandb__project="llm-cpt"))
    run.logs_folder.mkdir(parents=True)
    said: list[str] = []
    metrics = Metrics(run, said.append)
    metrics.step(step(1))
    metrics.step(step(2))
    metrics.close()
    assert said == ["train: Weights & Biases: wandb is broken: training goes on without it"]
    assert len(read_metrics(metrics_file(run))) == 2


def test_megatron_is_told_nothing_of_wandb(make_ready_run: RunFileMaker) -> None:
    assert "wandb" not in cptain("train", make_ready_run(wandb__project="p"), "--dry-run").stdout
