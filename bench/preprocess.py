"""preprocess against Megatron-LM's own tools: speed, memory, the same bytes, and how it scales over cores.

    make bench BENCH='preprocess --peer main=/path/to/Megatron-LM --peer fork=/path/to/another'

The corpus is 20 .jsonl.gz files of Japanese and English text, generated from the word frequencies of wordfreq; the
tokenizer is Llama 3's, from llama-models (both of PyPI). A peer gets its best case: all text in one plain .jsonl file,
and the same number of cores. Steady speed is taken between a fifth of the corpus and all of it, so that start-up drops
out of both. Every figure is the median of --repeat runs.

--scaling 1,4,16 encodes 16 files of --megabytes each with 1, 4 and 16 cores, and then one file with all of that; steady
speed is taken between a quarter and all.

--edges compares files of edge cases instead, one a file, beside one of all that every tool takes.
"""

import argparse
import contextlib
import filecmp
import functools
import gzip
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
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
# A process counts the memory of the one that began it as its own: hence one small process between.
BETWEEN = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[2:]).returncode
with open(sys.argv[1], "w") as peak:
    peak.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(status)
"""
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
    (folder / "config.json").write_text(json.dumps({"vocab_size": converted.get_vocab_size()}))
    return folder


def run(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Wall seconds of a command that must succeed, and the peak MB of the largest of its processes."""
    peak = log.with_suffix(".peak")
    began = time.monotonic()
    with open(log, "w") as output:
        status = subprocess.run(
            [sys.executable, "-c", BETWEEN, str(peak), *command],
            env={**os.environ, **environment},
            stdout=output,
            stderr=output,
        ).returncode
    if status:
        sys.exit(f"{' '.join(command)}: exit status {status}:\n{log.read_text()[-2000:]}")
    return time.monotonic() - began, int(peak.read_text()) / 1024


def ours(folder: Path, files: str, model: Path, cores: int, cold: bool = False, data: str = "") -> tuple[float, float]:
    """preprocess on some of the corpus; where `cold`, in a new data folder, so that transformers is asked too.

    `data` is more lines for the run file's [data].
    """
    work = folder / "work"
    if cold:
        shutil.rmtree(work, ignore_errors=True)
    run_file = folder / "run.toml"
    run_file.write_text(
        f'name = "bench"\nwork_dir = "{work}"\n[model]\nhf = "{model}"\n[data]\ninput = ["{files}"]\n'
        f"{data}[train]\nseq_length = 8\nglobal_batch_size = 1\nsteps = 1\nlr = 1\n"
    )
    command = [sys.executable, "-m", "cptain", "preprocess", str(run_file), "--workers", str(cores), "--force"]
    return run(command, {}, folder / "ours.log")


def peer_command(
    folder: Path, tree: Path, python: str, tool_name: str, file: Path, model: Path, cores: int
) -> tuple[list[str], dict[str, str]]:
    """A tool of Megatron-LM's on a plain .jsonl file, and its environment; what it wrote last is removed."""
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
    return [*tool, *options, *more], {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


def tools(peers: list[tuple[str, str, str]]) -> Iterator[tuple[str, Path, str, str]]:
    """The tools of every peer that has them: a label, the tree, its Python, and the tool's name."""
    for name, path, python in peers:
        tree = Path(path).resolve()
        for tool_name in ("preprocess_data.py", FAST):
            if (tree / "tools" / tool_name).exists():
                yield f"{tool_name}, {name} ({revision(tree)})", tree, python or sys.executable, tool_name


def same_bytes(folder: Path, mine: Path) -> bool:
    """Whether our pair `mine` is the peer's."""
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
        pair = folder / "work" / "bench" / "data" / "all_text_document"
        agree = ("yes" if same_bytes(folder, pair) else "NO") if same else ""
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


def edge_cases() -> dict[str, bytes]:
    """Files by what is odd in them. The first holds all that Megatron-LM's tool takes; in the others one line of four,
    or what is between the lines."""
    random = np.random.default_rng(1)
    points = np.concatenate([np.arange(0, 0xD800), np.arange(0xE000, 0x30000)])
    texts: list[str | list[str]] = [
        *("", " ", "\n", " \t\u3000both ends\u00a0\n", "a\r\nb\rc\n", "\0", "a\0b", "".join(map(chr, range(160)))),
        *("'\u017f", "I'm he'LL we'\u017f 'S\u212a", "\ufeffa\ufeff\ufffe\uffff\ue000", "a\u2028b\u2029c\u0085d"),
        *("<|begin_of_text|>", "a<|end_of_text|> <|reserved_3|>b<|end_of_text|>", "<|<|end_of_text|>|>"),
        *("x" * 100_000, "あ" * 30_000, " " * 20_000 + "x", "1234567890" * 2000, "e" + "\u0301" * 5000),
        *("がぎ か\u3099 ﾊﾝｶｸ Ａ①Ⅳ㍿ 𠮷野家", "👩🏽\u200d🚀🏳️\u200d🌈🇯🇵", "اَلْعَرَبِيَّةُ हिन्दी ไทย"),
        *(["one", "two"], [], [""], ["", "one", " ", "\n"], ["a " * 1000] * 50),
        *("".join(map(chr, random.choice(points, size=int(random.integers(0, 80))))) for _ in range(2000)),
    ]
    lines = [json.dumps({"text": text}, ensure_ascii=place % 2 == 0).encode() for place, text in enumerate(texts)]
    lines += [
        b'{"n": [NaN, Infinity, -Infinity, 1e400, -1e400, 1e-400, 12345678901234567890123], "text": "numbers"}',
        b'{"n": -' + b"9" * 4000 + b', "text": "an integer of 4000 digits"}',
        b'{"n": ' + b"[" * 900 + b"]" * 900 + b', "text": "deep"}',
        b'{"text": "first", "text": "last"}',
        b'{"text": ["first"], "te\\u0078t": "last, its key escaped"}',
        b' \t{"text" :\t"white space around", "more": {"text": "no"}}\t ',
        b'{"text": "\\/ \\u0041\\b\\f \x7f"}',
    ]
    taken = b"".join(line + (b"\r\n" if place % 3 else b"\n") for place, line in enumerate(lines))
    before, after = b'{"text": "one"}\n{"text": "two"}\n', b'\n{"text": "three"}\n'
    odd = {
        "half a surrogate pair": b'{"text": "\\ud83d"}',
        "a line cut short": b'{"text": "cut',
        "no key": b'{"txt": "x"}',
        "null": b'{"text": null}',
        "a number in a list": b'{"text": ["x", 1]}',
        "not UTF-8": b'{"text": "\xff"}',
        "an integer of 5000 digits": b'{"n": ' + b"9" * 5000 + b', "text": "x"}',
        "100,000 brackets deep": b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "x"}',
        "a carriage return between tokens": b'{"text":\r"x"}',
        "an empty line": b"",
    }
    return {
        "all that every tool takes": taken.removesuffix(b"\r\n").removesuffix(b"\n"),
        "a byte order mark": b"\xef\xbb\xbf" + before,
        "an empty last line": before + b"\n",
        **{name: before + line + after for name, line in odd.items()},
    }


def edges(arguments: argparse.Namespace, folder: Path, model: Path) -> Iterator[list[str]]:
    """What each tool makes of each file of `edge_cases`, against what we do, as it is and with data.strip."""
    cases, place = edge_cases(), folder / "edges"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for number, content in enumerate(cases.values()):
        (place / f"{number:02}.jsonl").write_bytes(content)
    skip, strip = 'on_error = "skip"\n', 'on_error = "skip"\nstrip = true\n'
    ours(place, f"{place}/*.jsonl", model, 1, data=skip)
    data = place / "work" / "bench" / "data"
    records = json.loads((data / "manifest.json").read_text())["records"]
    data.rename(place / "plain")
    ours(place, f"{place}/*.jsonl", model, 1, data=strip)
    data.rename(place / "stripped")
    patience = [600.0] * len(arguments.peer) * 2
    for record, name in zip(records, cases, strict=True):
        bad = f", {record['skipped']} bad line" if record["skipped"] else ""
        row = [name, f"{record['documents']} documents{bad}"]
        for number, (_, tree, python, tool_name) in enumerate(tools(arguments.peer)):
            command = peer_command(place, tree, python, tool_name, Path(record["input"]), model, 1)
            began = time.monotonic()
            said = outcome(*command, place / "peer.log", patience[number])
            if name == next(iter(cases)):
                patience[number] = 20 + 2 * (time.monotonic() - began)
            made = place / "peer_text_document.idx"
            if not made.exists():
                said += ", no .idx"
            elif said == "exit 0":
                same = [kind for kind in ("plain", "stripped") if same_bytes(place, place / kind / record["prefix"])]
                count = int.from_bytes(made.read_bytes()[26:34], "little") - 1
                said = f"identical ({' and '.join(same)})" if same else f"other bytes, {count} documents"
            row.append(said)
        yield row


def outcome(command: list[str], environment: dict[str, str], log: Path, patience: float) -> str:
    """How a command ended, which may fail or hang."""
    with open(log, "w") as output:
        started = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return f"exit {started.wait(patience)}"
        except subprocess.TimeoutExpired:
            return "hangs"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


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
        head, table = ["files", "cores", "steady MB/s", "of linear", "the encoder alone, of linear"], scaling
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
