"""data.documents = "masked" on GPUs: that no document changes another, and the speed beside "joined".

    python bench/documents.py --out DIR

Whether they change one another: eight documents of equal length, shuffled, in sequences of eight, in bf16 with
Transformer Engine, through `cptain train`. Each comes to each place of a micro batch again and again between other
ones, and its logits must be the same there bit for bit; joined ones differ everywhere but at the beginning of a
sequence. That positions begin anew shows in the losses of a document at different places. With two GPUs also data,
tensor, pipeline and context parallel 2, whose losses must be those of one GPU but for rounding. --peer adds other trees
of Megatron-LM.

Speed: the rows of bench/train.py on one GPU, 8B's width, 4 layers, 8192 tokens, micro batch 1. Documents have
log-normal lengths, of median 400 and mean 820 tokens, as web text has. --cpu tries all of it out on a tiny shape.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cptain.data.indexed_dataset import EncodedDocuments, IndexedDatasetWriter
from inputs import CPTAIN, INSTALLED, environment, make_run
from train import GLOBAL_BATCH, VARIANTS, Bench, machine, table

LAYOUTS = {
    "one GPU": "name=one",
    "DP 2": "name=dp",
    "TP 2": "parallel.tensor=2",
    "PP 2": "parallel.pipeline=2",
    "CP 2": "parallel.context=2",
}
DOCUMENTS = 8
ROUNDING = 0.05  # of a loss, by bf16 logits
MEDIAN, SIGMA = 400, 1.2
# In the place of a sitecustomize: a rank that has logits keeps a line for each document of a training micro batch.
RECORDER = """
import importlib.util, os

if "RANK" in os.environ and importlib.util.find_spec("torch"):
    import hashlib, json
    import torch
    from cptain.megatron import cross_entropy

    loss, length = cross_entropy.language_model_loss, int(os.environ["LENGTH"])

    def digest(tensor):
        return hashlib.sha256(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()

    def measured(labels, logits, z_loss):
        if not logits.requires_grad:
            return loss(labels, logits, z_loss)
        rows = logits.detach().transpose(0, 1).flatten(0, 1)
        hashes = [digest(block) for block in rows.split(length)]
        losses = loss(labels, logits, z_loss)
        blocks = zip(labels.flatten().split(length), hashes, losses.detach().flatten().split(length))
        with open(f"{os.environ['RECORD']}/{os.environ['RANK']}", "a") as out:
            for place, (of, logits_hash, of_losses) in enumerate(blocks):
                print(json.dumps([of[:-1].tolist(), place, logits_hash, of_losses[:-1].tolist()]), file=out)
        return losses

    cross_entropy.language_model_loss = measured
"""


def write_pair(prefix: Path, lengths: Any, highest: int) -> None:
    """Documents of random ids, as a .bin/.idx pair."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedDatasetWriter(prefix.with_suffix(".bin"), np.uint16)
    ids = np.random.default_rng(0).integers(5, highest, int(lengths.sum())).astype(np.uint16)
    writer.add(EncodedDocuments(ids, lengths.astype(np.int32), np.ones(len(lengths), dtype=np.int64)))
    writer.write_index(prefix.with_suffix(".idx"))


class Changes:
    """Whether documents change one another.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = options.out.resolve() / "changes"
        self.length = 16 if options.cpu else 256
        self.trees: dict[str, str] = dict(peer.split("=", 1) for peer in options.peer)
        self.losses: dict[tuple[int, ...], list[float]] = {}

    def make_inputs(self) -> None:
        """Model, data and converted checkpoint, and the recorder."""
        pair = self.folder.parent / "equal"
        write_pair(pair, np.full(DOCUMENTS, self.length), 4000)
        train = {
            "seq_length": DOCUMENTS * self.length,
            "micro_batch_size": 2,
            "global_batch_size": 64,
            "steps": 1,
            "lr": 1e-4,
            "warmup_steps": 0,
            "precision": "fp32" if self.options.cpu else "bf16",
            "recompute": "none",
        }
        shape = "tiny" if self.options.cpu else "small"
        self.file = make_run(self.folder, shape, layers=4, megabytes=0, train=train, pair=pair)
        (self.folder / "site").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(RECORDER)

    def measure(self, tree: str, layout: str, documents: str) -> dict[str, Any]:
        """Train a step, and compare what was recorded."""
        row = {"megatron": tree, "layout": layout, "documents": documents}
        name = "-".join(row.values()).replace(" ", "")
        record, processes = self.folder / f"record-{name}", 1 if layout == "one GPU" else 2
        record.mkdir()
        found = environment(self.trees.get(tree), "" if self.options.cpu else ",".join(map(str, range(processes))))
        found["PYTHONPATH"] = f"{self.folder / 'site'}{os.pathsep}{found['PYTHONPATH']}"
        command = [*CPTAIN, "train", str(self.file), "--nproc-per-node", str(processes)]
        command += ["--cpu"] if self.options.cpu else []
        for setting in (LAYOUTS[layout], f"name={name}", f"data.documents={documents}"):
            command += ["--set", setting]
        found |= {"RECORD": str(record), "LENGTH": str(self.length // (2 if layout == "CP 2" else 1))}
        done = subprocess.run(command, env=found, capture_output=True, text=True, timeout=self.options.timeout)
        if done.returncode:
            return {**row, "error": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300]}
        return {**row, **self.compared(record)}

    def compared(self, record: Path) -> dict[str, Any]:
        """Of the ranks that have logits: with tensor parallel 2 a half of each and the same losses, with context
        parallel 2 two pieces of each document. A token's loss is found again by its and the two labels before it."""
        alike: dict[tuple[str, tuple[int, ...], int], list[str]] = defaultdict(list)
        losses: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for file in sorted(record.iterdir()):
            for line in file.read_text().splitlines():
                labels, place, logits, of_losses = json.loads(line)
                alike[file.name, tuple(labels), place].append(logits)
                for token in range(2, len(labels)):
                    losses[tuple(labels[token - 2 : token + 1])].append(of_losses[token])
        differ = sorted({place % DOCUMENTS for (_, _, place), hashes in alike.items() if len(set(hashes)) > 1})
        self.losses = self.losses or losses  # the first: masked, on one GPU
        both = losses.keys() & self.losses.keys()
        return {
            "documents_seen": sum(map(len, alike.values())),
            "compared": sum(len(hashes) - 1 for hashes in alike.values()),
            "places_that_differ": differ,
            "losses_of_a_token_differ_by": max(max(one) - min(one) for one in losses.values()),
            "tokens_of_one_gpu": len(both) / len(self.losses),
            "losses_differ_from_one_gpu_by": max(abs(losses[one][0] - self.losses[one][0]) for one in both),
        }

    def is_right(self, result: dict[str, Any]) -> bool:
        """Masked documents differ nowhere, and have the losses of one GPU; joined ones differ everywhere but at the
        beginning of a sequence."""
        if "error" in result or result["compared"] < 200:
            return False
        if result["documents"] == "joined":
            return bool(result["places_that_differ"] == list(range(1, DOCUMENTS)))
        same = result["losses_differ_from_one_gpu_by"] < ROUNDING and result["tokens_of_one_gpu"] > 0.9
        return bool(same and not result["places_that_differ"])


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of bench/train.py."""
    folder = options.out.resolve() / "speed"
    made = argparse.Namespace(**vars(options), folder=folder, lr=1e-5)
    bench, tokens = Bench(made), GLOBAL_BATCH * options.seq * options.steps * 2
    count = math.ceil(tokens / (MEDIAN * math.exp(SIGMA**2 / 2)))
    lengths = np.random.default_rng(0).lognormal(math.log(MEDIAN), SIGMA, count).clip(2, 50_000).astype(np.int32)
    write_pair(folder.parent / "web", lengths, 4000)
    train = {
        "seq_length": options.seq,
        "global_batch_size": GLOBAL_BATCH,
        "steps": options.steps,
        "lr": made.lr,
        "precision": "bf16",
        "recompute": "none",
        "save_interval": options.steps,
        "eval_interval": options.steps,
    }
    pair = folder.parent / "web"
    bench.file = make_run(folder, "tiny" if options.cpu else "8b", options.layers, 0, train, pair)
    VARIANTS.update({"joined": [], "masked": ['data.documents="masked"']})
    results = []
    for tree in (INSTALLED, *bench.trees):
        for variant in ("joined", "masked", "joined", "masked"):  # twice: how far do two of the same differ?
            row = f"{variant}@{tree}"
            results.append(bench.measure(row, "" if options.cpu else options.gpu))
            print(json.dumps({key: value for key, value in results[-1].items() if key != "losses"}), flush=True)
    return results


def main() -> None:
    """Measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="begun anew below it: changes, speed")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=TREE", help="a tree of Megatron-LM")
    parser.add_argument("--only", choices=["changes", "speed"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="of one training")
    parser.add_argument("--gpu", default="0", help="for the speed")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    gpus = 2 if options.cpu else torch.cuda.device_count()
    if not gpus:
        sys.exit("documents: no GPU found; --cpu tries it out without one")
    found: dict[str, Any] = machine(options.cpu)
    wrong = []
    if options.only != "speed":
        changes = Changes(options)
        changes.make_inputs()
        found["changes"] = []
        layouts = [one for one in LAYOUTS if gpus > 1 and not (options.cpu and one == "CP 2")] or ["one GPU"]
        for tree in (INSTALLED, *changes.trees):
            for layout in layouts:
                for documents in ("masked", "joined") if layout == "one GPU" else ("masked",):
                    result = changes.measure(tree, layout, documents)
                    found["changes"].append(result)
                    wrong += [] if changes.is_right(result) else [f"{tree}, {layout}, {documents}"]
                    print(json.dumps(result), flush=True)
    if options.only != "changes":
        found["speed"] = speed(options)
        wrong += [row["row"] for row in found["speed"] if "error" in row]
        print(table(found["speed"]))
    (options.out / "documents.json").write_text(json.dumps(found, indent=1))
    if wrong:
        sys.exit(f"documents: not as it should be: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
