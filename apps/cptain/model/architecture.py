"""A model's architecture, read from its config.json and never typed.

Megatron cannot represent every config: what it cannot is refused here, by name, before anything is written. Keys that
config.json leaves out have the values that transformers gives them, which differ by family (`cptain.model.families`).
The rope scaling of Llama 3.1 is hard-coded in Megatron (`megatron.core.models.common.embeddings.rotary_pos_embedding`):
low and high frequency factors 1 and 4, original length 8192; only the factor is an argument.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cptain.errors import CptainError, one_line
from cptain.model.families import FAMILIES, Experts

# What transformers reads for every family, and the one value that Megatron can represent (`Family.only`).
_ONLY = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
_MEGATRON_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_ROPE = ("factor", *_MEGATRON_LLAMA3_ROPE)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts in the place of every layer's MLP.

    Attributes:
        experts: of a layer.
        top_k: of them, that a token gets.
        normalized: the probabilities of these are scaled to add up to 1.
        aux_loss: coefficient of the loss that balances the load, in training.
        names: of the mixture, and of an expert's gate, up and down projection, in Hugging Face's tensors.
    """

    experts: int
    top_k: int
    normalized: bool
    aux_loss: float
    names: tuple[str, str, str, str]


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder, in Megatron's terms.

    Attributes:
        num_layers: decoder layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the MLP, or of each of its experts, of the gate alone.
        num_attention_heads: query heads.
        num_query_groups: key and value heads; equal to `num_attention_heads` without grouped-query attention.
        kv_channels: channels a head.
        vocab_size: rows of the embedding in the Hugging Face checkpoint, unpadded.
        max_position_embeddings: the longest sequence that the config names, tokens; or its sliding window, where that
            is shorter: a sequence no longer than the window is attended to in full, which is what Megatron computes.
        rotary_base: rope theta.
        rope_scaling_factor: llama3 rope scaling's factor, or None without scaling.
        norm_epsilon: of every RMSNorm.
        tied_embeddings: the output layer is the embedding.
        qkv_bias: the query, key and value projections have biases.
        qk_layernorm: an RMSNorm over the channels of every query and every key head.
        mixture: of experts; None: a dense model.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling_factor: float | None
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_layernorm: bool = False
    mixture: Mixture | None = None

    @property
    def experts(self) -> int:
        """MLPs of a layer."""
        return self.mixture.experts if self.mixture else 1

    @property
    def experts_a_token(self) -> int:
        """MLPs of a layer that compute a token."""
        return self.mixture.top_k if self.mixture else 1

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of Megatron's embedding: `vocab_size` up to a multiple of 128 × `tensor_parallel`."""
        multiple = 128 * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face model's folder, as it stands."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CptainError(f"{folder}: not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise CptainError(f"{file}: cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise CptainError(f"{file}: not a JSON object")
    return config


def _refuse_two_rotations(file: Path, config: dict[str, Any]) -> None:
    """Refuse a config.json in which transformers 4 and 5 would read different rotations.

    Raises:
        CptainError: names both.
    """
    five = config.get("rope_parameters")
    if not five or not ("rope_theta" in config or "rope_scaling" in config):
        return

    def rotation(rope: dict[str, Any]) -> dict[str, Any]:
        theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
        kind = rope.get("rope_type", rope.get("type", "default"))
        return {"rope_theta": theta, "rope_type": kind} | {key: rope[key] for key in _LLAMA3_ROPE if key in rope}

    four = {**(config.get("rope_scaling") or {}), "rope_theta": config.get("rope_theta") or 10000.0}
    before, after = rotation(four), rotation(five)
    for key in {**before, **after}:
        if before.get(key) != after.get(key):
            raise CptainError(
                f"{file}: {key}: {before.get(key)} by rope_theta and rope_scaling, which transformers 4 reads, and "
                f"{after.get(key)} by rope_parameters, which 5 reads: make them say the same"
            )


def _refuse(file: Path, key: str, value: Any, allowed: str) -> NoReturn:
    raise CptainError(f"{file}: {key} = {json.dumps(value)}: not supported: {allowed}")


def _read_rope(file: Path, config: dict[str, Any]) -> tuple[float, float | None]:
    """Theta, and the factor of llama3's scaling or None.

    transformers 5 keeps both together in rope_parameters, 4 apart in rope_theta and rope_scaling.
    """
    _refuse_two_rotations(file, config)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        _refuse(file, "rope_scaling.rope_type", kind, 'Megatron knows "default" and "llama3"')
    if "mrope_section" in rope:
        _refuse(file, "rope_scaling.mrope_section", rope["mrope_section"], "positions must be those of text")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(file, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"], "only 1.0")
    theta = float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    if kind == "default":
        return theta, None
    for key, fixed in _MEGATRON_LLAMA3_ROPE.items():
        if rope[key] != fixed:
            _refuse(file, f"rope_scaling.{key}", rope[key], f"Megatron hard-codes {fixed:g}")
    return theta, float(rope["factor"])


def _read_mixture(file: Path, config: dict[str, Any], family: Experts | None) -> Mixture | None:
    if family is None:
        return None
    counts = {key: int(config[key]) for key in family.count if key in config}
    if not counts:
        raise KeyError(family.count[0])
    if len(set(counts.values())) > 1:
        said = " and ".join(f"{key} = {count}" for key, count in counts.items())
        raise CptainError(f"{file}: {said}: transformers 4 reads the one, and 5 the other: make them say the same")
    experts, top_k = next(iter(counts.values())), int(config["num_experts_per_tok"])
    if not 1 <= top_k <= experts:
        _refuse(file, "num_experts_per_tok", top_k, f"there are {experts} experts")
    normalized = bool(config["norm_topk_prob"]) if family.normalized is None else family.normalized
    if normalized and top_k == 1:
        _refuse(file, "num_experts_per_tok", top_k, "Megatron has no single expert whose probability is made 1")
    return Mixture(experts, top_k, normalized, float(config["router_aux_loss_coef"]), family.names)


def read_architecture(folder: Path) -> Architecture:
    """The architecture of the Hugging Face model in `folder`.

    Raises:
        CptainError: no config.json, a missing key, or a config that Megatron cannot represent.
    """
    file, config = folder / "config.json", read_config(folder)
    names = config.get("architectures") or []
    if names not in [[name] for name in FAMILIES]:
        _refuse(file, "architectures", names, f"supported: {', '.join(FAMILIES)}")
    family = FAMILIES[names[0]]
    defaults = dict(family.defaults)
    if config.get("rope_parameters"):
        defaults.pop("rope_theta", None)  # which it holds
    config = {**defaults, **config}
    width = family.experts.width if family.experts else "intermediate_size"
    for key, only in {**_ONLY, **family.only}.items():
        if config.get(key, only) != only:
            _refuse(file, key, config[key], f"only {json.dumps(only)}")
    if set(config.get("layer_types") or []) - {"full_attention"}:
        _refuse(file, "layer_types", config["layer_types"], 'only "full_attention"')
    try:
        for key in (*_SIZES, width):
            if int(config[key]) < 1:
                _refuse(file, key, config[key], "must be over 0")
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        theta, factor = _read_rope(file, config)
        longest = int(config["max_position_embeddings"])
        if family.sliding_window and config["sliding_window"] is not None:
            longest = min(longest, int(config["sliding_window"]))
        return Architecture(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            ffn_hidden_size=int(config[width]),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            kv_channels=int(config.get("head_dim") or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            max_position_embeddings=longest,
            rotary_base=theta,
            rope_scaling_factor=factor,
            norm_epsilon=float(config["rms_norm_eps"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_layernorm=family.qk_layernorm,
            mixture=_read_mixture(file, config, family.experts),
        )
    except KeyError as error:
        raise CptainError(f"{file}: {error.args[0]}: is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CptainError(f"{file}: a value has the wrong type: {one_line(error)}") from error


def model_folder(hf: str, only: list[str] | None = None) -> Path:
    """The local folder of a model: a folder as it is; a hub id from the Hugging Face cache, downloaded where it is not
    there.

    Args:
        hf: the folder or id.
        only: files that are needed of a hub id; None: all of it.

    Raises:
        CptainError: no such folder, or the hub does not have it or cannot be reached.
    """
    if Path(hf).is_absolute():
        if not Path(hf).is_dir():
            raise CptainError(f"{hf}: no such model folder")
        return Path(hf)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hf, allow_patterns=only, ignore_patterns=["*.pth", "*.bin", "original/*"]))
    except Exception as error:
        raise CptainError(f"{hf}: no such folder, and the hub does not give it: {one_line(error)}") from error
