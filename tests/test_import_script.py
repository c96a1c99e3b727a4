"""cptain import-script: arguments become keys, and what does not is said."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, cptain
from cptain.run_file import load_run
from cptain.scheduling.sweep import expand
from cptain.shell_script import namespaces
from cptain.shell_script.import_script import import_script
from cptain.shell_script.mapping import Mapping, map_arguments
from cptain.shell_script.run_text import put_jobs, run_text
from cptain.shell_script.trainer import read_script

NEEDED = "--seq-length 64 --micro-batch-size 1 --global-batch-size 8 --train-iters 100 --lr 1e-4 --bf16"
DATA = "--data-path /data/a_text_document --tokenizer-type HuggingFaceTokenizer --tokenizer-model org/model"


@pytest.fixture(autouse=True)
def _not_compared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of Megatron takes seconds: one test is of it."""
    if "megatron" not in request.fixturenames:
        monkeypatch.setattr(namespaces.sys, "executable", "/bin/false")


@pytest.fixture
def megatron() -> None:
    """The comparison by the installed Megatron."""


def mapped(folder: Path, arguments: str, head: str = "") -> Mapping:
    """What a script maps to that gives these arguments."""
    file = folder / "script.sh"
    file.write_text(f"#!/bin/bash\n{head}\ntorchrun pretrain_gpt.py {arguments}\n")
    mapping = map_arguments(read_script(file))
    put_jobs(mapping)
    return mapping


def imported(folder: Path, arguments: str, head: str = "") -> tuple[dict[str, Any], list[str]]:
    """The run file of such a script, and what is said of it."""
    mapped(folder, arguments, head)
    out, lines = import_script(folder / "script.sh", out=folder / "out.toml", force=True)
    return tomllib.loads(out.read_text()), lines


def test_the_shipped_runs_are_what_the_lab_s_scripts_give(tmp_path: Path) -> None:
    recorded = tomllib.loads((PROJECT / "tests" / "recordings" / "swallow_smbc.toml").read_text())
    common = " ".join(f"{flag} {value}".strip() for flag, value in recorded["arguments"].items())
    sweep = PROJECT / "runs" / "swallow-8b-sweep.toml"
    runs = {run.name: run for run in expand(load_run(sweep), sweep)}
    runs["exp1 alone"] = load_run(PROJECT / "runs" / "swallow-8b.toml")
    assert len(runs) == 7
    compared = 0
    for name, run in runs.items():
        one = recorded[name.split()[0].removeprefix("swallow-8b-")]
        head = f"""#$ -l node_f={one["node_f"]}
#$ -l h_rt={one["h_rt"]}
for FILE in "/data/{one["data"]}"/*; do
  [[ "$FILE" == *.idx ]] && DATA="$DATA 1 ${{FILE%.idx}}"
done"""
        keys = mapped(tmp_path, f"{common} --lr {one['lr']} --min-lr {one['min_lr']} --data-path $DATA", head).keys
        document = run.model_dump(mode="json")
        for dotted, value in keys.items():
            section, _, key = dotted.rpartition(".")
            if section and dotted not in ("data.tokenized", "model.hf"):
                assert document[section][key] == value, (name, dotted)
                compared += 1
    assert compared > 7 * 20


def test_weights_become_tables_and_equal_ones_a_word(tmp_path: Path) -> None:
    pairs = "--data-path 845605789 /d/ja_text_document 30221726.23 /d/en_text_document 1 /d/ja_text_document"
    weighted = mapped(tmp_path, f"{NEEDED} {pairs}")
    assert weighted.tables["data.mix"] == [
        {"input": "/d/ja_text_document", "weight": 845605790.0},
        {"input": "/d/en_text_document", "weight": 30221726.23},
    ]
    assert weighted.keys["data.tokenized"] == ["/d/ja_text_document", "/d/en_text_document"]
    assert mapped(tmp_path, f"{NEEDED} --data-path 2 /d/a 2 /d/b").keys["data.mix"] == "uniform"
    for alike in ("--data-path 3 /d/a", "--data-path /d/a", "--data-path /d/a /d/b", "--data-path /d/a /d/b /d/c"):
        assert "data.mix" not in mapped(tmp_path, f"{NEEDED} {alike}").keys, alike
    unlike = mapped(
        tmp_path, f"{NEEDED} --data-path $DATA 2 /d/one", 'for F in /d/*.bin; do DATA="$DATA 1 ${F%.bin}"; done'
    )
    assert unlike.tables["data.mix"] == [{"input": "/d/*", "weight": 1.0}, {"input": "/d/one", "weight": 2.0}]
    assert any("each of its files has weight 1 in the script" in what for what in unlike.differs)


WITHOUT_DATA = f"{NEEDED} --tokenizer-model org/model"


def test_what_the_script_validates_with_becomes_sets(tmp_path: Path) -> None:
    paths = "--train-data-path 2 /d/a 1 /d/b --valid-data-path /v/ja_text_document 'v 2/ja_text_document' /v/*"
    keys, lines = imported(tmp_path, f"{WITHOUT_DATA} {paths} --test-data-path /t/x")
    data = keys["data"]
    assert data["mix"] == [{"input": "/d/a", "weight": 2}, {"input": "/d/b", "weight": 1}]
    assert data["split"] == "1,0,0"
    assert data["validation"] == [
        {"name": "ja", "tokenized": "/v/ja_text_document"},
        {"name": "ja-2", "tokenized": "v 2/ja_text_document"},
        {"name": "v", "tokenized": "/v/*"},
    ]
    said = "\n".join(lines)
    assert "--valid-data-path: the script has one loss of all its pairs; here each is a set with its own loss" in said
    assert "--test-data-path: no set is kept for a test after the training" in said
    assert [one.name for one in load_run(tmp_path / "out.toml").data.validation] == ["ja", "ja-2", "v"]
    none = imported(tmp_path, f"{WITHOUT_DATA} {paths} --eval-iters 0")[0]
    assert "validation" not in none["data"]


def test_data_that_a_file_says_is_read_where_it_is_here(tmp_path: Path) -> None:
    (tmp_path / "blend.txt").write_text("3 /d/a\n1 /d/b\n")
    data = imported(tmp_path, f"{WITHOUT_DATA} --data-args-path blend.txt")[0]["data"]
    assert data["mix"] == [{"input": "/d/a", "weight": 3}, {"input": "/d/b", "weight": 1}]
    assert data["split"] == "969,30,1"
    blends = {"train": ["1", "/d/a", "1", "/d/b"], "valid": "/v/ja", "test": None}
    (tmp_path / "blends.json").write_text(json.dumps(blends))
    data = imported(tmp_path, f"{WITHOUT_DATA} --per-split-data-args-path {tmp_path}/blends.json")[0]["data"]
    assert (data["mix"], data["split"]) == ("uniform", "1,0,0")
    assert data["validation"] == [{"name": "ja", "tokenized": "/v/ja"}]
    for words in ("--data-args-path away.txt", "--per-split-data-args-path $ELSEWHERE/blends.json"):
        keys, lines = imported(tmp_path, f"{WITHOUT_DATA} {words}")
        flag, file = words.split()
        assert any(line.startswith(f"OTHER THAN THE SCRIPT: {flag} ") and file in line for line in lines), lines
        assert keys["data"]["tokenized"] == ["/path/to/tokenized/data/**/*"]
        assert "validation" not in keys["data"]


SCHEDULES = {
    "--lr-decay-style cosine --lr-warmup-iters 10": {"schedule": "cosine", "warmup_steps": 10},
    "--lr-warmup-fraction 0.05": {"schedule": "linear", "warmup_steps": 5},
    "--lr-decay-iters 200 --lr-warmup-iters 10": {"schedule": "linear", "warmup_steps": 10, "decay_steps": 190},
    "--lr-decay-style constant --min-lr 1e-5": {"schedule": "constant"},
    "--lr-decay-style WSD --lr-wsd-decay-iters 20": {
        "schedule": "wsd",
        "decay_steps": 20,
        "decay_style": "exponential",
    },
    "--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style minus_sqrt": {"decay_style": "minus_sqrt"},
    "--lr-warmup-samples 80 --lr-decay-samples 800": {"warmup_steps": 10},
    "--weight-decay 0.2 --adam-beta2 0.95 --seed=7": {"weight_decay": 0.2, "adam_beta2": 0.95, "seed": 7},
    "--eval-iters 0": {"eval_steps": 0},
    "--fp8-format hybrid": {"precision": "fp8", "fp8_recipe": "delayed"},
    "--fp8-format hybrid --fp8-recipe tensorwise": {"precision": "fp8"},
}


@pytest.mark.parametrize("arguments", SCHEDULES)
def test_schedules_and_settings_become_keys(arguments: str, tmp_path: Path) -> None:
    keys, _ = imported(tmp_path, f"{NEEDED} {DATA} {arguments}")
    run = load_run(tmp_path / "out.toml").model_dump(mode="json")["train"]
    for key, value in SCHEDULES[arguments].items():
        assert run[key] == value, (key, keys["train"])
    if "constant" in arguments:
        assert run["min_lr"] == 0


SAMPLES = "--seq-length 64 --micro-batch-size 1 --train-samples 1000 --lr-warmup-samples 200 --lr 1e-4 --bf16"


def test_a_ramp_of_megatron_s_becomes_steps(tmp_path: Path) -> None:
    """16 sequences until 120 are seen, 32 until 240, 48, and 64 from 360 on."""
    given = f"{SAMPLES} --global-batch-size 64 --rampup-batch-size 16 16 360"
    keys, lines = imported(tmp_path, f"{given} {DATA}")
    train = keys["train"]
    assert train["batch_ramp"] == [[16, 8], [32, 12], [48, 15]]
    assert load_run(tmp_path / "out.toml").train.batch_ramp == [(16, 8), (32, 12), (48, 15)]
    # 128, 256 and 400 sequences, then 9 whole batches of 64; 200 are seen in step 11.
    assert (train["global_batch_size"], train["steps"], train["warmup_steps"]) == (64, 24, 11)
    assert any("the learning rate goes by samples in the script, and by steps here" in line for line in lines)

    newer = imported(tmp_path, f'{SAMPLES} --step-batch-size-schedule "0:16 0.0064M:32" {DATA}')[0]["train"]
    assert newer["batch_ramp"] == [[16, 7]]  # 6,400 tokens are 100 sequences
    assert (newer["global_batch_size"], newer["steps"]) == (32, 35)  # 112 sequences, then 28 times 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--global-batch-size 64 --rampup-batch-size 16 16", "--rampup-batch-size 16 16: allowed: three numbers"),
        ("--global-batch-size 64 --rampup-batch-size 64 16 9", "it does not rise to 64 sequences"),
        ("--global-batch-size 64 --rampup-batch-size 16 10 9", "it does not rise to 64 sequences"),
        ("--step-batch-size-schedule 0:16,1K:8", "cptain's batches grow from the first step on"),
        ("--step-batch-size-schedule 16", "cptain's batches grow from the first step on"),
        ("--global-batch-size 2 --rampup-batch-size 1 1 90000000", "it takes more than 1,000,000 steps"),
    ],
)
def test_a_ramp_that_megatron_or_cptain_would_not_take_is_one_line(words: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(f"torchrun pretrain_gpt.py {SAMPLES} {words} {DATA}\n")
    result = cptain("import-script", script, "-o", tmp_path / "out.toml")
    assert result.exit_code == 2
    assert result.output.startswith(f"cptain: {script}: --")
    assert said in result.output


def test_what_the_script_leaves_to_megatron_has_megatron_s_default(tmp_path: Path) -> None:
    keys, _ = imported(tmp_path, f"{NEEDED} {DATA}")
    train = keys["train"]
    assert (train["weight_decay"], train["adam_beta2"], train["schedule"]) == (0.01, 0.999, "linear")
    assert (train["eval_interval"], train["eval_steps"], keys["data"]["split"]) == (1000, 100, "969,30,1")
    text = (tmp_path / "out.toml").read_text()
    assert "weight_decay      = 0.01  # Megatron's default, as the script says nothing" in text


def test_arguments_without_a_key_are_said_with_line_and_reason(tmp_path: Path) -> None:
    given = """--use-mpi --no-load-optim --log-interval 5 \\
    --num-layers 32 --moe-z-loss-coeff 1e-3 \\
    --decrease-batch-size-if-needed"""
    keys, lines = imported(tmp_path, f"{NEEDED} {DATA} {given}")
    said = "\n".join(lines)
    for line, what in (
        (3, "--use-mpi: no key: torchrun starts one process a GPU"),
        (3, "--log-interval 5: no key: cptain logs every step"),
        (5, "--decrease-batch-size-if-needed: no key: set train.global_batch_size"),
    ):
        assert any(one.startswith(f"line {line}: {what}") for one in lines), said
    assert "OTHER THAN THE SCRIPT: --decrease-batch-size-if-needed: set train.global_batch_size" in said
    assert keys["train"]["megatron_args"] == ["--moe-z-loss-coeff", "1e-3"]
    assert keys["data"]["strip"] is True  # the fork that has --use-mpi
    assert "--num-layers" not in said


def test_a_difference_stands_in_the_run_file(tmp_path: Path) -> None:
    for arguments, what in (
        ("--fp16", "--fp16: cptain trains in bf16"),
        ("--lr-decay-style inverse-square-root", "--lr-decay-style inverse-square-root: cptain has"),
        ("", "the script begins with random weights"),
        ("--ckpt-convert-format torch", "--ckpt-convert-format: this start converts a checkpoint"),
        ("--bf16 $UNSET", "--bf16 $UNSET: $UNSET: known on the cluster only"),
        ("--lr-decay-style cosine $UNSET", "$UNSET among the arguments: known on the cluster only"),
        ("--lr-warmup-fraction 0.033", "the warm-up is 3.3 steps"),
    ):
        imported(tmp_path, f"{NEEDED} {DATA} {arguments}")
        text = " ".join((tmp_path / "out.toml").read_text().replace("\n#  ", "").split())
        assert f"# OTHER THAN THE SCRIPT: {what}" in text, arguments


DIRECTIVES = {
    "#$ -l node_f=2\n#$ -l h_rt=5:00:00\n#$ -g my-group": ("tsubame4", 2, "05:00:00", "my-group"),
    "#$ -l rt_AF=16\n#$ -l h_rt=5:00:00:00": (None, 16, "120:00:00", None),
    "#PBS -P gch1\n#PBS -q rt_HF\n#PBS -l select=2:mpiprocs=8 -k oe\n#PBS -l walltime=12:00:00": (
        "abci3",
        2,
        "12:00:00",
        "gch1",
    ),
    "#SBATCH --nodes=4\n#SBATCH -A grp\n#SBATCH --time=1-02:00:00\n#SBATCH --gpus-per-node=8": (
        "slurm",
        4,
        "26:00:00",
        "grp",
    ),
    "#SBATCH -N 3\n#SBATCH -t 90": ("slurm", 3, "01:30:00", None),
}


@pytest.mark.parametrize("head", DIRECTIVES)
def test_directives_become_jobs(head: str, tmp_path: Path) -> None:
    jobs = imported(tmp_path, f"{NEEDED} {DATA}", head)[0]["jobs"]
    assert tuple(jobs.get(key) for key in ("site", "nodes", "walltime", "group")) == DIRECTIVES[head]


def test_a_walltime_beyond_the_site_s_is_the_site_s(tmp_path: Path) -> None:
    keys, _ = imported(tmp_path, f"{NEEDED} {DATA}", "#$ -l node_f=2\n#$ -l h_rt=36:00:00")
    assert keys["jobs"]["walltime"] == "24:00:00"
    assert "the script asks for 36:00:00" in (tmp_path / "out.toml").read_text()


def test_what_the_scheduler_gives_a_job_is_known(tmp_path: Path) -> None:
    head = (
        '#PBS -q rt_HF\n#PBS -l select=4:mpiprocs=8\n[[ "$PBS_QUEUE" == rt_HF ]] && G=8\nN=$(wc -l < "$PBS_NODEFILE")'
    )
    assert mapped(tmp_path, f"{NEEDED} {DATA} --num-workers $((N / G))", head).script.value("--num-workers") == "4"
    head = "#$ -l node_f=3\nG=$(nvidia-smi -L | wc -l); N=$(cat $PE_HOSTFILE | awk '{print $1}' | sort -u | wc -l)"
    assert mapped(tmp_path, f"{NEEDED} {DATA} --num-workers $((N * G))", head).script.value("--num-workers") == "12"


def test_the_model_is_the_tokenizer_s(tmp_path: Path) -> None:
    for tokenizer, model in (
        ("/hf/Meta-Llama-3.1-8B/tokenizer.json", "/hf/Meta-Llama-3.1-8B"),
        ("org/model", "org/model"),
        ("/hf/model", "/hf/model"),
        ("some/where/v3.model", "/path/to/the/huggingface/model"),
        ("$HERE/tokenizer", "/path/to/the/huggingface/model"),
    ):
        assert mapped(tmp_path, f"{NEEDED} --data-path /d/a --tokenizer-model {tokenizer}").keys["model.hf"] == model


def test_bad_use_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "run me.sh"
    script.write_text(f"torchrun pretrain_gpt.py {NEEDED} {DATA} $EXTRA\n")
    first = cptain("import-script", script)
    assert first.exit_code == 0, first.output
    assert first.stdout == "run me.toml\n"
    again = cptain("import-script", script)
    assert (again.exit_code, again.output) == (
        2,
        "cptain: run me.toml: is there already: --force writes over it, -o names another\n",
    )
    assert cptain("import-script", script, "--force", "-v", "EXTRA=--seed 5").exit_code == 0
    assert load_run(tmp_path / "run me.toml").train.seed == 5
    assert cptain("import-script", script, "-o", "b.toml", "-v", "EXTRA").exit_code == 2
    assert (
        "no checkout of Megatron-LM" in cptain("import-script", script, "-o", "b.toml", "--megatron", tmp_path).output
    )
    assert "is a folder" in cptain("import-script", script, "-o", tmp_path, "--force").output
    other = tmp_path / "other.sh"
    for text, status, said in (
        (
            "python tools/preprocess_data.py --input x",
            1,
            "it starts no pretrain_gpt.py; it starts python tools/preprocess_data.py",
        ),
        (
            '[ $# -lt 2 ] && exit 1\ntorchrun pretrain_gpt.py "$@"',
            1,
            "it ends at line 1: exit 1: give its own arguments after FILE",
        ),
        (f"torchrun pretrain_gpt.py {NEEDED.replace('100', '$STEPS')}", 1, "$STEPS is known on the cluster only"),
        (
            "source params.sh\ntorchrun pretrain_gpt.py $ALL",
            1,
            "it gives no train.seq_length (--seq-length); line 1: params.sh",
        ),
        ("torchrun pretrain_gpt.py --seq-length many", 1, "--seq-length 'many': no number"),
        ("if", 2, "line 1: cptain cannot read this"),
    ):
        other.write_text(text)
        result = cptain("import-script", other)
        assert result.exit_code == status, result.output
        assert said in result.output
        assert not (tmp_path / "other.toml").exists()
    assert cptain("import-script", tmp_path / "absent.sh").exit_code == 2


def test_without_megatron_the_run_file_is_written_and_the_comparison_said_to_be_left_out(tmp_path: Path) -> None:
    _, lines = imported(tmp_path, f"{NEEDED} {DATA} --num-layers 2 --hidden-size 64 --num-attention-heads 4")
    assert lines[-1].startswith("not compared by Megatron's own parser: ")


def test_the_forks_own_words_have_their_places(tmp_path: Path) -> None:
    forks = "--use-mpi --use-z-loss --no-initialization --rope-theta 500000.0 --wandb-name x --torch-profile"
    keys, lines = imported(tmp_path, f"{NEEDED} {DATA} {forks}")
    assert keys["train"]["z_loss"] == 1e-4
    assert "strip" not in keys["data"]  # Swallow's fork does not
    assert "megatron_args" not in keys["train"]
    assert any("--rope-theta 500000.0: no key: the model's config.json says it" in one for one in lines)


MODEL = """--num-layers 2 --hidden-size 64 --ffn-hidden-size 176 --num-attention-heads 4 --group-query-attention
 --num-query-groups 2 --max-position-embeddings 8192 --swiglu --disable-bias-linear --normalization RMSNorm
 --position-embedding-type rope --rotary-base 500000 --use-rope-scaling --untie-embeddings-and-output-weights
 --attention-dropout 0.0 --hidden-dropout 0.0 --transformer-impl transformer_engine --norm-epsilon 1e-6 --use-mpi"""


@pytest.mark.usefixtures("megatron")
def test_megatron_s_own_parser_finds_the_one_value_that_was_changed(tmp_path: Path) -> None:
    """Which is a proof of Megatron's defaults too: the script gives no more than it must."""
    mapping = mapped(tmp_path, f"{NEEDED} {DATA} {' '.join(MODEL.split())}", "#$ -l node_f=1")
    out = tmp_path / "out.toml"
    out.write_text(run_text(mapping))
    run = load_run(out)
    changed = run.model_copy(update={"train": run.train.model_copy(update={"lr": 2e-4})})
    found = namespaces.compare(mapping, changed, None)
    assert {one.name: (one.script, one.ours) for one in found.differences if not one.why} == {"lr": (1e-4, 2e-4)}
    assert found.unknown == ["--use-mpi"]
    assert found.same > 500
    assert [note for note in found.notes if "refuses" in note] == []
