"""preprocess on very many tiny files: the time of all of it, and of planning alone with its memory.

    make bench BENCH='files --files 20000 --planned 200000 --cores 2 --folder /dev/shm/b'

Every file is one document of a line, so that what a file costs is all that there is. Planning is what `preprocess` does
before it begins: find the files, name them, take their fingerprints and look for what is done.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tokenizing import ours, tokenizer

PLAN = """
import resource, sys
from pathlib import Path
from cptain.data.preprocess import _plan
from cptain.run_file import load_run
run = load_run(Path(sys.argv[1]))
tasks, _, _ = _plan(run, False, run.tokenizers_folder)
print(len(tasks), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
A_FOLDER = 1000


def write(folder: Path, count: int) -> None:
    """Files of a document each, a thousand a folder."""
    for number in range(count):
        place = folder / f"{number // A_FOLDER:04}"
        if number % A_FOLDER == 0:
            place.mkdir(parents=True)
        (place / f"{number:07}.jsonl").write_text(f'{{"text": "document {number}, one of many; 一つの文書"}}\n')


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--planned", type=int, default=200_000)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/bench/files"))
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    model = tokenizer(folder / "llama3")
    print("| | files | wall s | CPU s | peak MB |\n| --- | --- | --- | --- | --- |", flush=True)
    for count, planned in ((arguments.files, False), (arguments.planned, True)):
        for old in ("in", "work"):
            shutil.rmtree(folder / old, ignore_errors=True)
        write(folder / "in", 1)
        ours(folder, f"{folder}/in/*/*.jsonl", model, 1)  # transformers is asked about the tokenizer
        shutil.rmtree(folder / "in")
        write(folder / "in", count)
        rows = []
        for _ in range(arguments.repeat):
            before, began = os.times(), time.monotonic()
            if planned:
                command = [sys.executable, "-c", PLAN, str(folder / "run.toml")]
                peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1])
            else:
                peak = ours(folder, f"{folder}/in/*/*.jsonl", model, arguments.cores, "work/bench/data")[1]
            wall, after = time.monotonic() - began, os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            rows.append((wall, spent, peak))
        wall, spent, peak = (statistics.median(column) for column in zip(*rows, strict=True))
        label = "planned" if planned else f"tokenized, {arguments.cores} cores"
        print(f"| {label} | {count} | {wall:.1f} | {spent:.1f} | {peak:.0f} |", flush=True)
    shutil.rmtree(folder / "in")


if __name__ == "__main__":
    main()
