"""preprocess against Megatron-LM's own tools: speed, memory, the same bytes, and how it scales over cores.

    make bench BENCH='preprocess --peer main=/path/to/Megatron-LM --peer fork=/path/to/another'

The corpus is 20 .jsonl.gz files of Japanese and English text (tokenizing.py). A peer gets its best case: all text in
one plain .jsonl file, and the same number of cores. Steady speed is taken between a fifth of the corpus and all of it,
so that start-up drops out of both. Every figure is the median of --repeat runs.

--scaling 1,4,16 encodes 16 files of --megabytes each with 1, 4 and 16 cores, and then one file with all of that; steady
speed is taken between a quarter and all. Medians are of as many runs as there are cores, and of --repeat at most.

--edges compares files of edge cases instead, one a file, beside one of all that every tool takes.
"""

import argparse
import functools
import os
import platform
import re
import statistics
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from cores import scaling
from edges import edges
from tokenizing import corpus, ours, peer_command, run, same_bytes, tokenizer, tools

# In a new work_dir, transformers is asked about the tokenizer.
STARTS = {"": None, ", in a new data folder": "work/bench/data", ", in a new work_dir": "work"}


def rows(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[list[str]]:
    """The table, row by row."""
    cores, sizes = arguments.cores, [(folder / name).stat().st_size / 1e6 for name in ("part.jsonl", "all.jsonl")]

    Measured = Callable[[], tuple[float, float]]

    def measure(label: str, part: Measured, whole: Measured, same: bool = False) -> list[str]:
        """A row: median wall seconds of all, steady MB/s, the ratios of both, peak memory, and whether bytes agree."""
        short = statistics.median(part()[0] for _ in range(arguments.repeat))
        times, peaks = zip(*(whole() for _ in range(arguments.repeat)), strict=True)
        wall = statistics.median(times)
        speed = (sizes[1] - sizes[0]) / (wall - short)
        own.setdefault("wall", wall)
        own.setdefault("speed", speed)
        ratios = [f"{wall / own['wall']:.2f}", f"{own['speed'] / speed:.2f}"]
        pair = folder / "work" / "bench" / "data" / "all_text_document"
        agree = ("yes" if same_bytes(folder, pair) else "NO") if same else ""
        return [label, f"{wall:.1f}", f"{speed:.1f}", *ratios, f"{max(peaks):.0f}", agree]

    own: dict[str, float] = {}
    few, every = f"{folder}/0[0-3].jsonl.gz", f"{folder}/??.jsonl.gz"
    ours(folder, few, model, cores, new="work")  # bytecode and page cache
    kind = (re.search(r"tokenizer: (.*)", (folder / "ours.log").read_text()) or [""])[1]
    yield measure(
        f"cptain ({kind}), 20 .jsonl.gz",
        lambda: ours(folder, few, model, cores),
        lambda: ours(folder, every, model, cores),
    )
    for label, new in STARTS.items():
        start = startup(folder, model, new)
        yield [f"cptain, one document{label}", f"{start:.1f}", "", f"{start / own['wall']:.2f}", "", "", ""]
    yield measure(
        "cptain, one .jsonl",
        lambda: ours(folder, str(folder / "part.jsonl"), model, cores),
        lambda: ours(folder, str(folder / "all.jsonl"), model, cores),
    )
    for label, tree, python, tool_name in tools(arguments.peer):

        def tool(file: Path, place: tuple[Path, str, str] = (tree, python, tool_name)) -> tuple[float, float]:
            return run(*peer_command(folder, *place, file, model, cores), folder / "peer.log")

        tool(folder / "part.jsonl")
        yield measure(
            f"{label}, one .jsonl",
            functools.partial(tool, folder / "part.jsonl"),
            functools.partial(tool, folder / "all.jsonl"),
            same=True,
        )


def startup(folder: Path, model: Path, new: str | None) -> float:
    """Wall seconds of a run over one document; see `ours`."""
    one = folder / "one.jsonl"
    one.write_text('{"text": "one"}\n')
    ours(folder, str(one), model, 1)
    return statistics.median(ours(folder, str(one), model, 1, new)[0] for _ in range(3))


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=TREE[,PYTHON]", help="a tree of Megatron-LM"
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--scaling",
        type=lambda cores: [int(count) for count in cores.split(",")],
        metavar="1,2,…,N",
        help="measure how speed grows with these numbers of cores instead",
    )
    parser.add_argument("--edges", action="store_true", help="compare edge cases instead")
    parser.add_argument("--folder", type=Path, default=Path("build/bench/preprocess"))
    arguments = parser.parse_args()
    arguments.peer = [
        (name, *tree.partition(",")[::2]) for name, _, tree in (one.partition("=") for one in arguments.peer)
    ]
    folder = arguments.folder.resolve()
    if not arguments.edges:
        corpus(folder, arguments.megabytes)
    model = tokenizer(folder / "llama3")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("fastokens", "tokenizers", "transformers", "isal", "orjson")
    )
    print(f"{platform.machine()}, {arguments.cores} cores, Python {platform.python_version()}, {packages};")
    if arguments.edges:
        head, table = ["edge case", "cptain", *(label for label, *_ in tools(arguments.peer))], edges
    elif arguments.scaling:
        head, table = ["files", "cores", "steady MB/s", "the encoder alone, MB/s", "of linear"], scaling
        head += ["ours over the encoder's", "that, of its first"]
    else:
        head, table = ["tool", "wall s", "steady MB/s", "wall, times ours", "ours, times its speed"], rows
        head += ["peak MB a process", "same bytes"]
    if not arguments.edges:
        size = (folder / "all.jsonl").stat().st_size / 1e6
        print(f"{size:.0f} MB of text, median of {arguments.repeat}")
    print(f"\n| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |", flush=True)
    for row in table(arguments, folder, model):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
