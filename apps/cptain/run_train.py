"""The run file's [train] and [parallel]: how long, with which batches, schedule and optimizer, and cut over which GPUs.

What depends on the length of the run (a warm-up or a decay given as a share of it) is worked out here, for whoever has
counted its steps; `cptain.training.flags` says it to Megatron, and the model card to people.
"""

import itertools
import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cptain import batches
from cptain.run_values import AbsolutePath, Fraction, TokenCount
from cptain.toml_file import Duration, Section, seconds

HOW_LONG = ("steps", "tokens", "epochs")


class Branch(Section):
    """Where a run branches off another.

    run: the other's folder, which is work_dir/name of its run file.
    iteration: the step whose checkpoint is begun with.
    optimizer: go on from it as the other run would, with optimizer, random states and the place in the data, so that
        the steps count on; false: begin at step 0 with its weights.
    """

    run: AbsolutePath
    iteration: PositiveInt
    optimizer: bool = True


class Train(Section):
    """How it is trained. Exactly one of steps, tokens and epochs says for how long.

    from: another run's checkpoint to begin with, in the place of the converted one.
    micro_batch_size: sequences that a copy of the model computes at a time; "auto": the largest that fits and divides.
    batch_ramp: smaller global batches to begin with, each with the step up to which it holds, as in
        [[256, 500], [512, 1000]].
    schedule: of the learning rate, after a linear warm-up to lr: "cosine" or "linear" fall to min_lr by the last step;
        "wsd" (warm-up, stable, decay) stays at lr and falls in the last decay_steps; "constant" stays.
    warmup_steps or warmup_share: how long the warm-up takes; a share is of all steps, rounded.
    decay_steps or decay_share: how long the decay takes. With cosine and linear it begins after the warm-up, and by
        default takes all steps that are left; it may be longer than the run, which then ends amid it.
    decay_style: the form of wsd's decay.
    z_loss: so many times the square of the logarithm of the softmax's denominator is trained on beside the loss, which
        keeps logits small; it is in no loss that is logged. PaLM had 1e-4.
    fp8_recipe: what values share a scale: "tensorwise" (default) a tensor, as it is; "delayed" a tensor, by the largest
        of its last 1024 steps; "blockwise" 1 × 128 or 128 × 128 values.
    keep: how many checkpoints stay, the last ones; with keep_every also those at its multiples, in steps; and always
        the last of each start.
    eval_steps: batches of a validation; 0: none is made.
    deterministic: kernels and collectives that give the same bits each time, so that a run repeats itself, and one that
        is resumed at its layout is as if undisturbed.
    recompute: what the backward pass computes again: "full" all layers, a number so many of each pipeline stage;
        "auto": as few layers as let a step fit.
    max_loss_spike: nats a token that the loss of a step may be over the median of the 100 steps before it; more, or a
        loss that is no number, ends the training. By 2 nats every token is 7 times less probable: what continued
        pre-training began with is lost, where another mix of data moves the loss by tenths.
    step_timeout: a step that takes longer ends the training, with the stack of every rank in the log. torch ends
        collectives by itself after 10 minutes, and leaves no stacks.
    megatron_args: passed to Megatron as written, after cptain's own, so that they win over its defaults; what a key
        or config.json says is refused.
    script: another training script that takes Megatron's arguments; default: cptain's own.
    """

    from_: Branch | None = Field(default=None, alias="from")
    seq_length: PositiveInt
    micro_batch_size: PositiveInt | Literal["auto"] = 1
    global_batch_size: PositiveInt
    batch_ramp: list[tuple[PositiveInt, PositiveInt]] = Field(default_factory=list)
    steps: PositiveInt | None = None
    tokens: TokenCount | None = None
    epochs: PositiveFloat | None = None
    lr: PositiveFloat
    min_lr: NonNegativeFloat = 0.0
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    warmup_share: Fraction | None = None
    decay_steps: PositiveInt | None = None
    decay_share: Fraction | None = None
    decay_style: Literal["linear", "cosine", "minus_sqrt", "exponential"] | None = None
    weight_decay: NonNegativeFloat = 0.1
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    adam_eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    z_loss: NonNegativeFloat = 0.0
    seed: PositiveInt = 1234
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise"] | None = None
    deterministic: bool = False
    recompute: Literal["auto", "none", "selective", "full"] | PositiveInt = "auto"
    save_interval: PositiveInt = 500
    keep: PositiveInt | Literal["all"] = "all"
    keep_every: PositiveInt | None = None
    eval_interval: PositiveInt = 100
    eval_steps: NonNegativeInt = 1
    max_loss_spike: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    step_timeout: Duration = "00:08:00"
    megatron_args: list[str] = Field(default_factory=list)
    script: AbsolutePath | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [key for key in HOW_LONG if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and epochs (given: {', '.join(given) or 'none'})")
        if self.micro_batch_size != "auto" and self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of "
                f"micro_batch_size = {self.micro_batch_size}"
            )
        if not seconds(self.step_timeout):
            raise ValueError("step_timeout: allowed: 00:00:01 and more")
        self._check_ramp()
        for key in ("max_loss_spike", "step_timeout", "z_loss", "batch_ramp") if self.script else ():
            if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: another train.script than cptain's own does nothing with it")
        if self.fp8_recipe and self.precision != "fp8":
            raise ValueError(f'fp8_recipe = "{self.fp8_recipe}": precision = "{self.precision}" does not read it')
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is over lr = {self.lr}")
        self._check_schedule_keys()
        if self.keep_every is not None and (self.keep == "all" or self.keep_every % self.save_interval):
            what = 'keep = "all"' if self.keep == "all" else f"save_interval = {self.save_interval}"
            why = "keeps them anyway" if self.keep == "all" else "does not divide it"
            raise ValueError(f"keep_every = {self.keep_every}: {what} {why}")
        if self.from_ and self.from_.optimizer and self.steps is not None and self.steps <= self.from_.iteration:
            raise ValueError(
                f"steps = {self.steps} must be over from.iteration = {self.from_.iteration}, whose steps count"
            )
        if self.steps is not None:
            self.check_length(self.steps, f"steps = {self.steps}")
        return self

    def _check_ramp(self) -> None:
        """Refuse a ramp that does not rise to global_batch_size."""
        rising = [*self.batch_ramp, (self.global_batch_size, math.inf)]
        for (batch, until), (larger, later) in itertools.pairwise(rising):
            if batch >= larger or until >= later:
                then = f"global_batch_size = {larger}" if later == math.inf else f"[{larger}, {later}]"
                raise ValueError(f"batch_ramp: [{batch}, {until}] before {then}: batches and steps must grow")
            if self.micro_batch_size != "auto" and batch % self.micro_batch_size:
                raise ValueError(f"batch_ramp: {batch} is not a multiple of micro_batch_size = {self.micro_batch_size}")

    def _check_schedule_keys(self) -> None:
        """Refuse keys that the schedule would not read, and two that say one thing."""
        if self.warmup_steps and self.warmup_share is not None:
            raise ValueError("give one of warmup_steps and warmup_share")
        if self.decay_steps is not None and self.decay_share is not None:
            raise ValueError("give one of decay_steps and decay_share")
        decay = next((key for key in ("decay_steps", "decay_share") if getattr(self, key) is not None), None)
        if self.schedule == "wsd" and decay is None:
            raise ValueError('schedule = "wsd" needs decay_steps or decay_share')
        unread = {
            decay: self.schedule == "constant",
            "min_lr": self.schedule == "constant" and self.min_lr > 0,
            "decay_style": self.schedule != "wsd" and self.decay_style is not None,
        }
        if wrong := next((key for key, is_unread in unread.items() if key and is_unread), None):
            raise ValueError(f'{wrong} = {getattr(self, wrong)}: schedule = "{self.schedule}" does not read it')

    def check_length(self, steps: int, given: str) -> None:
        """Refuse a warm-up or a decay that the run is too short for.

        Args:
            steps: optimizer steps in all.
            given: the key that says how long, with its value.

        Raises:
            ValueError: naming both.
        """
        warmup, decay = self.warmup(steps), self.decay(steps)
        if warmup >= steps:
            raise ValueError(f"warmup_steps = {warmup} must be under {given}")
        if decay < 1:
            raise ValueError(f"decay_share = {self.decay_share}: {given} is too short for a step of it")
        if self.schedule == "wsd" and warmup + decay > steps:
            raise ValueError(f"warmup_steps = {warmup} and decay_steps = {decay} are over {given} together")

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a run of `steps`."""
        return self.warmup_steps if self.warmup_share is None else round(self.warmup_share * steps)

    def decay(self, steps: int) -> int:
        """Steps of the decay in a run of `steps`; what is left after the warm-up where nothing says otherwise."""
        if self.decay_steps is not None:
            return self.decay_steps
        return steps - self.warmup(steps) if self.decay_share is None else round(self.decay_share * steps)

    def described_schedule(self, steps: int) -> str:
        """The learning rate's way over a run of `steps`, in words."""
        warmup, decay = self.warmup(steps), self.decay(steps)
        way = {
            "constant": "constant",
            "wsd": f"constant, then {self.decay_style or 'linear'} to {self.min_lr:g} in the last {decay:,} steps",
        }.get(self.schedule, f"{self.schedule} to {self.min_lr:g}")
        if self.schedule != "wsd" and warmup + decay != steps:
            way += f" in {decay:,} steps"
        return f"{self.lr:g}, {way}, {warmup:,} steps of warm-up"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step sees, after batch_ramp."""
        return self.seq_length * self.global_batch_size

    def sequences(self, steps: int) -> int:
        """Sequences that the first `steps` optimizer steps see."""
        return batches.sequences(self.batch_ramp, self.global_batch_size, steps)

    def tokens_seen(self, steps: int) -> int:
        """Tokens that the first `steps` optimizer steps see."""
        return self.sequences(steps) * self.seq_length

    def whole_steps(self, steps: int) -> float:
        """How many steps of global_batch_size see as much, and so take about as long, as the first `steps`."""
        return self.sequences(steps) / self.global_batch_size

    @property
    def divides_batches(self) -> int:
        """The largest number of sequences that divides every global batch."""
        return math.gcd(self.global_batch_size, *(batch for batch, _ in self.batch_ramp))

    def steps_for(self, tokens: float, begin: int = 0) -> int:
        """How many optimizer steps after step `begin` see so many tokens, rounded up."""
        wanted = self.sequences(begin) + math.ceil(tokens / self.seq_length)
        return batches.steps_for(self.batch_ramp, self.global_batch_size, wanted) - begin

    @property
    def described_batch(self) -> str:
        """The global batch size in words."""
        ramp = "".join(f"{batch:,} up to step {until:,}, then " for batch, until in self.batch_ramp)
        return f"{ramp}{self.global_batch_size:,} sequences"


class Parallel(Section):
    """How the model is cut over GPUs: tensor × pipeline × context of them hold one copy.

    expert: over how many of the GPUs that otherwise have equal weights (copies × context) the experts of a mixture are
        shared out.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1

    @property
    def model_size(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tensor * self.pipeline * self.context

    @property
    def least_gpus(self) -> int:
        """GPUs that a training needs: those of one copy, or of as many as share the experts."""
        return self.tensor * self.pipeline * math.lcm(self.context, self.expert)
