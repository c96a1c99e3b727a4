"""The model families, each on random weights in its real config's shape, shrunk: transformers against megatron.core."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import RunFileMaker, as_if_trained, cptain, write_run_file
from cptain.checkpoint.logits import Logits, _in_process, _megatron
from cptain.errors import CptainError
from cptain.megatron.log import read_steps, train_logs
from cptain.model.architecture import Architecture, read_architecture
from cptain.model.sizes import parameters
from cptain.run_file import load_run
from cptain.training.flags import check_parallel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


PROMPT = np.random.default_rng(0).integers(0, 500, 64).tolist()


def shrunk(kind: type[PreTrainedConfig], theta: float, **values: Any) -> PreTrainedConfig:
    """A config of 2 layers, 64 wide, in transformers' class of the family."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": theta}
    return kind(**{**sizes, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 1, **values})


# The ratios of heads to groups, the head sizes that are not hidden / heads, the lengths, epsilons and rotary bases are
# those of the models named.
MODELS = {
    "Llama 2 7B": shrunk(LlamaConfig, 10000.0, num_attention_heads=4, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "Llama 3 8B, Swallow": shrunk(
        LlamaConfig,
        500000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
    ),
    "Llama 3.1 8B, 3.1 Swallow": shrunk(
        LlamaConfig,
        500000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={**LLAMA3_ROPE, "factor": 8.0},
    ),
    "Llama 3.2 1B": shrunk(
        LlamaConfig,
        500000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={**LLAMA3_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "Mistral 7B v0.1, Swallow MS": shrunk(
        MistralConfig,
        10000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        sliding_window=4096,
        rms_norm_eps=1e-5,
    ),
    "Mistral Nemo 12B": shrunk(
        MistralConfig,
        1000000.0,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=12,
        max_position_embeddings=131072,
        sliding_window=None,
        rms_norm_eps=1e-5,
    ),
    "Qwen2.5 0.5B": shrunk(
        Qwen2Config,
        1000000.0,
        num_attention_heads=14,
        num_key_value_heads=2,
        hidden_size=112,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "Qwen2.5 7B": shrunk(
        Qwen2Config,
        1000000.0,
        num_attention_heads=7,
        num_key_value_heads=1,
        hidden_size=56,
        max_position_embeddings=131072,
    ),
    "Qwen3 0.6B": shrunk(
        Qwen3Config,
        1000000.0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "Qwen3 8B": shrunk(
        Qwen3Config,
        1000000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40960,
    ),
    "Mixtral 8x7B, Swallow MX": shrunk(
        MixtralConfig,
        1000000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        num_local_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
    ),
    "Qwen3 30B-A3B": shrunk(
        Qwen3MoeConfig,
        1000000.0,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=40960,
        moe_intermediate_size=24,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
    ),
    "Qwen3-MoE of other probabilities": shrunk(
        Qwen3MoeConfig,
        1000000.0,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=False,
        router_aux_loss_coef=0.0,
        tie_word_embeddings=True,
    ),
}


def save_random_model(folder: Path, config: PreTrainedConfig) -> None:
    """Save a model whose biases and norms are random too, not the zeros and ones that transformers begins with."""
    torch.manual_seed(1234)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def export_as_trained(file: Path) -> Path:
    """Export the converted checkpoint as if training had saved it as iteration 1."""
    exported = as_if_trained(file)
    result = cptain("export", file)
    assert result.exit_code == 0, result.output
    return exported


def forward_passes(releases: list[tuple[str, Architecture]]) -> Logits:
    """In a process of its own: megatron.core's logits of PROMPT from every release."""
    return [_megatron(folder, architecture, "cpu", [PROMPT])[0] for folder, architecture in releases]


@pytest.fixture(scope="module")
def converted(session_folder: Path, run_content: dict[str, Any]) -> dict[str, Path]:
    """A run file of every model, converted."""
    files: dict[str, Path] = {}
    for name, config in MODELS.items():
        folder = session_folder / "families" / name
        save_random_model(folder / "model", config)
        files[name] = write_run_file(folder, run_content, {"model.hf": str(folder / "model")})
        result = cptain("convert", files[name])
        assert result.exit_code == 0, result.output
    return files


@pytest.fixture(scope="module")
def megatron_logits(converted: dict[str, Path]) -> dict[str, npt.NDArray[np.float32]]:
    """What megatron.core computes from every release; it is imported once, which takes longer than all of them."""
    runs = [load_run(file) for file in converted.values()]
    releases = [(str(run.megatron_folder / "release"), read_architecture(Path(run.model.hf))) for run in runs]
    return dict(zip(converted, _in_process("megatron", forward_passes, releases), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_a_family_computes_in_megatron_what_it_does_in_transformers(
    converted: dict[str, Path], megatron_logits: dict[str, npt.NDArray[np.float32]], name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(load_run(converted[name]).model.hf, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(expected).max() > 0.1
    assert np.abs(expected - megatron_logits[name]).max() < 1e-5
    assert parameters(read_architecture(Path(load_run(converted[name]).model.hf))) == model.num_parameters()


@pytest.mark.parametrize("name", MODELS)
def test_a_family_comes_back_bit_for_bit_with_its_own_config(converted: dict[str, Path], name: str) -> None:
    file = converted[name]
    folder, exported = Path(load_run(file).model.hf), export_as_trained(file)
    before, after = load_file(folder / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_architecture(exported) == read_architecture(folder)
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, exported))
    assert after == {**after, **before}


@pytest.mark.parametrize(
    ("name", "processes", "tensor"),
    [
        ("Qwen2.5 0.5B", 2, "self_attn.k_proj.bias"),
        ("Qwen3 0.6B", 1, "self_attn.q_norm.weight"),
        ("Mixtral 8x7B, Swallow MX", 1, "block_sparse_moe.gate.weight"),
    ],
)
def test_a_family_trains_with_the_flags_of_its_config(
    converted: dict[str, Path], make_ready_run: RunFileMaker, model: Path, name: str, processes: int, tensor: str
) -> None:
    run = load_run(converted[name])
    changes = {"model__hf": run.model.hf, "model__tokenizer": str(model), "train__steps": 3}
    changes["parallel__tensor"] = processes
    file = make_ready_run(**changes)
    result = cptain("train", file, "--cpu", "--set", f"model.megatron='{run.megatron_folder}'")
    assert result.exit_code == 0, result.output
    first, *_, last = (step.loss for step in read_steps(train_logs(load_run(file).logs_folder)))
    assert last < first
    assert cptain("export", file).exit_code == 0
    trained = load_file(load_run(file).hf_folder / "iter_0000003" / "model.safetensors")
    began = load_file(Path(run.model.hf) / "model.safetensors")
    assert trained.keys() == began.keys()
    assert not torch.equal(trained[f"model.layers.1.{tensor}"], began[f"model.layers.1.{tensor}"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama 2 7B", {"attention_bias": True}, "attention_bias = true: not supported: only false"),
        ("Llama 2 7B", {"mlp_bias": True}, "mlp_bias = true: not supported: only false"),
        ("Llama 2 7B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: not supported: only 1.0"),
        (
            "Qwen2.5 7B",
            {"use_sliding_window": True, "sliding_window": 4096},
            "use_sliding_window = true: not supported: only false",
        ),
        (
            "Qwen3 8B",
            {"layer_types": ["full_attention", "sliding_attention"]},
            'layer_types = ["full_attention", "sliding_attention"]: not supported: only "full_attention"',
        ),
        ("Qwen3 8B", {"attention_bias": True}, "attention_bias = true: not supported: only false"),
        (
            "Qwen3 8B",
            {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            'rope_scaling.rope_type = "yarn": not supported: Megatron knows "default" and "llama3"',
        ),
        (
            "Qwen2.5 7B",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}},
            "rope_scaling.mrope_section = [16, 24, 24]: not supported: positions must be those of text",
        ),
        (
            "Qwen3 8B",
            {"architectures": ["Qwen2MoeForCausalLM"]},
            'architectures = ["Qwen2MoeForCausalLM"]: not supported: supported: LlamaForCausalLM, MistralForCausalLM, ',
        ),
        ("Qwen3 30B-A3B", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2: not supported: only 1"),
        ("Qwen3 30B-A3B", {"mlp_only_layers": [0]}, "mlp_only_layers = [0]: not supported: only []"),
        (
            "Qwen3 30B-A3B",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size = 64: not supported: only null",
        ),
        ("Qwen3 30B-A3B", {"num_experts_per_tok": 17}, "num_experts_per_tok = 17: not supported: there are 16 experts"),
        (
            "Qwen3 30B-A3B",
            {"num_experts_per_tok": 1},
            "num_experts_per_tok = 1: not supported: Megatron has no single expert whose probability is made 1",
        ),
        (
            "Qwen3 30B-A3B",
            {"num_experts": 8, "num_local_experts": 16},
            "num_experts = 8 and num_local_experts = 16: transformers 4 reads the one, and 5 the other: make them say",
        ),
        ("Mixtral 8x7B, Swallow MX", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: not supported: only 0"),
        ("Llama 2 7B", {"architectures": [["Llama"]]}, 'architectures = [["Llama"]]: not supported: '),
    ],
)
def test_a_family_that_megatron_cannot_represent_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    MODELS[name].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    architectures = [MODELS[name].__class__.__name__.replace("Config", "ForCausalLM")]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": architectures, **changes}))
    with pytest.raises(CptainError, match=re.escape(f"config.json: {message}")):
        read_architecture(tmp_path)


def test_a_mistral_trains_on_sequences_within_its_sliding_window(
    converted: dict[str, Path], make_run: RunFileMaker
) -> None:
    """No token then is so far back that the window leaves it out."""
    windowed, full = (
        read_architecture(Path(load_run(converted[name]).model.hf))
        for name in ("Mistral 7B v0.1, Swallow MS", "Mistral Nemo 12B")
    )
    check_parallel(load_run(make_run(train__seq_length=4096)), windowed, 1)
    check_parallel(load_run(make_run(train__seq_length=8192)), full, 1)
    with pytest.raises(CptainError, match=r"train\.seq_length = 8192: the model's config\.json allows at most 4096"):
        check_parallel(load_run(make_run(train__seq_length=8192)), windowed, 1)


def test_what_a_config_leaves_out_is_what_transformers_takes(converted: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((Path(load_run(converted["Mistral Nemo 12B"]).model.hf) / "config.json").read_text())
    for key in ("sliding_window", "num_key_value_heads", "rope_parameters", "head_dim"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 16}))
    theirs, ours = MistralConfig.from_pretrained(tmp_path), read_architecture(tmp_path)
    assert ours.max_position_embeddings == theirs.sliding_window
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.kv_channels == theirs.head_dim
    assert ours.rotary_base == theirs.rope_parameters["rope_theta"]
