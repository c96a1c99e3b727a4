"""Which Hugging Face tensors make which Megatron tensor, as a table.

Megatron stacks the layers of a decoder into one tensor on disk, and the experts of each: a rule whose names hold
`{layer}` has one Megatron tensor [layers, …], and with `{expert}` [layers, experts, …]. The local and the Transformer
Engine layer specs write the same keys (`cptain.megatron.layers`). No rotary permutation: both sides rotate halves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from cptain.model.architecture import Architecture

Shape = tuple[int, ...]
Index = tuple[int, ...]
"""Of one part of a stacked tensor: none, the layer, or the layer and the expert."""
_PIECE_BYTES = 256 << 20


# How the Hugging Face tensors of a rule make the Megatron tensor of one index.
Layout = Callable[[list[torch.Tensor], Architecture], torch.Tensor]


def stacked(parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """One tensor after another: the gate's rows, then the up projection's; or a single tensor as it is."""
    return torch.cat(parts)


def by_query_group(parts: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """q, k and v interleaved by query group: its query heads, then its key head, then its value head."""
    groups = architecture.num_query_groups
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and what it is made of.

    Attributes:
        key: Megatron's key on disk.
        hf: Hugging Face names, with `{layer}` in a decoder layer's and `{expert}` in an expert's, and the names of
            their dimensions.
        layout: how the latter lie in the former.
    """

    key: str
    hf: tuple[tuple[str, tuple[str, ...]], ...]
    layout: Layout = stacked

    @property
    def layered(self) -> bool:
        """Whether the tensor is stacked over the decoder's layers."""
        return "{layer}" in self.hf[0][0]

    def stacks(self, architecture: Architecture) -> Shape:
        """The dimensions that Megatron stacks along: layers, then experts; none outside the decoder's layers."""
        counts = {"{layer}": architecture.num_layers, "{expert}": architecture.experts}
        return tuple(count for word, count in counts.items() if word in self.hf[0][0])

    def indices(self, architecture: Architecture) -> Iterator[Index]:
        """Every index of it; the empty one alone for a tensor outside the decoder's layers."""
        return product(*map(range, self.stacks(architecture)))

    def hf_names(self, index: Index) -> list[str]:
        """The Hugging Face names of one index."""
        values = dict(zip(("layer", "expert"), index, strict=False))
        return [name.format(**values) for name, _ in self.hf]

    def hf_shapes(self, architecture: Architecture) -> list[Shape]:
        """The shapes of the Hugging Face tensors."""
        sizes = _sizes(architecture)
        return [tuple(sizes[dimension] for dimension in dimensions) for _, dimensions in self.hf]

    def megatron_shape(self, architecture: Architecture) -> Shape:
        """The shape of the whole Megatron tensor, its vocabulary unpadded."""
        shapes = self.hf_shapes(architecture)
        return (*self.stacks(architecture), sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def has_vocabulary_rows(self) -> bool:
        """Whether Megatron pads its rows to a multiple of the tensor-parallel size."""
        return self.hf[0][1][0] == "vocabulary"


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "vocabulary": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "queries": architecture.num_attention_heads * architecture.kv_channels,
        "keys": architecture.num_query_groups * architecture.kv_channels,
        "channels": architecture.kv_channels,
        "experts": architecture.experts,
    }


_ATTENTION, _MLP = "decoder.layers.self_attention", "decoder.layers.mlp"
_HF = "model.layers.{layer}"
_EMBEDDING = Rule("embedding.word_embeddings.weight", (("model.embed_tokens.weight", ("vocabulary", "hidden")),))
_OUTPUT = Rule("output_layer.weight", (("lm_head.weight", ("vocabulary", "hidden")),))
VOCABULARY_TENSORS = tuple(rule.hf[0][0] for rule in (_EMBEDDING, _OUTPUT))  # those with a row for every token
_LAYER = (
    Rule(f"{_ATTENTION}.linear_qkv.layer_norm_weight", ((f"{_HF}.input_layernorm.weight", ("hidden",)),)),
    Rule(
        f"{_ATTENTION}.linear_qkv.weight",
        (
            (f"{_HF}.self_attn.q_proj.weight", ("queries", "hidden")),
            (f"{_HF}.self_attn.k_proj.weight", ("keys", "hidden")),
            (f"{_HF}.self_attn.v_proj.weight", ("keys", "hidden")),
        ),
        by_query_group,
    ),
    Rule(f"{_ATTENTION}.linear_proj.weight", ((f"{_HF}.self_attn.o_proj.weight", ("hidden", "queries")),)),
)
_DENSE = (
    Rule(f"{_MLP}.linear_fc1.layer_norm_weight", ((f"{_HF}.post_attention_layernorm.weight", ("hidden",)),)),
    Rule(
        f"{_MLP}.linear_fc1.weight",
        ((f"{_HF}.mlp.gate_proj.weight", ("ffn", "hidden")), (f"{_HF}.mlp.up_proj.weight", ("ffn", "hidden"))),
    ),
    Rule(f"{_MLP}.linear_fc2.weight", ((f"{_HF}.mlp.down_proj.weight", ("hidden", "ffn")),)),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The rules of a mixture of experts, by its names in Hugging Face's tensors. Megatron keeps the norm before it
    apart (`cptain.megatron.layers`), and its experts under the same keys whether they are computed in one or apart."""
    expert = f"{_HF}.{block}.experts.{{expert}}"
    gated = ((f"{expert}.{gate}.weight", ("ffn", "hidden")), (f"{expert}.{up}.weight", ("ffn", "hidden")))
    return (
        Rule("decoder.layers.pre_mlp_layernorm.weight", ((f"{_HF}.post_attention_layernorm.weight", ("hidden",)),)),
        Rule(f"{_MLP}.router.weight", ((f"{_HF}.{block}.gate.weight", ("experts", "hidden")),)),
        Rule(f"{_MLP}.experts.experts.linear_fc1.weight", gated),
        Rule(f"{_MLP}.experts.experts.linear_fc2.weight", ((f"{expert}.{down}.weight", ("hidden", "ffn")),)),
    )


_QKV_BIAS = (
    Rule(
        f"{_ATTENTION}.linear_qkv.bias",
        (
            (f"{_HF}.self_attn.q_proj.bias", ("queries",)),
            (f"{_HF}.self_attn.k_proj.bias", ("keys",)),
            (f"{_HF}.self_attn.v_proj.bias", ("keys",)),
        ),
        by_query_group,
    ),
)
_QK_LAYERNORM = (
    Rule(f"{_ATTENTION}.q_layernorm.weight", ((f"{_HF}.self_attn.q_norm.weight", ("channels",)),)),
    Rule(f"{_ATTENTION}.k_layernorm.weight", ((f"{_HF}.self_attn.k_norm.weight", ("channels",)),)),
)
_FINAL_NORM = Rule("decoder.final_layernorm.weight", (("model.norm.weight", ("hidden",)),))

# Entries that Transformer Engine layers ask for when they load. They hold nothing for bf16; what no layer asks for is
# ignored.
_FINAL_EXTRA_STATE = "decoder.final_layernorm._extra_state"
_LAYER_EXTRA_STATES = (
    f"{_ATTENTION}.linear_qkv._extra_state",
    f"{_ATTENTION}.q_layernorm._extra_state",
    f"{_ATTENTION}.k_layernorm._extra_state",
    f"{_ATTENTION}.linear_proj._extra_state",
    f"{_ATTENTION}.core_attention._extra_state",
    f"{_MLP}.linear_fc1._extra_state",
    f"{_MLP}.linear_fc2._extra_state",
)
_MIXTURE_EXTRA_STATES = ("decoder.layers.pre_mlp_layernorm._extra_state",)
_EXPERT_EXTRA_STATES = tuple(f"{_MLP}.experts.experts.linear_{name}._extra_state" for name in ("fc1", "fc2"))


def extra_states(architecture: Architecture) -> Iterator[tuple[str, Index, Shape]]:
    """The extra states of a checkpoint: keys, indices, and how many of each there are along an index's dimensions."""
    yield _FINAL_EXTRA_STATE, (0,), (1,)
    layers, mixture = architecture.num_layers, architecture.mixture
    for layer in range(layers):
        for key in _LAYER_EXTRA_STATES + (_MIXTURE_EXTRA_STATES if mixture else ()):
            yield key, (layer,), (layers,)
        for expert in range(mixture.experts if mixture else 0):
            for key in _EXPERT_EXTRA_STATES:
                yield key, (layer, expert), (layers, architecture.experts)


def rules(architecture: Architecture) -> tuple[Rule, ...]:
    """The rules of an architecture: the embedding's, a layer's, and what follows the layers."""
    mlp = _experts(*architecture.mixture.names) if architecture.mixture else _DENSE
    layer = _LAYER + mlp
    layer += (_QKV_BIAS if architecture.qkv_bias else ()) + (_QK_LAYERNORM if architecture.qk_layernorm else ())
    return (_EMBEDDING, *layer, _FINAL_NORM, *(() if architecture.tied_embeddings else (_OUTPUT,)))


def model_order(architecture: Architecture) -> Iterator[tuple[Rule, Index]]:
    """Every rule with every index it applies to, in the order of a forward pass: a layer's tensors lie together."""
    layered = [rule for rule in rules(architecture) if rule.layered]
    yield _EMBEDDING, ()
    for layer in range(architecture.num_layers):
        for rule in layered:
            for inner in product(*map(range, rule.stacks(architecture)[1:])):
                yield rule, (layer, *inner)
    for rule in rules(architecture):
        if not rule.layered and rule is not _EMBEDDING:
            yield rule, ()


def row_ranges(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Rows (first, stop) of a tensor of `shape` in pieces of at most 256 MB: an embedding may be gigabytes."""
    row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
    step = max(1, _PIECE_BYTES // row_bytes)
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])
