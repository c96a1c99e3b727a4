"""For how many code points a fast library gives other ids than Hugging Face's, for each family of tokenizers.

    make bench BENCH='code_points [FOLDER ...]'

Every code point but the surrogates (1,112,064) is tried as `preprocess` tries them where a tokenizer normalizes by
Unicode's tables: between letters, before two combining marks, and before a voiced sound mark. The families are those of
the tests, trained on the demo's text, with NFC as Qwen has it too; Llama 3's own where llama-models of PyPI is
installed; and the tokenizers of the folders that are named.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tokenizing
from cptain.data.agreement import unlike
from cptain.data.tokenizer import Tokenizer, _split_by

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runs"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from demo import python_help
from test_ids import FAMILIES, trained

NFC = "byte-level BPE with NFC"


def families(folder: Path) -> dict[str, Path]:
    """A tokenizer of each family, by the family."""
    texts = [*python_help(), *(f"第{number}章。吾輩は猫である。令和元年。" * 5 for number in range(200))]
    made = {family: trained(family, folder / family.replace(" ", "-"), texts) for family in FAMILIES}
    made[NFC] = trained(FAMILIES[0], folder / "nfc", texts)
    file = made[NFC] / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "NFC"}}))
    if importlib.util.find_spec("llama_models"):
        made["Llama 3"] = tokenizing.tokenizer(folder / "llama3")
    return made


def main() -> None:
    """Try all, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a tokenizer of Hugging Face's format")
    arguments = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("fastokens", "splintr-rs", "tokenizers"))
    print(f"{packages}\n\n| tokenizer | encoded by | code points that differ | the first | s |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, place in {**families(Path(folder)), **{str(one): one for one in arguments.folders}}.items():
            tokenizer, began = Tokenizer(str(place)), time.monotonic()
            library, _, _ = tokenizer.backend.partition(" (")
            if tokenizer._fast is None:
                found = "none is fast |"
            else:
                differ = sorted(unlike(partial(_split_by, tokenizer._fast), tokenizer.exact, None))
                found = f"{len(differ):,} | {' '.join(f'U+{ord(one):04X}' for one in differ[:4])}"
            print(f"| {name} | {library} | {found} | {time.monotonic() - began:.0f} |", flush=True)


if __name__ == "__main__":
    main()
