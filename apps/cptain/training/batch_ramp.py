"""train.batch_ramp in Megatron: global batches that grow by the step.

Core 0.13 has --rampup-batch-size and 0.19 --step-batch-size-schedule in its place; both ask for a run that is counted
in samples, with a learning rate by samples. Here a run is counted in steps with every Megatron, and so is its rate.
"""

from typing import Any

from cptain.batches import Ramp, batch_after


def install(ramp: Ramp) -> None:
    """Let the batches grow, after Megatron's import, `resumed_optimizer.install` and before training."""
    from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator as Calculator
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training import get_args

    def update(self: Any, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Set the batch of the next step.

        Megatron's loop asks twice before a step. First without `consistency_check`, and where the number of micro
        batches is another than then it saves, whatever the save interval: so that one is always the same.
        """
        args = get_args()
        if consistency_check:
            batch = batch_after(ramp, args.global_batch_size, consumed_samples)
            self.current_global_batch_size = self.current_running_global_batch_size = batch
            self.num_micro_batches = batch // (self.micro_batch_size * args.data_parallel_size)
        else:
            self.num_micro_batches = getattr(self, "at_first", self.num_micro_batches)
        self.at_first = getattr(self, "at_first", self.num_micro_batches)

    advance = OptimizerParamScheduler.step

    def step(self: Any, increment: int) -> None:
        """After a step of training go on by a whole batch, so that the rate is one of steps."""
        advance(self, get_args().global_batch_size if increment else 0)

    Calculator.update = update
    OptimizerParamScheduler.step = step
