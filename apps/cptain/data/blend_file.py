"""<run>/blend.json: what cptain's training script is told of the data, and in which order it is read.

"files" has weight and prefix of every file, for Megatron's order and for what `data.split` validates with, and
"documents" is data.documents. With [[data.mix]] tables there are "parts" besides (name, what its order is made of,
prefixes), the domains of the ledger, and with [[data.stage]] "stages" (sequences, the weight of each part). By file,
not on the command line: 10,000 input files are more than a command line holds. Another train.script gets
<run>/data-args.txt, `weight prefix` a line, which Megatron takes as --data-args-path and splits at white space.
"""

import shlex
from typing import Any

from cptain import atomic
from cptain.data.blend import blend
from cptain.data.manifest import Record
from cptain.data.stages import identity, parts_to_train, stages
from cptain.run_file import RunFile


def blend_flag(run: RunFile, records: list[Record], steps: int, write: bool = True) -> tuple[str, str]:
    """The flag and the path that the training script gets; the file is written, unless it is not to be.

    Raises:
        CptainError: see `cptain.data.stages.stages`.
    """
    if run.train.script is not None:
        file = run.folder / "data-args.txt"
        lines = [f"{weight:.12g} {shlex.quote(prefix)}\n" for weight, prefix in _files(run, records)]
        if write:
            atomic.write_text(file, "".join(lines))
        return "--data-args-path", str(file)
    content: dict[str, Any] = {"files": _files(run, records), "documents": run.data.documents}
    if not isinstance(run.data.mix, str):
        found = parts_to_train(run, records)
        content["parts"] = [
            {
                "name": part.name,
                "order": identity(part, run.data.split),
                "files": [str(run.data_folder / one.prefix) for one in part.records],
            }
            for part, _ in found
        ]
    if run.data.stage:
        content["stages"] = [
            {
                "sequences": run.train.sequences(plan.end) - run.train.sequences(plan.begin),
                "weights": plan.shares,
            }
            for plan in stages(run, found, steps)
        ]
    file = run.folder / "blend.json"
    if write:
        atomic.write_json(file, content)
    return "--blend", str(file)


def _files(run: RunFile, records: list[Record]) -> list[tuple[float, str]]:
    """Weight and prefix of every file; with stages, whose weights change, by tokens."""
    weighted = blend("tokens" if run.data.stage else run.data.mix, records)
    return [(float(f"{weight:.12g}"), str(run.data_folder / record.prefix)) for weight, record in weighted]
