"""Which Megatron a training script will import; found without importing it, which takes seconds."""

import importlib.util
import runpy
import subprocess
from pathlib import Path


def _package_info(script: Path) -> Path | None:
    """package_info.py of the megatron.core that `script` imports.

    Args:
        script: Python looks beside it first, so that a script of a Megatron-LM checkout gets that checkout.
    """
    beside = script.parent / "megatron" / "core" / "package_info.py"
    if beside.is_file():
        return beside
    spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
    found = Path(spec.origin).with_name("package_info.py") if spec is not None and spec.origin is not None else None
    return found if found is not None and found.is_file() else None


def core_version(script: Path) -> tuple[int, int]:
    """Major and minor version of the megatron.core that `script` imports; (0, 0) where there is none."""
    if (file := _package_info(script)) is None:
        return 0, 0
    values = runpy.run_path(str(file))
    return values["MAJOR"], values["MINOR"]


def whole_version(script: Path) -> tuple[str | None, str | None]:
    """Version of the megatron.core that `script` imports, such as 0.19.2, and the commit of its checkout; None for what
    is not known."""
    if (file := _package_info(script)) is None:
        return None, None
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit: str | None = head.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a file of a checkout, as in site-packages
        commit = None
    version = runpy.run_path(str(file)).get("__version__", "").partition("+")[0]  # a wheel's may end in +COMMIT
    return version or None, commit
