"""The schedule of the learning rate and the optimizer's settings, as the run file says them and Megatron takes them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain, in_megatron
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run
from cptain.run_train import Train
from cptain.training.flags import schedule_rows

LR, MIN_LR, STEPS = 1e-3, 1e-4, 20
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "cosine", "warmup_steps": 4},
    {"schedule": "cosine", "warmup_share": 0.2, "decay_steps": 8},
    {"schedule": "cosine", "decay_steps": 50},
    {"schedule": "linear", "warmup_steps": 3},
    {"schedule": "linear", "warmup_steps": 3, "decay_share": 0.5},
    {"schedule": "constant", "warmup_steps": 5},
    {"schedule": "constant"},
    *({"schedule": "wsd", "warmup_share": 0.1, "decay_share": 0.4, "decay_style": style} for style in
      ("linear", "cosine", "minus_sqrt", "exponential")),
    {"schedule": "wsd", "decay_steps": 20},
]  # fmt: skip


def train(**changes: Any) -> Train:
    min_lr = 0.0 if changes.get("schedule") == "constant" else MIN_LR
    return Train(**{"seq_length": 64, "global_batch_size": 8, "steps": STEPS, "lr": LR, "min_lr": min_lr, **changes})


def fall(form: str | None, part: float) -> float:
    """What is left of lr over min_lr once `part` of a decay is done."""
    return {
        "linear": 1 - part,
        None: 1 - part,
        "cosine": (1 + math.cos(math.pi * part)) / 2,
        "minus_sqrt": 1 - math.sqrt(part),
        "exponential": 2 * 0.5**part - 1,
    }[form]


def rate(keys: dict[str, Any], step: int) -> float:
    """The learning rate after `step` steps, from the keys of a run file of `STEPS` steps alone."""
    warmup = keys.get("warmup_steps") or round(keys.get("warmup_share", 0) * STEPS)
    if warmup and step <= warmup:
        return LR * step / warmup
    if keys["schedule"] == "constant":
        return LR
    decay = keys.get("decay_steps") or round(keys.get("decay_share", 0) * STEPS) or STEPS - warmup
    begins = STEPS - decay if keys["schedule"] == "wsd" else warmup
    part = min(1.0, max(0.0, (step - begins) / decay))
    return MIN_LR + (LR - MIN_LR) * fall(
        keys.get("decay_style") if keys["schedule"] == "wsd" else keys["schedule"], part
    )


_RATES = """
import argparse
from types import SimpleNamespace
from cptain.training import resumed_optimizer
from megatron.training import training
from megatron.training.arguments import add_megatron_arguments

resumed_optimizer.install()
parser = add_megatron_arguments(argparse.ArgumentParser())

def begin(words):
    args = parser.parse_args(words)
    args.start_weight_decay = args.end_weight_decay = args.weight_decay
    training.get_args = lambda: args
    group = {"max_lr": args.lr, "min_lr": args.min_lr}
    return group, training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[group]))

found = []
for words in SCHEDULES:
    group, schedule = begin(words)
    rates = []
    for step in range(STEPS):
        if step == 13:
            saved = schedule.state_dict()
            group, schedule = begin(words)
            schedule.load_state_dict(saved)
        schedule.step(8)
        rates.append(group["lr"])
    found.append(rates)
"""


def test_megatrons_rates_are_those_of_every_schedules_formula_also_across_a_resume() -> None:
    size = ["--lr", str(LR), "--train-iters", str(STEPS), "--global-batch-size", "8", "--weight-decay", "0.1"]
    words = []
    for keys in SCHEDULES:
        said = train(**keys)
        rows = schedule_rows(said, STEPS)
        words.append([*size, "--min-lr", str(said.min_lr), *(word for row in rows for word in row[1:])])
    found = in_megatron(f"SCHEDULES, STEPS = {words!r}, {STEPS}\n{_RATES}")
    for keys, rates in zip(SCHEDULES, found, strict=True):
        assert rates == pytest.approx([rate(keys, step) for step in range(1, STEPS + 1)], rel=1e-9), keys


def test_a_wsd_run_logs_the_rates_of_its_formula_and_resumes_amid_its_decay(make_ready_run: RunFileMaker) -> None:
    keys = {"schedule": "wsd", "warmup_share": 0.1, "decay_share": 0.4, "decay_style": "minus_sqrt"}
    optimizer = {"weight_decay": 0.033, "adam_eps": 1e-5, "clip_grad": 0.5, "seed": 7, "eval_steps": 2}
    said = {f"train__{key}": value for key, value in {**keys, **optimizer}.items()}
    file = make_ready_run(train__steps=STEPS, train__warmup_steps=None, **said)
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "15"]')
    assert stopped.exit_code == 75, stopped.output
    resumed = cptain("train", file, "--cpu")
    assert resumed.exit_code == 0, resumed.output
    run = load_run(file)
    steps = read_steps(train_logs(run.logs_folder))
    assert [step.number for step in steps] == list(range(1, STEPS + 1))
    # Megatron logs six digits.
    assert [step.learning_rate for step in steps] == pytest.approx(
        [rate(keys, step.number) for step in steps], rel=1e-6, abs=1e-12
    )
    (before, after) = (json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines())
    assert before["run"]["train"]["schedule"] == "wsd"
    assert (before["last"], after["start"]) == (15, 15)
    assert cptain("export", file).exit_code == 0
    card = (run.hf_folder / f"iter_{STEPS:07d}" / "README.md").read_text()
    assert "| 0.001, constant, then minus_sqrt to 0.0001 in the last 8 steps, 2 steps of warm-up |" in card
    assert "| Adam, betas 0.9 and 0.95, epsilon 1e-05, weight decay 0.033, gradients clipped at 0.5 |" in card


def test_the_settings_reach_megatron_and_the_defaults_are_those_of_before(make_ready_run: RunFileMaker) -> None:
    def flags(**changes: Any) -> set[str]:
        result = cptain("train", make_ready_run(**changes), "--dry-run")
        assert result.exit_code == 0, result.output
        return {line.strip().removesuffix(" \\") for line in result.stdout.splitlines()}

    before = """
        --lr-decay-style cosine, --lr-decay-iters 8, --lr-warmup-iters 1, --weight-decay 0.1, --adam-beta1 0.9,
        --adam-beta2 0.95, --adam-eps 1e-08, --clip-grad 1.0, --seed 1234, --eval-iters 1"""
    assert {flag.strip() for flag in before.split(",")} < flags()
    changed = {"weight_decay": 0.0, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_eps": 1e-5, "clip_grad": 0.0}
    after = """
        --weight-decay 0.0, --adam-beta1 0.8, --adam-beta2 0.99, --adam-eps 1e-05, --clip-grad 0.0, --seed 7,
        --eval-iters 3"""
    said = {f"train__{key}": value for key, value in {**changed, "seed": 7, "eval_steps": 3}.items()}
    assert {flag.strip() for flag in after.split(",")} < flags(**said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "wsd"}, 'train: schedule = "wsd" needs decay_steps or decay_share'),
        ({"decay_steps": 2, "decay_share": 0.5}, "train: give one of decay_steps and decay_share"),
        ({"warmup_share": 0.5}, "train: give one of warmup_steps and warmup_share"),
        ({"decay_style": "linear"}, 'train: decay_style = linear: schedule = "cosine" does not read it'),
        ({"schedule": "constant"}, 'train: min_lr = 0.0001: schedule = "constant" does not read it'),
        (
            {"schedule": "constant", "min_lr": 0.0, "decay_steps": 2},
            'train: decay_steps = 2: schedule = "constant" does not read it',
        ),
        (
            {"schedule": "wsd", "decay_steps": 8},
            "train: warmup_steps = 1 and decay_steps = 8 are over steps = 8 together",
        ),
        ({"decay_share": 0.01}, "train: decay_share = 0.01: steps = 8 is too short for a step of it"),
        ({"warmup_steps": 0, "warmup_share": 0.99}, "train: warmup_steps = 8 must be under steps = 8"),
        ({"schedule": "wsb"}, "train.schedule = \"wsb\": input should be 'cosine', 'wsd', 'linear' or 'constant'"),
        ({"adam_beta2": 1.0}, "train.adam_beta2 = 1.0: input should be less than 1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_name(
    make_ready_run: RunFileMaker, changes: dict[str, Any], message: str
) -> None:
    result = cptain("train", make_ready_run(**{f"train__{key}": value for key, value in changes.items()}), "--dry-run")
    assert result.exit_code == 2
    assert message in result.output


def test_a_decay_that_tokens_make_too_long_is_refused(make_ready_run: RunFileMaker) -> None:
    keys = {"train__steps": None, "train__tokens": "2K", "train__schedule": "wsd", "train__decay_steps": 5}
    result = cptain("train", make_ready_run(**keys), "--dry-run")
    assert result.exit_code == 2
    assert result.output == (
        "cptain: train.warmup_steps = 1 and decay_steps = 5 are over the 4 steps of tokens = 2000 together\n"
    )


def test_a_sweep_over_schedules_is_a_run_each(make_run: RunFileMaker, tmp_path: Path) -> None:
    from cptain.scheduling.sweep import expand

    file = make_run(sweep={"train.schedule, train.decay_steps": [["cosine", 7], ["wsd", 2], ["linear", 4]]})
    assert [(run.name, run.train.decay_steps) for run in expand(load_run(file), file)] == [
        ("run-schedulecosine", 7),
        ("run-schedulewsd", 2),
        ("run-schedulelinear", 4),
    ]
