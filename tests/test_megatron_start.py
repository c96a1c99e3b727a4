"""What a rank does without at its start and its first save: seconds of every training, and no number of it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import PROJECT, in_megatron

PRETRAIN = PROJECT / "apps" / "cptain" / "training" / "pretrain.py"
BEGIN = "from cptain.megatron.importing import before_import, import_megatron\nbefore_import(cpu=True)\n"

STEPS = """
import torch
weight = torch.nn.Parameter(torch.ones(2))
for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
    optimizer = kind([weight], lr=0.1)
    optimizer.zero_grad()
    (weight * weight).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
stepped = [weight.tolist(), weight.requires_grad]
"""

BESIDE_MEGATRON = f"""
import sys
at_start = [hasattr(sys.modules["wandb"], "init"), "torch._dynamo" in sys.modules]
{STEPS}
without = "torch._dynamo" not in sys.modules
import torch._dynamo  # as torch.utils.checkpoint does
rules = len(torch._dynamo.trace_rules.get_torch_obj_rule_map())
found = [at_start, stepped, without, rules > 1000, torch._dynamo.disable(lambda: 1)()]
"""

IN_A_SAVE = """
import multiprocessing
import sys
from cptain.megatron import saving
from megatron.core.dist_checkpointing.strategies import filesystem_async as writer
sys.argv = ["pretrain.py"] + WORDS
saving.install()
queue = getattr(writer, "get_write_results_queue", getattr(writer, "_get_write_results_queue", None))()
queue.put([1, "what was written"])
found = [queue.get_nowait(), len(multiprocessing.active_children())]
"""


COLLECTS = """
import gc, runpy, sys
import megatron.training

megatron.training.pretrain = lambda *given: print(gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)
runpy.run_path(sys.argv[0], run_name=NAME)
print(gc.isenabled(), gc.get_freeze_count())
"""


def test_neither_wandb_nor_torch_s_compiler_is_imported_and_optimizers_step_as_they_do_elsewhere() -> None:
    here: dict[str, Any] = {}
    exec(STEPS, here)
    assert in_megatron(BESIDE_MEGATRON) == [[False, False], here["stepped"], True, True, 1]


def test_what_a_save_wrote_needs_no_other_process_unless_it_is_async() -> None:
    for words, processes in (["--save", "x"], 0), (["--async-save"], 1):
        assert in_megatron(IN_A_SAVE.replace("WORDS", str(words))) == [[1, "what was written"], processes]


def test_garbage_is_collected_once_all_is_imported_and_in_spawned_children_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "blend.json").write_text('{"files": [], "documents": "joined"}')
    words = [
        "--cpu",
        "--blend",
        tmp_path / "blend.json",
        "--max-loss-spike=2",
        "--step-timeout=60",
        "--megatron-args=0",
    ]
    for name, said in ("__main__", "True True"), ("__mp_main__", "True 0"):
        script = f"import sys\nsys.argv[0] = {str(PRETRAIN)!r}\n{BEGIN}{COLLECTS.replace('NAME', repr(name))}"
        done = subprocess.run([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.splitlines()[-1] == said
