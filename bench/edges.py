"""What cptain and each peer make of files of edge cases, one a file: `preprocess --edges`."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizing import ours, peer_command, same_bytes, tools


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
