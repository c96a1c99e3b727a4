"""What preprocess.py and files.py measure: text, a tokenizer, cptain's run on it, and the tools of others.

The text is generated from the word frequencies of wordfreq; the tokenizer is Llama 3's, from llama-models (both of
PyPI).
"""

import filecmp
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
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


def ours(
    folder: Path, files: str, model: Path, cores: int, new: str | None = None, data: str = ""
) -> tuple[float, float]:
    """preprocess on some of the corpus, of all files anew.

    Args:
        folder: of the benchmark.
        files: a glob.
        model: whose tokenizer.
        cores: how many.
        new: what is removed below the folder first.
        data: more lines for the run file's [data].
    """
    work = folder / "work"
    if new:
        shutil.rmtree(folder / new, ignore_errors=True)
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
