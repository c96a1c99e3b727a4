"""The Hugging Face architectures that cptain knows, each as what it adds to a Llama.

All are one decoder: RMSNorm, rotary positions over whole heads, grouped-query attention, a gated SiLU MLP, no biases
but those named here. A new family of that kind is an entry of `FAMILIES`; a part that none has yet is also a rule in
`cptain.checkpoint.mapping`, a fact in `cptain.model.arguments` and a field of
`cptain.model.architecture.Architecture`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
    """

    only: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool = False
    qk_layernorm: bool = False
    sliding_window: bool = False


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
}
