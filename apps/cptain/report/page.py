"""The page: the documents of runs, put into one HTML file that needs nothing else to open.

Styles, script and the plotting library (uPlot, MIT) go into it; its content security policy lets it load nothing more.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from markupsafe import Markup

from cptain import __version__, atomic
from cptain.errors import CptainError
from cptain.report.document import NOISY, Values, document, load_runs, titles
from cptain.report.figures import write_figures

_HERE = Path(__file__).parent
_UPLOT = next(_HERE.glob("uplot-*"))


def _shown(value: Any) -> str:
    """A value as text: numbers with six digits, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _differing(runs: list[Values]) -> list[str]:
    """The keys of the run files whose values differ among runs."""
    keys = dict.fromkeys(key for run in runs for key in run["settings"])
    return [key for key in keys if len({_shown(run["settings"].get(key)) for run in runs}) > 1]


def page(runs: list[Values], every: int = 0) -> str:
    """The report of the documents of runs; one that is written anew every so many seconds loads itself as often."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters["shown"] = _shown
    return environment.get_template("page.html.j2").render(
        runs=runs,
        every=every,
        titles=titles(runs),
        noisy=NOISY,
        numbers=[{key: run[key] for key in ("name", "columns", "restarts")} for run in runs],
        differing=_differing(runs),
        finals=list(dict.fromkeys(name for run in runs for name in run["finals"])),
        time=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        uplot=_UPLOT.name,
        part=lambda name: Markup((_HERE / name).read_text(encoding="utf-8")),
    )


def _documents(paths: list[Path], out: Path | None) -> tuple[Path, list[Values], list[str]]:
    """Where the report goes, what it shows, and a line a run of which nothing is trained yet."""
    loaded = [load_runs(path) for path in paths]
    found, lines = [], []
    for run in (run for _, runs in loaded for run in runs):
        if one := document(run):
            found.append(one)
        else:
            lines.append(f"report: {run.folder}: nothing is trained yet")
    return out or (loaded[0][0] if len(loaded) == 1 else Path()) / "report.html", found, lines


def write_report(paths: list[Path], out: Path | None, png: Path | None = None) -> Path:
    """Write the report of runs, and say where; those of which nothing is trained yet are said and left out.

    Args:
        paths: run files, or folders of runs.
        out: the file; None: report.html in the folder of the one, or here for several.
        png: a folder for the figures as PNG files.

    Raises:
        CptainError: nothing was trained; a run file or a history that cannot be read; no matplotlib for `png`.
    """
    target, found, lines = _documents(paths, out)
    for line in lines:
        print(line, file=sys.stderr)
    if not found:
        raise CptainError("report: no run has a step in its logs/metrics.jsonl: train first")
    if png:
        print(f"report: {len(write_figures(found, png))} figures → {png}", file=sys.stderr)
    atomic.write_text(target, page(found))
    return target


def watch_report(paths: list[Path], out: Path | None, every: int, written: Callable[[Path], None]) -> NoReturn:
    """Write the report again every so many seconds, until an exception such as `Interrupted`; what is trained later
    joins it. `written` is called once, when it is there."""
    said, is_there = set[str](), False
    while True:
        target, found, lines = _documents(paths, out)
        for line in lines:
            if line not in said:
                print(f"{line}; looked at again every {every} s", file=sys.stderr)
        said.update(lines)
        if found:
            atomic.write_text(target, page(found, every))
            if not is_there:
                is_there = True
                written(target)
        time.sleep(every)
