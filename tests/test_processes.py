"""What is read of other processes, which may end at any moment; and how our own do."""

import os
import subprocess
import sys

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


AT_ITS_END = """
import atexit, sys, threading, time
from cptain.processes import end

class Module:
    def __del__(self):
        print("taken apart", flush=True)

module = Module()
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
PROFILED
end(3)
"""


def test_a_process_that_is_done_waits_for_its_threads_and_takes_no_module_apart_unless_it_is_profiled() -> None:
    for profiled, status, said in ("", 3, ["a thread", "at exit"]), ("sys.setprofile(print)", 0, None):
        script = AT_ITS_END.replace("PROFILED", profiled)
        done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert done.returncode == status
        assert said in (None, done.stdout.splitlines())
        assert ("taken apart" in done.stdout) == (said is None)
