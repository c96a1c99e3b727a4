"""cptain plan: what a run needs on a site, from the real sizes of Llama 3.1 and logs that H100s wrote."""

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RunFileMaker, as_if_trained, cptain
from cptain.model.architecture import Architecture
from cptain.model.sizes import parameters
from cptain.run_file import RunFile, load_run
from cptain.scheduling.sites import load_site
from cptain.training import measured
from cptain.training.layout import Layout
from cptain.training.measured import Planned
from cptain.training.rates import Rate, known_rates, nearest, plan_log, step_seconds
from cptain.training.step_time import gpu_seconds, whole_step
from test_memory import LLAMA_8B, changed, llama

PROJECT = Path(__file__).resolve().parent.parent
RECORDED = PROJECT / "tests" / "recordings" / "megatron" / "h100-four-layers-of-8b.log"
SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"num_hidden_layers": 32},
    "70B": {
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    },
    "405B": {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
    },
}
PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}


def model_of(folder: Path, name: str) -> Path:
    """A model's folder with its config.json and a file of weights that nobody reads."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **SHAPES[name]}))
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def swallow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The shipped run, with a model and a large disk that are here."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1 << 50))
    file = PROJECT / "runs" / "swallow-8b.toml"
    return [file, "--set", f"model.hf={model_of(tmp_path, '8B')}", "--set", f'work_dir="{tmp_path}"']


def planned(*arguments: Any) -> dict[str, Any]:
    """What plan --json says."""
    result = cptain("plan", *arguments, "--json")
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_the_shipped_run_is_planned_for_tsubame(swallow: list[Any]) -> None:
    document = planned(*swallow)
    assert document["parameters"] == PARAMETERS["8B"]
    assert document["gpus"] == 16
    assert [stage["layers"] for stage in document["memory"]["stages"]] == [16, 16]
    assert document["memory"]["fullest_stage"] == 1
    assert document["memory"]["fits"] == "yes"
    for stage in document["memory"]["stages"]:
        parts = [stage[name] for name in ("weights", "gradients", "optimizer", "activations", "logits", "other")]
        assert stage["peak"] == pytest.approx(sum(parts), abs=0.05)
    assert document["steps"] == 3600
    assert document["data"] is None
    assert document["disk"]["to_come"] == 6
    assert document["disk"]["checkpoint_bytes"] == 14 * PARAMETERS["8B"]
    time = document["time"]
    assert time["hours"] == pytest.approx(3600 * time["step_seconds"] / 3600, rel=0.001)
    assert time["node_hours"] == pytest.approx(4 * time["hours"], rel=0.001)
    assert time["chain"] == 3
    assert "docs/plan.md" in time["from"]


def test_people_read_the_same(swallow: list[Any]) -> None:
    output = cptain("plan", *swallow).stdout
    document = planned(*swallow)
    assert "model        8,030,261,248 parameters" in output
    assert f"fits         {document['memory']['peak']:.1f} GiB of the GPU's 93.5 (69%)" in output
    assert 'train.recompute = "auto": none, as a step without it needs 64 GiB' in output
    assert "fastest      tensor 1, pipeline 2, context 1, data 8; micro batch 1; recompute none: " in output
    assert "data         not tokenized yet" in output
    assert all(len(line) < 400 for line in output.splitlines())


def test_a_login_node_needs_neither_torch_nor_time(swallow: list[Any]) -> None:
    script = "import sys; sys.modules['torch'] = None; from cptain.cli import main; main()"
    words = [sys.executable, "-c", script, "plan", *map(str, swallow)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout


@pytest.mark.parametrize(("name", "nodes"), [("8B", 4), ("70B", 16), ("405B", 32)])
def test_every_llama_finds_a_layout_on_abci(name: str, nodes: int, swallow: list[Any], tmp_path: Path) -> None:
    options = ["--site", "abci3", "--set", f"model.hf={model_of(tmp_path, name)}", "--set", f"jobs.nodes={nodes}"]
    document = planned(*swallow, *options)
    assert document["parameters"] == PARAMETERS[name]
    best = document["fastest"][0]
    assert best["peak"] < 0.85 * 140.4
    assert best["layout"]["tensor"] <= 8
    sizes = [best["layout"][size] for size in ("tensor", "pipeline", "context", "data")]
    assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8 * nodes
    words = [
        word
        for size in ("tensor", "pipeline", "context")
        for word in ("--set", f"parallel.{size}={best['layout'][size]}")
    ]
    again = planned(*swallow, *options, *words)  # the proposal, taken
    assert again["memory"]["peak"] == best["peak"]
    assert again["time"]["step_seconds"] == best["step_seconds"]


def test_126_layers_lie_on_eight_stages(swallow: list[Any], tmp_path: Path) -> None:
    options = [f"model.hf={model_of(tmp_path, '405B')}", "parallel.pipeline=8", "parallel.tensor=8", "jobs.nodes=32"]
    document = planned(*swallow, "--site", "abci3", *[word for one in options for word in ("--set", one)])
    assert [stage["layers"] for stage in document["memory"]["stages"]] == [15, 16, 16, 16, 16, 16, 16, 15]


def test_jobs_and_plan_say_the_same_of_what_cannot_fit(swallow: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cptain.sif").touch()
    changes = [
        f"model.hf={model_of(tmp_path, '70B')}",
        f'jobs.image="{tmp_path}/cptain.sif"',
        "data.input=['/x/*.jsonl']",
    ]
    options = [word for change in changes for word in ("--set", change)]
    refusal = planned(*swallow, *options)["memory"]["refusal"]
    assert refusal.startswith("a step needs ")
    assert " GiB of the GPU's 94 (stage 1 of 2: weights 66, gradients 131, optimizer " in refusal
    result = cptain("jobs", *swallow, *options)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == (
        f"cptain: {refusal}: take more nodes, or another layout (cptain plan proposes one)"
    )
    assert f"fits         no: {refusal}" in cptain("plan", *swallow, *options).stdout
    tables = (PROJECT / "jobs" / "sites" / "gridengine.toml").read_text()  # one that says no gpu_memory
    assert "gpu_memory" not in tomllib.loads(tables)
    assert cptain("jobs", *swallow, *options, "--site", "gridengine").exit_code == 0


def test_jobs_submits_the_chain_that_plan_counts(swallow: list[Any], tmp_path: Path) -> None:
    (tmp_path / "cptain.sif").touch()
    options = ["--set", f'jobs.image="{tmp_path}/cptain.sif"', "--set", "data.input=['/x/*.jsonl']"]
    options += ["--set", "train.steps=10000"]
    chain = planned(*swallow, *options)["time"]["chain"]
    assert chain == 4
    assert f"/jobs, {chain} train jobs" in cptain("jobs", *swallow, *options).output


def test_epochs_and_documents_are_those_of_training(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    first = cptain("train", file, "--cpu", "--dry-run").stderr.splitlines()[0]
    document = planned(file)
    (part,) = document["data"]["parts"]
    assert first.startswith(f"train: {part['documents']:,} documents, {part['tokens']:,} tokens to train on; 8 steps")
    assert f"{part['epochs']:.3g} epochs" in first


def test_a_checkpoint_is_as_large_as_the_last_one(ready_run: Path, make_ready_run: RunFileMaker) -> None:
    file = make_ready_run()
    as_if_trained(file, 4)
    run = load_run(file)
    files = [one for one in (run.checkpoints_folder / "iter_0000004").rglob("*") if one.is_file()]
    assert planned(file)["disk"] | {"free_bytes": 0} == {
        "checkpoint_bytes": sum(one.stat().st_size for one in files),
        "to_come": 1,
        "free_bytes": 0,
    }


# Rates


def test_megatron_s_count_of_operations_is_what_h100s_logged() -> None:
    shapes = {rate.where: rate for rate in known_rates()}
    assert shapes["docs/benchmarks.md, cptain@installed"].teraflops == pytest.approx(567, rel=0.002)
    assert shapes["docs/benchmarks.md, fp8-mb2@installed"].teraflops == pytest.approx(713, rel=0.002)
    assert shapes["docs/checks.md, a whole 8B"].teraflops == pytest.approx(479, rel=0.002)


def same_training(one: Rate, other: Rate) -> bool:
    """Whether two rates are of the same shape and layout, whatever the cards."""
    return (one.shape, one.architecture, one.layout) == (other.shape, other.architecture, other.layout)


def test_every_measured_training_is_predicted_from_others_that_are_cut_alike() -> None:
    """A GPU's host is what one of them waited for, and hosts differ: 999 and 1,154 ms of the same."""
    run = load_run(PROJECT / "runs" / "swallow-8b.toml")
    rates, predicted = known_rates(), []
    for rate in rates:
        others = [
            one
            for one in rates
            if one.cut_as(rate.layout) and one.precision == rate.precision and not same_training(one, rate)
        ]
        if not others:
            continue
        predicted.append(rate.where)
        train = {name: getattr(rate, name) for name in ("seq_length", "global_batch_size", "precision")}
        found = nearest(others, rate.architecture, rate.precision, rate.layout)
        assert found is not None
        seconds = step_seconds(changed(run, **train), rate.architecture, rate.layout, found)
        assert seconds == pytest.approx(rate.seconds, rel=0.1), rate
    assert len(predicted) == 20


def test_stages_wait_and_layers_computed_again_take_time(tmp_path: Path) -> None:
    run = changed(load_run(PROJECT / "runs" / "swallow-8b.toml"), global_batch_size=16)
    architecture, (rate, *_) = llama(tmp_path, 32), known_rates()
    one = Layout(tensor=1, pipeline=1, context=1, data=2)

    def seconds(layout: Layout) -> float:
        return step_seconds(run, architecture, layout, rate) * layout.gpus

    plain, half, full = (seconds(replace(one, recompute=layers)) for layers in ("none", 16, "full"))
    assert seconds(replace(one, pipeline=4)) == pytest.approx(plain * (1 + 3 / 8), rel=0.01)  # Adam waits for nobody
    assert full == pytest.approx(plain * 4 / 3, rel=0.05)  # a forward pass more, but of the output layer
    assert half - plain == pytest.approx((full - plain) / 2)


def test_a_host_launches_the_kernels_of_a_small_model_slower_than_they_run(swallow: list[Any]) -> None:
    """24 layers of width 1024, measured in micro batches of 8."""
    rate = next(rate for rate in known_rates() if rate.shape == "llama-0.3b")
    shape = (rate.architecture, rate.seq_length, rate.global_batch_size, rate.precision)
    assert gpu_seconds(*shape, rate.layout) < 0.6 * rate.seconds
    assert whole_step(*shape, rate.layout) == pytest.approx(rate.seconds, rel=0.02)
    assert whole_step(*shape, replace(rate.layout, micro_batch_size=4)) == pytest.approx(2 * rate.seconds, rel=0.02)
    said = "GPUs wait for their hosts"
    assert said not in cptain("plan", *swallow).stdout
    fp8 = ("train.precision=fp8", "parallel.pipeline=1", "parallel.tensor=2", "train.micro_batch_size=1")
    small = [word for setting in (*fp8, "train.seq_length=2048") for word in ("--set", setting)]
    assert said in cptain("plan", *swallow, *small).stdout
    assert planned(*swallow, *small)["time"]["waits_for_host"]


def test_what_was_never_measured_is_said_so(swallow: list[Any]) -> None:
    assert planned(*swallow, "--set", "train.precision=fp32")["time"] is None
    assert (
        "time         not measured: nothing alike" in cptain("plan", *swallow, "--set", "train.precision=fp32").stdout
    )
    output = cptain("plan", *swallow, "--set", "parallel.tensor=8").stdout
    assert "this tensor or context parallel size was not measured" in output


# What a training leaves


@pytest.fixture
def four_layers(tmp_path: Path) -> tuple[RunFile, Architecture]:
    """The run that wrote the recorded log, with Megatron's own loss."""
    run = load_run(PROJECT / "runs" / "swallow-8b.toml", (f'work_dir="{tmp_path}"', "parallel.pipeline=1"))
    run.logs_folder.mkdir(parents=True)
    script = Path("pretrain_gpt.py")
    return changed(run, global_batch_size=8, steps=14, warmup_steps=1, script=script), llama(tmp_path, 4)


def test_a_training_leaves_its_error_and_its_speed(
    four_layers: tuple[RunFile, Architecture], swallow: list[Any], tmp_path: Path
) -> None:
    run, architecture = four_layers
    layout = Layout(tensor=1, pipeline=1, context=1, data=1)
    for _ in range(2):
        measured.append(run, Planned(architecture, layout, PROJECT / "apps" / "cptain" / "cli.py"), RECORDED)
    before, after = (json.loads(line) for line in plan_log(run).read_text().splitlines())
    assert before["peak_gib"] == [{"stage": 1, "predicted": 47.91, "measured": 47.89}]
    assert before["seconds"]["measured"] == pytest.approx(1.1912, abs=0.001)
    assert before["seconds"]["predicted"] == pytest.approx(1.0562, abs=0.001)  # by the table
    assert after["seconds"]["predicted"] == pytest.approx(1.1912, abs=0.001)  # by the run itself
    plan_log(run).open("a").write('{"half": ')
    changes = ["parallel.pipeline=1", "jobs.nodes=1", "train.global_batch_size=8", "train.steps=14"]
    changes += ["train.warmup_steps=1", f"model.hf={tmp_path}"]
    document = planned(*swallow, *[word for change in changes for word in ("--set", change)])
    assert document["trained"] == [after]
    output = cptain("plan", *swallow, *[word for change in changes for word in ("--set", change)]).stdout
    assert "measured     step: 1.19 predicted, 1.19 measured (" in output
    assert "0.0%) s, by swallow-8b-exp1, h100-four-layers-of-8b.log" in output
    assert "stage 1: 47.91 predicted, 47.89 measured (+0.0%) GiB" in output
    assert "4 layers of this model" in output


def test_a_start_that_ends_before_it_is_warm_leaves_none(
    four_layers: tuple[RunFile, Architecture], tmp_path: Path
) -> None:
    run, architecture = four_layers
    short = tmp_path / "train-short.log"
    short.write_text("".join(RECORDED.read_text().splitlines(keepends=True)[:8]))
    measured.append(run, Planned(architecture, Layout(1, 1, 1, 1), PROJECT / "Makefile"), short)
    assert not plan_log(run).exists()


def test_a_training_on_the_cpu_leaves_none(trained_run: Path) -> None:
    assert not plan_log(load_run(trained_run)).exists()


def test_sites_say_how_much_memory_their_gpus_have() -> None:
    assert load_site("abci3")[0].gpu_memory == 140.4
    assert load_site("pbs")[0].gpu_memory is None


def test_parameters_are_counted_without_a_model(tmp_path: Path) -> None:
    assert parameters(llama(tmp_path, 32)) == PARAMETERS["8B"]
