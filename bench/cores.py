"""How speed grows with cores, and how the machine itself lets it grow: `preprocess --scaling 1,4,16`."""

import argparse
import gzip
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tokenizing import FILES, ours

ALONE = 100  # MB of text that a process encodes alone, some 2 s: in less, their start would count


def encode_alone(folder: Path, model: Path, cores: int) -> float:
    """MB/s of text that `cores` processes encode side by side with nothing to read, parse or write: the machine's."""
    from cptain.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(str(model), folder / "work" / ".tokenizers")
    with open(folder / "part.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = sum(len(text.encode()) for text in texts) / 1e6
    times = math.ceil(ALONE / size)
    began = time.monotonic()
    children = []
    for _ in range(cores):
        child = os.fork()
        if not child:
            for first in [*range(0, len(texts), 4000)] * times:
                tokenizer.encode(texts[first : first + 4000])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return size * times * cores / (time.monotonic() - began)


def scaling(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[list[str]]:
    """Steady speed over cores, for as many files as the most cores, and for one file."""
    most = max(arguments.scaling)
    many = folder / "scaling"
    shutil.rmtree(many, ignore_errors=True)
    members = sorted(folder.glob("??.jsonl.gz"))
    for part, some in (("quarter", members[: FILES // 4]), ("whole", members)):
        (many / part).mkdir(parents=True)
        content = b"".join(member.read_bytes() for member in some)
        for number in range(most):
            (many / part / f"{number:02}.jsonl.gz").write_bytes(content)
        with open(many / part / "one.jsonl", "wb") as file:
            for _ in range(most):
                file.write(b"".join(gzip.decompress(member.read_bytes()) for member in some))
    text = (
        sum((many / part / "one.jsonl").stat().st_size * sign for part, sign in (("whole", 1), ("quarter", -1))) / 1e6
    )
    ours(folder, str(many / "quarter" / "00.jsonl.gz"), model, 1, new="work")
    repeats = {cores: min(cores, arguments.repeat) for cores in arguments.scaling}  # few cores take long
    alone = {
        cores: statistics.median(encode_alone(folder, model, cores) for _ in range(repeats[cores]))
        for cores in arguments.scaling
    }
    for label, files in ((f"{most} .jsonl.gz", "??.jsonl.gz"), ("one .jsonl", "one.jsonl")):
        first = 0.0
        for cores in arguments.scaling:
            times = [
                statistics.median(
                    ours(folder, f"{many}/{part}/{files}", model, cores)[0] for _ in range(repeats[cores])
                )
                for part in ("quarter", "whole")
            ]
            speed = text / (times[1] - times[0])
            first = first or speed / cores
            of_machine = alone[cores] / alone[arguments.scaling[0]] / cores * arguments.scaling[0]
            figures = [f"{speed / first / cores:.2f}", f"{of_machine:.2f}", f"{speed / first / cores / of_machine:.2f}"]
            yield [label, str(cores), f"{speed:.0f}", *figures]
    shutil.rmtree(many)
