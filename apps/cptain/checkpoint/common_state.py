"""What a Megatron checkpoint holds beside its tensors: the arguments that it was trained with, and the iteration."""

from typing import Any

from cptain.checkpoint.torch_save import is_a


def saved_arguments(common: Any) -> dict[str, Any]:
    """Megatron's arguments in a checkpoint's common state, by name; none where it holds none.

    Args:
        common: as `torch_save` gives it: a dict, or since core 0.19 a list of that dict alone.
    """
    arguments = _dict_of(common).get("args")
    return dict(vars(arguments)) if is_a(arguments, "Namespace") else {}


def saved_iteration(common: Any) -> int | None:
    """The iteration that a checkpoint's common state names; None where it names none."""
    iteration = _dict_of(common).get("iteration")
    return iteration if type(iteration) is int else None


def _dict_of(common: Any) -> dict[Any, Any]:
    if isinstance(common, list) and len(common) == 1:
        common = common[0]
    return common if isinstance(common, dict) else {}
