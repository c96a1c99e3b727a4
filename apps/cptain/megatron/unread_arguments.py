"""Arguments that Megatron's parser takes and no code of Megatron's reads: such a one would change nothing, in silence.

Each release leaves some behind (core 0.19.2 has --check-for-spiky-loss and --rampup-batch-size, for example, which
0.13.1 reads), so that the Megatron at hand is asked, not a list. What cptain itself passes is looked at by the tests:
nothing may be left to find, and so every source be read, before a training starts.
"""

import argparse
import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_DECLARE = ("arguments.py", "yaml_arguments.py")  # name every argument in quotes
_COMPUTED = "muon_"  # read by getattr with a name put together from this prefix


def _sources() -> Iterator[Path]:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None
    for place in spec.submodule_search_locations or ():
        for folder in ("training", "core"):  # first where most are found
            yield from (Path(place) / folder).rglob("*.py")


def unread(words: Iterable[str], script: Path) -> list[str]:
    """The flags among `words` whose value neither Megatron nor the script reads; unknown ones are left to Megatron.

    Args:
        words: of a command line.
        script: the training script.
    """
    if not (words := list(words)):
        return []  # Megatron's parser takes 0.4 s to be made
    from megatron.training.arguments import add_megatron_arguments

    actions = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._option_string_actions
    names = {flag: actions[flag].dest for word in words if (flag := word.partition("=")[0]) in actions}
    waiting = {name for name in names.values() if not name.startswith(_COMPUTED)}
    for source in (script, *_sources()):
        if not waiting:
            break
        any_of = "|".join(sorted(waiting))
        pattern = rf"\.({any_of})\b" + ("" if source.name in _DECLARE else rf"|[\"']({any_of})[\"']")
        for match in re.finditer(pattern, source.read_text(encoding="utf-8")):
            waiting.discard(match[1] or match[2])
    return [flag for flag, name in names.items() if name in waiting]
