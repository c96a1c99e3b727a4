"""The demo: text and a model made on the spot, then preprocess → convert → train (stopped, resumed) → export → verify →
report.

`make demo` runs it in the project's venv. Everything lands under demo/; the run is runs/tiny.toml. The text is what
every Python carries (the topics of its own help) and this project's README in Japanese; the model is a 4-layer Llama
3.1 with random weights, and a BPE tokenizer trained on that text. `--inputs-only` makes text and model and stops.
"""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import zstandard
from cptain.data.manifest import read_manifest
from cptain.errors import Interrupted
from cptain.megatron.log import read_steps, train_logs
from cptain.run_file import load_run

PROJECT = Path(__file__).resolve().parent.parent
DEMO = PROJECT / "demo"
RUN_FILE = PROJECT / "runs" / "tiny.toml"
STOP_AT_STEP = 20


def python_help() -> list[str]:
    """The topics of Python's help(), about 700 kB of English."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def japanese_documents() -> list[str]:
    """The sections of this project's README in Japanese."""
    return (PROJECT / "README.ja.md").read_text(encoding="utf-8").split("\n## ")


def make_text(folder: Path) -> list[str]:
    """Write the text as .jsonl, .jsonl.gz and .jsonl.zst files in two folders, and return it."""
    english, japanese = python_help(), japanese_documents()
    half = len(english) // 2

    def lines(texts: list[str]) -> bytes:
        return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()

    for name, content in (
        ("en/topics-1.jsonl", lines(english[:half])),
        ("en/topics-2.jsonl.gz", gzip.compress(lines(english[half:]), mtime=0)),
        ("ja/documents.jsonl.zst", zstandard.ZstdCompressor().compress(lines(japanese))),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return english + japanese


def make_model(folder: Path, texts: list[str], vocab_size: int = 4000, **sizes: Any) -> None:
    """Train a byte-level BPE tokenizer on the text and initialise a small model of Llama 3.1's shape.

    Args:
        folder: where both are saved.
        texts: what the tokenizer is trained on.
        vocab_size: of the tokenizer and the model, at most.
        sizes: keys of transformers' LlamaConfig that differ from the demo's.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos)
    torch.manual_seed(1234)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    model = LlamaForCausalLM(LlamaConfig(**{**config, **sizes}))
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_inputs() -> None:
    """Text and model, unless an earlier demo made them."""
    if (DEMO / "model" / "config.json").exists():
        print("demo: text and model are there already")
        return
    shutil.rmtree(DEMO / "text", ignore_errors=True)
    partial = DEMO / "model.partial"
    shutil.rmtree(partial, ignore_errors=True)
    make_model(partial, make_text(DEMO / "text"))
    partial.rename(DEMO / "model")


@contextmanager
def started(*arguments: str, note: str = "") -> Iterator["subprocess.Popen[bytes]"]:
    """Start one command as a user would. However the block ends, the command ends first, and saves: a terminal's Ctrl-C
    reaches it too, and a SIGTERM is passed on."""
    print(f"\n$ cptain {' '.join(arguments)}{note}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "cptain", *arguments], cwd=PROJECT)
    try:
        yield process
    except Interrupted as interrupt:
        if interrupt.signal_name == "SIGTERM":
            process.terminate()
        raise
    finally:
        while process.returncode is None:
            with suppress(Interrupted):
                process.wait()


def must(*arguments: str) -> None:
    """Run one command that has to succeed."""
    with started(*arguments) as process:
        status = process.wait()
    if status:
        sys.exit(f"demo: cptain {arguments[0]} ended with exit status {status}")


def train_and_stop(file: str, logs: Path) -> None:
    """Start training, and send it SIGTERM at a step in the middle, as a scheduler would."""
    with started("train", file, "--cpu", note=f"     # and SIGTERM at step {STOP_AT_STEP}") as process:
        while process.poll() is None:
            steps = read_steps(train_logs(logs))
            if steps and steps[-1].number >= STOP_AT_STEP:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.2)
        status = process.wait()
    if status != 75:
        sys.exit(f"demo: the stopped training ended with exit status {status}, not 75")


def main() -> None:
    """Make the inputs, run every stage, and print what came of it."""
    began = time.monotonic()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    make_inputs()
    if "--inputs-only" in sys.argv:
        return
    run = load_run(RUN_FILE)
    shutil.rmtree(run.folder, ignore_errors=True)  # the demo shows a whole run, not the rest of one
    file = str(RUN_FILE.relative_to(PROJECT))
    must("preprocess", file)
    must("convert", file)
    must("verify", str(run.model.hf), str(run.megatron_folder), "--logits")
    train_and_stop(file, run.logs_folder)
    must("train", file, "--cpu")
    must("export", file)
    (exported,) = run.hf_folder.iterdir()
    must("verify", str(exported), str(run.checkpoints_folder), "--logits")
    must("report", file)
    records, steps = read_manifest(run.data_folder, run.data.input), read_steps(train_logs(run.logs_folder))
    seconds = sorted(step.seconds for step in steps)[len(steps) // 2]
    verified = json.loads((exported / "verify.json").read_text(encoding="utf-8"))
    rows = (
        ("documents", f"{sum(record.documents for record in records):,} in {len(records)} files"),
        ("tokens", f"{sum(record.tokens for record in records):,}"),
        ("loss, first → last step", f"{steps[0].loss:.3f} → {steps[-1].loss:.3f} ({len(steps)} steps, one stop)"),
        ("tokens a second", f"{run.train.tokens_per_step / seconds:,.0f} (median step, CPU)"),
        ("exported tensors", f"{verified['equal']} of {verified['tensors']} bit-equal to Megatron's"),
        ("logits, HF against Megatron", f"differ by at most {verified['logits']['max_abs_difference']:.1e} (fp32)"),
        ("exported model", str(exported.relative_to(PROJECT))),
        ("logs", str(run.logs_folder.relative_to(PROJECT))),
        ("everything", f"{run.folder.relative_to(PROJECT)}, {time.monotonic() - began:.0f} s"),
        ("report, for a browser", str((run.folder / "report.html").relative_to(PROJECT))),
    )
    print()
    for name, value in rows:
        print(f"{name:<28} {value}")


def interrupt(number: int, frame: object) -> NoReturn:
    """End the demo, once the command in hand has ended."""
    raise Interrupted(signal.Signals(number).name)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except Interrupted as stop:
        sys.exit(f"demo: stopped by {stop.signal_name}; the next one begins anew")
