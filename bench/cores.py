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


def make_files(folder: Path, most: int) -> dict[str, float]:
    """Of every kind a quarter and the whole, for so many cores; gives the MB of text between them.

    A core has as much to do whatever their number is: the files of `N` cores are N .jsonl.gz, or one .jsonl N times as
    long.
    """
    shutil.rmtree(folder / "scaling", ignore_errors=True)
    members, sizes = sorted(folder.glob("??.jsonl.gz")), dict[str, float]()
    for part, some in (("quarter", members[: FILES // 4]), ("whole", members)):
        (folder / "scaling" / part).mkdir(parents=True)
        content = b"".join(member.read_bytes() for member in some)
        for number in range(most):
            (folder / "scaling" / part / f"{number:02}.jsonl.gz").write_bytes(content)
        text = gzip.decompress(content)
        with open(folder / "scaling" / part / "one.jsonl", "wb") as file:
            for _ in range(most):
                file.write(text)
        sizes[part] = len(text) * most / 1e6
    return sizes


def scaling(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[list[str]]:
    """Steady speed over cores, for as many files as the most cores, and for one file.

    A machine's speed drifts within minutes by as much as is looked for. So the encoder alone runs right before each run
    of cptain's, which it is compared with.
    """
    sizes = make_files(folder, max(arguments.scaling))
    text = sizes["whole"] - sizes["quarter"]
    ours(folder, str(folder / "scaling" / "quarter" / "00.jsonl.gz"), model, 1, new="work")
    kinds = {f"{max(arguments.scaling)} .jsonl.gz": "??.jsonl.gz", "one .jsonl": "one.jsonl"}
    first: dict[str, tuple[float, float]] = {}
    for label, files in kinds.items():
        for cores in arguments.scaling:
            pairs = []
            for _ in range(min(cores, arguments.repeat)):  # few cores take long
                alone = encode_alone(folder, model, cores)
                quarter, whole = (
                    ours(folder, f"{folder}/scaling/{part}/{files}", model, cores)[0] for part in ("quarter", "whole")
                )
                pairs.append((text / (whole - quarter), alone))
            speed, alone = (statistics.median(values) for values in zip(*pairs, strict=True))
            share = statistics.median(mine / encoder for mine, encoder in pairs)
            one = first.setdefault(label, (speed / cores, share))
            figures = [f"{speed:.0f}", f"{alone:.0f}", f"{speed / one[0] / cores:.2f}", f"{share:.2f}"]
            yield [label, str(cores), *figures, f"{share / one[1]:.2f}"]
    shutil.rmtree(folder / "scaling")
