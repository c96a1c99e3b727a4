"""The layers of Megatron's GPT model, and under which keys a checkpoint has them.

Transformer Engine's layer and the local one write the same keys but for one: the norm before a mixture of experts,
which Transformer Engine's has as it is and the local one as if it were fused with a dense MLP. Here both have it as it
is, so that a checkpoint does not depend on which of them wrote it. Whether experts are computed in one
(--moe-grouped-gemm) or one after another changes no key.
"""

from typing import Any


def gpt_layer(
    transformer_engine: bool, *, qk_layernorm: bool, num_experts: int | None, moe_grouped_gemm: bool = False
) -> Any:
    """The spec of a decoder's layer.

    Args:
        transformer_engine: its layers, or Megatron's own.
        qk_layernorm: norms of queries and keys.
        num_experts: of the mixture that is every layer's MLP; None: a dense one.
        moe_grouped_gemm: experts are computed in one.
    """
    from megatron.core.models.gpt import gpt_layer_specs as specs

    same = {"num_experts": num_experts, "moe_grouped_gemm": moe_grouped_gemm, "qk_layernorm": qk_layernorm}
    if transformer_engine:
        return specs.get_gpt_layer_with_transformer_engine_spec(**same)
    spec = specs.get_gpt_layer_local_spec(**same, normalization="RMSNorm")
    if num_experts:
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    return spec
