"""A run that has begun: what may change at its next start, on Megatron's own optimizers, and what may not."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain, in_megatron
from cptain.checkpoint.tracker import write_tracker
from cptain.errors import CptainError
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import RunFile, load_run
from cptain.training.changes import check_changes
from cptain.training.resumed_optimizer import renew

_LOAD_IN_EVERY_OPTIMIZER = """
import copy
import torch
from cptain.megatron.cpu import CudaToCpu
from cptain.training import resumed_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig

resumed_optimizer.install()

def build(kind, lr, decay, beta2, warmup, steps):
    torch.manual_seed(0)
    bf16, distributed = kind != "fp32", kind == "distributed"
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, bf16=bf16),
        DistributedDataParallelConfig(use_distributed_optimizer=distributed),
        torch.nn.Linear(8, 8).to(dtype),  # a weight, which decays, and a bias, which does not
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=lr, min_lr=lr / 10, weight_decay=decay, adam_beta2=beta2, bf16=bf16,
                        params_dtype=dtype, use_distributed_optimizer=distributed), [model])
    schedule = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=lr, min_lr=lr / 10, lr_warmup_steps=warmup, lr_decay_steps=steps,
        lr_decay_style="cosine", start_wd=decay, end_wd=decay, wd_incr_steps=steps, wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False)
    return model, optimizer, schedule

def step(model, optimizer, schedule):
    model.zero_grad_buffer()
    model(torch.ones(2, 8, dtype=next(model.parameters()).dtype)).sum().backward()
    model.finish_grad_sync()
    optimizer.step()
    schedule.step(8)

found = {}
with CudaToCpu():
    torch.distributed.init_process_group("gloo", init_method="file://" + FILE, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    for kind in ("fp32", "bf16", "distributed"):
        begun = build(kind, 1e-3, 0.1, 0.95, 8, 64)
        for _ in range(3):
            step(*begun)
        resumed = build(kind, 1e-5, 0.01, 0.999, 16, 128)
        for one, state in zip(resumed[1:], copy.deepcopy([one.state_dict() for one in begun[1:]])):
            one.load_state_dict(state)
        found[kind] = [
            {key: group[key] for key in ("max_lr", "min_lr", "lr", "weight_decay", "betas")}
            for group in resumed[1].param_groups
        ]
        step(*resumed)
"""

_ORDERS = """
import math
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from cptain.run_file import load_run
from cptain.training.changes import epochs
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

run = load_run(Path(FILE))
lengths = np.full(40, 50, dtype=np.int32)
lengths[::3] = 171
documents = SimpleNamespace(sequence_lengths=lengths, path_prefix="none")
config = GPTDatasetConfig(
    random_seed=1234, sequence_length=64, blend=(["none"], None), split="1,0,0", path_to_cache=CACHE,
    tokenizer=SimpleNamespace(unique_identifiers={}, eod=0, pad=-1, vocab_size=9), reset_position_ids=False,
    reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False)
found = []
for steps in range(1, 60):
    samples = math.ceil(steps * run.train.global_batch_size * 1.005)
    data = GPTDataset(documents, "none", np.arange(40, dtype=np.int32), samples, Split.train, config)
    order = data.document_index.tolist() + data.shuffle_index.tolist()
    found.append((str(epochs(int(lengths.sum()), 1.0, run, steps)), str(order)))
"""


def cosine(step: int, lr: float, min_lr: float, warmup: int, steps: int) -> float:
    """Linear warm-up to `lr`, then a cosine to `min_lr` at the last step."""
    if step <= warmup:
        return lr * step / warmup
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def test_every_optimizer_of_megatron_resumes_with_the_settings_of_its_new_start(tmp_path: Path) -> None:
    found = in_megatron(f"FILE = {str(tmp_path / 'store')!r}\n{_LOAD_IN_EVERY_OPTIMIZER}")
    expected: dict[str, Any] = {
        "max_lr": 1e-5,
        "min_lr": 1e-5 / 10,
        "lr": pytest.approx(cosine(24, 1e-5, 1e-6, 16, 128)),
    }
    expected["betas"] = [0.9, 0.999]
    for kind, groups in found.items():
        assert groups == [{**expected, "weight_decay": 0.01}, {**expected, "weight_decay": 0.0}], kind


def test_groups_that_differ_in_their_rates_alone_keep_their_order_and_their_state() -> None:
    saved = [{"wd_mult": 1.0, "max_lr": rate, "params": [place], "step": 7} for place, rate in enumerate((1.0, 2.0))]
    renew(saved, [{"wd_mult": 1.0, "max_lr": rate, "params": []} for rate in (0.1, 0.3)])
    assert [(group["max_lr"], group["params"], group["step"]) for group in saved] == [(0.1, [0], 7), (0.3, [1], 7)]
    with pytest.raises(ValueError, match="too few parameter groups"):
        renew(saved, [{"wd_mult": 0.0, "params": []}])


def test_a_run_goes_on_with_other_rates_steps_and_warm_up(make_ready_run: RunFileMaker, trained_run: Path) -> None:
    file = make_ready_run(train__lr=1e-5, train__min_lr=1e-6, train__steps=7, train__warmup_steps=5)
    run = load_run(file)
    shutil.copytree(load_run(trained_run).checkpoints_folder / "iter_0000004", run.checkpoints_folder / "iter_0000004")
    write_tracker(run.checkpoints_folder, 4)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    steps = read_steps(train_logs(run.logs_folder))
    assert [(step.number, step.sequences) for step in steps] == [(5, 40), (6, 48), (7, 56)]
    assert [step.learning_rate for step in steps] == pytest.approx(
        [cosine(step, 1e-5, 1e-6, 5, 7) for step in (5, 6, 7)], rel=1e-5
    )


def as_started(run: RunFile) -> dict[str, Any]:
    return run.model_dump(mode="json", exclude_none=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("global_batch_size", 16, "train.global_batch_size: 8 → 16: a run that has begun keeps it (how far it is"),
        ("seq_length", 128, "train.seq_length: 64 → 128: a run that has begun keeps it (its data is cut"),
        ("precision", "bf16", 'train.precision: "fp32" → "bf16": a run that has begun keeps it (the optimizer'),
        ("precision", "fp8", 'train.precision: "fp32" → "fp8": a run that has begun keeps it (the optimizer'),
    ],
)
def test_what_a_begun_run_cannot_change_is_refused(
    make_ready_run: RunFileMaker, key: str, value: object, message: str
) -> None:
    before = as_started(load_run(make_ready_run()))
    with pytest.raises(CptainError) as refusal:
        check_changes(before, load_run(make_ready_run(**{f"train__{key}": value})))
    assert str(refusal.value).startswith(message)
    assert str(refusal.value).endswith("export the run and begin another with that as model.hf")
    assert refusal.value.exit_status == 2


def test_bf16_and_fp8_and_the_rates_may_change_without_a_word(make_ready_run: RunFileMaker) -> None:
    before = as_started(load_run(make_ready_run(train__precision="bf16")))
    after = load_run(make_ready_run(train__precision="fp8", train__lr=1e-5, train__min_lr=0.0, train__warmup_steps=3))
    assert check_changes(before, after) == []


ANEW = "the order of the data begins anew: some sequences come again and others are left out"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data__mix": "uniform"}, f'data.mix: "tokens" → "uniform": {ANEW}'),
        ({"data__split": "80,20,0"}, f'data.split: "90,10,0" → "80,20,0": {ANEW}'),
        ({"train__seed": 7}, f"train.seed: 1234 → 7: {ANEW}"),
        (
            {"train__megatron_args": ["--dataloader-type", "cyclic"]},
            f"--dataloader-type: default → cyclic: {ANEW}",
        ),
        ({"train__megatron_args": ["--dataloader-type=cyclic"]}, f"--dataloader-type: default → cyclic: {ANEW}"),
    ],
)
def test_a_change_that_shuffles_the_data_anew_is_said(
    make_ready_run: RunFileMaker, change: dict[str, Any], line: str
) -> None:
    before = as_started(load_run(make_ready_run()))
    assert check_changes(before, load_run(make_ready_run(**change))) == [line]


def test_more_steps_are_said_where_they_shuffle_other_epochs_together(make_ready_run: RunFileMaker) -> None:
    before = as_started(load_run(make_ready_run()))
    assert check_changes(before, load_run(make_ready_run(train__steps=9))) == []
    (line,) = check_changes(before, load_run(make_ready_run(train__steps=800)))
    assert line.startswith("steps: 8 → 800 (0.")
    assert line.endswith(f" epochs of its data): {ANEW}")
    tokens = {"train__steps": None, "train__tokens": 8 * 8 * 64}
    assert check_changes(before, load_run(make_ready_run(**tokens))) == []  # which is 8 steps
    before = as_started(load_run(make_ready_run(**tokens)))
    assert check_changes(before, load_run(make_ready_run(train__steps=20, train__warmup_steps=9))) == []


def test_megatron_orders_its_data_alike_where_the_epochs_are_alike(
    make_ready_run: RunFileMaker, tmp_path: Path
) -> None:
    """Its own GPTDataset, for many numbers of steps."""
    found = in_megatron(f"FILE, CACHE = {str(make_ready_run())!r}, {str(tmp_path)!r}\n{_ORDERS}")
    orders: dict[str, set[str]] = {}
    for epochs, order in found:
        orders.setdefault(epochs, set()).add(order)
    assert len(orders) > 8
    assert all(len(alike) == 1 for alike in orders.values())
    assert len(set.union(*orders.values())) == len(orders)
