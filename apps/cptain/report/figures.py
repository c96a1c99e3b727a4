"""The plots of the page as PNG files, for papers: one a metric, of the same numbers and in the same colours.

matplotlib draws them. It is an optional extra, which the image has not: a run's folder may be copied to where it is.
"""

import re
import sys
import warnings
from pathlib import Path
from statistics import fmean
from typing import Any

from cptain import atomic
from cptain.errors import CptainError
from cptain.report.document import NOISY, Values, titles

_INCHES = (5.5, 3.4)  # a column and a half of a paper
_DOTS = 300  # an inch
_MEAN = 100  # steps; a line of more than these is drawn faint, and their mean over it
_JAPANESE = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic")  # names of domains may be
_DASHES = ("-", "--", ":")  # eight colours, then the same dashed


def import_pyplot() -> Any:
    """matplotlib.pyplot, without a screen and with the fonts that are here; an error where it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise CptainError(
            "report: --png needs matplotlib: pip install matplotlib in the venv of cptain; a copy of the run's folder "
            "has the same report there"
        ) from error
    matplotlib.use("Agg")  # no screen
    from matplotlib import font_manager, pyplot

    there = {font.name for font in font_manager.fontManager.ttflist}
    pyplot.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _JAPANESE if name in there)]
    return pyplot


def draw(axes: Any, runs: list[Values], key: str) -> None:
    """Draw a metric of the documents of runs."""
    light = (Path(__file__).parent / "page.css").read_text(encoding="utf-8").partition("@media")[0]
    colours, meant = re.findall(r"--run\d: (#\w+)", light), False
    for number, run in enumerate(runs):
        column = run["columns"].get(key, [])
        points = [pair for pair in zip(run["columns"]["step"], column, strict=False) if pair[1] is not None]
        if not points:
            continue
        steps, values = (list(side) for side in zip(*points, strict=True))
        line = {"color": colours[number % 8], "linestyle": _DASHES[number // 8 % 3]}
        if key.partition("/")[0] in NOISY and len(values) > _MEAN:
            meant = True
            axes.plot(steps, values, color=line["color"], linewidth=0.5, alpha=0.25)
            values = [fmean(values[max(0, place - _MEAN) : place]) for place in range(1, len(values) + 1)]
        marker = "o" if len(values) < 30 else ""
        axes.plot(steps, values, label=run["name"], linewidth=1.3, marker=marker, markersize=3, **line)
    axes.set_xlabel(f"step (bold: mean of {_MEAN} steps)" if meant else "step")
    if len(runs) > 1:
        axes.legend(fontsize=7, frameon=False)


def write_figures(runs: list[Values], folder: Path) -> list[Path]:
    """Write a PNG file a metric (loss.png; loss-math.png of loss/math), and say which; see `import_pyplot`."""
    pyplot, files = import_pyplot(), []
    folder.mkdir(parents=True, exist_ok=True)
    for key, title in titles(runs).items():
        figure, axes = pyplot.subplots(figsize=_INCHES, layout="constrained")
        draw(axes, runs, key)
        axes.set_ylabel(title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#d9d9e0", linewidth=0.5)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
        files.append(folder / (re.sub(r"[^\w.-]", "-", key) + ".png"))
        with atomic.atomic_file(files[-1]) as partial, warnings.catch_warnings(record=True) as warned:
            figure.savefig(partial, format="png", dpi=_DOTS)
        if any("missing from font" in str(one.message) for one in warned):
            print(f"report: {title}: no font here has all its letters: install {_JAPANESE[0]}", file=sys.stderr)
        pyplot.close(figure)
    return files
