"""The report's page in a browser, headless Chromium: what it draws is the log's, in light and in dark."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, RunFileMaker, cptain
from cptain.run_file import load_run
from cptain.scheduling.sweep import expand
from cptain.training.metrics import metrics_file, read_metrics
from test_report import train

# What the page shows, told by itself: what each plot holds, how much of each line is on its canvas, and the ground.
PROBE = """
const rgb = text => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
const colour = number => {
  const box = document.body.appendChild(document.createElement("i"));
  box.style.color = `var(--run${number})`;
  const found = rgb(getComputedStyle(box).color);
  box.remove();
  return found;
};
const dots = ({ ctx }) => {
  const { data } = ctx.getImageData(0, 0, ctx.canvas.width, ctx.canvas.height);
  const counts = runs.map(() => 0), colours = runs.map((_, number) => [...colour(number), 255].join());
  for (let at = 0; at < data.length; at += 4) {
    const number = colours.indexOf(data.slice(at, at + 4).join());
    if (number >= 0) counts[number]++;
  }
  return counts;
};
const told = () => ({
  plots: plots.map(plot => ({
    title: plot.root.parentNode.firstChild.textContent,
    data: plot.data,
    dots: dots(plot),
    isInside: plot.root.clientWidth <= plot.root.parentNode.clientWidth,
  })),
  ground: rgb(getComputedStyle(document.body).backgroundColor),
  axis, hidden: hidden(), every: window.every ?? 0,
});
const tell = () => {
  const text = document.body.appendChild(document.createElement("pre"));
  text.id = "told";
  text.textContent = JSON.stringify(told());
};
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser that is there, or Debian's, unpacked beside the project."""
    if found := shutil.which("chromium") or shutil.which("google-chrome"):
        return found
    subprocess.run([PROJECT / "tests" / "chromium.sh", PROJECT / ".chromium"], check=True)
    return str(PROJECT / ".chromium" / "chromium")


def look(chromium: str, page: Path, before: str = "", dark: bool = False) -> dict[str, Any]:
    """Load a page, with a script before its own, and give what it tells; nothing may be said on the console."""
    probed = page.with_name("probed.html")
    text = page.read_text(encoding="utf-8").replace("</body>", f"<script>{PROBE}tell();</script></body>")
    probed.write_text(text.replace("<body>", f"<body><script>{before}</script>"), encoding="utf-8")
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--enable-logging=stderr"),
            *(f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,1000"),
            *(f"--user-data-dir={page.parent / 'browser'}", "--dump-dom", probed.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search('<pre id="told">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found, done.stdout[-2000:]
    return dict(json.loads(unescape(found[1])))


@pytest.mark.parametrize("dark", [False, True])
def test_every_plot_holds_the_numbers_of_the_log_and_shows_them_on_its_ground(
    make_run: RunFileMaker, chromium: str, dark: bool
) -> None:
    file = make_run(sweep={"train.lr": [1e-3, 2e-3]})
    runs = expand(load_run(file), file)
    train(runs[0], 3.0, 2.5, 2.25)
    train(runs[1], 3.5, float("nan"), 2.75, 2.5, grad_norm=0.75)
    page = Path(cptain("report", file).stdout.strip())
    told = look(chromium, page, dark=dark)
    logged = [read_metrics(metrics_file(run)) for run in runs]
    titles = {"Loss, nats a token": "loss", "Learning rate": "learning_rate", "Tokens a second": "tokens_per_second"}
    titles["Gradient norm, before clipping"] = "grad_norm"
    assert {plot["title"] for plot in told["plots"]} == titles.keys()
    for plot in told["plots"]:
        steps, *drawn = plot["data"]
        assert steps == [1, 2, 3, 4]
        for values, metrics in zip(drawn, logged, strict=True):
            expected = {step: one[titles[plot["title"]]] for step, one in metrics.items()}
            shown = {step: value for step, value in zip(steps, values, strict=True) if value is not None}
            assert shown == {step: value for step, value in expected.items() if value == value}
        assert max(plot["dots"]) > 20
        assert plot["isInside"]
    assert min(told["plots"][0]["dots"]) > 20
    assert max(told["ground"]) < 64 if dark else min(told["ground"]) > 192


def test_a_page_that_is_written_anew_loads_itself_and_keeps_what_was_chosen_and_another_does_not(
    make_run: RunFileMaker, chromium: str
) -> None:
    from cptain.report.document import document
    from cptain.report.page import page as page_of

    run = load_run(make_run())
    train(run, 3.0, 2.5)
    shown = document(run)
    assert shown
    page = run.folder / "watched.html"
    page.write_text(page_of([shown], every=1), encoding="utf-8")
    chosen = {"axis": "tokens", "span": 1, "hidden": [False, True]}
    before = f"sessionStorage.setItem(location.pathname, {json.dumps(json.dumps(chosen))});"
    told = look(chromium, page, before + "setInterval = (again, milliseconds) => { every = milliseconds; };")
    assert told["every"] == 1000
    assert (told["axis"], told["hidden"]) == ("tokens", [False, True])
    assert told["plots"][0]["data"][0] == [8 * 64, 16 * 64]
    page.write_text(page_of([shown]), encoding="utf-8")
    told = look(chromium, page, before + "setInterval = (again, milliseconds) => { every = milliseconds; };")
    assert (told["every"], told["axis"]) == (0, "step")
