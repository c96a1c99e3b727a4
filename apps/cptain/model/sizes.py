"""How large a model is, from its architecture alone."""

from cptain.model.architecture import Architecture


def parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, its vocabulary unpadded."""
    queries = architecture.num_attention_heads * architecture.kv_channels
    keys = architecture.num_query_groups * architecture.kv_channels
    layer = architecture.hidden_size * (2 * queries + 2 * keys + 3 * architecture.ffn_hidden_size + 2)
    if architecture.qkv_bias:
        layer += queries + 2 * keys
    if architecture.qk_layernorm:
        layer += 2 * architecture.kv_channels
    embeddings = architecture.vocab_size * architecture.hidden_size * (1 if architecture.tied_embeddings else 2)
    return architecture.num_layers * layer + embeddings + architecture.hidden_size
