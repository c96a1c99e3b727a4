"""Which Megatron a training script will import; found without importing it, which takes seconds."""

import importlib.util
import runpy
from pathlib import Path


def core_version(script: Path) -> tuple[int, int]:
    """Major and minor version of the megatron.core that `script` imports; (0, 0) where there is none.

    Args:
        script: Python looks beside it first, so that a script of a Megatron-LM checkout gets that checkout.
    """
    package_info = script.parent / "megatron" / "core" / "package_info.py"
    if not package_info.is_file():
        spec = importlib.util.find_spec("megatron.core") if importlib.util.find_spec("megatron") else None
        if spec is None or spec.origin is None:
            return 0, 0
        package_info = Path(spec.origin).with_name("package_info.py")
    values = runpy.run_path(str(package_info))
    return values["MAJOR"], values["MINOR"]
