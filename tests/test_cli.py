"""The command line itself: quick to answer, honest when it fails, and as documented."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, RunFileMaker, cptain
from cptain.run_file import RunFile
from cptain.toml_file import table_of


def test_help_imports_nothing_heavy() -> None:
    script = "import cptain.cli, sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "click" in loaded
    assert not {"torch", "transformers", "numpy", "pydantic", "megatron", "tqdm"} & set(loaded)


def test_every_command_has_help_and_an_unknown_one_is_bad_usage() -> None:
    listed = re.findall(r"^  (\w+)  +\S", cptain("--help").output, flags=re.MULTILINE)
    assert {"preprocess", "convert", "train", "export", "verify"} <= set(listed)
    for command in listed:
        if not command.startswith("-"):
            assert cptain(command, "--help").exit_code == 0
    assert cptain("nosuch").exit_code == 2
    assert cptain("convert").exit_code == 2


def test_a_defect_is_one_line_and_debug_shows_its_traceback(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cptain.checkpoint.convert as convert

    def broken(*_: object) -> None:
        raise KeyError("oops\nsecond line")

    monkeypatch.setattr(convert, "convert", broken)
    result = cptain("convert", make_run())
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "a defect of cptain" in result.output
    assert "Traceback" in cptain("--debug", "convert", make_run()).output


def test_every_key_of_the_run_file_is_documented() -> None:
    text = (PROJECT / "docs" / "run-file.md").read_text(encoding="utf-8")
    for section_name, section in RunFile.model_fields.items():
        table = table_of(section.annotation)
        for key in table.by_key() if table else ():
            assert re.search(rf"`{section_name}\.{key}`|`\.{key}`", text), f"{section_name}.{key}"
        assert section_name in text


def test_the_reference_of_the_commands_is_what_the_program_says() -> None:
    reference = runpy.run_path(str(PROJECT / "docs" / "cli.py"))["reference"]
    text = (PROJECT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert text == reference(), "docs/cli.md is not what the program says: make docs"


def test_every_variable_that_job_scripts_and_users_set_is_in_the_reference() -> None:
    sources = [*(PROJECT / "apps").rglob("*.py"), *(PROJECT / "jobs" / "templates").glob("*.j2")]
    named = {name for source in sources for name in re.findall(r"CPTAIN_[A-Z_]+", source.read_text(encoding="utf-8"))}
    text = (PROJECT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert {name for name in named if name not in text} == {"CPTAIN_TRAINING"}  # a mark of its processes, set by train


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_a_closed_pipe_is_no_traceback(make_run: RunFileMaker, tmp_path: Path) -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m cptain --help | head -c 1", shell=True, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr


def _quoted(page: str) -> list[str]:
    """The messages in the first column of a page on failures."""
    return re.findall(r"^\| `([^`]+)`", (PROJECT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_message_that_the_page_on_failures_quotes_is_one_of_the_program_s() -> None:
    """Each piece between … or ; stands in the source as it is; a checkpoint's record by the name of its constant."""
    source = "".join(file.read_text() for file in (PROJECT / "apps").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source).replace("{RECORD}", "checksums.json")
    told = _quoted("failures.md")
    assert len(told) > 15
    missing = [
        piece
        for line in told
        for piece in re.split("…|; ", line)
        if piece.strip("; :,") and piece.strip() not in source
    ]
    assert missing == []
    assert _quoted("failures.ja.md") == told


@pytest.mark.parametrize("site", ["tsubame", "abci"])
def test_a_quick_start_s_run_file_is_one_for_its_site_and_its_commands_are_the_same_in_japanese(
    site: str, tmp_path: Path, model: Path, text_folder: Path
) -> None:
    def blocks(page: str) -> list[str]:
        text = (PROJECT / "docs" / page).read_text(encoding="utf-8")
        return [re.sub(" +# .*", "", block) for block in re.findall(r"```\n(.*?)```", text, re.DOTALL)]

    here = blocks(f"quickstart-{site}.md")
    assert here == blocks(f"quickstart-{site}.ja.md")
    for command in re.findall(r"cptain\.sif cptain (\w+)", "".join(here)):
        assert cptain(command, "--help").exit_code == 0
    (typed,) = [block for block in here if "[jobs]" in block]
    (tmp_path / "runs").mkdir()
    shutil.copy(PROJECT / "runs" / "tiny.toml", tmp_path / "runs")
    subprocess.run(["bash"], input=typed.replace("$ ", ""), text=True, cwd=tmp_path, check=True)
    (tmp_path / "cptain.sif").touch()
    overrides = (f'model.hf="{model}"', f'data.input=["{text_folder}/*.jsonl"]', f'jobs.image="{tmp_path}/cptain.sif"')
    result = cptain("jobs", tmp_path / "runs" / "first.toml", *(word for one in overrides for word in ("--set", one)))
    assert result.exit_code == 0, result.output
