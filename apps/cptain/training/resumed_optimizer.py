"""A resumed optimizer follows the run file: of its settings the checkpoint keeps none, of its state everything.

Megatron saves every parameter group with the rates that it was built with (max_lr, min_lr) and with Adam's settings.
Up to core 0.16 these come back at a resume and win over the arguments, in silence; since 0.17 a group is even found
again by its rates, so that a run whose lr changed does not load. Here a saved group is found by what it holds, and gets
the settings of the group that this start built. The schedule takes from the checkpoint no more than how far it is.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Group = dict[str, Any]

# What tells groups apart whatever the rates are: every other key is a setting. Groups that are equal in these (Megatron
# has several only where rates differ within the model, as with --decoupled-lr) are in the same order at every start.
_KIND = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "optimizer")
_STATE = ("params", "step")  # "step" is where Transformer Engine's and Apex's Adam count


def renew(saved: list[Group], built: list[Group]) -> None:
    """Give the groups of a checkpoint the settings of those that this start built; order and state stay.

    Args:
        saved: the checkpoint's groups, changed in place.
        built: the optimizer's, from the arguments.

    Raises:
        ValueError: the two do not match.
    """
    of_kind: dict[tuple[Any, ...], list[Group]] = defaultdict(list)
    for group in saved:
        of_kind[tuple(map(group.get, _KIND))].append(group)
    for group in built:
        kind = tuple(map(group.get, _KIND))
        if not of_kind[kind]:
            raise ValueError(f"the checkpoint's optimizer has too few parameter groups with {_KIND} = {kind}")
        of_kind[kind].pop(0).update({key: value for key, value in group.items() if key not in _STATE})


def _load_renewed(load: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """`load_state_dict` of an optimizer of Megatron's, with the saved groups renewed."""

    def load_state_dict(self: Any, state_dict: Any) -> None:
        # FP32Optimizer saves torch's own dictionary, the others wrap it.
        renew(state_dict.get("optimizer", state_dict)["param_groups"], self.optimizer.param_groups)
        load(self, state_dict)

    return load_state_dict


def _advance(self: Any, state_dict: dict[str, Any]) -> None:
    """`load_state_dict` of the schedule: go to where the checkpoint is, in sequences, by this start's own formula."""
    self.num_steps = state_dict["num_steps"]
    self.step(0)


def install() -> None:
    """Put both around Megatron's loading, after Megatron's import and before training."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    for optimizer in (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer):
        optimizer.load_state_dict = _load_renewed(optimizer.load_state_dict)
    OptimizerParamScheduler.load_state_dict = _advance
