"""A shell script is read as bash would run it, and nothing of it is run."""

import subprocess
from pathlib import Path

import pytest
from cptain.errors import CptainError
from cptain.shell_script.control import Reading
from cptain.shell_script.shell import Shell
from cptain.shell_script.trainer import read_script
from cptain.shell_script.values import shown
from shell_scripts import CONSTRUCTIONS, TRAINER, by_bash, by_bash_each, random_words


def followed(text: str, folder: Path = Path("/nonexistent")) -> Reading:
    """What is found in a script."""
    shell = Shell(folder)
    shell.follow(text)
    return shell.reading


def started(text: str) -> list[list[str]]:
    """The programs that a script starts, as people read them."""
    return [[shown(word) for word in one.words] for one in followed(text).started]


def refused(text: str) -> str:
    """The line that a script is refused with."""
    with pytest.raises(CptainError) as error:
        followed(text)
    return str(error.value)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_words_are_those_that_bash_makes(name: str, tmp_path: Path) -> None:
    script = f"MORE=\n{CONSTRUCTIONS[name]}\n{TRAINER}"
    ours = next(words for words in started(script) if words[0] == "mpirun")
    assert ours[1:] == by_bash(script, tmp_path)


def test_any_words_are_those_that_bash_makes(tmp_path: Path) -> None:
    scripts = [random_words(seed) for seed in range(1000)]
    for script, theirs in zip(scripts, by_bash_each(scripts, tmp_path), strict=True):
        ours = next(words for words in started(script) if words[0] == "rec")
        assert ours[1:] == theirs, script


HOSTILE = """#!/bin/bash
rm -rf {folder}/*
> {folder}/emptied
echo x >> {folder}/emptied
/usr/bin/touch {folder}/made
touch {folder}/made &
x=$(touch {folder}/made; echo `touch {folder}/made`)
y=${{z:=$(rm {folder}/emptied)}}
exec 3> {folder}/made
eval "rm {folder}/emptied"
trap 'rm {folder}/emptied' EXIT
python3 -c 'open("{folder}/made", "w")'
bash -c 'rm {folder}/emptied; exec touch {folder}/made'
kill -9 -1
cat < <(touch {folder}/made) > >(tee {folder}/made)
coproc_is=no; PATH=/bin:/usr/bin command rm {folder}/emptied
read x < /dev/tcp/127.0.0.1/9
source {folder}/fifo
. /dev/zero
cd {folder} && rm emptied
mpirun -np 4 python pretrain_gpt.py --lr 1 2>&1 | tee {folder}/made
"""


def test_a_hostile_script_changes_nothing_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "emptied").write_text("content")
    file = tmp_path / "hostile.sh"
    file.write_text(HOSTILE.format(folder=folder))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for name in ("os.system", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.unlink", "os.kill", "socket.socket"):
        monkeypatch.setattr(name, forbidden)
    script = read_script(file)
    monkeypatch.undo()
    assert [str(one) for one in script.arguments] == ["--lr 1"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (folder / "emptied").read_text() == "content"


@pytest.mark.parametrize(
    "script",
    [
        "while true; do x=1; done",
        "for ((;;)); do :; done",
        "f() { f; }; f",
        ":(){ :|:& };:",
        'x=aaaaaaaa; while true; do x="$x$x"; done',
        'a=(1 2 3); while true; do a+=("${a[@]}"); done',
        "echo {1..99999}{1..99999}",
        "x=$((2 ** 100))",
        'eval "' + "$(" * 3000 + ")" * 3000 + '"',
        "x=aaaaaaaaaaaaaaaaaaaaaaaaa; [[ $x == *a*a*a*a*a*a*b ]]",
        "source here.sh",
    ],
)
def test_a_script_without_end_is_refused(script: str, tmp_path: Path) -> None:
    (tmp_path / "here.sh").write_text("source here.sh\n")
    with pytest.raises(CptainError, match="line 1"):
        followed(script, tmp_path)


def test_what_cannot_be_read_is_refused_by_its_line() -> None:
    assert refused("a=1\nselect x in a b; do :; done") == "line 2: cptain cannot read this: select"
    assert refused("a=1\n\nif true; then\n").startswith("line 4: cptain cannot read this: fi is missing")
    assert "line 2" in refused("a=1\nb=$((1 / 0))")
    assert "line 1" in refused("a='")
    assert "gaps" in refused("a=(1)\na[3]=1")
    assert "known on the cluster only" in refused("a[$(hostname)]=1")
    assert "division by 0" in refused("x=$((3 % 0))")


def test_what_only_the_cluster_knows_is_a_mark_in_the_words() -> None:
    (words,) = [one for one in started("N=$(hostname)\nmpirun -x A=$N-$JOB_ID $((N + 1)) ${N%x}") if one[0] == "mpirun"]
    assert words[:3] == ["mpirun", "-x", "A=$(hostname)-$JOB_ID"]
    assert words[3] == "$((N + 1)) with N = $(hostname)"


def test_every_file_that_a_glob_may_match_goes_on_as_a_glob() -> None:
    script = """
for FILE in "$D"/*; do
  if [[ "$FILE" == *.idx ]]; then
    NAME=$(basename "$FILE")
    DATA="$DATA 1 ${D}/${NAME%_text_document.idx}_text_document"
  fi
done
for F in $D/*.bin; do DATA="$DATA 2 ${F%.bin}"; done
mpirun $DATA
"""
    found = followed("D=/data/processed" + script)
    words = [shown(word) for word in found.started[-1].words]
    assert words == ["mpirun", "1", "/data/processed/*_text_document", "2", "/data/processed/*"]
    assert any("line 3" in what and "*.idx" in what for what in found.assumed)


def test_checks_of_files_and_programs_are_taken_for_granted_and_said() -> None:
    script = """
if [ -f "$S/latest.txt" ]; then LOAD=$S; else LOAD=/base; fi
if [ ! -d /venv ]; then echo no; exit 1; fi
[ -e /data ] || exit 2
if command -v srun; then HOW=srun; else HOW=other; fi
which numactl || LOAD=/none
mkdir -p "$S" || echo no
mpirun $LOAD $HOW
"""
    found = followed("S=/saved" + script)
    assert found.started[-1].words == ["mpirun", "/base", "srun"]
    said = "\n".join(found.assumed)
    assert "mkdir" not in said
    expected = {2: "-f /saved/latest.txt", 3: "an exit", 4: "an exit", 5: "command -v srun succeeds"}
    for line, what in {**expected, 6: "which numactl succeeds"}.items():
        assert any(one.startswith(f"line {line}:") and what in one for one in said.splitlines()), (line, said)


def test_an_exit_that_does_not_hang_on_the_cluster_is_an_exit() -> None:
    found = followed("if [ $# -lt 1 ]; then\n  echo usage\n  exit 1\nfi\nmpirun")
    assert found.started == []
    assert found.ended == "line 3: exit 1"


def test_files_that_it_sources_are_read_beside_it(tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params" / "small.sh").write_text("ALL+=(--lr 3e-4)\n")
    (tmp_path / "train.sh").write_text(
        '#!/bin/bash\nHERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)\nsource "$HERE/params/$1.sh"\n'
        'source missing.sh\nexec torchrun --nproc-per-node 8 /opt/Megatron-LM/pretrain_gpt.py "${ALL[@]}" --seed=7\n'
    )
    script = read_script(tmp_path / "train.sh", ("small",))
    assert [str(one) for one in script.arguments] == ["--lr 3e-4", "--seed 7"]
    assert any("missing.sh is not here" in what for what in script.reading.assumed)


def test_the_trainer_is_found_behind_shells_and_launchers(tmp_path: Path) -> None:
    for number, start in enumerate(
        (
            'srun bash -c "cd x; torchrun pretrain_gpt.py --lr $LR"',
            'CMD="python -u /x/pretrain_gpt.py --lr $LR"\n$CMD > log 2>&1 &\nwait',
            'ssh node1 "torchrun pretrain_gpt.py --lr $LR"',
            'run() { singularity exec --nv image.sif python pretrain_gpt.py "$@"; }\nrun --lr $LR',
            "nohup env A=b numactl -N 0 python3 pretrain_gpt.py --lr $LR",
        )
    ):
        file = tmp_path / f"{number}.sh"
        file.write_text(f"LR=1e-5\n{start}\n")
        assert [str(one) for one in read_script(file).arguments] == ["--lr 1e-5"], start


def test_bash_is_what_the_words_are_compared_with() -> None:
    done = subprocess.run(["bash", "--version"], capture_output=True, text=True, check=True)
    assert "GNU bash" in done.stdout
