"""What a process does around its first import of Megatron. Megatron's spawned children need the first half as well."""

import importlib.machinery
import importlib.util
import sys
import typing

# What Megatron prefers to torch's own operations wherever it can be imported, even in layers that ask for torch's: the
# last norm of a model of local layers is Transformer Engine's, which takes no tensor of the CPU and multiplies fp32
# matrices in TF32.
_GPU_KERNELS = ("transformer_engine", "apex", "amp_C", "fused_weight_gradient_mlp_cuda", "flash_attn", "flash_attn_3")


def leave_out_gpu_kernels() -> None:
    """Let Megatron find no library of kernels for GPUs, so that it computes with torch's own operations alone."""
    for name in _GPU_KERNELS:
        sys.modules[name] = None  # type: ignore[assignment]  # the import fails, and find_spec finds nothing


def before_import(cpu: bool) -> None:
    """Make Megatron importable here.

    Args:
        cpu: answer for CUDA on the CPU (`cptain.megatron.cpu`).
    """
    if not hasattr(typing, "override"):  # Python 3.11, with Megatron 0.17 or later
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    if cpu:
        from cptain.megatron.cpu import install

        install()


def import_megatron(cpu: bool) -> None:
    """Import megatron.core, after `before_import`, and settle what can only be settled then.

    It finds an empty wandb, whose import takes 0.4 s: what goes there comes from the process that reads the log.
    """
    empty = importlib.machinery.ModuleSpec("wandb", None)  # a module, as the lab's fork does not do without one
    sys.modules.setdefault("wandb", importlib.util.module_from_spec(empty))
    import megatron.core.datasets.utils as datasets_utils

    # Megatron runs make for its dataset helpers at every start, which fails in a read-only image and in PyPI's wheel
    # (no Makefile).
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        datasets_utils.compile_helpers = lambda: None
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # core 0.13 looks at it where the import has failed
        moe_utils.te_general_gemm = None
    if cpu:
        from cptain.megatron.cpu import install_in_megatron

        install_in_megatron()
