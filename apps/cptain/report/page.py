"""The page: the documents of runs, put into one HTML file that needs nothing else to open.

Styles, script and the plotting library (uPlot, MIT) go into it; its content security policy lets it load nothing more.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cptain import __version__, atomic
from cptain.errors import CptainError
from cptain.report.document import Values, document, load_runs

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


def page(runs: list[Values]) -> str:
    """The report of the documents of runs."""
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
        numbers=[{key: run[key] for key in ("name", "columns", "restarts")} for run in runs],
        differing=_differing(runs),
        finals=list(dict.fromkeys(name for run in runs for name in run["finals"])),
        time=time.strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        uplot=_UPLOT.name,
        part=lambda name: Markup((_HERE / name).read_text(encoding="utf-8")),
    )


def write_report(paths: list[Path], out: Path | None) -> Path:
    """Write the report of runs, and say where; those of which nothing is trained yet are said and left out.

    Args:
        paths: run files, or folders of runs.
        out: the file; None: report.html in the folder of the one, or here for several.

    Raises:
        CptainError: nothing was trained; a run file or a history that cannot be read.
    """
    loaded = [load_runs(path) for path in paths]
    found = []
    for run in (run for _, runs in loaded for run in runs):
        if one := document(run):
            found.append(one)
        else:
            print(f"report: {run.folder}: nothing is trained yet", file=sys.stderr)
    if not found:
        raise CptainError("report: no run has a step in its logs/metrics.jsonl: train first")
    target = out or (loaded[0][0] if len(loaded) == 1 else Path()) / "report.html"
    atomic.write_text(target, page(found))
    return target
