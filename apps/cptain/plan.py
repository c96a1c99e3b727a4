"""plan: what a run needs and takes, before anything is started: memory, layout, time, data and disk.

All of it is computed from the run file, config.json, the site and what is on the disk; no GPU and no torch is needed.
`plan` gives it as a document (docs/plan.md explains the keys), `lines` shows that to people.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cptain.data.epochs import exposures
from cptain.data.manifest import read_manifest
from cptain.data.steps import known_steps
from cptain.data.vocabulary import run_architecture
from cptain.errors import CptainError
from cptain.model.sizes import active_parameters, parameters
from cptain.progress import human
from cptain.run_file import RunFile
from cptain.scheduling.on_site import OnSite, on_site
from cptain.scheduling.render import chain_length
from cptain.scheduling.sites import Site
from cptain.training.disk import checkpoint_bytes, checkpoints_to_come, free_bytes
from cptain.training.fit import USABLE
from cptain.training.layout import stage_layers
from cptain.training.layouts import fastest
from cptain.training.memory import StageMemory, fullest, stage_memory
from cptain.training.rates import known_rates, own_rates, predict, read_plan_log
from cptain.training.step_time import gpu_seconds, launch_seconds

Document = dict[str, Any]
_GIB = 2**30


def _gib(size: float) -> float:
    return round(size / _GIB, 2)


def _parts(memory: StageMemory) -> Document:
    """A stage's bytes as plan shows them, GiB; the peak is less than their sum where not all are there at a time."""
    return {
        "weights": _gib(memory.weights),
        "gradients": _gib(memory.gradients),
        "optimizer": _gib(memory.master + memory.moments),
        "activations": _gib(memory.activations),
        "logits": _gib(memory.logits),
        "other": _gib(memory.buffers + memory.rebuilt + memory.in_optimizer),
        "peak": _gib(memory.peak),
    }


def _memory(run: RunFile, here: OnSite) -> Document:
    layers = stage_layers(here.architecture.num_layers, here.layout.pipeline)
    stages = [
        {"layers": held, **_parts(stage_memory(run, here.architecture, here.layout, stage))}
        for stage, held in enumerate(layers)
    ]
    memory, stage = fullest(run, here.architecture, here.layout)
    verdict = None
    if here.gpu_bytes:
        verdict = "no" if here.refusal else "yes" if memory.peak < USABLE * here.gpu_bytes else "hardly"
    return {
        "stages": stages,
        "fullest_stage": stage + 1,
        "peak": _gib(memory.peak),
        "gpu": _gib(here.gpu_bytes) if here.gpu_bytes else None,
        "fits": verdict,
        "refusal": here.refusal,
    }


def _time(run: RunFile, site: Site | None, here: OnSite) -> Document | None:
    """Hours and links of the chain; None where nothing alike was measured, or the CPU trains."""
    predicted = predict(run, here.architecture, here.layout)
    if predicted is None or (site and not site.gpus):
        return None
    a_step, rate = predicted
    found: Document = {
        "step_seconds": round(a_step, 3),
        "tokens_per_second_per_gpu": round(run.train.tokens_per_step / a_step / here.layout.gpus),
        "from": str(rate),
        "measured_cut": rate.cut_as(here.layout),
        "waits_for_host": _waits_for_host(run, here),
    }
    if steps := known_steps(run):
        hours = run.train.whole_steps(steps) * a_step / 3600
        found |= {"hours": round(hours, 2), "node_hours": round(hours * run.jobs.nodes, 2)}
        if run.jobs.walltime:
            found["chain"] = chain_length(run, a_step)
    return found


def _waits_for_host(run: RunFile, here: OnSite) -> bool:
    """Whether kernels run faster than the process of each GPU launches them."""
    train, layout = run.train, here.layout
    launched = launch_seconds(here.architecture, train.global_batch_size, train.precision, layout)
    computed = gpu_seconds(here.architecture, train.seq_length, train.global_batch_size, train.precision, layout)
    return launched > computed


def _proposals(run: RunFile, site: Site | None, here: OnSite) -> list[Document]:
    if site is None or here.gpu_bytes is None:
        return []
    rates = [*known_rates(), *own_rates(run)]
    found = fastest(run, here.architecture, site.gpus, run.jobs.nodes, here.gpu_bytes, rates)
    return [
        {
            "layout": asdict(one.layout),
            "shown": str(one.layout),
            "step_seconds": round(one.seconds, 3),
            "peak": _gib(fullest(run, here.architecture, one.layout)[0].peak),
            "measured_cut": one.rate.cut_as(one.layout),
            "from": str(one.rate),
        }
        for one in found
    ]


def _data(run: RunFile) -> Document | None:
    """Steps and epochs; None where the text is not tokenized yet."""
    try:
        records = read_manifest(run.data_folder, run.data.sources)
    except CptainError:
        return None
    steps = known_steps(run)
    assert steps is not None
    return {"parts": [asdict(part) for part in exposures(run, records, steps)]}


def _disk(run: RunFile, here: OnSite) -> Document:
    steps = known_steps(run)
    return {
        "checkpoint_bytes": checkpoint_bytes(run, here.architecture),
        "to_come": None if steps is None else checkpoints_to_come(run, steps),
        "free_bytes": free_bytes(run.folder),
    }


def _error(predicted: float | None, measured: float | None) -> str:
    if not predicted or not measured:
        return "not measured" if predicted else "not predicted"
    return f"{predicted:,.2f} predicted, {measured:,.2f} measured ({predicted / measured - 1:+.1%})"


def plan(run: RunFile, site: Site | None) -> Document:
    """What a run needs on a site.

    Args:
        run: the run.
        site: where it would run; None: one copy of the model on GPUs that nothing is known of.

    Raises:
        CptainError: a config.json that Megatron cannot represent; sizes that do not divide.
    """
    here, steps = on_site(run, site, run_architecture(run, ["config.json"])), known_steps(run)
    return {
        "name": run.name,
        "parameters": parameters(here.architecture),
        "active_parameters": active_parameters(here.architecture),
        "nodes": run.jobs.nodes if site else None,
        "gpus": here.layout.gpus,
        "layout": asdict(here.layout),
        "shown": str(here.layout),
        "choices": here.choices,
        "memory": _memory(run, here),
        "steps": steps,
        "tokens_per_step": run.train.tokens_per_step,
        "tokens": None if steps is None else run.train.tokens_seen(steps),
        "data": _data(run),
        "time": _time(run, site, here),
        "fastest": _proposals(run, site, here),
        "disk": _disk(run, here),
        "trained": read_plan_log(run)[-1:],
    }


def _memory_lines(memory: Document, pipeline: int) -> Iterator[str]:
    columns = ("weights", "gradients", "optimizer", "activations", "logits", "other", "peak")
    yield f"{'memory, GiB a GPU':<24}" + "".join(f"{column:>12}" for column in columns)
    for number, stage in enumerate(memory["stages"], 1):
        mark = "  ← fullest" if number == memory["fullest_stage"] and pipeline > 1 else ""
        name = f"  stage {number} ({stage['layers']} layers)"
        yield f"{name:<24}" + "".join(f"{stage[column]:>12,.1f}" for column in columns) + mark
    if memory["refusal"]:
        yield f"fits         no: {memory['refusal']}"
    elif memory["gpu"] is None:
        yield "fits         not known: no site that says gpu_memory"
    else:
        of = f"{memory['peak']:,.1f} GiB of the GPU's {memory['gpu']:,.1f} ({memory['peak'] / memory['gpu']:.0%})"
        yield f"fits         {of}" + (
            "" if memory["fits"] == "yes" else f": hardly, as PyTorch reserves more: {USABLE:.0%} is safe"
        )


def _time_lines(time: Document | None, nodes: int | None) -> Iterator[str]:
    if time is None:
        yield "time         not measured: nothing alike is in the table of rates"
        return
    speed = f"{time['step_seconds']:,.2f} s a step, {time['tokens_per_second_per_gpu']:,} tokens/s a GPU"
    if "hours" in time:
        hours = f"{time['hours']:,.1f} hours, {time['node_hours']:,.1f} node-hours"
        links = f", {time['chain']} train jobs" if "chain" in time else ""
        yield f"time         {hours if nodes else hours.split(',')[0]}{links if nodes else ''}: {speed}"
    else:
        yield f"time         {speed}"
    cut = "" if time["measured_cut"] else "; this tensor or context parallel size was not measured"
    yield f"             scaled by what is computed from {time['from']}{cut}"
    if time["waits_for_host"]:
        yield "             GPUs wait for their hosts, which launch kernels: a larger micro batch is faster"


def _data_lines(document: Document) -> Iterator[str]:
    steps, a_step = document["steps"], document["tokens_per_step"]
    if steps is None:
        yield f"steps        not known before the text is tokenized; {a_step:,} tokens each"
    else:
        most = "up to " if steps * a_step > document["tokens"] else ""
        yield f"steps        {steps:,} of {most}{a_step:,} tokens: {document['tokens']:,} tokens"
    if document["data"] is None:
        yield "data         not tokenized yet"
        return
    for part in document["data"]["parts"]:
        yield (
            f"data         {part['name']}: {part['documents']:,} documents, {part['tokens']:,} tokens to train on, "
            f"{part['share']:.1%}, {part['epochs']:.3g} epochs"
        )


def _disk_line(disk: Document) -> str:
    size, count, free = disk["checkpoint_bytes"], disk["to_come"], disk["free_bytes"]
    if count is None:
        return f"disk         {human(size)}B a checkpoint"
    there = "its disk is not seen from here" if free is None else f"{human(free)}B are free"
    short = "" if free is None or free >= size * count else ": too few"
    return f"disk         {count:,} checkpoints of {human(size)}B, {human(size * count)}B; {there}{short}"


def _trained_lines(trained: list[Document]) -> Iterator[str]:
    for line in trained:
        time = line["seconds"]
        yield f"measured     step: {_error(time['predicted'], time['measured'])} s, by {line['where']}"
        for stage in line["peak_gib"]:
            yield f"             stage {stage['stage']}: {_error(stage['predicted'], stage['measured'])} GiB"


def lines(document: Document) -> Iterator[str]:
    """A plan for people."""
    layout, nodes = document["layout"], document["nodes"]
    active = document["active_parameters"]
    some = f", of which {active:,} compute a token" if active < document["parameters"] else ""
    yield f"model        {document['parameters']:,} parameters{some}"
    where = (
        f"{document['gpus']} GPUs on {nodes} node{'s' if nodes > 1 else ''}"
        if nodes
        else f"{document['gpus']} GPUs, one copy of the model"
    )
    yield f"layout       {where}: {document['shown']}"
    for choice in document["choices"]:
        yield f"             {choice}"
    yield from _memory_lines(document["memory"], layout["pipeline"])
    for proposal in document["fastest"]:
        name, but = "fastest      ", ""
        if not proposal["measured_cut"]:
            name, but = "perhaps      ", ", if it communicates like the nearest measured layout: it was not measured"
        step = f"{proposal['step_seconds']:,.2f} s a step, {proposal['peak']:,.1f} GiB"
        yield f"{name}{proposal['shown']}: {step}{but}"
    if document["memory"]["gpu"] and document["time"] and not document["fastest"]:
        yield "fastest      none that fits these GPUs"
    yield from _time_lines(document["time"], nodes)
    yield from _data_lines(document)
    yield _disk_line(document["disk"])
    yield from _trained_lines(document["trained"])
