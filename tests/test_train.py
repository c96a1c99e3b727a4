"""train: the real Megatron-LM, on the CPU, from our checkpoints and data; and every way it can fail."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from conftest import RunFileMaker, cptain, write_jsonl
from cptain.checkpoint.tracker import read_tracker
from cptain.data.split import training_tokens
from cptain.data.steps import train_steps
from cptain.errors import RESUMABLE, CptainError
from cptain.megatron.log import parse_step, parse_validation, read_steps, train_logs
from cptain.model.architecture import read_architecture
from cptain.model.sizes import parameters
from cptain.run_file import load_run
from cptain.training.documents import Documents, File, same_blend
from cptain.training.flags import check_parallel


def losses(run_file: Path) -> list[float]:
    return [step.loss for step in read_steps(train_logs(load_run(run_file).logs_folder))]


def test_z_loss_changes_what_is_trained_and_not_what_is_logged(make_ready_run: RunFileMaker, trained_run: Path) -> None:
    file = make_ready_run(train__z_loss=1.0)
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval","3"]')
    assert stopped.exit_code == RESUMABLE, stopped.output
    plain, found = losses(trained_run), losses(file)
    assert found[:2] == plain[:2]  # the warm-up begins at 0
    assert found[2] != plain[2]


def last_line(result: Result) -> str:
    return result.output.strip().splitlines()[-1]


def wait_for(run_file: Path, what: str, is_in: Callable[[list[Path]], bool]) -> None:
    """Wait until something is in the run's logs."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if is_in(train_logs(load_run(run_file).logs_folder)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{what} was not reached in 120 s")


def wait_for_step(run_file: Path, number: int) -> None:
    wait_for(run_file, f"step {number}", lambda logs: any(step.number >= number for step in read_steps(logs)))


def test_the_real_megatron_trains_and_the_loss_falls(trained_run: Path) -> None:
    found = losses(trained_run)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.05
    checkpoints = load_run(trained_run).checkpoints_folder
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == ["iter_0000004", "iter_0000008"]
    assert read_tracker(checkpoints) == 8


def test_what_megatron_saved_exports_bit_equal_and_computes_the_same_logits(own_trained_run: Path) -> None:
    assert cptain("export", own_trained_run).exit_code == 0
    run = load_run(own_trained_run)
    result = cptain("verify", run.hf_folder / "iter_0000008", run.checkpoints_folder, "--logits")
    assert result.exit_code == 0, result.output
    assert "21 of 21 tensors bit-equal" in result.output
    assert (
        cptain("verify", run.hf_folder / "iter_0000008", run.megatron_folder).exit_code == 1
    )  # it did learn something


def test_a_done_run_is_said_to_be_done(trained_run: Path) -> None:
    result = cptain("train", trained_run, "--cpu")
    assert result.exit_code == 0
    assert result.output.startswith("train: all 8 steps are done (")


def test_a_run_stopped_in_the_middle_and_resumed_has_the_losses_of_one_that_was_not(
    make_ready_run: RunFileMaker, trained_run: Path
) -> None:
    file = make_ready_run()
    stopped = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "3"]')
    assert stopped.exit_code == 75
    assert last_line(stopped) == "cptain: train: stopped early; saved at step 3 of 8; the same command continues"
    resumed = cptain("train", file, "--cpu")
    assert resumed.exit_code == 0, resumed.output
    assert f"train: from step 3 of {load_run(file).checkpoints_folder} to step 8" in resumed.output
    assert losses(file) == losses(trained_run)


@pytest.mark.parametrize("parallel", ["tensor", "pipeline"])
def test_two_processes_give_the_losses_of_one(make_ready_run: RunFileMaker, trained_run: Path, parallel: str) -> None:
    file = make_ready_run(train__steps=8, **{f"parallel__{parallel}": 2})
    result = cptain("train", file, "--cpu", "--set", 'train.megatron_args=["--exit-interval", "3"]')
    assert result.exit_code == 75, result.output
    assert losses(file) == pytest.approx(losses(trained_run)[:3], abs=2e-5)
    assert cptain("export", file).exit_code == 0
    run = load_run(file)
    assert cptain("verify", run.hf_folder / "iter_0000003", run.checkpoints_folder).exit_code == 0


def test_files_too_small_to_be_split_and_many_of_them_train(
    make_run: RunFileMaker, tmp_path: Path, ready_run: Path
) -> None:
    """A file of one document has no validation part: Megatron alone never returns from it."""
    for number in range(150):
        write_jsonl(tmp_path / "in" / f"{number % 7} folder" / f"{number}.jsonl", [f"document {number} of many"])
    shared = load_run(ready_run).megatron_folder
    file = make_run(data__input=["in/**/*.jsonl"], model__megatron=str(shared), train__steps=2, train__warmup_steps=0)
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 0, result.output
    assert len(json.loads((load_run(file).folder / "blend.json").read_text())["files"]) == 150


def test_many_files_read_as_one_give_what_each_gives(ready_run: Path) -> None:
    """Against the ids in the .bin files themselves, whole and in parts, in the order of the files."""
    folder = load_run(ready_run).data_folder
    files = [File(str(folder / name)) for name in ("a_text_document", "sub/a_text_document")]
    whole = Documents([(file, file.part((0.0, 1.0))) for file in files])
    ids = np.concatenate([np.fromfile(f"{file.prefix}.bin", dtype=np.uint16) for file in files])
    assert len(whole) == sum(len(file.lengths) for file in files)
    assert np.array_equal(np.concatenate([whole.get(number) for number in range(len(whole))]), ids)
    assert np.array_equal(whole.get(41, offset=3, length=5), whole.get(41)[3:8])
    early, late = (Documents([(file, file.part(bounds)) for file in files]) for bounds in ((0.0, 0.9), (0.9, 1.0)))
    assert len(early) + len(late) == len(whole)
    assert np.array_equal(late.get(0), whole.get(len(files[0].part((0.0, 0.9)))))
    assert early.path_prefix != whole.path_prefix


def test_files_of_one_weight_a_token_become_one_data_set(ready_run: Path) -> None:
    folder = load_run(ready_run).data_folder
    a, b, c = (
        File(str(folder / name)) for name in ("a_text_document", "sub/a_text_document", "sub/deeper/b_text_document")
    )
    by_tokens = same_blend([(float(file.tokens), file) for file in (a, b, c)])
    assert by_tokens == [(a.tokens + b.tokens + c.tokens, [a, b, c])]
    tables = same_blend([(2.0 * a.tokens, a), (2.0 * b.tokens, b), (1.0 * c.tokens, c)])
    assert tables == [(2.0 * (a.tokens + b.tokens), [a, b]), (1.0 * c.tokens, [c])]


def test_dry_run_prints_the_command_one_flag_a_line(make_ready_run: RunFileMaker, model: Path) -> None:
    result = cptain("train", make_ready_run(parallel__tensor=2, train__precision="bf16"), "--dry-run")
    assert result.exit_code == 0
    lines = [line.strip().removesuffix(" \\") for line in result.stdout.splitlines()]
    assert "--standalone --nproc-per-node 2" in lines[0]
    for flag in (
        "--num-layers 2",
        "--num-query-groups 2",
        "--rotary-base 500000",
        "--rope-scaling-factor 8.0",
        "--norm-epsilon 1e-05",
        "--untie-embeddings-and-output-weights",
        "--make-vocab-size-divisible-by 256",
        "--train-iters 8",
        "--bf16",
        "--sequence-parallel",
        "--no-load-optim",
        f"--tokenizer-model '{model}'",
    ):
        assert flag in lines
    assert all(line.count("--") == 1 or line.startswith("--load") for line in lines[1:])


def test_arguments_of_the_run_file_come_last_so_that_they_win(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__megatron_args=["--log-interval", "2"])
    words = cptain("train", file, "--dry-run").stdout.replace("\\\n", " ").split()
    assert words[-2:] == ["--log-interval", "2"]
    assert words.index("--log-interval") < len(words) - 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel__pipeline": 3}, "parallel.pipeline = 3: the model has 2 layers, and a stage needs one"),
        ({"parallel__tensor": 8}, "parallel.tensor = 8 does not divide the 4 attention heads"),
        ({"parallel__tensor": 4}, "parallel.tensor = 4 does not divide the 2 key and value heads"),
        ({"train__seq_length": 200000}, "train.seq_length = 200000: the model's config.json allows at most 131072"),
        ({"train__precision": "fp8"}, 'train.precision = "fp8": not on the CPU'),
        ({"parallel__context": 2}, "parallel.context = 2: not on the CPU"),
        ({"train__script": "no.py"}, "no.py: no such file"),
        (
            {"train__steps": None, "train__tokens": 512},
            "train.warmup_steps = 1 must be under the 1 steps of tokens = 512",
        ),
    ],
)
def test_an_impossible_combination_is_refused_before_anything_starts(
    make_ready_run: RunFileMaker, changes: dict[str, Any], message: str
) -> None:
    result = cptain("train", make_ready_run(**changes), "--cpu")
    assert result.exit_code == 2
    assert last_line(result).startswith("cptain: ")
    assert message in last_line(result)


def test_processes_and_batch_that_do_not_divide_are_refused_with_both_numbers(
    make_run: RunFileMaker, model: Path
) -> None:
    architecture = read_architecture(model)
    with pytest.raises(CptainError, match="tensor × pipeline × context = 4 does not divide the 6 processes"):
        check_parallel(load_run(make_run(parallel__tensor=2, parallel__pipeline=2)), architecture, 6)
    message = (
        r"micro_batch_size × data-parallel size = 6 does not divide the 8 sequences of train.global_batch_size "
        r"\(micro_batch_size = 2, 3 copies of the model\)"
    )
    with pytest.raises(CptainError, match=message):
        check_parallel(load_run(make_run()), architecture, 3)
    result = cptain("train", make_run(), "--cpu", "--nproc-per-node", 3)
    assert result.exit_code == 2


def test_without_a_gpu_training_says_so(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run())
    assert (result.exit_code, "no GPU found" in last_line(result)) == (1, True)


def damage(what: str, run_file: Path) -> None:
    run = load_run(run_file)
    if what == "no data":
        shutil.rmtree(run.data_folder)
    elif what == "a lost .bin":
        (run.data_folder / "a_text_document.bin").unlink()
    elif what == "no converted checkpoint":
        shutil.rmtree(run.megatron_folder)
    elif what == "a converted checkpoint cut short":
        os.truncate(run.megatron_folder / "release" / "__0_0.distcp", 1000)
    elif what == "a tracker without its checkpoint":
        run.checkpoints_folder.mkdir(parents=True)
        (run.checkpoints_folder / "latest_checkpointed_iteration.txt").write_text("5")
    elif what == "an unreadable tracker":
        run.checkpoints_folder.mkdir(parents=True)
        (run.checkpoints_folder / "latest_checkpointed_iteration.txt").write_text("five")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no data", "manifest.json: missing: the data is not ready; run preprocess first"),
        ("a lost .bin", "a_text_document.bin: missing: run preprocess again"),
        ("no converted checkpoint", "there is no checkpoint in "),
        ("a converted checkpoint cut short", "__0_0.distcp: truncated: 1000 bytes where .metadata needs "),
        ("a tracker without its checkpoint", "iter_0000005: not a complete torch_dist checkpoint"),
        ("an unreadable tracker", 'latest_checkpointed_iteration.txt: must hold "release" or an iteration'),
    ],
)
def test_missing_or_unreadable_input_is_exit_1_with_a_line_that_names_it(
    make_run: RunFileMaker, ready_run: Path, what: str, message: str
) -> None:
    file = make_run()
    shutil.copytree(load_run(ready_run).folder, load_run(file).folder, symlinks=True)  # a lock is a link
    damage(what, file)
    result = cptain("train", file, "--cpu")
    assert result.exit_code == 1
    assert message in last_line(result)


def test_data_or_a_checkpoint_made_from_something_else_is_refused(
    make_ready_run: RunFileMaker, trained_run: Path, model: Path, tmp_path: Path
) -> None:
    result = cptain("train", make_ready_run(data__input=[f"{tmp_path}/*.jsonl"]), "--cpu")
    assert result.exit_code == 1
    assert "manifest.json: made from data.input and data.tokenized = [" in last_line(result)
    shutil.copytree(model, tmp_path / "other")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    result = cptain("train", make_ready_run(model__hf="./other", model__tokenizer=str(model)), "--cpu")
    assert result.exit_code == 1
    assert f"release: converted from {model}, and model.hf is {tmp_path / 'other'}: run convert again" in last_line(
        result
    )
    result = cptain("train", trained_run, "--cpu", "--set", "train.steps=5")
    assert result.exit_code == 2
    assert "train.steps = 5: " in last_line(result)
    assert last_line(result).endswith("is at step 8, beyond it")


def test_a_dry_run_leaves_the_run_file_of_the_last_stage(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    assert cptain("train", file, "--dry-run", "--set", "train.lr=0.5").exit_code == 0
    assert not (load_run(file).folder / "run.toml").exists()


def test_data_of_another_tokenizer_is_refused(make_ready_run: RunFileMaker, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    config = tmp_path / "other" / "tokenizer_config.json"
    config.write_text(config.read_text() + "\n")
    result = cptain("train", make_ready_run(model__tokenizer="./other"), "--cpu")
    assert result.exit_code == 1
    assert ": made with another model.tokenizer, and the run file has " in last_line(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap-param-gather"], "AssertionError: "),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--exit-signal-handler-for-dataloader"], "ValueError: --exit-signal-handler-for-dataloader: this Megatron"),
    ],
)
def test_what_megatron_refuses_is_exit_1_with_its_own_reason(
    make_ready_run: RunFileMaker, arguments: list[str], message: str
) -> None:
    result = cptain("train", make_ready_run(train__megatron_args=arguments), "--cpu")
    assert result.exit_code == 1
    assert last_line(result).startswith("cptain: train: ")
    assert message in last_line(result)


def test_steps_come_from_tokens_or_epochs(make_ready_run: RunFileMaker, ready_run: Path) -> None:
    from cptain.data.manifest import read_manifest

    records = read_manifest(load_run(ready_run).data_folder, load_run(ready_run).data.sources)
    tokens = training_tokens(load_run(ready_run).data_folder, records, "90,10,0")
    run = load_run(make_ready_run(train__steps=None, train__tokens=64 * 8 * 10 + 1))
    assert train_steps(run, records) == 11
    run = load_run(make_ready_run(train__steps=None, train__epochs=2.0))
    assert train_steps(run, records) == -(-2 * tokens // (64 * 8))


def test_the_parameter_count_is_that_of_the_model(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert parameters(read_architecture(model)) == AutoModelForCausalLM.from_pretrained(str(model)).num_parameters()


def test_the_log_lines_of_the_fork_and_of_upstream_are_read() -> None:
    fork = (
        " [2026-11-23 22:44:21] iteration     3600/    3600 | consumed samples:      1843200 | "
        "elapsed time per iteration (ms): 370.1 | throughput per GPU (TFLOP/s/GPU): 497.0 | "
        "learning rate: 1.000000E-06 | global batch size:   512 | lm loss: 1.672335E+00 | loss scale: 1.0 | "
        "grad norm: 0.311 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )
    step = parse_step(fork)
    assert step is not None
    assert (step.number, step.steps, step.loss) == (3600, 3600, 1.672335)
    assert step.seconds == pytest.approx(0.3701)
    assert (step.learning_rate, step.grad_norm, step.global_batch_size) == (1e-6, 0.311, 512)
    assert parse_step("iteration something else") is None
    assert parse_validation(" validation loss at iteration 10 | lm loss value: 6.5E+00 | lm loss PPL: 665 | ") == (
        10,
        6.5,
    )
    assert parse_validation(" validation loss at iteration 60 on validation set | lm loss value: 6.3E+00 | ") == (
        60,
        6.3,
    )


def test_the_whole_log_and_the_command_are_kept(trained_run: Path) -> None:
    (log,) = train_logs(load_run(trained_run).logs_folder)
    text = log.read_text()
    assert re.match(r"\S+python\S* -m torch.distributed.run --standalone", text)
    assert text.count(" iteration ") >= 8
    assert json.loads((load_run(trained_run).folder / "provenance.json").read_text())["train"]["packages"][
        "megatron-core"
    ]
