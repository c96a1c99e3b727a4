"""Locks: one holder at a time, whoever dies when; and whether a holder lives is known, whichever node it is on."""

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import pytest
from conftest import count
from cptain.lock import STALE_AFTER, Held, _touching, living_holder, lock

# Processes race for a lock whose holder is dead. Whoever gets it may die while it holds it, takes it or releases it, so
# that the others race on. A pause before a step makes it likely that another process is between its own.
RACE = """
import os, random, sys, time
from pathlib import Path
from cptain import lock as module
from cptain.lock import lock

def slowed(function):
    def slow(*arguments):
        if random.random() < 0.01:
            os._exit(0)
        time.sleep(random.choice((0, 0, 0.0005, 0.002)))
        return function(*arguments)
    return slow

def compete(file):
    for name in ("symlink", "readlink", "unlink", "rename"):
        setattr(os, name, slowed(getattr(os, name)))
    with lock(file, "race"):
        os.close(os.open(f"{file}.held", os.O_CREAT | os.O_EXCL))
        time.sleep(0.001)
        os.remove(f"{file}.held")
        if random.random() < 0.5:
            os._exit(0)

module._PATIENCE, module._LOOK = 60, 0.001
folder, rounds, racers = Path(sys.argv[1]), *map(int, sys.argv[2:])
for number in range(rounds):
    file = folder / f"{number}.lock"
    os.symlink("dead", file)
    children = []
    for racer in range(racers):
        if child := os.fork():
            children.append(child)
            continue
        try:
            random.seed(f"{number} {racer}")
            compete(file)
            os._exit(0)
        finally:
            os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * racers, f"round {number}: two held the lock"
    with lock(file, "race"):
        pass
"""


def test_two_never_hold_a_lock_though_holders_die_at_any_moment(tmp_path: Path) -> None:
    rounds, racers = 30, 8
    subprocess.run([sys.executable, "-c", RACE, tmp_path, str(rounds), str(racers)], check=True)
    count("races for a dead holder's lock", rounds * racers)


def elsewhere(file: Path, age: float = 0) -> str:
    """Lock `file` as process 17 of another host that touched it `age` seconds ago."""
    words = f"another-host|1|17|1|1767322980|{age}"  # since 2026-01-02 03:03 UTC
    os.symlink(words, file)
    then = time.time() - age
    os.utime(file, (then, then), follow_symlinks=False)
    return words


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock; nobody waits long for it, and its holder touches it often."""
    monkeypatch.setattr("cptain.lock._PATIENCE", 0.1)
    monkeypatch.setattr("cptain.lock._BEAT", 0.02)
    return tmp_path / "a.lock"


def test_a_holder_elsewhere_is_dead_once_it_has_not_touched_its_link_for_long(file: Path) -> None:
    elsewhere(file, STALE_AFTER - 60)
    with (
        pytest.raises(Held, match=r"x: process 17 on host another-host \(since 2026-01-0\d \d\d:\d\d\) is at it"),
        lock(file, "x"),
    ):
        pytest.fail("it was held")
    file.unlink()
    elsewhere(file, STALE_AFTER + 5)
    with lock(file, "x"):
        assert os.readlink(file).split("|")[2] == str(os.getpid())
    assert list(file.parent.iterdir()) == []


def test_whoever_watches_takes_the_lock_of_a_holder_elsewhere_that_shows_no_life(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere(file, -3600)  # by a clock that is an hour ahead
    with lock(file, "train", watch=0.5):
        assert os.readlink(file).split("|")[2] == str(os.getpid())
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("train: process 17 on host another-host (since 2026-01-0")
    assert said[0].endswith(" was at it: waiting 0 s for a sign of its life")


def test_whoever_watches_leaves_the_lock_to_a_holder_elsewhere_that_touches_it(file: Path) -> None:
    words = elsewhere(file)
    said = "train: process 17 on host another-host"
    with _touching(file, words), pytest.raises(Held, match=said), lock(file, "train", watch=600):
        pytest.fail("it was held")
    assert os.readlink(file) == words


def test_whoever_watches_takes_a_lock_that_is_released_meanwhile(file: Path) -> None:
    elsewhere(file)
    release = Timer(0.1, file.unlink)
    release.start()
    with lock(file, "train", watch=600):
        assert str(living_holder(file)).startswith(f"process {os.getpid()} on ")
    release.join()


def test_a_holder_shows_that_it_lives_without_doing_anything(file: Path) -> None:
    with lock(file, "x"):
        os.utime(file, (0, 0), follow_symlinks=False)
        while file.lstat().st_mtime == 0:
            time.sleep(0.01)


def test_a_holder_whose_lock_was_taken_touches_and_removes_no_other_s(file: Path) -> None:
    with lock(file, "x"):
        file.unlink()
        words = elsewhere(file, 60)
        touched = file.lstat().st_mtime
        time.sleep(0.2)
    assert (os.readlink(file), file.lstat().st_mtime) == (words, touched)


def test_who_holds_a_lock_is_told_while_it_lives(file: Path) -> None:
    assert living_holder(file) is None
    with lock(file, "x"):
        assert str(living_holder(file)).startswith(f"process {os.getpid()} on host {os.uname().nodename} (since 20")
    assert living_holder(file) is None
    elsewhere(file)
    assert str(living_holder(file)).startswith("process 17 on host another-host (since ")
    os.utime(file, (0, 0), follow_symlinks=False)
    assert living_holder(file) is None


@pytest.mark.parametrize("words", ["x", "a|1|2|3|4", "another-host|1|x|1|1|x", "another-host|1|17|1|x|x", "|||||"])
def test_a_link_that_no_holder_made_holds_nobody_up(file: Path, words: str) -> None:
    os.symlink(words, file)
    assert living_holder(file) is None
    with lock(file, "x"):
        pass
