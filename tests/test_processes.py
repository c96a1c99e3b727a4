"""What is read of other processes, which may end at any moment."""

import os
import subprocess

import pytest
from cptain.processes import process_start, read_of_all, stat_fields


def test_every_process_is_read_and_one_that_ended_meanwhile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(os, "listdir", lambda _: [str(ended.pid), "self", "1", str(os.getpid())])
    assert [pid for pid, _ in read_of_all("stat")] == [1, os.getpid()]
    stat = dict(read_of_all("stat"))[os.getpid()].decode()
    assert int(stat_fields(stat)[1]) == os.getppid()
    assert process_start(os.getpid()) == stat_fields(stat)[19]
    assert process_start(ended.pid) is None
