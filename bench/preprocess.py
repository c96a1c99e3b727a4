"""preprocess against Megatron-LM's own tools: speed, memory, the same bytes, and how it scales over cores.

    make bench BENCH='preprocess --peer main=/path/to/Megatron-LM --peer fork=/path/to/another'

The corpus is 20 .jsonl.gz files of Japanese and English text, generated from the word frequencies of wordfreq; the
tokenizer is Llama 3's, from llama-models (both of PyPI). A peer gets its best case: all text in one plain .jsonl file,
and the same number of cores. Steady speed is taken between a fifth of the corpus and all of it, so that start-up drops
out of both. Every figure is the median of --repeat runs.

--scaling 1,4,16 encodes 16 files of --megabytes each with 1, 4 and 16 cores, and then one file with all of that; steady
speed is taken between a quarter and all.
"""

import argparse
import filecmp
import functools
import gzip
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np

FILES = 20
FAST = "preprocess_data_fast.py"
LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def words(language: str) -> tuple[np.ndarray, np.ndarray]:
    """Words of a language, and the cumulated share of each in its texts."""
    import wordfreq

    frequencies = wordfreq.get_frequency_dict(language, "large")
    shares = np.array(list(frequencies.values()))
    return np.array(list(frequencies), dtype=object), np.cumsum(shares / shares.sum())


def corpus(folder: Path, megabytes: int) -> Path:
    """The files, and all.jsonl and part.jsonl with the text of all of them and of the first fifth."""
    if (folder / "part.jsonl").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    languages = {language: words(language) for language in ("ja", "en")}
    with open(folder / "all.jsonl", "wb") as whole, open(folder / "part.partial", "wb") as part:
        for number in range(FILES):
            lines, size = [], 0
            while size < megabytes * 1_000_000 // FILES:
                language = ("ja", "en")[len(lines) % 2]
                vocabulary, shares = languages[language]
                count = min(5 + int(random.lognormal(5.5, 1)), 20_000)
                picked = vocabulary[np.minimum(np.searchsorted(shares, random.random(count)), len(shares) - 1)]
                sentences = [picked[start : start + 18] for start in range(0, count, 18)]
                joined = ("。" if language == "ja" else ". ").join(
                    ("" if language == "ja" else " ").join(sentence) for sentence in sentences
                )
                lines.append(json.dumps({"text": joined}, ensure_ascii=False).encode() + b"\n")
                size += len(lines[-1])
            content = b"".join(lines)
            (folder / f"{number:02}.jsonl.gz").write_bytes(gzip.compress(content, 6))
            whole.write(content)
            if number < FILES // 5:
                part.write(content)
    (folder / "part.partial").rename(folder / "part.jsonl")
    return folder


def tokenizer(folder: Path) -> Path:
    """Llama 3's tokenizer as a Hugging Face model's folder has it, with a small model's config.json."""
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Regex, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = importlib.util.find_spec("llama_models")
    assert spec is not None
    assert spec.submodule_search_locations
    ranks = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    special = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{number}|>" for number in range(254))]
    converted = TikTokenConverter(str(ranks), pattern=LLAMA_3_PATTERN, extra_special_tokens=special).converted()
    converted.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    converted.model.ignore_merges = True
    bos = converted.token_to_id(special[0])
    converted.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], bos)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=converted, bos_token=special[0], eos_token=special[1]).save_pretrained(
        folder
    )
    (folder / "config.json").write_text("{}")
    return folder


def run(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Wall seconds of a command that must succeed, and the peak MB of the largest of its processes."""
    began = time.monotonic()
    with open(log, "w") as output:
        started = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(started.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}: wait status {status}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 1024


def ours(folder: Path, files: str, model: Path, cores: int, cold: bool = False) -> tuple[float, float]:
    """preprocess on some of the corpus; where `cold`, in a new data folder, so that transformers is asked too."""
    work = folder / "work"
    if cold:
        shutil.rmtree(work, ignore_errors=True)
    run_file = folder / "run.toml"
    run_file.write_text(
        f'name = "bench"\nwork_dir = "{work}"\n[model]\nhf = "{model}"\n[data]\ninput = ["{files}"]\n'
        "[train]\nseq_length = 8\nglobal_batch_size = 1\nsteps = 1\nlr = 1\n"
    )
    command = [sys.executable, "-m", "cptain", "preprocess", str(run_file), "--workers", str(cores), "--force"]
    return run(command, {}, folder / "ours.log")


def peer(
    folder: Path, tree: Path, python: str, tool_name: str, file: Path, model: Path, cores: int
) -> tuple[float, float]:
    """A tool of Megatron-LM's on a plain .jsonl file."""
    prefix = folder / "peer"
    for old in folder.glob("peer_*"):
        old.unlink()
    tool = ["taskset", "--cpu-list", f"0-{cores - 1}", python, str(tree / "tools" / tool_name), "--input", str(file)]
    options = [
        "--output-prefix",
        str(prefix),
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(model),
    ]
    fast = tool_name == FAST
    more = ["--append-eod", *(["--use-gigatoken"] if fast else ["--workers", str(cores), "--log-interval", "100000"])]
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    return run([*tool, *options, *more], {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}, folder / "peer.log")


def same_bytes(folder: Path) -> bool:
    """Whether our pair of all.jsonl is the peer's."""
    mine = folder / "work" / "bench" / "data" / "all_text_document"
    return all(
        filecmp.cmp(f"{mine}{suffix}", folder / f"peer_text_document{suffix}", shallow=False)
        for suffix in (".bin", ".idx")
    )


def revision(tree: Path) -> str:
    """The commit of a tree, if it is one."""
    done = subprocess.run(["git", "-C", str(tree), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "?"


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
        agree = ("yes" if same_bytes(folder) else "NO") if same else ""
        return [label, f"{wall:.1f}", f"{speed:.1f}", *ratios, f"{max(peaks):.0f}", agree]

    own: dict[str, float] = {}
    few, every = f"{folder}/0[0-3].jsonl.gz", f"{folder}/??.jsonl.gz"
    ours(folder, few, model, cores, cold=True)  # bytecode and page cache
    kind = (re.search(r"tokenizer: (.*)", (folder / "ours.log").read_text()) or [""])[1]
    yield measure(
        f"cptain ({kind}), 20 .jsonl.gz",
        lambda: ours(folder, few, model, cores),
        lambda: ours(folder, every, model, cores),
    )
    times, peaks = zip(*(ours(folder, every, model, cores, cold=True) for _ in range(arguments.repeat)), strict=True)
    cold = statistics.median(times)
    yield [
        "the same, in a new data folder",
        f"{cold:.1f}",
        "",
        f"{cold / own['wall']:.2f}",
        "",
        f"{max(peaks):.0f}",
        "",
    ]
    start = startup(folder, model)
    yield ["cptain, one document", f"{start:.1f}", "", f"{start / own['wall']:.2f}", "", "", ""]
    yield measure(
        "cptain, one .jsonl",
        lambda: ours(folder, str(folder / "part.jsonl"), model, cores),
        lambda: ours(folder, str(folder / "all.jsonl"), model, cores),
    )
    for name, path, python in arguments.peer:
        tree = Path(path).resolve()
        for tool_name in ("preprocess_data.py", FAST):
            if not (tree / "tools" / tool_name).exists():
                continue
            tool = functools.partial(peer, folder, tree, python or sys.executable, tool_name, model=model, cores=cores)
            tool(folder / "part.jsonl")
            yield measure(
                f"{tool_name}, {name} ({revision(tree)}), one .jsonl",
                functools.partial(tool, folder / "part.jsonl"),
                functools.partial(tool, folder / "all.jsonl"),
                same=True,
            )


def startup(folder: Path, model: Path) -> float:
    """Wall seconds of a run over one document."""
    one = folder / "one.jsonl"
    one.write_text('{"text": "one"}\n')
    ours(folder, str(one), model, 1)
    return statistics.median(ours(folder, str(one), model, 1)[0] for _ in range(3))


def encode_alone(folder: Path, model: Path, cores: int) -> float:
    """MB/s of text that `cores` processes encode side by side with nothing to read, parse or write: the machine's."""
    from cptain.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(str(model), folder / "work" / "bench" / "data" / ".tokenizer")
    with open(folder / "part.jsonl", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = sum(len(text.encode()) for text in texts) / 1e6
    began = time.monotonic()
    children = []
    for _ in range(cores):
        child = os.fork()
        if not child:
            for first in range(0, len(texts), 4000):
                tokenizer.encode(texts[first : first + 4000])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return size * cores / (time.monotonic() - began)


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
    ours(folder, str(many / "quarter" / "00.jsonl.gz"), model, 1, cold=True)
    alone = {cores: encode_alone(folder, model, cores) for cores in arguments.scaling}
    for label, files in ((f"{most} .jsonl.gz", "??.jsonl.gz"), ("one .jsonl", "one.jsonl")):
        first = 0.0
        for cores in arguments.scaling:
            times = [
                statistics.median(
                    ours(folder, f"{many}/{part}/{files}", model, cores)[0] for _ in range(arguments.repeat)
                )
                for part in ("quarter", "whole")
            ]
            speed = text / (times[1] - times[0])
            first = first or speed / cores
            of_machine = alone[cores] / alone[arguments.scaling[0]] / cores * arguments.scaling[0]
            yield [label, str(cores), f"{speed:.0f}", f"{speed / first / cores:.2f}", f"{of_machine:.2f}"]
    shutil.rmtree(many)


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
    parser.add_argument("--folder", type=Path, default=Path("build/bench/preprocess"))
    arguments = parser.parse_args()
    arguments.peer = [
        (name, *tree.partition(",")[::2]) for name, _, tree in (one.partition("=") for one in arguments.peer)
    ]
    folder = arguments.folder.resolve()
    corpus(folder, arguments.megabytes)
    model = tokenizer(folder / "llama3")
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("fastokens", "tokenizers", "transformers", "isal", "orjson")
    )
    print(f"{platform.machine()}, {arguments.cores} cores, Python {platform.python_version()}, {packages};")
    print(f"{(folder / 'all.jsonl').stat().st_size / 1e6:.0f} MB of text, median of {arguments.repeat}\n")
    head = [
        "tool",
        "wall s",
        "steady MB/s",
        "wall, times ours",
        "ours, times its speed",
        "peak MB a process",
        "same bytes",
    ]
    if arguments.scaling:
        head = ["files", "cores", "steady MB/s", "of linear", "the encoder alone, of linear"]
    print(f"| {' | '.join(head)} |\n| {' | '.join('---' for _ in head)} |", flush=True)
    for row in (scaling if arguments.scaling else rows)(arguments, folder, model):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
