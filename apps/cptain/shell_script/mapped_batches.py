"""How many sequences a step of a script sees, and what it counts in samples, as keys that count in steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from cptain import batches
from cptain.errors import bad_usage

if TYPE_CHECKING:
    from cptain.shell_script.mapping import Mapping

_RAMP, _SCHEDULE = "--rampup-batch-size", "--step-batch-size-schedule"
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_LONGEST = 10**6  # steps of a ramp


def last_batch(mapping: Mapping) -> int | None:
    """The global batch size that --step-batch-size-schedule ends with, which Megatron takes in the other's place."""
    return _scheduled(mapping)[-1][1] if mapping.given(_SCHEDULE) else None


def map_ramp(mapping: Mapping, batch: int) -> None:
    """Set train.batch_ramp.

    Args:
        mapping: whose train.seq_length is known.
        batch: sequences of a step in the end.

    Raises:
        CptainError: a ramp that Megatron would not take either.
    """
    if mapping.given(_SCHEDULE):
        flag, scheduled = _SCHEDULE, _scheduled(mapping)
        ramp = _by_steps(mapping, flag, lambda seen: max(size for begin, size in scheduled if begin <= seen), batch)
    elif words := (mapping.given(_RAMP) or "").split():
        flag = _RAMP
        if len(words) != 3 or any(not word.isdigit() for word in words):
            bad_usage(f"{mapping.script.file}: {flag} {' '.join(words)}: allowed: three numbers")
        start, increment, samples = map(int, words)
        rises = (batch - start) // increment if increment else 0
        if rises < 1 or (batch - start) % increment:
            bad_usage(f"{mapping.script.file}: {flag} {' '.join(words)}: it does not rise to {batch} sequences")
        a_rise = samples / rises
        ramp = _by_steps(
            mapping, flag, lambda seen: min(batch, start + increment * int(seen / a_rise if a_rise else rises)), batch
        )
    else:
        return
    mapping.put("train.batch_ramp", ramp, f"{flag}, in steps", flag)
    mapping.differs.append(f"{flag}: the learning rate goes by samples in the script, and by steps here")


def _scheduled(mapping: Mapping) -> list[tuple[int, int]]:
    """Samples seen and the batch from there on, as Megatron reads "0:768 250B:1536", in tokens."""
    text = mapping.given(_SCHEDULE) or ""
    try:
        found = []
        for entry in text.replace(",", " ").split():
            begin, _, size = (word.strip().upper() for word in entry.partition(":"))
            factor = _SUFFIXES.get(begin[-1:], 1)
            tokens = int(float(begin.removesuffix(begin[-1:]) if factor > 1 else begin) * factor)
            found.append((tokens // mapping.keys["train.seq_length"], int(size)))
    except ValueError:
        found = []
    grows = all(a < b and m < n for (a, m), (b, n) in itertools.pairwise(found))
    if not found or found[0][0] or not grows:
        bad_usage(f"{mapping.script.file}: {_SCHEDULE} {text}: cptain's batches grow from the first step on")
    return found


def _by_steps(mapping: Mapping, flag: str, batch_at: Callable[[int], int], full: int) -> list[list[int]]:
    """A ramp, from the batch after so many samples."""
    ramp: list[list[int]] = []
    seen = 0
    for step in range(1, _LONGEST):
        if (batch := batch_at(seen)) == full:
            return ramp
        if not ramp or ramp[-1][0] != batch:
            ramp.append([batch, step])
        ramp[-1][1] = step
        seen += batch
    bad_usage(f"{mapping.script.file}: {flag}: it takes more than {_LONGEST:,} steps")


def steps_of(mapping: Mapping, samples: float) -> float:
    """After how many steps so many samples are seen, by the keys that are set."""
    ramp, batch = mapping.keys.get("train.batch_ramp", []), mapping.keys["train.global_batch_size"]
    return samples / batch if not ramp else float(batches.steps_for(ramp, batch, int(samples)))


def whole_steps(mapping: Mapping, samples: int) -> int:
    """Steps of --train-samples: Megatron leaves out the samples that fill no step, but not of a schedule."""
    ramp, batch = mapping.keys.get("train.batch_ramp", []), mapping.keys["train.global_batch_size"]
    steps = batches.steps_for(ramp, batch, samples)
    return steps - (not mapping.given(_SCHEDULE) and batches.sequences(ramp, batch, steps) > samples)
