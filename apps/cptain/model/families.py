"""The Hugging Face architectures that cptain knows, each as what it adds to a Llama.

All are one decoder: RMSNorm, rotary positions over whole heads, grouped-query attention, a gated SiLU MLP or a mixture
of such, no biases but those named here. A new family of that kind is an entry of `FAMILIES`; a part that none has yet
is also a rule in `cptain.checkpoint.mapping`, a fact in `cptain.model.arguments` and a field of
`cptain.model.architecture.Architecture`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Experts:
    """How a family says and names its mixture of experts: a softmax over all of them, and a token gets the first few.

    Attributes:
        count: the key of config.json that says how many there are; transformers 5 may write the second, 4 knows the
            first alone.
        width: the key that says how wide each is.
        normalized: whether the chosen ones' probabilities are scaled to add up to 1; None: the key norm_topk_prob says.
        names: of a layer's mixture, and of an expert's gate, up and down projection, in the names of tensors.
    """

    count: tuple[str, ...]
    width: str
    normalized: bool | None
    names: tuple[str, str, str, str]


@dataclass(frozen=True)
class Family:
    """How the models of one architecture differ from a Llama.

    Attributes:
        only: keys of config.json that transformers reads for this architecture, and the one value of each that Megatron
            can represent; a config that leaves the key out has this value.
        defaults: what transformers takes for a key that config.json leaves out, where that differs from a Llama's.
        qkv_bias: the query, key and value projections have biases.
        qk_layernorm: an RMSNorm over the channels of every query and every key head, before the rotation.
        sliding_window: a sliding_window in config.json is in use.
        experts: in the place of every layer's MLP, a mixture of experts; None: a dense model.
    """

    only: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_layernorm: bool = False
    sliding_window: bool = False
    experts: Experts | None = None


FAMILIES: dict[str, Family] = {
    # Llama 1 to 3.3, and what was trained from them: Swallow, Llama 3.1 Swallow.
    "LlamaForCausalLM": Family(only={"attention_bias": False, "mlp_bias": False}),
    # Mistral 7B and Nemo; Swallow MS.
    "MistralForCausalLM": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        sliding_window=True,
    ),
    # Qwen2 and Qwen2.5. The sliding_window in their config.json is in use where use_sliding_window says so.
    "Qwen2ForCausalLM": Family(
        only={"use_sliding_window": False},
        defaults={"num_key_value_heads": 32},
        qkv_bias=True,
    ),
    "Qwen3ForCausalLM": Family(
        only={"use_sliding_window": False, "attention_bias": False},
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        qk_layernorm=True,
    ),
    # Mixtral 8x7B and 8x22B; Swallow MX.
    "MixtralForCausalLM": Family(
        only={"router_jitter_noise": 0.0},
        defaults={
            "num_key_value_heads": 8,
            "sliding_window": None,
            "rope_theta": 1000000.0,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        sliding_window=True,
        experts=Experts(("num_local_experts",), "intermediate_size", True, ("block_sparse_moe", "w1", "w3", "w2")),
    ),
    # Qwen3 30B-A3B and 235B-A22B. A model with layers that are dense (the first two keys) is saved by Megatron under
    # other keys, with every layer apart.
    "Qwen3MoeForCausalLM": Family(
        only={
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "attention_bias": False,
            "shared_expert_intermediate_size": None,
        },
        defaults={
            "num_key_value_heads": 4,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "router_aux_loss_coef": 0.001,
        },
        qk_layernorm=True,
        experts=Experts(
            ("num_experts", "num_local_experts"),
            "moe_intermediate_size",
            None,
            ("mlp", "gate_proj", "up_proj", "down_proj"),
        ),
    ),
}
