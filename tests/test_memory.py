"""The memory of a training step, as computed, against what was measured on H100s."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.model.architecture import Architecture, read_architecture
from cptain.run_file import RunFile, load_run
from cptain.training.memory import choose_recompute, stage_memory

PROJECT = Path(__file__).resolve().parent.parent
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
MB = 1 << 20  # what Megatron logs as MB


def llama(folder: Path, layers: int) -> Architecture:
    """Llama 3.1 8B with so many layers."""
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "num_hidden_layers": layers}))
    return read_architecture(folder)


def changed(run: RunFile, **train: Any) -> RunFile:
    """The run with other keys of [train]."""
    return run.model_copy(update={"train": run.train.model_copy(update=train)})


@pytest.fixture
def swallow() -> RunFile:
    """The shipped run: 8B, pipeline parallel 2."""
    return load_run(PROJECT / "runs" / "swallow-8b.toml")


@pytest.fixture
def one_gpu(swallow: RunFile) -> RunFile:
    """The same without parallelism, 8 sequences a step, as it was measured."""
    parallel = swallow.parallel.model_copy(update={"pipeline": 1})
    return changed(swallow.model_copy(update={"parallel": parallel}), global_batch_size=8)


@pytest.mark.parametrize(
    ("seq_length", "precision", "micro_batch_size", "measured"),
    [
        (8192, "bf16", 1, 49_000),
        (8192, "bf16", 2, 63_500),
        (8192, "fp8", 1, 50_000),
        (8192, "fp8", 2, 63_800),
        (2048, "bf16", 1, 38_200),
        (2048, "fp8", 1, 39_600),
    ],
)
def test_the_peak_of_four_layers_is_what_an_h100_measured(
    seq_length: int, precision: str, micro_batch_size: int, measured: int, one_gpu: RunFile, tmp_path: Path
) -> None:
    run = changed(one_gpu, seq_length=seq_length, precision=precision, micro_batch_size=micro_batch_size)
    memory = stage_memory(run, llama(tmp_path, 4), "none", 1, 0)
    assert memory.peak == pytest.approx(measured * MB, rel=0.01)


def test_the_shipped_run_recomputes_nothing_on_its_sixteen_gpus(swallow: RunFile, tmp_path: Path) -> None:
    chosen, (line,) = choose_recompute(swallow, llama(tmp_path, 32), 80 << 30, data_parallel=8)
    assert chosen == "none"
    assert line == (
        'train.recompute = "auto": none, as a step without it needs 64 GiB of the GPU\'s 80 '
        "(stage 1 of 2; data-parallel size 8)"
    )


def test_one_copy_of_it_recomputes_everything(swallow: RunFile, tmp_path: Path) -> None:
    chosen, (line,) = choose_recompute(swallow, llama(tmp_path, 32), 80 << 30, data_parallel=1)
    assert chosen == "full"
    assert "needs 104 GiB" in line


def test_the_last_stage_is_the_fullest_where_its_logits_outweigh_what_is_in_flight(
    swallow: RunFile, tmp_path: Path
) -> None:
    _, (line,) = choose_recompute(swallow, llama(tmp_path, 4), 80 << 30, data_parallel=8)
    assert "stage 2 of 2" in line


def test_a_dry_run_says_why(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run(), "--dry-run")
    assert 'train: train.recompute = "auto": none, as a step without it needs ' in result.stderr
    assert "--recompute-granularity" not in result.stdout


def test_fp32_needs_more_than_bf16(one_gpu: RunFile, tmp_path: Path) -> None:
    architecture = llama(tmp_path, 4)
    single, half = (
        stage_memory(changed(one_gpu, precision=precision), architecture, "none", 1, 0)
        for precision in ("fp32", "bf16")
    )
    assert single.weights == 2 * half.weights
    assert single.activations == 2 * half.activations
