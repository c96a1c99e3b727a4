"""What Megatron has to be told of a model, each fact once, under every name that it has there.

A fact has a key of config.json, a flag of Megatron's command line, a name among the arguments that Megatron saves in a
checkpoint, one in megatron.core's TransformerConfig and one in its GPTModel; not all of them have all. Training is told
of a model by `flags`, a converted checkpoint by `saved_arguments`, and the model of `verify --logits` by
`core_arguments`; `difference` compares what a checkpoint was trained as with what config.json says now.

Nothing of it is left to --use-checkpoint-args: Megatron restores neither the norm's epsilon nor the rope scaling from a
checkpoint, and reads what it restores from a file that another run may have written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cptain.errors import CptainError
from cptain.model.architecture import Architecture, Mixture

Flag = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact under all its names.

    Attributes:
        config: where config.json says it, for people; empty: it is the same for every model that cptain knows.
        value: from an architecture; None: this model has no such fact.
        flag: of Megatron's command line. A switch says True by being there, one that begins with ! False.
        saved: among the arguments in a checkpoint, the newest name first.
        core: of TransformerConfig.
        gpt: of GPTModel; one that begins with ! has the opposite value.
    """

    config: str
    value: Callable[[Architecture], Any]
    flag: str = ""
    saved: tuple[str, ...] = ()
    core: str = ""
    gpt: str = ""


def _always(value: Any) -> Callable[[Architecture], Any]:
    return lambda architecture: value


def _theta(architecture: Architecture) -> int:
    if architecture.rotary_base != int(architecture.rotary_base):
        raise CptainError(f"config.json: rope_theta = {architecture.rotary_base}: Megatron takes whole numbers only")
    return int(architecture.rotary_base)


def _mixture(value: Callable[[Mixture], Any]) -> Callable[[Architecture], Any]:
    """A fact of a mixture of experts."""
    return lambda architecture: value(architecture.mixture) if architecture.mixture else None


def _size(config: str, name: str) -> Fact:
    """A size that every part of Megatron calls by the same name."""
    flag = "--" + name.replace("_", "-")
    return Fact(config, lambda architecture: getattr(architecture, name), flag, (name,), name)


FACTS = (
    _size("num_hidden_layers", "num_layers"),
    _size("hidden_size", "hidden_size"),
    _size("intermediate_size", "ffn_hidden_size"),
    _size("num_attention_heads", "num_attention_heads"),
    Fact("", _always(True), "--group-query-attention", ("group_query_attention",)),
    _size("num_key_value_heads", "num_query_groups"),
    _size("head_dim", "kv_channels"),
    Fact(
        "max_position_embeddings",
        lambda architecture: architecture.max_position_embeddings,
        "--max-position-embeddings",
        ("max_position_embeddings",),
        gpt="max_sequence_length",
    ),
    Fact(
        "",
        _always("rope"),
        "--position-embedding-type",
        ("position_embedding_type",),
        gpt="position_embedding_type",
    ),
    Fact("rope_theta", _theta, "--rotary-base", ("rotary_base",), gpt="rotary_base"),
    Fact("", _always(1.0), "--rotary-percent", ("rotary_percent",), gpt="rotary_percent"),
    Fact(
        "rope_scaling",
        lambda architecture: architecture.rope_scaling_factor is not None,
        "--use-rope-scaling",
        ("use_rope_scaling",),
        gpt="rope_scaling",
    ),
    Fact(
        "rope_scaling.factor",
        lambda architecture: architecture.rope_scaling_factor,
        "--rope-scaling-factor",
        ("rope_scaling_factor",),
        gpt="rope_scaling_factor",
    ),
    Fact("", _always("RMSNorm"), "--normalization", ("normalization",), "normalization"),
    Fact(
        "rms_norm_eps",
        lambda architecture: architecture.norm_epsilon,
        "--norm-epsilon",
        ("layernorm_epsilon", "norm_epsilon"),  # since core 0.17; before
        "layernorm_epsilon",
    ),
    Fact("", _always(False), saved=("layernorm_zero_centered_gamma", "apply_layernorm_1p")),
    Fact("", _always(True), "--swiglu", ("swiglu",), "gated_linear_unit"),
    Fact("", _always(False), "!--disable-bias-linear", ("add_bias_linear",), "add_bias_linear"),
    Fact(
        "biases of the projections",
        lambda architecture: architecture.qkv_bias,
        "--add-qkv-bias",
        ("add_qkv_bias",),
        "add_qkv_bias",
    ),
    Fact(
        "norms of queries and keys",
        lambda architecture: architecture.qk_layernorm,
        "--qk-layernorm",
        ("qk_layernorm",),
        "qk_layernorm",
    ),
    Fact(
        "number of experts",
        _mixture(lambda mixture: mixture.experts),
        "--num-experts",
        ("num_experts",),
        "num_moe_experts",
    ),
    Fact(
        "width of an expert",
        lambda architecture: architecture.ffn_hidden_size if architecture.mixture else None,
        "--moe-ffn-hidden-size",
        ("moe_ffn_hidden_size",),
        "moe_ffn_hidden_size",
    ),
    Fact(
        "num_experts_per_tok",
        _mixture(lambda mixture: mixture.top_k),
        "--moe-router-topk",
        ("moe_router_topk",),
        "moe_router_topk",
    ),
    Fact(
        "",
        _mixture(lambda mixture: "softmax"),
        "--moe-router-score-function",
        ("moe_router_score_function",),
        "moe_router_score_function",
    ),
    # The softmax of the chosen ones alone is that of all, scaled to add up to 1.
    Fact(
        "norm_topk_prob",
        _mixture(lambda mixture: not mixture.normalized),
        "--moe-router-pre-softmax",
        ("moe_router_pre_softmax",),
        "moe_router_pre_softmax",
    ),
    Fact("", _always(0.0), "--attention-dropout", core="attention_dropout"),
    Fact("", _always(0.0), "--hidden-dropout", core="hidden_dropout"),
    Fact(
        "tie_word_embeddings",
        lambda architecture: not architecture.tied_embeddings,
        "--untie-embeddings-and-output-weights",
        ("untie_embeddings_and_output_weights",),
        gpt="!share_embeddings_and_output_weights",
    ),
)


def flags(architecture: Architecture, tensor_parallel: int) -> list[Flag]:
    """Megatron's flags for a model, each with its value.

    Raises:
        CptainError: a rope theta that is no whole number, which Megatron does not take.
    """
    result: list[Flag] = []
    for fact in FACTS:
        value = fact.value(architecture)
        if not fact.flag or value is None:
            continue
        if isinstance(value, bool):
            if value != fact.flag.startswith("!"):
                result.append((fact.flag.removeprefix("!"),))
        else:
            result.append((fact.flag, value if isinstance(value, str) else repr(value)))
    # Megatron pads the tokenizer's size to a multiple of this × tensor parallel size. As large as the model's own
    # embedding, it always gives that, also where the tokenizer is smaller: Megatron would cut the embedding unsaid.
    padded = architecture.padded_vocab_size(tensor_parallel)
    return [*result, ("--make-vocab-size-divisible-by", str(padded // tensor_parallel))]


def saved_arguments(architecture: Architecture) -> dict[str, Any]:
    """The arguments that a checkpoint of the model holds, by every name that a Megatron looks for."""
    pairs = ((name, fact.value(architecture)) for fact in FACTS for name in fact.saved)
    return {name: value for name, value in pairs if value is not None}


def core_arguments(architecture: Architecture) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of TransformerConfig, and of GPTModel."""
    config: dict[str, Any] = {}
    gpt: dict[str, Any] = {"vocab_size": architecture.vocab_size}
    for fact in FACTS:
        if (value := fact.value(architecture)) is None:
            continue
        if fact.core:
            config[fact.core] = value
        if fact.gpt:
            gpt[fact.gpt.removeprefix("!")] = not value if fact.gpt.startswith("!") else value
    return config, gpt


def difference(saved: Mapping[str, Any], architecture: Architecture) -> str | None:
    """The first fact in which a checkpoint's own arguments differ from an architecture, in words; None where none does.

    Args:
        saved: Megatron's arguments, as the checkpoint holds them. What it does not hold is not compared.
        architecture: as config.json has it.
    """
    for fact in FACTS:
        wanted = fact.value(architecture)
        found = next((saved[name] for name in fact.saved if name in saved), None)
        if found is None or wanted is None or found == wanted:
            continue
        name = fact.config or fact.saved[0]
        if isinstance(wanted, bool) and fact.config:
            wanted, found = ("yes" if value else "no" for value in (wanted, found))
        if name in ("tie_word_embeddings", "norm_topk_prob"):  # Megatron names their opposites
            wanted, found = found, wanted
        return f"{name} = {found!s:.80}, where config.json has {wanted}"
    return None
