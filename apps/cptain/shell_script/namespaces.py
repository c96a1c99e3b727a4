"""What Megatron itself makes of two argument lists, the script's and cptain's, and why they differ.

Both go through the parse_args and validate_args of the Megatron at hand, in a process of its own that answers for CUDA
on the CPU; nothing is trained. A difference is explained by `cptain.shell_script.reasons`, through the arguments that
set it, or by `cptain.shell_script.explanations`; what neither explains is said to be unexplained.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cptain.errors import CptainError
from cptain.model.architecture import Architecture, Mixture, read_architecture
from cptain.run_file import RunFile
from cptain.shell_script.explanations import Explanations
from cptain.shell_script.mapping import Mapping
from cptain.shell_script.trainer import Script
from cptain.shell_script.values import is_known, shown
from cptain.training import flags
from cptain.training.layout import layout_of
from cptain.training.start import Beginning

_SECONDS = 300  # an import of Megatron takes 10; 60 where the disk is slow

_PARSE = """
import json, sys
given = json.loads(sys.stdin.read())
sys.path[:0] = given["tree"]
from cptain.megatron.importing import before_import, import_megatron
before_import(cpu=True)
import_megatron(cpu=True)
import argparse, traceback
from megatron.training import arguments

def parser():
    made = argparse.ArgumentParser(allow_abbrev=False)
    return arguments.add_megatron_arguments(made)

def taken_by(action, values):
    # What a parser takes: forks give floats where others want whole numbers, and name tokenizers of their own.
    result = []
    for value in values:
        try:
            made = action.type(value) if action.type else value
        except (ValueError, KeyError, TypeError, argparse.ArgumentTypeError):
            if action.type is not int or not value.replace(".", "", 1).isdigit():
                return None
            made = value = str(int(float(value)))
        if action.choices and made not in action.choices:
            return None
        result.append(value)
    return result

actions = {flag: action for action in parser()._actions for flag in action.option_strings}
found = {"flags": {flag: action.dest for flag, action in actions.items()}}
for name in ("script", "cptain"):
    words, unknown = [], []
    for flag, *values in given[name]:
        action = actions.get(flag)
        if action is None:
            unknown.append(flag)
        elif (taken := taken_by(action, values)) is None:
            unknown.append(" ".join([flag, *values]))
        else:
            words += [flag, *taken]
    sys.argv = ["pretrain_gpt.py", *words]
    args = arguments.parse_args(ignore_unknown_args=False)
    try:
        args = arguments.validate_args(args, {}) or args
        refused = ""
    except (AssertionError, ValueError, RuntimeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        refused = f"{type(error).__name__}: {str(error) or where.line}"
    simple = (bool, int, float, str, type(None))
    plain = {key: value if isinstance(value, simple) else str(value) for key, value in vars(args).items()}
    found[name] = {"values": plain, "unknown": unknown, "refused": refused}
print("\\n" + json.dumps(found))
"""


@dataclass
class Difference:
    """A value of Megatron's that the script and the run file give otherwise.

    Attributes:
        name: in the namespace.
        script, ours: both values.
        why: the explanation; "" where there is none.
    """

    name: str
    script: Any
    ours: Any
    why: str


@dataclass
class Comparison:
    """What came of it.

    Attributes:
        same: how many values are equal.
        differences: the others.
        unknown: arguments of the script that this Megatron does not have.
        notes: what else is to be known.
    """

    same: int = 0
    differences: list[Difference] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _architecture(script: Script, run: RunFile) -> tuple[Architecture, str]:
    """The model's, from its config.json where that is here; else as the script's arguments say it."""
    folder = Path(run.model.hf)
    if (folder / "config.json").is_file():
        return read_architecture(folder), ""
    given = {one.flag: one.values for one in script.arguments if all(map(is_known, one.values))}
    facts: dict[str, Any] = {}
    for name, flag in (
        ("num_layers", "--num-layers"),
        ("hidden_size", "--hidden-size"),
        ("num_attention_heads", "--num-attention-heads"),
    ):
        if flag not in given:
            raise CptainError(f"the script gives no {flag}, and {run.model.hf} is not here")
        facts[name] = int(given[flag][0])

    def number(flag: str, default: float) -> float:
        return float(given[flag][0]) if flag in given else default

    heads, hidden = facts["num_attention_heads"], facts["hidden_size"]
    groups = int(number("--num-query-groups", 1 if "--group-query-attention" in given else heads))
    scaled = not given.keys().isdisjoint(("--use-rope-scaling", "--rope-factor"))
    experts = int(number("--num-experts", 0))
    names = ("", "", "", "")  # of Hugging Face's tensors, which no argument says
    normalized = "--moe-router-pre-softmax" not in given
    mixture = Mixture(
        experts, int(number("--moe-router-topk", 2)), normalized, number("--moe-aux-loss-coeff", 0), names
    )
    architecture = Architecture(
        **facts,
        ffn_hidden_size=int(number("--ffn-hidden-size", 4 * hidden)),
        num_query_groups=groups,
        kv_channels=int(number("--kv-channels", hidden // heads)),
        vocab_size=int(number("--vocab-size", 128_256)),
        max_position_embeddings=int(number("--max-position-embeddings", run.train.seq_length)),
        rotary_base=number("--rotary-base", number("--rope-theta", 10_000)),
        rope_scaling_factor=number("--rope-scaling-factor", number("--rope-factor", 8.0)) if scaled else None,
        norm_epsilon=number("--norm-epsilon", 1e-5),
        tied_embeddings="--untie-embeddings-and-output-weights" not in given,
        qkv_bias="--add-qkv-bias" in given,
        qk_layernorm="--qk-layernorm" in given,
        mixture=mixture if experts else None,
    )
    return architecture, f"{run.model.hf} is not here: its architecture is taken to be what the script's arguments say"


def own_arguments(run: RunFile, architecture: Architecture, gpus: int) -> list[list[str]]:
    """The arguments that cptain train would give to Megatron for the first start of a run."""
    here = run.model_copy(update={"model": run.model.model_copy(update={"hf": "/", "tokenizer": None})})
    begins = Beginning(run.megatron_folder, None, [])
    script = Path(flags.__file__).with_name("pretrain.py")
    rows = flags.megatron_flags(
        here,
        architecture,
        script=script,
        steps=run.train.steps or 1,
        begins=begins,
        layout=layout_of(run, gpus),
        cpu=False,
    )
    passed: list[list[str]] = []
    for word in run.train.megatron_args:
        passed += [[word]] if word.startswith("--") else []
        passed[-1] += [] if word.startswith("--") else [word]
    return [*map(list, rows), *passed]


def compare(mapping: Mapping, run: RunFile, tree: Path | None) -> Comparison:
    """Put both argument lists through Megatron and compare what it makes of them.

    Args:
        mapping: the script's.
        run: the run file that was made of it, loaded.
        tree: a checkout of Megatron-LM in the place of the installed one.

    Raises:
        CptainError: it cannot be done here; says why.
    """
    script = mapping.script
    architecture, note = _architecture(script, run)
    gpus = (script.directives.nodes or 1) * (script.directives.gpus or 1)
    gpus = max(gpus, run.parallel.least_gpus)
    theirs = [[one.flag, *map(shown, one.values)] for one in script.arguments]
    given = {
        "tree": [str(tree.resolve())] if tree else [],
        "script": theirs,
        "cptain": own_arguments(run, architecture, gpus),
    }
    environment = {
        **os.environ,
        **_mpi(gpus),
        "WORLD_SIZE": str(gpus),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    command = [sys.executable, "-c", _PARSE]
    try:
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, env=environment, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CptainError(f"Megatron did not answer in {_SECONDS} s") from None
    if done.returncode:
        last = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()][-1:]
        raise CptainError(f"Megatron's parser ended with status {done.returncode}: {''.join(last):.200}")
    return _compared(json.loads(done.stdout.strip().splitlines()[-1]), note, " ".join(mapping.differs))


def _mpi(gpus: int) -> dict[str, str]:
    """What a fork with --use-mpi reads in the place of torchrun's variables."""
    ranks = dict.fromkeys(("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), "0")
    return {**ranks, "OMPI_COMM_WORLD_SIZE": str(gpus)}


def _compared(found: dict[str, Any], note: str, said: str) -> Comparison:
    result = Comparison(unknown=found["script"]["unknown"], notes=[note] if note else [])
    for name, who in (("script", "the script's"), ("cptain", "cptain's")):
        if found[name]["refused"]:
            result.notes.append(f"Megatron refuses {who} arguments here: {found[name]['refused']:.200}")
    theirs, ours = found["script"]["values"], found["cptain"]["values"]
    refused = [found[name]["refused"] for name in ("script", "cptain")]
    explanations = Explanations(theirs, ours, found["flags"], result.unknown, said, any(refused))
    for key in sorted({*theirs, *ours}):
        left, right = theirs.get(key), ours.get(key)
        if left == right or (isinstance(left, str) and left.replace(" ", "") == right):
            result.same += 1
            continue
        result.differences.append(Difference(key, left, right, explanations.of(key)))
    return result
