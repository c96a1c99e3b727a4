"""Whether a training step fits a GPU, and what "auto" in the run file makes of the memory that is there.

`cptain train` asks with the GPU that it finds, `cptain plan` and `cptain jobs` with what the site says of its own.
"""

from dataclasses import replace

from cptain.model.architecture import Architecture
from cptain.run_file import RunFile
from cptain.training.layout import Layout, layout_of, stage_layers
from cptain.training.memory import fullest

USABLE = 0.85  # of a GPU's memory: PyTorch was seen to reserve 12 to 15 % more than it allocates
# What micro batch 4 gains over 1 on an H200, 4 layers of Llama 3.1 8B in bf16: 567 to 573 TFLOP/s. A longer wait for a
# pipeline's first and last micro batches may cost no more than that.
_GAIN_OF_A_MICRO_BATCH = 0.01


def peak(run: RunFile, architecture: Architecture, layout: Layout) -> float:
    """Bytes that the fullest stage needs."""
    return fullest(run, architecture, layout)[0].peak


def fits(run: RunFile, architecture: Architecture, layout: Layout, gpu_bytes: float) -> bool:
    """Whether a step fits with room to spare for what PyTorch reserves beyond it."""
    return peak(run, architecture, layout) < USABLE * gpu_bytes


def least_recompute(run: RunFile, architecture: Architecture, layout: Layout, gpu_bytes: float) -> Layout:
    """The layout with as few layers recomputed as let it fit; "full" where that is all of them, or none would.

    Selective recomputation drops the attention scores, which a fused attention kernel never stores: it is no middle way
    here.
    """
    most = max(stage_layers(architecture.num_layers, layout.pipeline))
    if fits(run, architecture, none := replace(layout, recompute="none"), gpu_bytes):
        return none
    too_few, enough = 0, most
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if fits(run, architecture, replace(layout, recompute=middle), gpu_bytes):
            enough = middle
        else:
            too_few = middle
    return replace(layout, recompute="full" if enough == most else enough)


def _need(run: RunFile, architecture: Architecture, layout: Layout, gpu_bytes: float) -> str:
    memory, stage = fullest(run, architecture, layout)
    return f"{memory.peak / 2**30:.0f} GiB of the GPU's {gpu_bytes / 2**30:.0f} (stage {stage + 1} of {layout.pipeline}"


def _micro_batch(run: RunFile, architecture: Architecture, layout: Layout, gpu_bytes: float) -> tuple[Layout, str]:
    """The largest micro batch that fits and divides, and why it is no larger."""
    batch = run.train.global_batch_size
    divides = run.train.divides_batches // layout.data
    a_copy, others = batch // layout.data, layout.pipeline - 1
    chosen, why = replace(layout, micro_batch_size=1), "which is all that a copy of the model has of a global batch"
    for size in range(2, divides + 1):
        if divides % size:
            continue
        larger = replace(layout, micro_batch_size=size)
        if not fits(run, architecture, larger, gpu_bytes):
            why = f"as {size} needs {_need(run, architecture, larger, gpu_bytes)}; {USABLE:.0%} is safe)"
            break
        if others * (size - 1) / a_copy > _GAIN_OF_A_MICRO_BATCH:
            waits = others / larger.micro_batches(batch)
            why = f"as with {size} the {layout.pipeline} stages wait {waits:.1%} of the time that they compute"
            break
        chosen = larger
    return chosen, f'train.micro_batch_size = "auto": {chosen.micro_batch_size}, {why}'


def settle(
    run: RunFile, architecture: Architecture, processes: int, gpu_bytes: float | None
) -> tuple[Layout, list[str]]:
    """The run's layout with every "auto" decided.

    A micro batch is as large as fits without recomputation, which costs more than a larger one gains.

    Args:
        run: the run.
        architecture: the model's.
        processes: GPUs of all nodes together; check_parallel has passed them.
        gpu_bytes: of the smallest GPU; None where that is not known, or the CPU trains: then "auto" is the least.

    Returns:
        The layout, and for every "auto" a line that says why.
    """
    layout, lines = layout_of(run, processes), list[str]()
    if gpu_bytes is None:
        return layout, lines
    if run.train.micro_batch_size == "auto":
        layout, why = _micro_batch(run, architecture, layout, gpu_bytes)
        lines.append(why)
    if run.train.recompute == "auto":
        chosen = least_recompute(run, architecture, layout, gpu_bytes)
        what, safe, but = str(chosen.recompute), "" if chosen.recompute == "none" else f"; {USABLE:.0%} is safe", ""
        if isinstance(chosen.recompute, int):
            layers = max(stage_layers(architecture.num_layers, layout.pipeline))
            what = f"{chosen.recompute} of {layers} layers a stage"
            but = f", and with it {peak(run, architecture, chosen) / 2**30:.0f}"
        lines.append(
            f'train.recompute = "auto": {what}, as a step without it needs '
            f"{_need(run, architecture, layout, gpu_bytes)}; data-parallel size {layout.data}{safe}){but}"
        )
        layout = chosen
    return layout, lines


def refusal(run: RunFile, architecture: Architecture, layout: Layout, gpu_bytes: float) -> str | None:
    """Why a step cannot fit, for people; None where it may."""
    if peak(run, architecture, layout) <= gpu_bytes:
        return None
    memory, stage = fullest(run, architecture, layout)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.master + memory.moments + memory.in_optimizer,
        "activations": memory.activations + memory.rebuilt,
        "logits": memory.logits,
    }
    shown = ", ".join(f"{name} {size / 2**30:.0f}" for name, size in parts.items() if size)
    return (
        f"a step needs {memory.peak / 2**30:.0f} GiB of the GPU's {gpu_bytes / 2**30:.0f} "
        f"(stage {stage + 1} of {layout.pipeline}: {shown})"
    )
