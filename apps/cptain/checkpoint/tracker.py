"""The root of a Megatron checkpoint: a folder an iteration, and a tracker that names the latest that is complete."""

from pathlib import Path

from cptain.atomic import write_text
from cptain.errors import CptainError, one_line

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def iteration_folder(root: Path, iteration: int | None) -> Path:
    """The folder of an iteration, or of the release, under a checkpoint's root."""
    return root / (RELEASE if iteration is None else f"iter_{iteration:07d}")


def read_tracker(root: Path) -> int | None:
    """The latest iteration that a checkpoint's root says is complete; None for a release.

    Raises:
        CptainError: no tracker, or one that says neither.
    """
    file = root / TRACKER
    try:
        text = file.read_text(encoding="utf-8").strip()
        return None if text == RELEASE else int(text)
    except FileNotFoundError:
        raise CptainError(f"{file}: missing: there is no checkpoint in {root}") from None
    except (OSError, ValueError) as error:
        raise CptainError(f'{file}: must hold "{RELEASE}" or an iteration: {one_line(error)}') from error


def write_tracker(root: Path, iteration: int | None) -> None:
    """Say which iteration, or that the release, is complete."""
    write_text(root / TRACKER, RELEASE if iteration is None else str(iteration))
