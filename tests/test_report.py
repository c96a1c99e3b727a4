"""The report: its numbers are the log's, and one file is all of it. How it looks is in test_report_page.py."""

import json
import re
import shutil
import signal
import sys
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import RunFileMaker, cptain, cptain_process
from cptain.history import Start, write_history
from cptain.megatron.log import Step, read_steps, train_logs
from cptain.run_file import RunFile, load_run
from cptain.scheduling.sweep import expand
from cptain.training.metrics import Metrics


def numbers(page: Path) -> list[dict[str, Any]]:
    """What the plots are drawn from."""
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found
    return list(json.loads(found[1]))


def tables(page: Path) -> list[list[list[str]]]:
    """The cells of every table, by row."""
    text = re.sub(r"<(style|script).*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [
        [
            [unescape(re.sub("<[^>]*>", "", cell)).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
            for row in re.findall("<tr>.*?</tr>", table, flags=re.DOTALL)
        ]
        for table in re.findall("<table.*?</table>", text, flags=re.DOTALL)
    ]


def train(run: RunFile, *losses: float, start: int = 0, grad_norm: float = 0.5) -> None:
    """Leave the metrics of steps with these losses, as training does."""
    run.logs_folder.mkdir(parents=True, exist_ok=True)
    metrics = Metrics(run, print)
    for number, loss in enumerate(losses, start + 1):
        metrics.step(Step(number, 20, loss, 1e-3, grad_norm, 0.25, 8 * number, 8, 400.0))
    metrics.close()


def start_of(run: RunFile, begin: int, last: int, began: float) -> Start:
    return Start(
        began=time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
        start=begin,
        steps=20,
        run=run.model_dump(mode="json", exclude_none=True),
        data={},
        layout={"processes": 1},
        versions={},
        last=last,
    )


def test_the_numbers_on_the_page_are_those_of_the_log(trained_run: Path, tmp_path: Path) -> None:
    run, page = load_run(trained_run), tmp_path / "report.html"
    result = cptain("report", trained_run, "--out", page)
    assert (result.exit_code, result.output) == (0, f"{page}\n")
    steps = read_steps(train_logs(run.logs_folder))
    columns = numbers(page)[0]["columns"]
    assert columns["step"] == [one.number for one in steps]
    assert columns["tokens"] == [one.sequences * 64 for one in steps]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert columns[name] == [getattr(one, name) for one in steps]
    said = re.findall(
        r"validation loss at iteration (\d+) .*?lm loss value: (\S+)", train_logs(run.logs_folder)[0].read_text()
    )
    first_said = {int(step): float(loss) for step, loss in reversed(said)}  # Megatron evaluates once more at the end
    validated = dict(zip(columns["step"], columns["validation_loss"], strict=True))
    assert {step: loss for step, loss in validated.items() if loss} == first_said
    finals, starts, times, data, validation, checkpoints = tables(page)
    first, last = first_said[min(first_said)], first_said[max(first_said)]
    assert validation[-1][-1] == f"{last - first:+.4f}"
    shown = dict(zip(finals[0], finals[1], strict=True))
    assert (shown["run"], shown["steps"], shown["tokens"]) == ("run", "8", "4,096")
    assert shown["loss"] == f"{steps[-1].loss:.6g}"
    assert shown["validation loss"] == f"{first_said[8]:.6g}"
    assert starts[1][2:5] == ["1 to 8", "8", "done"]
    assert [row[0] for row in times[1:]][::6] == ["trained", "in all"]
    assert data[1][3] == "100.0%"
    assert [row[0] for row in checkpoints[1:]] == ["4", "8"]
    assert {row[3] for row in checkpoints[1:]} == {"whole"}
    text = unescape(page.read_text(encoding="utf-8"))
    assert "  --num-layers 2 \\\n" in text
    assert "max_loss_spike = 2.0" in text


def test_scores_in_tasks_are_shown_by_their_settings_as_eval_recorded_them(make_run: RunFileMaker) -> None:
    def score(model: str, value: float, few_shot: int | None) -> dict[str, Any]:
        of = {"task": "ja", "asked": "ja", "metric": "acc,none", "error": 0.01, "higher_is_better": True}
        more = {"weights": "", "version": "1", "harness": "", "samples": 100, "limit": None}
        return {"model": model, "value": value, "few_shot": few_shot, **of, **more}

    run = load_run(file := make_run())
    train(run, 3.0, 2.0)
    scores = [score("base", 0.5, None), score("iter_0000002", 0.625, None), score("base", 0.25, 4)]
    (run.folder / "eval.json").write_text(json.dumps(scores))
    assert cptain("report", file).exit_code == 0
    page = run.folder / "report.html"
    assert tables(page)[-2:] == [
        [
            ["task", "metric", "questions", "base", "iter_0000002", "change"],
            ["ja", "acc", "100", "0.5 ± 0.01", "0.625 ± 0.01", "+0.125 better *"],
        ],
        [["task", "metric", "questions", "base"], ["ja", "acc", "100", "0.25 ± 0.01"]],
    ]
    headings = re.findall("<h3>(.*?)</h3>", page.read_text(encoding="utf-8"))
    assert headings[-2:] == ["Tasks", "Tasks, 4 examples before each question"]
    (run.folder / "eval.json").write_text("{")
    broken = cptain("report", file)
    assert broken.exit_code == 1
    assert f"{run.folder / 'eval.json'}: " in broken.output
    assert "take it away to evaluate anew" in broken.output


def test_a_page_loads_nothing_and_has_the_licence_of_what_it_embeds(make_run: RunFileMaker) -> None:
    run = load_run(file := make_run())
    train(run, 3.0, 2.0)
    assert cptain("report", file).exit_code == 0
    text = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"""<(?:link|img|iframe)\b|\b(?:src|href)=|@import|url\(""", text)
    assert "Permission is hereby granted, free of charge" in text
    assert len(text) < 100_000


def test_runs_of_a_sweep_are_drawn_together_and_one_that_has_not_begun_is_said(make_run: RunFileMaker) -> None:
    file = make_run(sweep={"train.lr": [1e-3, 2e-3, 3e-3]}, train__min_lr=0.0)
    first, second, third = expand(load_run(file), file)
    train(first, 3.0, 2.5)
    train(second, 3.0, 2.25, 2.0)
    result = cptain("report", file)
    assert f"report: {third.folder}: nothing is trained yet\n" in result.output
    page = load_run(file).folder / "report.html"
    assert result.stdout == f"{page}\n"
    assert [(one["name"], one["columns"]["loss"]) for one in numbers(page)] == [
        (first.name, [3.0, 2.5]),
        (second.name, [3.0, 2.25, 2.0]),
    ]
    finals = tables(page)[0]
    assert [row[:3] for row in finals] == [
        ["run", "train.lr", "steps"],
        [first.name, "0.001", "2"],
        [second.name, "0.002", "3"],
    ]


def test_steps_that_were_not_saved_and_are_done_again_are_not_on_the_page(
    make_run: RunFileMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(file := make_run())
    again = time.time()
    with monkeypatch.context() as earlier:
        earlier.setattr(time, "time", lambda: again - 30)
        train(run, 5.0, 4.0, 3.0, 9.0, 9.0)
    write_history(run.folder, [start_of(run, 0, 5, again - 60), start_of(run, 3, 4, again)])
    train(run, 2.0, start=3)
    assert cptain("report", file).exit_code == 0
    (one,) = numbers(run.folder / "report.html")
    assert one["columns"]["loss"] == [5.0, 4.0, 3.0, 2.0]
    assert one["restarts"] == [{"step": 3, "tokens": 3 * 8 * 64}]


def test_what_is_no_number_in_json_is_a_gap_and_nothing_of_a_run_file_becomes_html(make_run: RunFileMaker) -> None:
    run = load_run(file := make_run(train__megatron_args=["</pre></script><script>alert(1)//"]))
    train(run, 3.0, float("inf"), grad_norm=float("nan"))
    assert cptain("report", file).exit_code == 0
    page = run.folder / "report.html"
    assert numbers(page)[0]["columns"]["loss"] == [3.0, None]
    assert numbers(page)[0]["columns"]["grad_norm"] == [None, None]
    assert "<script>alert" not in page.read_text(encoding="utf-8")


def test_a_run_whose_folder_was_copied_elsewhere_has_a_report(make_run: RunFileMaker, tmp_path: Path) -> None:
    run = load_run(make_run())
    train(run, 3.0, 2.0)
    (run.folder / "run.toml").write_text(make_run().read_text(encoding="utf-8"), encoding="utf-8")
    copy = tmp_path / "on a laptop" / "copy"
    shutil.copytree(run.folder, copy)
    shutil.rmtree(run.folder)
    assert cptain("report", copy).output == f"{copy / 'report.html'}\n"
    assert numbers(copy / "report.html")[0]["name"] == "copy"


def test_a_run_that_has_trained_nothing_is_refused_in_one_line(make_run: RunFileMaker, tmp_path: Path) -> None:
    result = cptain("report", make_run())
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("cptain: report: no run has a step in its logs/metrics.jsonl")
    result = cptain("report", tmp_path / "runs")
    assert (result.exit_code, result.output.count("\n")) == (2, 1)


def test_a_watched_report_follows_the_run_and_is_left_as_a_page_that_stays_as_it_is(make_run: RunFileMaker) -> None:
    run = load_run(file := make_run())
    page = run.folder / "report.html"

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 60
        while not (page.exists() and text in page.read_text(encoding="utf-8")):
            assert watching.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    watching = cptain_process("report", file, "--watch", "1")
    assert watching.stdout
    assert "nothing is trained yet; looked at again every 1 s" in watching.stdout.readline()
    train(run, 3.0, 2.0)
    wait_for('data-every="1"')
    train(run, 1.5, start=2)
    wait_for("[3.0,2.0,1.5]")
    watching.send_signal(signal.SIGINT)
    output, _ = watching.communicate(timeout=60)
    assert (watching.returncode, output) == (0, f"report: {page}\n{page}\n")
    assert 'data-every="0"' in page.read_text(encoding="utf-8")


def test_figures_for_papers_are_of_the_page_s_numbers(make_run: RunFileMaker, tmp_path: Path) -> None:
    from cptain.report.document import document
    from cptain.report.figures import draw, import_pyplot

    run = load_run(file := make_run())
    losses = [3 - number / 100 for number in range(150)]
    train(run, *losses)
    result = cptain("report", file, "--png", tmp_path / "png")
    assert f"report: 4 figures → {tmp_path / 'png'}\n" in result.output
    names = ["grad_norm.png", "learning_rate.png", "loss.png", "tokens_per_second.png"]
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == names
    assert (tmp_path / "png" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    shown = document(run)
    assert shown
    _, axes = import_pyplot().subplots()
    draw(axes, [shown], "loss")
    each, mean = axes.lines
    assert list(each.get_xdata()) == list(mean.get_xdata()) == list(range(1, 151))
    assert list(each.get_ydata()) == losses
    assert mean.get_ydata()[-1] == pytest.approx(sum(losses[50:]) / 100)
    assert mean.get_ydata()[1] == pytest.approx(2.995)


def test_without_matplotlib_the_error_says_what_to_install(
    make_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(load_run(file := make_run()), 3.0, 2.0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cptain("report", file, "--png", tmp_path / "png")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "pip install matplotlib" in result.output
    assert cptain("report", file, "--png", tmp_path, "--watch", "5").exit_code == 2
