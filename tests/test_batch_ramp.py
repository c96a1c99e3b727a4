"""train.batch_ramp: what a run with batches that grow sees, and that the real Megatron trains so."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain, refused
from cptain.batches import batch_after, sequences, steps_for
from cptain.data.blend_file import blend_flag
from cptain.data.epochs import exposures
from cptain.data.manifest import read_manifest
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run
from cptain.training.metrics import metrics_file, read_metrics

RAMP = [[4, 3], [8, 6]]
BATCHES = [4, 4, 4, 8, 8, 8, 16, 16, 16, 16]
RUN: dict[str, Any] = {"train__global_batch_size": 16, "train__steps": 10, "train__save_interval": 100}


def test_sequences_and_steps_are_those_of_a_plain_count() -> None:
    chance = random.Random(5)
    for _ in range(300):
        until = sorted(chance.sample(range(1, 30), chance.randrange(4)))
        sizes = sorted(chance.sample(range(1, 50), len(until) + 1))
        ramp, full = list(zip(sizes, until, strict=False)), sizes[-1]
        plain = [next((batch for batch, end in ramp if step < end), full) for step in range(40)]
        for steps in range(40):
            seen = sequences(ramp, full, steps)
            assert seen == sum(plain[:steps])
            assert batch_after(ramp, full, seen) == plain[steps]
            assert steps_for(ramp, full, seen) == steps
            if steps:
                assert steps_for(ramp, full, seen - plain[steps - 1] + 1) == steps


def test_batches_grow_by_the_step_and_rates_do_not_feel_it(make_ready_run: RunFileMaker, trained_run: Path) -> None:
    file = make_ready_run(**RUN, train__batch_ramp=RAMP)
    dry = cptain("train", file, "--cpu", "--dry-run")
    assert "10 steps of up to 1,024 tokens: 6.4k in all" in dry.output
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "4"]')
    assert stopped.exit_code == 75, stopped.output
    resumed = cptain("train", file, "--cpu", "--nproc-per-node", 2)  # amid the ramp, and another layout
    assert resumed.exit_code == 0, resumed.output
    run = load_run(file)
    steps = read_steps(train_logs(run.logs_folder))
    assert [step.global_batch_size for step in steps] == BATCHES
    assert [step.sequences for step in steps] == [sum(BATCHES[: n + 1]) for n in range(10)]
    assert [values["tokens"] for values in read_metrics(metrics_file(run)).values()][-1] == 100 * 64
    # Megatron saves wherever the number of micro batches changes; this saves where it was asked to alone.
    assert sorted(folder.name for folder in run.checkpoints_folder.glob("iter_*")) == ["iter_0000004", "iter_0000010"]

    # As long as its batches are equal, a run is another one of constant batches; and its rates always are.
    constant = make_ready_run(name="constant", **{**RUN, "train__global_batch_size": 4})
    assert cptain("train", constant, "--cpu").exit_code == 0
    others = read_steps(train_logs(load_run(constant).logs_folder))
    assert [step.learning_rate for step in steps] == [step.learning_rate for step in others]
    assert [step.loss for step in steps[:3]] == [step.loss for step in others[:3]]
    assert steps[4].loss != others[4].loss

    changed = cptain("train", make_ready_run(**RUN, train__batch_ramp=[[8, 6]]), "--cpu")
    assert changed.exit_code == 2
    assert "train.batch_ramp: [[4, 3], [8, 6]] → [[8, 6]]: a run that has begun keeps it" in changed.output
    assert cptain("export", file).exit_code == 0
    card = (run.hf_folder / "iter_0000010" / "README.md").read_text()
    assert "| tokens seen | 6.4k (6,400) |" in card
    assert "| global batch size | 4 up to step 3, then 8 up to step 6, then 16 sequences |" in card


def test_what_is_counted_in_tokens_knows_of_the_ramp(make_ready_run: RunFileMaker, text_folder: Path) -> None:
    ramp = {**RUN, "train__batch_ramp": RAMP, "train__steps": None}
    for tokens, steps in ((6400, 10), (6401, 11), (12 * 64, 3), (12 * 64 + 1, 4)):
        dry = cptain("train", make_ready_run(**ramp, train__tokens=tokens), "--cpu", "--dry-run")
        assert f" to train on; {steps} steps of " in dry.output, dry.output
    mix = [{"input": f"{text_folder}/a.jsonl", "name": "a"}, {"input": f"{text_folder}/sub/**", "name": "sub"}]
    stages = [{"step": 0, "weight": {"a": 1.0}}, {"step": 5, "weight": {"a": 1.0, "sub": 3.0}}]
    run = load_run(make_ready_run(**{**ramp, "train__steps": 10}, data__mix=mix, data__stage=stages))
    records = read_manifest(run.data_folder, run.data.sources)
    content = json.loads(Path(blend_flag(run, records, 10)[1]).read_text())
    assert [stage["sequences"] for stage in content["stages"]] == [28, 72]
    a, sub = exposures(run, records, 10)
    assert (a.share, sub.share) == (pytest.approx(0.46), pytest.approx(0.54))
    assert a.epochs * a.tokens == pytest.approx((28 + 18) * 64)
    plan = json.loads(cptain("plan", make_ready_run(**ramp, train__tokens=6400), "--json").stdout)
    assert (plan["steps"], plan["tokens"]) == (10, 6400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_ramp": [[8, 6], [4, 9]]}, "train: batch_ramp: [8, 6] before [4, 9]: batches and steps must grow"),
        ({"batch_ramp": [[4, 6], [8, 6]]}, "train: batch_ramp: [4, 6] before [8, 6]: batches and steps must grow"),
        (
            {"batch_ramp": [[32, 6]]},
            "train: batch_ramp: [32, 6] before global_batch_size = 16: batches and steps must grow",
        ),
        ({"batch_ramp": [[5, 6]]}, "train: batch_ramp: 5 is not a multiple of micro_batch_size = 2"),
        ({"batch_ramp": [[4, 6]], "script": "/x.py"}, "train: batch_ramp: another train.script than cptain's own"),
        ({"batch_ramp": [4, 6]}, "train.batch_ramp"),
    ],
)
def test_a_ramp_that_does_not_rise_is_refused(
    make_jobs_run: RunFileMaker, changes: dict[str, Any], message: str
) -> None:
    file = make_jobs_run(**{f"train__{key}": value for key, value in changes.items()}, train__global_batch_size=16)
    assert message in refused(file)


def test_every_batch_is_to_divide_among_the_copies(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run(**RUN, train__batch_ramp=[[6, 3]]), "--cpu", "--nproc-per-node", 2)
    assert result.exit_code == 2
    assert "= 4 does not divide the 2 sequences of train.global_batch_size and batch_ramp" in result.output
