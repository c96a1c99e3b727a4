"""train.megatron_args: what the run file, config.json or nobody reads is refused, before anything starts."""

import shlex
from typing import Any

import pytest
from click.testing import Result
from conftest import RunFileMaker, cptain, in_megatron
from cptain.training import flags
from cptain.training.megatron_args import Row, refusal

_READ = """
import argparse, ast, dataclasses, re
from pathlib import Path
import megatron.core
from cptain.megatron.unread_arguments import unread
from cptain.training import pretrain
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training.arguments import add_megatron_arguments

script = Path(pretrain.__file__)
root = Path(megatron.core.__file__).parents[1]
other_models = re.compile("core/(inference|export)/|core/models/(T5|bert|retro|vision|multimodal|mimo|huggingface)/")
own_scripts = ("get_blend_and_blend_per_split", "get_batch_on_this_tp_rank", "dummy_train_step")

def reads(node):
    if isinstance(node, ast.FunctionDef) and node.name in own_scripts:
        return
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        yield node.attr
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from reads(child)

read = set()
for file in (script, *root.rglob("*.py")):
    name = str(file.relative_to(root)) if file.is_relative_to(root) else "ours"
    if not other_models.search(name + "/") and not name.endswith(("/arguments.py", "yaml_arguments.py")):
        read.update(reads(ast.parse(file.read_text(encoding="utf-8"))))
ours = set(reads(ast.parse(script.read_text(encoding="utf-8"))))
ours |= {node.arg for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.keyword)}
of_data = {field.name for field in dataclasses.fields(GPTDatasetConfig)}
actions = add_megatron_arguments(argparse.ArgumentParser())._actions
flags = {flag: action.dest for action in actions for flag in action.option_strings if flag.startswith("--")}
not_on_our_path = [flag for flag, name in flags.items() if name not in read]
found = {
    "flags": flags,
    "unread": unread([*not_on_our_path, *SOME_READ], script),
    "not on our path": not_on_our_path,
    "of data sets alone": [flag for flag, name in flags.items() if name in of_data and name not in ours],
}
"""

# Arguments of Megatron that work though no code of its training names them.
_WORK_ELSEWHERE = {
    "arguments.py turns it into another argument": """
        --ckpt-fully-parallel-save --cuda-graph-scope --decoder-first-pipeline-num-layers
        --decoder-last-pipeline-num-layers --disable-msc --grad-reduce-in-bf16 --init-method-xavier-uniform
        --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-persist-layer-norm --no-weight-decay-cond-type
        --num-layers-per-virtual-pipeline-stage --num-virtual-stages-per-pipeline-rank --te-precision-config-file
    """,
    "read by getattr with a computed name": """
        --muon-coefficient-type --muon-extra-scale-factor --muon-fp32-matmul-prec --muon-momentum --muon-nesterov
        --muon-no-split-qkv --muon-num-ns-steps --muon-tp-mode
    """,
    "shows the parser's own help": "--help",
    "says to another train.script what ours does anyway": "--no-create-attention-mask-in-dataloader",
}
_SOME_READ = ["--lr", "--data-cache-path", "--norm-epsilon", "--seed", "--muon-momentum"]
# The data sets' arguments that the model or the loop reads as well.
_READ_BY_THE_LOOP = "--context-parallel-size --no-create-attention-mask-in-dataloader --sequence-parallel"


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """Of the installed Megatron: every argument, and those that no code on our script's path reads."""
    return in_megatron(f"SOME_READ = {_SOME_READ}\n{_READ}")  # type: ignore[no-any-return]


def dry_run(file: object) -> Result:
    return cptain("train", file, "--dry-run")


def test_every_argument_of_megatron_is_read_or_refused_or_has_a_reason(arguments: dict[str, Any]) -> None:
    assert len(arguments["flags"]) > 700
    working = {flag for flags in _WORK_ELSEWHERE.values() for flag in flags.split()} | set(arguments["unread"])
    assert [flag for flag in arguments["not on our path"] if flag not in working and not refusal(flag, [])] == []
    of_data = [flag for flag in arguments["of data sets alone"] if flag not in _READ_BY_THE_LOOP.split()]
    assert [flag for flag in of_data if not refusal(flag, [])] == []


def test_what_this_megatron_reads_nowhere_is_found(arguments: dict[str, Any]) -> None:
    assert {"--check-for-spiky-loss", "--exit-signal-handler-for-dataloader"} < set(arguments["unread"])
    assert not set(_SOME_READ) & set(arguments["unread"])


def test_no_other_name_of_a_refused_argument_is_taken(
    arguments: dict[str, Any], make_ready_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = []
    monkeypatch.setattr(flags, "check_megatron_args", lambda run, built: rows.extend(built))
    assert dry_run(make_ready_run()).exit_code == 0
    names: dict[str, str] = arguments["flags"]
    refused = {name for flag, name in names.items() if refusal(flag, rows)}
    assert {"lr", "hidden_size", "save_interval", "fp16", "mock_data"} < refused
    assert [flag for flag, name in names.items() if name in refused and not refusal(flag, rows)] == []


def test_no_argument_of_megatron_is_taken_for_an_abbreviation(arguments: dict[str, Any]) -> None:
    taken = [flag for flag in arguments["flags"] if "no such argument" in (refusal(flag, [("train.lr", "--lr")]) or "")]
    assert taken == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rotary-base", "1000000"], "--rotary-base: the model's config.json says it"),
        (["--rotary-base=1000000"], "--rotary-base: the model's config.json says it"),
        (
            ["--rotary-b", "1000000"],
            "--rotary-b: Megatron has no such argument; --rotary-base: the model's config.json",
        ),
        (["--untie-embeddings-and-output-weights"], "--untie-embeddings-and-output-weights: the model's config.json"),
        (["--decoder-num-layers", "3"], "--decoder-num-layers: the model's config.json says it"),
        (["--num-experts", "8"], "--num-experts: the model's config.json says it"),
        (["--use-checkpoint-args"], "--use-checkpoint-args: the model's config.json says it"),
        (["--lr", "1"], "--lr: set train.lr"),
        (["--log-interval", "2", "--lr=1"], "--lr: set train.lr"),
        (["--clip-grad", "0.5"], "--clip-grad: set train.clip_grad"),
        (["--start-weight-decay", "0.5"], "--start-weight-decay: set train.weight_decay"),
        (["--seed", "7"], "--seed: set train.seed"),
        (["--fp16"], "--fp16: set train.precision"),
        (["--train-samples", "99"], "--train-samples: set train.steps"),
        (["--lr-decay-samples", "99"], "--lr-decay-samples: set train.decay_steps"),
        (["--lr-warmup-fraction", "0.1"], "--lr-warmup-fraction: set train.warmup_steps"),
        (["--pipeline-model-parallel-size", "3"], "--pipeline-model-parallel-size: set parallel.pipeline"),
        (["--tokenizer-model", "/nowhere"], "--tokenizer-model: set model.tokenizer"),
        (["--recompute-granularity", "full"], "--recompute-granularity: set train.recompute"),
        (["--save", "x"], "--save: set work_dir and name"),
        (["--yaml-cfg", "x"], "--yaml-cfg: the run file says every argument"),
        (["--fp8-param-gather"], "--fp8-param-gather: checkpoints and exports would hold weights rounded to fp8"),
        (["--deterministic-mode"], "--deterministic-mode: set train.deterministic"),
        (["--data-path", "x"], "--data-path: set data.input and data.mix"),
        (["--per-split-data-args-path", "x"], "--per-split-data-args-path: set data.input and data.mix"),
        (["--mock-data"], "--mock-data: set data.input and data.mix"),
        (["--sft"], "--sft: cptain's training script does nothing with it: it reads documents as they were tokenized"),
        (
            ["--reset-attention-mask"],
            "--reset-attention-mask: cptain's training script does nothing with it: data.documents",
        ),
        (
            ["--reset-position-ids"],
            "--reset-position-ids: cptain's training script does nothing with it: data.documents",
        ),
    ],
)
def test_what_something_else_says_is_refused_by_name(
    make_ready_run: RunFileMaker, words: list[str], message: str
) -> None:
    result = dry_run(make_ready_run(train__megatron_args=words))
    assert result.exit_code == 2
    assert result.output.startswith(f"cptain: train.megatron_args: {message}")
    assert result.output.count("\n") == 1


def test_defaults_of_ours_may_be_overridden(make_ready_run: RunFileMaker) -> None:
    words = ["--optimizer", "sgd", "--num-workers=1", "--log-interval=2"]
    assert dry_run(make_ready_run(train__megatron_args=words)).exit_code == 0


def test_another_script_may_read_what_ours_does_not(make_ready_run: RunFileMaker, tmp_path: Any) -> None:
    (tmp_path / "script.py").touch()
    file = make_ready_run(train__script="script.py", train__megatron_args=["--sft"])
    assert dry_run(file).exit_code == 0
    assert dry_run(make_ready_run(train__script="script.py", train__megatron_args=["--lr", "1"])).exit_code == 2


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_reads_all_that_cptain_passes(make_ready_run: RunFileMaker, tensor: int) -> None:
    """train asks it of the run file's megatron_args alone."""
    shown = dry_run(make_ready_run(parallel__tensor=tensor)).stdout.replace("\\\n", " ")
    words = [word for word in shlex.split(shown) if word.startswith("--")]
    script = "from pathlib import Path\nfrom cptain.megatron.unread_arguments import unread\n"
    script += "from cptain.training import pretrain\n"
    assert in_megatron(f"{script}found = unread({words!r}, Path(pretrain.__file__))") == []
