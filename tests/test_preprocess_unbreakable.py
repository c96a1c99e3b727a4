"""preprocess killed at any moment, run twice at once, and given files at random: what it counts is printed."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from conftest import RunFileMaker, cptain, cptain_process, leftovers, of_session
from cptain.data import reader
from cptain.data.hashed_file import HashedFile
from cptain.data.manifest import lock_file
from cptain.data.processes import process_pool
from cptain.data.tokenizer import Tokenizer
from cptain.errors import CptainError

KILLS = 80


def data(folder: Path) -> dict[str, bytes]:
    """Everything in a data folder that a reader of it sees."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".bin", ".idx", ".jsonl") and not file.name.startswith(".")
    }


def run_in_child(file: Path, output: Path, *options: str) -> int:
    """Begin preprocess in a forked process, which has imported everything; its process id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        from cptain.cli import main

        main(["preprocess", str(file), "--workers", "2", *options])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def test_a_run_killed_at_any_moment_is_finished_by_the_next_one_to_the_same_bytes(
    make_run: RunFileMaker, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts[number::4]] * 3
        lines[5:5] = [b"bad\n"]
        content = b"".join(lines)
        name = tmp_path / "in" / f"{number}.jsonl"
        if number % 2:
            name.with_suffix(".jsonl.gz").write_bytes(gzip.compress(content))
        else:
            name.write_bytes(content)
    file = make_run(data__input=["in/*"], data__on_error="skip")
    folder, log = file.parent / "runs" / "run" / "data", tmp_path / "log"
    assert cptain("preprocess", file, "--workers", 2).exit_code == 0
    whole, manifest = data(folder), (folder / "manifest.json").read_bytes()
    assert len(whole) == 4 * 3

    def wait_for(child: int, manifest: bool) -> float:
        """Seconds until there is a manifest, or none, as while the files are worked on; or until the process ends."""
        began = time.monotonic()
        while (folder / "manifest.json").exists() != manifest:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.001)
        return time.monotonic() - began

    child = run_in_child(file, log, "--force")
    before, work = wait_for(child, manifest=False), wait_for(child, manifest=True)
    _, status = os.waitpid(child, 0)
    assert status == 0, log.read_text()

    moments = random.Random(11)
    during = finished = 0
    for number in range(KILLS):
        child = run_in_child(file, log, "--force")
        if number % 4:
            wait_for(child, manifest=False)
        time.sleep(moments.uniform(0, work if number % 4 else before))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        finished += status == 0
        while of_session(child):  # a worker in a long fsync outlives its parent for a moment
            time.sleep(0.01)
        for path, content in data(folder).items():  # of what is there, every file is whole
            assert content == whole[path], path
        during += not (folder / "manifest.json").exists()
        again = run_in_child(file, log)
        _, status = os.waitpid(again, 0)
        assert status == 0, log.read_text()
        assert data(folder) == whole
        assert (folder / "manifest.json").read_bytes() == manifest
        assert leftovers(folder) == []
    with capsys.disabled():
        print(f" {KILLS} kills, {during} of them before the manifest, {finished} too late", end="")
    assert during > KILLS // 2


def test_a_second_process_on_the_same_file_is_told_who_has_it_and_a_dead_one_s_lock_is_taken(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    file = make_run(data__input=["in.jsonl"])
    folder = file.parent / "runs" / "run" / "data"
    held = lock_file(folder, "in_text_document")
    holder = f"""
import sys, time
from pathlib import Path
from cptain.lock import lock
with lock(Path({str(held)!r}), "test"):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused = cptain("preprocess", file, "--workers", 1)
        other.kill()
    assert refused.exit_code == 1
    said = refused.output.splitlines()[-1]
    assert said.startswith(
        f"cptain: preprocess: {tmp_path}/in.jsonl: process {other.pid} on host {os.uname().nodename} ("
    )
    assert said.endswith("wait until it is done, or stop it")
    assert held.is_symlink()  # nobody took it away
    assert cptain("preprocess", file, "--workers", 1).exit_code == 0
    assert not held.is_symlink()


def test_four_runs_at_once_leave_what_one_leaves(make_run: RunFileMaker, tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::6]] * 20
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(lines), encoding="utf-8")
    file = make_run(data__input=["in/*"])
    folder = file.parent / "runs" / "run" / "data"
    assert cptain("preprocess", file, "--workers", 2).exit_code == 0
    whole = data(folder)
    processes = [cptain_process("preprocess", file, "--workers", 2, "--force") for _ in range(4)]
    ends = []
    for process in processes:  # each did its part, or was told who is at it
        output, _ = process.communicate(timeout=120)
        last, ends = output.splitlines()[-1], [*ends, process.returncode]
        assert (ends[-1] == 0 and " → " in last) or (ends[-1] == 1 and " is at it: " in last), output
    assert 0 in ends
    assert data(folder) == whole
    assert "6 of 6 files are done and unchanged" in cptain("preprocess", file).output
    assert leftovers(folder) == []


def test_a_process_that_missed_the_signal_to_stop_is_told_again() -> None:
    def miss_one() -> None:
        signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    with suppress(ZeroDivisionError), process_pool(2, miss_one) as pool:
        pool.submit(os.getpid).result()
        pool.submit(time.sleep, 600)
        _ = 1 / 0


def test_a_result_cut_short_by_the_signal_to_stop_is_not_waited_for() -> None:
    with suppress(ZeroDivisionError), process_pool(2, lambda: None) as pool:
        pool.submit(os.getpid).result()
        pool._result_queue._writer._send(b"\0\0\1\0")  # type: ignore[attr-defined]  # the length of one, and nothing of it
        time.sleep(0.2)
        _ = 1 / 0


def test_a_killed_worker_ends_the_run_though_another_is_idle(make_run: RunFileMaker, tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 100}) + "\n"
    (tmp_path / "large.jsonl").write_text(line * 300_000)
    (tmp_path / "small.jsonl").write_text(line)
    file = make_run(data__input=["*.jsonl"])
    folder = file.parent / "runs" / "run" / "data"
    process = cptain_process("preprocess", file, "--workers", 2)
    while not (folder / "small_text_document.idx").exists():
        assert process.poll() is None
        time.sleep(0.02)
    holder = os.readlink(lock_file(folder, "large_text_document")).split("|")[2]
    os.kill(int(holder), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("cptain: a preprocess worker died (killed, or out of memory)")


def test_what_another_host_left_half_written_goes_once_its_lock_is_stale(
    make_run: RunFileMaker, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "one"}\n')
    file = make_run(data__input=["in.jsonl"])
    folder = file.parent / "runs" / "run" / "data"
    folder.mkdir(parents=True)
    left = folder / ".in_text_document.bin.partial-another-host-4026531836-17"
    left.write_bytes(b"half")
    result = cptain("preprocess", file, "--workers", 1)
    assert result.exit_code == 0
    assert "1 files were begun and not finished: done from their start" in result.output
    assert not left.exists()


def line_at_random(pick: random.Random) -> bytes:
    """A line of a .jsonl file, most of them documents."""
    text = "".join(
        pick.choices(["a", "β", "日本", "👩🏽", '"', "\\", "\t", "\u2028", "\x7f", " "], k=pick.randrange(30))
    )
    good = json.dumps({"id": pick.random(), "text": text, "meta": [1e308, None, {"text": "no"}]}, ensure_ascii=False)
    kinds: list[Any] = [
        good.encode(),
        json.dumps({"text": text}).encode(),  # escaped
        b'{"text": "first", "text": ' + json.dumps(text).encode() + b"}",
        json.dumps({"text": [text, text]}).encode(),
        b'{"n": NaN, "text": "x"}',
        b'{"n": 1e999, "text": "x"}',
        b'{"text": "\\ud800"}',
        b'{"text": null}',
        b'{"txt": "x"}',
        b"",
        b"  \t",
        good.encode()[: pick.randrange(1, 60)],
        bytes(pick.randrange(256) for _ in range(pick.randrange(20))).replace(b"\n", b""),
    ]
    return pick.choices(kinds, weights=[12, 6, 2, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1])[0]  # type: ignore[no-any-return]


def plainly(line: bytes) -> list[str] | str:
    """What Python's json makes of a line: its texts, or "blank" or "bad"."""
    line = line.removesuffix(b"\r")
    if not line.strip():
        return "blank"
    try:
        value = json.loads(line)["text"]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            text.encode()
    except (ValueError, KeyError, TypeError, AttributeError):
        return "bad"
    return texts


def test_files_at_random_lose_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pick = random.Random(5)
    files = lines_in_all = bad_in_all = 0
    for number in range(400):
        lines = [line_at_random(pick) for _ in range(pick.randrange(60))]
        ends = [pick.choice([b"\n", b"\n", b"\r\n"]) for _ in lines]
        content = pick.choice([b"", b"\xef\xbb\xbf"]) + b"".join(a + b for a, b in zip(lines, ends, strict=True))
        if lines and lines[-1] and pick.random() < 0.5:
            content = content.removesuffix(b"\n").removesuffix(b"\r")  # no end of line at the end of the file
        kind = pick.choice(["", ".gz", ".zst"])
        cut = pick.randrange(len(content) + 1)
        compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[kind]
        file = tmp_path / f"{number}.jsonl{kind}"
        file.write_bytes(compress(content[:cut]) + compress(content[cut:]))  # two members
        monkeypatch.setattr(reader, "_BLOCK", pick.choice([1, 7, 100, 10_000]))
        monkeypatch.setattr(reader, "_READ", pick.choice([1, 64, 10_000]))
        found: dict[int, list[str] | str] = {}
        count = 0
        for block in reader.blocks(HashedFile(file), "text", 1 << 20):
            assert block.first_line == count + 1
            documents = reader.parse(block, "text", 1 << 20)
            count += block.count
            assert documents.count + len(documents.bad) + documents.blank == block.count
            texts = iter(documents.texts)
            for place in range(documents.count):
                sequences = 1 if documents.sequences is None else documents.sequences[place]
                found[documents.line(place)] = [next(texts) for _ in range(sequences)]
            found.update((bad.line, "bad") for bad in documents.bad)
        expected = {line: what for line, what in enumerate(map(plainly, lines), 1) if what != "blank"}
        assert found == expected, file
        assert count == len(lines)
        files, lines_in_all = files + 1, lines_in_all + count
        bad_in_all += sum(what == "bad" for what in found.values())
    with capsys.disabled():
        print(f" {files} files, {lines_in_all} lines, {bad_in_all} of them bad", end="")
    assert bad_in_all > 1000


def test_compressed_files_that_are_cut_or_changed_never_give_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cut is always seen; a changed byte is seen, or changes nothing (gzip's header, for one, is not checked)."""
    content = b"".join(b'{"text": "document %d"}\n' % number for number in range(300))
    pick = random.Random(3)
    cut = changed = harmless = 0

    def text(file: Path) -> bytes:
        return b"\n".join(bytes(b.content) for b in reader.blocks(HashedFile(file), "text", 1 << 20))

    for kind, compressed in (
        (".gz", gzip.compress(content)),
        (".zst", zstandard.ZstdCompressor(write_checksum=True).compress(content)),
    ):
        file = tmp_path / f"x.jsonl{kind}"
        for size in range(1, len(compressed)):
            file.write_bytes(compressed[:size])
            with pytest.raises(CptainError, match=rf"truncated: the file ends at byte {size}|corrupt at byte"):
                text(file)
            cut += 1
        for _ in range(500):
            place = pick.randrange(len(compressed))
            file.write_bytes(
                compressed[:place] + bytes([compressed[place] ^ pick.randrange(1, 256)]) + compressed[place + 1 :]
            )
            try:
                assert text(file) + b"\n" == content
                harmless += 1
            except CptainError:
                changed += 1
    with capsys.disabled():
        print(f" {cut} cuts, {changed} changes refused, {harmless} harmless", end="")
    assert changed > 900


def test_ids_are_hugging_face_s_for_any_unicode(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(str(model))
    assert tokenizer.backend.startswith("fastokens")
    pick = np.random.default_rng(17)
    points = np.concatenate([np.arange(1, 0xD800), np.arange(0xE000, 0x30000)])
    texts = ["".join(map(chr, pick.choice(points, size=int(pick.integers(0, 60))))) for _ in range(4000)]
    ids, lengths = tokenizer.encode(texts)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    exact = tokenizer.exact(texts)
    differ = [text for text, part, wanted in zip(texts, parts, exact, strict=True) if part.tolist() != wanted]
    assert not differ, differ[:3]
    with capsys.disabled():
        print(f" {len(texts)} texts, {len(ids)} ids", end="")


def test_a_folder_is_listed_as_often_for_many_files_as_for_few(
    make_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listings(files: int) -> int:
        file = make_run(data__input=["in/*.jsonl"], name=f"of-{files}")
        (tmp_path / "in").mkdir(exist_ok=True)
        for number in range(files):
            (tmp_path / "in" / f"{number}.jsonl").write_text('{"text": "one"}\n')
        listed: list[Path] = []

        def noted(call: Any) -> Any:
            def noting(folder: Any = ".") -> Any:
                listed.append(Path(folder))
                return call(folder)

            return noting

        with monkeypatch.context() as patch:
            for name in ("listdir", "scandir"):
                patch.setattr(os, name, noted(getattr(os, name)))
            assert cptain("preprocess", file, "--workers", 1).exit_code == 0
        return sum((file.parent / "runs") in (folder, *folder.parents) for folder in listed)

    assert listings(3) == listings(30) > 0
