"""Why Megatron makes something else of the script's arguments than of cptain's, value by value."""

from dataclasses import dataclass
from typing import Any

from cptain.model.arguments import FACTS
from cptain.shell_script.reasons import reason

_OF_MODEL = "the model's config.json says it; positions are rotary, and this only bounds seq_length"
_EXPLAINED = {
    "max_position_embeddings": _OF_MODEL,
    "add_position_embedding": "positions are rotary: none are added, whatever it says",
    "make_vocab_size_divisible_by": "the embedding keeps the rows of the model's own, whatever the tokenizer has",
    "padded_vocab_size": "the embedding keeps the rows of the model's own, whatever the tokenizer has",
    "inprocess_active_world_size": "the number of processes, by mpirun's variable or by torchrun's",
    "recompute_granularity": reason("--recompute-granularity") or "",
    "use_rotary_position_embeddings": "the older name of --position-embedding-type rope",
    "use_dist_ckpt": reason("--use-dist-ckpt") or "",
    "ckpt_convert_format": reason("--ckpt-convert-format") or "",
    "data_parallel_size": "the GPUs of a job divided by a copy's",
}

_FORKS = {"rotary_base": "--rope-theta", "use_rope_scaling": "--rope-factor", "rope_scaling_factor": "--rope-factor"}
_NOT_GIVEN = {  # by the script
    "lr_decay_iters": "the same: Megatron's default is train_iters, which cptain says",
    "eval_interval": "not given: every 1000 steps by Megatron up to core 0.13, and never since",
    "save_interval": "not given: the script saves at its end alone",
}
_OF_CHECKPOINT = {name for fact in FACTS for name in fact.saved}


@dataclass
class Explanations:
    """Explains one comparison.

    Attributes:
        theirs, ours: the script's values and cptain's, by name.
        flags: which name each of Megatron's arguments sets.
        unknown: arguments of the script that this Megatron does not have.
        said: what the run file already says is other than the script.
        refused: Megatron refused one of both lists, and settled no values of it.
    """

    theirs: dict[str, Any]
    ours: dict[str, Any]
    flags: dict[str, str]
    unknown: list[str]
    said: str
    refused: bool

    def of(self, name: str) -> str:
        """Why a value differs; "" where nothing explains it."""
        if name in _NOT_GIVEN and self.theirs.get(name) is None:
            return _NOT_GIVEN[name]
        if name in _EXPLAINED:
            return _EXPLAINED[name]
        names = [flag for flag, dest in self.flags.items() if dest == name]
        if any(f"{flag} " in self.said or f"{flag}:" in self.said for flag in names):
            return "see OTHER THAN THE SCRIPT, above"
        return (
            self._of_model(name) or next((why for flag in names if (why := reason(flag))), "") or self._of_refusal(name)
        )

    def _of_model(self, name: str) -> str:
        one_each = self.ours.get("num_query_groups") == self.theirs.get("num_attention_heads")
        if name in ("group_query_attention", "num_query_groups") and one_each:
            return "the same: as many key and value heads as query heads"
        if name == "moe_ffn_hidden_size" and self.ours.get(name) == self.theirs.get("ffn_hidden_size"):
            return "the same: without --moe-ffn-hidden-size an expert has --ffn-hidden-size"
        if name in _OF_CHECKPOINT and self.theirs.get("use_checkpoint_args"):
            return "the script takes it from its checkpoint (--use-checkpoint-args), and cptain from config.json"
        if (of_fork := _FORKS.get(name)) and of_fork in self.unknown:
            return f"the script's fork says it with {of_fork}, which this Megatron does not have"
        return ""

    def _of_refusal(self, name: str) -> str:
        if self.refused and None in (self.theirs.get(name), self.ours.get(name)):
            return "not settled, as Megatron refuses one of both lists (above)"
        return ""
