"""Real forward passes of both sides on the same tokens, in fp32: transformers' model and megatron.core's GPTModel.

Each side runs in a process of its own: the CPU's answers for CUDA, which Megatron needs where there is no GPU, must not
reach transformers, and memory goes back when a side is done. On a GPU both compute as on the CPU, in whole fp32 with
torch's own operations: TF32 keeps 10 bits of a factor, which would hide what the comparison is for.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cptain.errors import CptainError, one_line
from cptain.model.architecture import Architecture
from cptain.model.arguments import core_arguments
from cptain.model.sizes import parameters

PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it does so again: 0123456789.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "E = mc², π ≈ 3.14159, «naïve café» – ½ ÷ ∞ 🙂",
)
_LONGEST = 128  # tokens of a prompt
_ROOM = 1.25  # of a GPU's memory to the weights: activations of one prompt, the CUDA context

Logits = list[npt.NDArray[np.float32]]


def prompt_tokens(folder: Path, vocab_size: int) -> list[list[int]]:
    """The fixed prompts as the tokenizer in `folder` encodes them; fixed random ids where there is none."""
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        from cptain.data.tokenizer import Tokenizer

        return [ids[:_LONGEST] for ids in Tokenizer(str(folder), backend="hf").exact(list(PROMPTS))]
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, 64).tolist() for _ in PROMPTS]


def _device(architecture: Architecture) -> str:
    """Where a side computes: on the GPU if there is one with room for the weights in fp32, else on the CPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > _ROOM * 4 * parameters(architecture):
        return "cuda"
    return "cpu"


def _transformers(folder: str, device: str, prompts: list[list[int]]) -> Logits:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # which keeps its carriage returns in a log
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    with torch.no_grad():
        return [model(torch.tensor([ids], device=device)).logits[0].cpu().numpy() for ids in prompts]


def _megatron(folder: str, architecture: Architecture, device: str, prompts: list[list[int]]) -> Logits:
    from cptain.megatron.importing import before_import, import_megatron, leave_out_gpu_kernels

    leave_out_gpu_kernels()
    before_import(cpu=device == "cpu")
    import torch

    import_megatron(cpu=device == "cpu")
    with contextlib.ExitStack() as answers, torch.no_grad():
        if device == "cpu":
            from cptain.megatron.cpu import CudaToCpu

            answers.enter_context(CudaToCpu())
        model = _gpt_model(architecture, device)
        from megatron.core import dist_checkpointing, parallel_state

        state: dict[str, Any] = {"model": model.sharded_state_dict(metadata={})}
        model.load_state_dict(dist_checkpointing.load(state, folder)["model"])
        results = []
        for ids in prompts:
            tokens = torch.tensor([ids], device=device)
            positions = torch.arange(len(ids), device=device)[None]
            mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool, device=device).triu(1)
            logits = model(tokens, positions, mask)[0, :, : architecture.vocab_size]
            results.append(logits.float().cpu().numpy())
        parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return results


def _gpt_model(architecture: Architecture, device: str) -> Any:
    """megatron.core's model of one process, in fp32, without weights."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from cptain.megatron.layers import gpt_layer

    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config, gpt = core_arguments(architecture)
    model = GPTModel(
        config=TransformerConfig(
            **config,
            activation_func=torch.nn.functional.silu,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            use_cpu_initialization=device == "cpu",
            perform_initialization=False,
        ),
        transformer_layer_spec=gpt_layer(
            False, qk_layernorm=architecture.qk_layernorm, num_experts=config.get("num_moe_experts")
        ),
        parallel_output=False,
        **gpt,
    )
    return model.eval().to(device)


def _run(connection: Any, function: Callable[..., Logits], arguments: tuple[Any, ...]) -> None:
    """In the process of one side: send its logits, or why there are none. What libraries print is dropped."""
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # NGC's images turn TF32 on, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        connection.send(function(*arguments))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {one_line(error)}")


def _in_process(side: str, function: Callable[..., Logits], *arguments: Any) -> Logits:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    process = context.Process(target=_run, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        result: Logits | str = ours.recv()
        process.join()
    except EOFError:
        result = "its process died (out of memory?)"
    finally:
        process.terminate()
        process.join()
    if isinstance(result, str):
        raise CptainError(f"--logits: {side}: {result}")
    return result


def hf_logits(folder: Path, architecture: Architecture, prompts: list[list[int]]) -> Logits:
    """Logits [tokens, vocabulary] of each prompt by transformers' model in `folder`.

    Raises:
        CptainError: the model cannot be loaded or run.
    """
    return _in_process(str(folder), _transformers, str(folder), _device(architecture), prompts)


def megatron_logits(folder: Path, architecture: Architecture, prompts: list[list[int]]) -> Logits:
    """Logits [tokens, vocabulary] of each prompt by megatron.core's GPTModel, which loads the torch_dist checkpoint
    itself.

    Raises:
        CptainError: Megatron is not installed, or cannot load or run the checkpoint.
    """
    return _in_process(str(folder), _megatron, str(folder), architecture, _device(architecture), prompts)
