"""The command: a Hugging Face model continues a text, by transformers: a look at whether it still speaks."""

import os
import sys
import time
from pathlib import Path

from cptain.data.hf_tokenizer import load_tokenizer
from cptain.errors import CptainError, bad_usage, one_line
from cptain.progress import human


def generate(folder: Path, text: str, tokens: int, temperature: float, seed: int) -> str:
    """A text and what a model continues it with.

    Args:
        folder: of a Hugging Face model with its tokenizer, such as an export.
        text: its beginning; "" stands for the token that begins a document.
        tokens: at most so many are added; fewer where the model ends the document.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.

    Raises:
        CptainError: no such model, nothing to begin with, or transformers cannot load or run it.
    """
    if not (folder / "config.json").is_file():
        bad_usage(
            f"generate: {folder}: no config.json: give the folder of a Hugging Face model, such as <run>/hf/iter_…"
        )
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ["HF_HUB_OFFLINE"] = "1"  # all is in the folder
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # which keeps its carriage returns in a log
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = load_tokenizer(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
        ids = tokenizer(text)["input_ids"] or [token for token in (tokenizer.bos_token_id,) if token is not None]
        if not ids:
            bad_usage("generate: the tokenizer has no token that begins a document: give some text")
        torch.manual_seed(seed)
        sampled = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        began = time.monotonic()
        prompt = torch.tensor([ids], device=device)
        with torch.inference_mode():
            given = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, pad_token_id=ids[0], **sampled
            )
    except CptainError:
        raise
    except Exception as error:
        raise CptainError(f"generate: {folder}: transformers cannot run it: {one_line(error)}") from error
    added = given.shape[1] - len(ids)
    seconds = time.monotonic() - began
    print(f"generate: {added} tokens, {human(round(added / seconds))} a second on {device}", file=sys.stderr)
    return str(tokenizer.decode(given[0], skip_special_tokens=True))
