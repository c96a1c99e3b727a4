"""The memory of a training step, as computed, against what was measured on H200s and H100s."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain
from cptain.model.architecture import Architecture, read_architecture
from cptain.run_file import RunFile, load_run
from cptain.training.fit import settle
from cptain.training.layout import Layout, Recompute, layout_of, stage_layers
from cptain.training.memory import StageMemory, stage_memory

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


def one_stage(run: RunFile, architecture: Architecture) -> StageMemory:
    """What a run on one GPU needs."""
    return stage_memory(run, architecture, layout_of(run, 1), 0)


@pytest.fixture
def swallow() -> RunFile:
    """The shipped run: 8B, pipeline parallel 2."""
    return load_run(PROJECT / "runs" / "swallow-8b.toml")


@pytest.fixture
def one_gpu(swallow: RunFile) -> RunFile:
    """The same without parallelism, 8 sequences a step, as it was measured."""
    parallel = swallow.parallel.model_copy(update={"pipeline": 1})
    return changed(swallow.model_copy(update={"parallel": parallel}), global_batch_size=8)


@pytest.fixture
def megatron_s_loss(one_gpu: RunFile) -> RunFile:
    """The same by a training script that leaves the loss to Megatron."""
    return changed(one_gpu, script=Path("pretrain_gpt.py"))


@pytest.mark.parametrize(
    ("seq_length", "precision", "micro_batch_size", "measured"),
    [
        (8192, "bf16", 1, 41_100),
        (8192, "bf16", 2, 47_600),
        (8192, "bf16", 4, 60_700),
        (8192, "fp8", 1, 42_000),
        (8192, "fp8", 2, 47_900),
        (8192, "fp8", 4, 59_600),
    ],
)
def test_the_peak_of_four_layers_is_what_an_h200_measured(
    seq_length: int, precision: str, micro_batch_size: int, measured: int, one_gpu: RunFile, tmp_path: Path
) -> None:
    run = changed(one_gpu, seq_length=seq_length, precision=precision, micro_batch_size=micro_batch_size)
    assert one_stage(run, llama(tmp_path, 4)).peak == pytest.approx(measured * MB, rel=0.01)


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
def test_with_megatron_s_own_loss_it_is_what_an_h100_measured(
    seq_length: int, precision: str, micro_batch_size: int, measured: int, megatron_s_loss: RunFile, tmp_path: Path
) -> None:
    run = changed(megatron_s_loss, seq_length=seq_length, precision=precision, micro_batch_size=micro_batch_size)
    assert one_stage(run, llama(tmp_path, 4)).peak == pytest.approx(measured * MB, rel=0.01)


@pytest.mark.parametrize(
    ("train", "measured"),
    [
        ({}, 34_500),
        ({"megatron_args": ["--no-gradient-accumulation-fusion"]}, 33_100),
        ({"megatron_args": ["--no-gradient-accumulation-fusion"], "micro_batch_size": 2}, 47_500),
        ({"megatron_args": ["--use-precision-aware-optimizer"]}, 30_900),
        ({"precision": "fp8"}, 36_200),
        ({"precision": "fp8", "micro_batch_size": 2}, 49_000),
    ],
)
def test_the_first_step_s_peak_is_what_an_h100_measured(
    train: dict[str, Any], measured: int, megatron_s_loss: RunFile, tmp_path: Path
) -> None:
    memory = one_stage(changed(megatron_s_loss, **train), llama(tmp_path, 4))
    assert memory.first_peak == pytest.approx(measured * MB, rel=0.01)


@pytest.mark.parametrize(("precision", "measured"), [("bf16", 70_302), ("fp8", 99_900)])
def test_a_whole_8b_on_two_gpus_peaks_in_its_optimizer_of_few_bits(
    precision: str, measured: int, one_gpu: RunFile, tmp_path: Path
) -> None:
    few_bits = ["--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16", "--exp-avg-sq-dtype", "bf16"]
    few_bits += ["--main-grads-dtype", "bf16", "--grad-reduce-in-bf16"]
    run = changed(one_gpu, megatron_args=few_bits, precision=precision)
    memory = stage_memory(run, llama(tmp_path, 32), Layout(tensor=2, pipeline=1, context=1, data=1), 0)
    assert memory.peak == pytest.approx(measured * MB, rel=0.02)
    assert memory.in_optimizer > memory.activations + memory.logits


# Ten steps of each, with random weights, on one GPU: not seen when the formulas were made. Sizes are hidden, MLP,
# layers, heads, key and value heads, head, vocabulary.
@pytest.mark.parametrize(
    ("family", "sizes", "train", "recompute", "measured"),
    [
        ("Llama", (2048, 8192, 16, 32, 8, 64, 128256), (4096, 4, "bf16"), "none", 45_109),
        ("Llama", (4096, 14336, 4, 32, 8, 128, 128256), (8192, 2, "bf16"), "full", 39_435),
        ("Llama", (4096, 14336, 12, 32, 8, 128, 32000), (8192, 1, "bf16"), 4, 59_857),
        ("Llama", (1024, 2816, 24, 16, 8, 64, 32000), (2048, 8, "bf16"), "selective", 20_178),
        ("Qwen2", (3584, 18944, 4, 28, 4, 128, 152064), (4096, 2, "bf16"), "none", 43_817),
        ("Qwen3", (4096, 12288, 5, 32, 8, 128, 151936), (4096, 1, "fp8"), "none", 44_991),
    ],
)
def test_shapes_that_the_formulas_had_not_seen_peak_where_they_say(
    family: str,
    sizes: tuple[int, ...],
    train: tuple[int, int, str],
    recompute: Recompute,
    measured: int,
    one_gpu: RunFile,
) -> None:
    hidden, ffn, layers, heads, groups, channels, vocabulary = sizes
    architecture = Architecture(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=vocabulary,
        max_position_embeddings=32768,
        rotary_base=1e6,
        rope_scaling_factor=None,
        norm_epsilon=1e-6,
        tied_embeddings=hidden == 2048,
        qkv_bias=family == "Qwen2",
        qk_layernorm=family == "Qwen3",
    )
    seq_length, micro_batch_size, precision = train
    run = changed(one_gpu, seq_length=seq_length, precision=precision)
    layout = replace(layout_of(run, 1), micro_batch_size=micro_batch_size, recompute=recompute)
    assert stage_memory(run, architecture, layout, 0).peak == pytest.approx(measured * MB, rel=0.05)


def test_the_shipped_run_recomputes_nothing_on_its_sixteen_gpus(swallow: RunFile, tmp_path: Path) -> None:
    layout, (line,) = settle(swallow, llama(tmp_path, 32), 16, 80 << 30)
    assert layout.recompute == "none"
    assert line == (
        'train.recompute = "auto": none, as a step without it needs 64 GiB of the GPU\'s 80 '
        "(stage 1 of 2; data-parallel size 8)"
    )


def test_no_more_layers_are_recomputed_than_must_be(swallow: RunFile, tmp_path: Path) -> None:
    architecture = llama(tmp_path, 32)
    layout, (line,) = settle(swallow, architecture, 4, 80 << 30)
    assert layout.recompute == 7
    assert "auto\": 7 of 16 layers a stage, as a step without it needs 81 GiB of the GPU's 80" in line
    assert line.endswith("(stage 1 of 2; data-parallel size 2; 85% is safe), and with it 66")
    peaks = [
        stage_memory(swallow, architecture, replace(layout, recompute=layers), 0).peak / (80 << 30) for layers in (6, 7)
    ]
    assert peaks[1] < 0.85 <= peaks[0]


def test_one_copy_of_it_recomputes_everything(swallow: RunFile, tmp_path: Path) -> None:
    layout, (line,) = settle(swallow, llama(tmp_path, 32), 2, 80 << 30)
    assert layout.recompute == "full"
    assert "needs 104 GiB" in line


def test_the_last_stage_is_the_fullest_where_its_logits_outweigh_what_is_in_flight(
    swallow: RunFile, tmp_path: Path
) -> None:
    _, (line,) = settle(swallow, llama(tmp_path, 4), 16, 80 << 30)
    assert "stage 2 of 2" in line


def test_a_dry_run_says_why(make_ready_run: RunFileMaker) -> None:
    result = cptain("train", make_ready_run(), "--dry-run")
    assert 'train: train.recompute = "auto": none, as a step without it needs ' in result.stderr
    assert "--recompute-granularity" not in result.stdout


def test_fp32_needs_more_than_bf16(one_gpu: RunFile, tmp_path: Path) -> None:
    architecture = llama(tmp_path, 4)
    single, half = (one_stage(changed(one_gpu, precision=precision), architecture) for precision in ("fp32", "bf16"))
    assert single.weights == 2 * half.weights
    assert single.activations == 2 * half.activations


@pytest.mark.parametrize(
    ("layers", "stages", "held"),
    [
        (32, 4, [8, 8, 8, 8]),
        (3, 2, [2, 1]),
        (126, 8, [15, 16, 16, 16, 16, 16, 16, 15]),
        (30, 8, [3, 4, 4, 4, 4, 4, 4, 3]),
        (9, 8, [2, 1, 1, 1, 1, 1, 1, 1]),
        (5, 4, [2, 1, 1, 1]),
    ],
)
def test_layers_that_do_not_divide_are_held_by_the_stages_between_the_ends(
    layers: int, stages: int, held: list[int]
) -> None:
    assert stage_layers(layers, stages) == held


@pytest.mark.parametrize(
    ("pipeline", "gpus", "gpu_gib", "chosen", "why"),
    [
        (1, 1, 64, 4, "8 needs 59 GiB of the GPU's 64 (stage 1 of 1; 85% is safe)"),
        (1, 1, 640, 8, "which is all that a copy of the model has of a global batch"),
        (2, 2, 640, 1, "as with 2 the 2 stages wait 25.0% of the time that they compute"),
    ],
)
def test_the_micro_batch_is_the_largest_that_fits_and_divides(
    pipeline: int, gpus: int, gpu_gib: int, chosen: int, why: str, one_gpu: RunFile, tmp_path: Path
) -> None:
    parallel = one_gpu.parallel.model_copy(update={"pipeline": pipeline})
    run = changed(one_gpu, micro_batch_size="auto", seq_length=4096).model_copy(update={"parallel": parallel})
    layout, (line, _) = settle(run, llama(tmp_path, 4), gpus, gpu_gib << 30)
    assert layout.micro_batch_size == chosen
    assert line.startswith(f'train.micro_batch_size = "auto": {chosen}, ')
    assert why in line
