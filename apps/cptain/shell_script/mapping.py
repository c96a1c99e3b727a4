"""Megatron's arguments as keys of a run file, through the tables that cptain builds Megatron's command from.

`cptain.training.flags` says which key a flag is, `cptain.model.arguments` which are of the architecture, and
`cptain.training.megatron_args` what the run file cannot hold; only what needs arithmetic, or another word, is here. An
argument that the script does not give has Megatron's default, not cptain's, and the run file says it where they differ.
"""

from dataclasses import dataclass, field
from typing import Any

from cptain.errors import CptainError
from cptain.model.arguments import FACTS
from cptain.shell_script.mapped_batches import last_batch, map_ramp, steps_of, whole_steps
from cptain.shell_script.mapped_data import map_data
from cptain.shell_script.reasons import CONVERTS, reason
from cptain.shell_script.trainer import Argument, Script
from cptain.shell_script.values import is_known, shown, unknowns
from cptain.training.flags import keys_of_flags
from cptain.training.megatron_args import Row, refusal

# Megatron's own defaults, where they matter; tests/test_import_script.py compares them with the installed parser's.
DEFAULTS = {
    "--lr-decay-style": "linear",
    "--min-lr": "0.0",
    "--weight-decay": "0.01",
    "--adam-beta1": "0.9",
    "--adam-beta2": "0.999",
    "--adam-eps": "1e-08",
    "--clip-grad": "1.0",
    "--seed": "1234",
    "--eval-interval": "1000",
    "--eval-iters": "100",
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "1",
    "--context-parallel-size": "1",
}
_WHOLE = ("steps", "size", "seed", "interval", "tensor", "pipeline", "context", "expert", "length")
_SAME = {"--optimizer": "adam", "--dataloader-type": "single"}  # of cptain, or Megatron's default
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "WSD": "wsd"}


@dataclass
class Mapping:
    """A run file in the making.

    Attributes:
        script: what is mapped.
        keys: values by dotted key.
        notes: a comment by dotted key.
        left: arguments without a key, and why.
        differs: what the run would do otherwise than the script, in words.
        of_model: arguments that the model's config.json says.
        passed: arguments for train.megatron_args.
        tables: those of [[data.mix]] and of [[data.validation]], by name.
    """

    script: Script
    keys: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left: list[tuple[Argument, str]] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    of_model: list[Argument] = field(default_factory=list)
    passed: list[Argument] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"data.mix": [], "data.validation": []})
    done: set[str] = field(default_factory=set)

    def put(self, key: str, value: Any, note: str = "", *flags: str) -> None:
        """Set a key, say why, and note the arguments that it says."""
        self.keys[key] = value
        self.done.update(flags)
        if note:
            self.notes[key] = note

    def given(self, flag: str) -> str | None:
        """An argument's value where the script gives one that is known."""
        value = self.script.value(flag)
        return value if value is not None and is_known(value) else None

    def whole(self, flag: str) -> int | None:
        """An argument's value as a whole number."""
        text = self.given(flag)
        if text is None:
            return None
        return int(self.as_number(flag, text))

    def number(self, flag: str) -> float | None:
        """An argument's value as a number."""
        text = self.given(flag)
        return None if text is None else self.as_number(flag, text)

    def as_number(self, flag: str, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            line = next(one.line for one in self.script.arguments if one.flag == flag)
            raise CptainError(f"{self.script.file}: line {line}: {flag} {shown(text)!r:.60}: no number") from None


def map_arguments(script: Script) -> Mapping:
    """Map what a script gives to pretrain_gpt.py.

    Raises:
        CptainError: what no run file does without is not known.
    """
    mapping = Mapping(script)
    _length(mapping)
    _schedule(mapping)
    _plain_keys(mapping)
    _precision(mapping)
    if any(one.flag == "--use-z-loss" for one in script.arguments):
        mapping.put("train.z_loss", 1e-4, "Swallow's and llm-jp's forks take 1e-4 for --use-z-loss", "--use-z-loss")
    map_data(mapping)
    _wandb(mapping)
    _rest(mapping)
    mapping.differs += [f"{word} among the arguments: known on the cluster only: left out" for word in script.extra]
    loaded, saved = script.value("--load"), script.value("--save")
    if loaded is None or loaded == saved:
        mapping.differs.append(
            "the script begins with random weights, or with its own last checkpoint; this run begins with model.hf"
        )
    if converting := next((one for one in script.arguments if one.flag.startswith("--ckpt-convert")), None):
        mapping.differs.append(f"{converting.flag}: {CONVERTS}; this is the run file of the training it belongs to")
    return mapping


def _needed(mapping: Mapping, what: str, *flags: str) -> CptainError:
    """The error for what a run file cannot do without."""
    script, said = mapping.script, [one for one in mapping.script.arguments if one.flag in flags]
    if said:
        marks = ", ".join(unknowns(" ".join(said[0].values)))
        return CptainError(f"{script.file}: line {said[0].line}: {said[0]}: {marks} is known on the cluster only")
    absent = next((one for one in script.reading.assumed if "is not here to be read" in one), "")
    hint = f"; {absent}" if absent else ""
    if "$" in absent or not script.arguments:
        hint += "; -v NAME=VALUE gives a variable that qsub -v gave"
    return CptainError(f"{script.file}: line {script.line}: it gives no {what} ({' or '.join(flags)}){hint}")


def _length(mapping: Mapping) -> None:
    """Batches and steps."""
    for key, flag in (("train.seq_length", "--seq-length"), ("train.micro_batch_size", "--micro-batch-size")):
        size = mapping.whole(flag)
        if size is None:
            raise _needed(mapping, key, flag)
        mapping.put(key, size, "", flag)
    batch = mapping.whole("--global-batch-size") or last_batch(mapping)
    if batch is None:
        batch = _default_batch(mapping)
        mapping.put("train.global_batch_size", batch, "the script leaves it to Megatron: micro batch × copies")
    mapping.put("train.global_batch_size", batch, "", "--global-batch-size")
    map_ramp(mapping, batch)
    if (steps := mapping.whole("--train-iters")) is None:
        samples = mapping.whole("--train-samples")
        if samples is None:
            raise _needed(mapping, "train.steps", "--train-iters", "--train-samples")
        steps = whole_steps(mapping, samples)
        mapping.put("train.steps", steps, f"--train-samples {samples} of {batch} a step", "--train-samples")
    mapping.put("train.steps", steps, "", "--train-iters")


def _default_batch(mapping: Mapping) -> int:
    directives = mapping.script.directives
    if "--global-batch-size" in {one.flag for one in mapping.script.arguments} or not (
        directives.nodes and directives.gpus
    ):
        raise _needed(mapping, "train.global_batch_size", "--global-batch-size")
    names = ("tensor", "pipeline", "context")
    flags = [f"--{name}{'-model' if name != 'context' else ''}-parallel-size" for name in names]
    model = 1
    for flag in flags:
        model *= mapping.whole(flag) or 1
    return mapping.keys["train.micro_batch_size"] * (directives.nodes * directives.gpus // model)  # type: ignore[no-any-return]


def _iterations(mapping: Mapping, name: str) -> float | None:
    """--NAME-iters, or --NAME-samples in steps."""
    steps = mapping.number(f"--{name}-iters")
    samples = mapping.number(f"--{name}-samples")
    mapping.done |= {f"--{name}-iters", f"--{name}-samples"}
    return steps if steps is not None or samples is None else steps_of(mapping, samples)


def _schedule(mapping: Mapping) -> None:
    """The learning rate's way."""
    lr = mapping.number("--lr")
    if lr is None:
        raise _needed(mapping, "train.lr", "--lr")
    mapping.put("train.lr", lr, "", "--lr")
    steps = mapping.keys["train.steps"]
    style = mapping.given("--lr-decay-style") or DEFAULTS["--lr-decay-style"]
    ends = _iterations(mapping, "lr-decay") or float(steps)
    warmup = _iterations(mapping, "lr-warmup") or 0.0
    if fraction := mapping.number("--lr-warmup-fraction"):
        warmup = fraction * ends
    mapping.done |= {"--lr-warmup-fraction", "--lr-decay-style"}
    schedule = _SCHEDULES.get(style)
    if schedule is None:
        mapping.differs.append(
            f"--lr-decay-style {style}: cptain has cosine, linear, wsd and constant; this has cosine"
        )
        schedule = "cosine"
    mapping.put("train.schedule", schedule, "" if mapping.given("--lr-decay-style") else "Megatron's default")
    mapping.put("train.warmup_steps", round(warmup))
    if warmup != round(warmup):
        mapping.differs.append(f"the warm-up is {warmup:g} steps, and here the nearest whole number")
    if schedule == "wsd":
        _wsd(mapping, ends)
    elif schedule != "constant" and round(ends) != steps:
        mapping.put("train.decay_steps", round(ends) - round(warmup), f"--lr-decay-iters {ends:g} less the warm-up")
    if schedule == "constant":
        mapping.done.add("--min-lr")
        if mapping.number("--min-lr"):
            mapping.notes["train.schedule"] = "which reads no --min-lr"


def _wsd(mapping: Mapping, ends: float) -> None:
    decay = _iterations(mapping, "lr-wsd-decay")
    if decay is None:
        raise _needed(mapping, "train.decay_steps", "--lr-wsd-decay-iters")
    mapping.put("train.decay_steps", round(decay))
    style = mapping.given("--lr-wsd-decay-style") or "exponential"
    mapping.put("train.decay_style", style, "", "--lr-wsd-decay-style")
    if round(ends) != mapping.keys["train.steps"]:
        mapping.differs.append(f"the decay ends at step {ends:g} by --lr-decay-iters, and here at the last step")


def _plain_keys(mapping: Mapping) -> None:
    """The keys that are a flag's value as it is, with Megatron's default where the script says nothing."""
    for flag, key in keys_of_flags().items():
        section, _, name = key.partition(".")
        if flag in mapping.done or section not in ("train", "parallel") or key in mapping.keys:
            continue
        text = mapping.given(flag)
        if text is None and any(one.flag == flag for one in mapping.script.arguments):
            continue  # known on the cluster only: said in _rest
        if text is None and (text := DEFAULTS.get(flag)) is None:
            continue
        value = mapping.as_number(flag, text)
        note = "" if mapping.given(flag) is not None else "Megatron's default, as the script says nothing"
        mapping.put(key, int(value) if name.endswith(_WHOLE) or flag == "--eval-iters" else value, note, flag)
    if "train.save_interval" not in mapping.keys:
        mapping.differs.append(
            "the script saves at its end alone; here every train.save_interval steps, 500 by default"
        )
    if size := mapping.whole("--expert-model-parallel-size"):
        mapping.put("parallel.expert", size, "", "--expert-model-parallel-size")


def _precision(mapping: Mapping) -> None:
    flags = {one.flag for one in mapping.script.arguments}
    mapping.done |= {"--bf16", "--fp8-format", "--fp8-recipe", "--fp8-amax-history-len", "--fp8-amax-compute-algo"}
    if "--fp16" in flags:
        mapping.done.add("--fp16")
        mapping.differs.append("--fp16: cptain trains in bf16, fp8 or fp32; this has bf16")
    if "--fp8-format" in flags or "--fp8-hybrid" in flags:
        mapping.put("train.precision", "fp8")
        recipe = mapping.given("--fp8-recipe") or "delayed"
        if recipe in ("tensorwise", "delayed", "blockwise"):
            mapping.put("train.fp8_recipe", recipe)
        else:
            mapping.differs.append(
                f"--fp8-recipe {recipe}: cptain has tensorwise, delayed and blockwise; this has tensorwise"
            )
        if (form := mapping.given("--fp8-format")) not in (None, "hybrid"):
            mapping.differs.append(f"--fp8-format {form}: cptain has hybrid")
        amax = (mapping.given("--fp8-amax-history-len"), mapping.given("--fp8-amax-compute-algo"))
        if recipe == "delayed" and amax != ("1024", "max"):
            mapping.differs.append('--fp8-amax-history-len and -compute-algo: cptain\'s "delayed" has 1024 and max')
    elif "--bf16" not in flags and "--fp16" not in flags:
        mapping.put("train.precision", "fp32", "the script gives no --bf16")
    if "--deterministic-mode" in flags:
        mapping.done.add("--deterministic-mode")
        mapping.put("train.deterministic", True)


def _wandb(mapping: Mapping) -> None:
    for key in ("project", "entity"):
        flag = f"--wandb-{key}"
        if (value := mapping.given(flag)) and (key == "project" or "wandb.project" in mapping.keys):
            mapping.put(f"wandb.{key}", value, "", flag)


def _of_model() -> set[str]:
    """Flags that say what config.json says."""
    return {fact.flag.removeprefix("!") for fact in FACTS if fact.flag}


def _rows() -> list[Row]:
    return [(key, flag) for flag, key in keys_of_flags().items()]


def _rest(mapping: Mapping) -> None:
    """Every argument that is no key yet: of the model, left out with a reason, or passed through."""
    of_model, rows = _of_model(), _rows()
    for argument in mapping.script.arguments:
        flag = argument.flag
        refused = refusal(flag, rows)
        if flag in mapping.done:
            if not argument.is_list and (marks := unknowns(" ".join(argument.values))):
                mapping.differs.append(f"{argument}: {', '.join(marks)}: known on the cluster only: left out")
            continue
        if marks := unknowns(" ".join(argument.values)):
            mapping.left.append((argument, reason(flag) or f"{', '.join(marks)}: known on the cluster only"))
        elif flag in of_model or refused == "the model's config.json says it":
            if why := reason(flag):
                mapping.left.append((argument, why))
            else:
                mapping.of_model.append(argument)
        elif why := reason(flag) or refused:
            mapping.left.append((argument, why))
            if refused and not reason(flag):
                mapping.differs.append(f"{argument}: {refused}")
        elif _SAME.get(flag) == " ".join(argument.values):
            mapping.left.append((argument, "cptain gives it too"))
        else:
            mapping.passed.append(argument)
