"""How large a model is, and how much a token of training computes, from its architecture alone."""

from cptain.model.architecture import Architecture


def parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, its vocabulary unpadded."""
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    layer = architecture.hidden_size * (2 * queries + 2 * keys + 2) + architecture.experts * expert(architecture)
    if architecture.mixture:
        layer += architecture.experts * architecture.hidden_size
    if architecture.qkv_bias:
        layer += queries + 2 * keys
    if architecture.qk_layernorm:
        layer += 2 * architecture.kv_channels
    embeddings = architecture.vocab_size * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)
    return architecture.num_layers * layer + embeddings + architecture.hidden_size


def expert(architecture: Architecture) -> int:
    """Parameters of a gated MLP: of one expert, where a layer has several."""
    return 3 * architecture.hidden_size * architecture.ffn_hidden_size


def active_parameters(architecture: Architecture) -> int:
    """Parameters that compute a token: all but those of the experts that it does not get."""
    idle = architecture.experts - architecture.experts_a_token
    return parameters(architecture) - architecture.num_layers * idle * expert(architecture)


def flops_per_token(architecture: Architecture, seq_length: int) -> float:
    """Floating-point operations that training does for a token, as Megatron counts them.

    Six for every weight of a matrix product (a multiplication and an addition, forward and twice backward), a router's
    left out, and as many for each channel of the queries and half the sequence, twice: attention is causal. Llama 3.1
    8B at 8192 tokens: 51.5e9.
    """
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    layer = architecture.hidden_size * (2 * queries + 2 * keys) + architecture.experts_a_token * expert(architecture)
    head = architecture.vocab_size * architecture.hidden_size
    return 6.0 * (architecture.num_layers * (layer + queries * seq_length) + head)
