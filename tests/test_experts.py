"""Mixtures of experts: trained with expert parallelism, read by whatever layers Megatron has, and faults in them found.

That each family computes what transformers does is in test_families.py.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunFileMaker, cptain, in_megatron, write_run_file
from cptain.checkpoint.logits import _in_process
from cptain.errors import CptainError
from cptain.megatron.log import read_steps, train_logs
from cptain.model.architecture import read_architecture
from cptain.model.sizes import active_parameters, flops_per_token, parameters
from cptain.run_file import load_run
from cptain.training.flags import check_parallel
from cptain.training.layout import Layout
from cptain.training.memory import stage_memory
from safetensors.torch import load_file, save_file
from test_families import MODELS, forward_passes, save_random_model

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(session_folder: Path) -> Path:
    """A random Qwen3-MoE of 16 experts."""
    folder = session_folder / "experts" / "model"
    save_random_model(folder, MODELS["Qwen3 30B-A3B"])
    return folder


@pytest.fixture(scope="module")
def converted(base: Path, run_content: dict[str, Any]) -> Path:
    """Its run file, converted."""
    file = write_run_file(base.parent, run_content, {"model.hf": str(base)})
    assert cptain("convert", file).exit_code == 0
    return file


@pytest.fixture
def make_experts_run(
    make_ready_run: RunFileMaker, converted: Path, base: Path, model: Path, tmp_path: Path
) -> Callable[..., Path]:
    """Writes run files of it with the data of `ready_run`."""
    megatron = f"model.megatron='{load_run(converted).megatron_folder}'"

    def make(**changes: Any) -> tuple[Path, str]:
        return make_ready_run(model__hf=str(base), model__tokenizer=str(model), train__steps=4, **changes), megatron

    return make


def train(run: tuple[Path, str], *sets: str) -> Any:
    file, megatron = run
    return cptain("train", file, "--cpu", "--set", megatron, *(word for one in sets for word in ("--set", one)))


def losses(file: Path) -> list[float]:
    return [step.loss for step in read_steps(train_logs(load_run(file).logs_folder))]


def test_experts_on_two_processes_go_on_on_four_and_lose_what_one_process_does(
    make_experts_run: Callable[..., tuple[Path, str]], base: Path
) -> None:
    """Half of the experts are in each of the first start's parts of the checkpoint; a rank of the second needs four."""
    run = make_experts_run()
    stopped = train(run, "parallel.expert=2", 'train.megatron_args=["--exit-interval", "2"]')
    assert stopped.exit_code == 75, stopped.output
    refused = train(run)
    assert refused.exit_code == 2
    assert "parallel.expert: 2 → 1: a run that has begun keeps it (where experts are shared out" in refused.output
    resumed = train(run, "parallel.expert=4")
    assert resumed.exit_code == 0, resumed.output
    apart = losses(run[0])
    assert cptain("export", run[0]).exit_code == 0
    exported = load_run(run[0]).hf_folder / "iter_0000004"
    assert cptain("verify", exported, load_run(run[0]).checkpoints_folder).exit_code == 0
    assert "context 1, expert 2, 2 processes (steps 1 to 2); " in (exported / "README.md").read_text()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, exported))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved == list(before)  # every expert and every router has learned
    config = json.loads((exported / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 16
    shutil.rmtree(load_run(run[0]).folder)
    assert train(run).exit_code == 0
    assert apart == pytest.approx(losses(run[0]), abs=2e-5)


def test_a_wrong_routing_shows_in_the_logits(converted: Path, base: Path) -> None:
    release, right = str(load_run(converted).megatron_folder / "release"), read_architecture(base)
    assert right.mixture
    wrong = [
        replace(right, mixture=replace(right.mixture, normalized=False)),
        replace(right, mixture=replace(right.mixture, top_k=3)),
        replace(right, mixture=replace(right.mixture, top_k=5)),
    ]
    expected, *others = _in_process("megatron", forward_passes, [(release, one) for one in (right, *wrong)])
    assert all(np.abs(one - expected).max() > 1e-4 for one in others)


def swap_experts(tensors: Tensors) -> list[str]:
    names = [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in (3, 12)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()
    return names


def swap_gate_and_up(tensors: Tensors) -> list[str]:
    names = [f"model.layers.0.mlp.experts.7.{kind}_proj.weight" for kind in ("gate", "up")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()
    return names


def swap_rows_of_the_router(tensors: Tensors) -> list[str]:
    name = "model.layers.1.mlp.gate.weight"
    tensors[name][[0, 15]] = tensors[name][[15, 0]]
    return [name]


def move_one_value_by_one_bit(tensors: Tensors) -> list[str]:
    name = "model.layers.1.mlp.experts.15.up_proj.weight"
    tensors[name].view(torch.int32)[-1, -1] ^= 1
    return [name]


@pytest.mark.parametrize("fault", [swap_experts, swap_gate_and_up, swap_rows_of_the_router, move_one_value_by_one_bit])
def test_a_fault_in_one_expert_is_found_and_named(
    converted: Path, base: Path, tmp_path: Path, fault: Callable[[Tensors], list[str]]
) -> None:
    shutil.copytree(base, tmp_path / "model")
    tensors = load_file(base / "model.safetensors")
    names = fault(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    result = cptain("verify", tmp_path / "model", load_run(converted).megatron_folder)
    assert result.exit_code == 1
    different = [line.split()[0] for line in result.output.splitlines() if line.endswith("≠")]
    assert sorted(different) == sorted(names)


def test_a_missing_expert_is_named(base: Path, tmp_path: Path, run_content: dict[str, Any]) -> None:
    shutil.copytree(base, tmp_path / "model")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    result = cptain("convert", write_run_file(tmp_path, run_content, {"model.hf": str(tmp_path / "model")}))
    assert result.exit_code == 1
    assert "model.layers.1.mlp.experts.5.up_proj.weight: missing, and config.json needs it" in result.output


_ASK = """
import torch
torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method="tcp://127.0.0.1:PORT")
from megatron.core import dist_checkpointing, parallel_state
parallel_state.initialize_model_parallel()
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

experts, layers, groups = 16, 2, parallel_state.get_data_parallel_group(with_context_parallel=True)
state = {}
for layer in range(layers):
    for expert in range(experts):
        offsets = ((0, layer, layers), (1, expert, experts))
        for linear, axis, shape in (("linear_fc1", 0, (48, 64)), ("linear_fc2", 1, (64, 24))):
            own = {"0.weight": torch.zeros(shape), "0._extra_state": None}
            own = make_sharded_tensors_for_checkpoint(
                own, "", {"0.weight": axis}, offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(), dp_cp_group=groups,
            )
            replace_prefix_for_sharding(own, "0.", f"decoder.layers.mlp.experts.experts.{linear}.")
            if axis == 0:
                own["0.weight"] = apply_swiglu_sharded_factory(
                    own["0.weight"], offsets, tp_group=parallel_state.get_tensor_model_parallel_group(), dp_group=groups
                )
            state |= {f"{layer}.{expert}.{linear}.{name}": value for name, value in own.items()}
state = dist_checkpointing.load(state, "RELEASE")
found = {name: value.tolist() for name, value in state.items() if name.endswith("weight")}
found["extra states"] = sum(1 for name in state if name.endswith("_extra_state"))
"""


def test_experts_that_are_computed_in_one_find_theirs(converted: Path, base: Path) -> None:
    """As Transformer Engine's grouped layers ask for their weights and extra states, by Megatron's own functions."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    release = load_run(converted).megatron_folder / "release"
    found = in_megatron(_ASK.replace("PORT", str(port)).replace("RELEASE", str(release)))
    assert found.pop("extra states") == 2 * 16 * 2
    tensors = load_file(base / "model.safetensors")
    for layer in range(2):
        for expert in range(16):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}."
            fc1 = torch.cat([tensors[f"{prefix}{kind}_proj.weight"] for kind in ("gate", "up")])
            assert torch.equal(torch.tensor(found[f"{layer}.{expert}.linear_fc1.0.weight"]), fc1)
            fc2 = tensors[f"{prefix}down_proj.weight"]
            assert torch.equal(torch.tensor(found[f"{layer}.{expert}.linear_fc2.0.weight"]), fc2)


@pytest.mark.parametrize(
    ("parallel", "processes", "message"),
    [
        ({"expert": 3}, 3, "parallel.expert = 3 does not divide the 16 experts of a layer"),
        ({"expert": 4}, 2, "parallel.expert = 4 does not divide the 2 GPUs that have equal weights otherwise"),
        ({"expert": 4, "pipeline": 2}, 4, "parallel.expert = 4 does not divide the 2 GPUs that"),
        ({"tensor": 16}, 16, "parallel.tensor = 16 does not divide the 8 attention heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(
    make_run: RunFileMaker, base: Path, parallel: dict[str, int], processes: int, message: str
) -> None:
    run = load_run(make_run(**{f"parallel__{key}": value for key, value in parallel.items()}))
    with pytest.raises(CptainError, match=message):
        check_parallel(run, read_architecture(base), processes)


def test_a_dense_model_has_no_experts_to_share_out(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run(parallel__expert=2), "--cpu")
    assert result.exit_code == 2
    assert "parallel.expert = 2 does not divide the 1 experts of a layer" in result.output


def test_what_the_cpu_cannot_do_of_experts_is_refused(make_experts_run: Callable[..., tuple[Path, str]]) -> None:
    result = train(make_experts_run(parallel__tensor=2))
    assert result.exit_code == 2
    assert "parallel.tensor = 2: not on the CPU for a mixture of experts" in result.output


def test_a_gpu_computes_experts_in_one_and_routes_in_fp32(make_experts_run: Callable[..., tuple[Path, str]]) -> None:
    file, megatron = make_experts_run(
        parallel__expert=2,
        parallel__tensor=1,
        train__precision="bf16",
        train__megatron_args=["--moe-permute-fusion", "--moe-aux-loss-coeff", "0.01"],
    )
    shown = cptain("train", file, "--dry-run", "--set", megatron)
    assert shown.exit_code == 0, shown.output
    given = [line.strip().removesuffix(" \\") for line in shown.stdout.splitlines()]
    for flag in (
        "--num-experts 16",
        "--moe-ffn-hidden-size 24",
        "--moe-router-topk 4",
        "--moe-router-score-function softmax",
        "--moe-router-load-balancing-type aux_loss",
        "--moe-aux-loss-coeff 0.001",
        "--moe-router-dtype fp32",
        "--moe-token-dispatcher-type alltoall",
        "--moe-grouped-gemm",
        "--expert-model-parallel-size 2",
    ):
        assert flag in given
    assert "--moe-router-pre-softmax" not in given
    assert given[-2:] == ["--moe-aux-loss-coeff", "0.01"]
    words = [line.split()[0] for line in given if line.startswith("--")]
    script = "from pathlib import Path\nfrom cptain.megatron.unread_arguments import unread\n"
    script += "from cptain.training import pretrain\n"
    assert in_megatron(f"{script}found = unread({words!r}, Path(pretrain.__file__))") == []


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--moe-router-pre-softmax", "the model's config.json says it"),
        ("--moe-layer-freq", "the model's config.json says it"),
        ("--moe-shared-expert-intermediate-size", "the model's config.json says it"),
        ("--expert-model-parallel-size", "set parallel.expert"),
        ("--expert-tensor-parallel-size", "set parallel.expert"),
    ],
)
def test_what_config_json_says_of_experts_is_no_argument(make_ready_run: RunFileMaker, flag: str, says: str) -> None:
    result = cptain("train", make_ready_run(train__megatron_args=[flag, "2"]), "--dry-run")
    assert result.exit_code == 2
    assert f"train.megatron_args: {flag}: {says}" in result.output


def test_memory_and_work_are_those_of_the_experts_a_gpu_and_a_token_get(make_run: RunFileMaker, tmp_path: Path) -> None:
    """Against the sums of the published Qwen3-30B-A3B: 30.5 billion parameters, 3.3 of them active."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    architecture = read_architecture(tmp_path)
    assert parameters(architecture) == 30_532_122_624
    assert active_parameters(architecture) == 3_353_032_704
    others = 151936 * 2048 + 48 * (2 * 2048 + 2 * 128 + 128 * 2048) + 2048  # embedding, norms, routers
    assert flops_per_token(architecture, 0) == 6 * (active_parameters(architecture) - others)
    run = load_run(make_run(train__precision="bf16", train__micro_batch_size=1))
    apart, whole = (stage_memory(run, architecture, Layout(1, 1, 1, 8, expert=size), 0) for size in (8, 1))
    experts = 48 * 128 * 3 * 2048 * 768
    assert whole.weights == 2 * parameters(architecture)
    assert apart.weights == pytest.approx(2 * (parameters(architecture) - experts * 7 / 8), rel=1e-12)
    assert apart.gradients == 2 * apart.weights
    assert apart.master == whole.master == 4 * parameters(architecture) / 8
    assert apart.activations == whole.activations


def test_a_plan_counts_what_computes_a_token_and_invents_no_time(
    make_run: RunFileMaker, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(QWEN3_30B))
    file = make_run(
        model__hf="./base",
        model__tokenizer=str(model),
        parallel__expert=8,
        train__precision="bf16",
        train__micro_batch_size=1,
        train__seq_length=4096,
    )
    shown = cptain("plan", file, "--site", "abci3", "--set", "jobs.group=g")
    assert "model        30,532,122,624 parameters, of which 3,353,032,704 compute a token" in shown.output
    assert "data 8, expert 8" in shown.output
    assert "time         not measured: nothing alike is in the table of rates" in shown.output
    assert "none that fits" not in shown.output
