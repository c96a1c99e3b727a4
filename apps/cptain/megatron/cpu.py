"""Answers for CUDA on the CPU, so that Megatron's own training loop runs where there is no GPU.

Megatron asks CUDA for devices, streams, events and random states on nearly every path. Here the calls it makes are
answered by the CPU: `install` replaces the functions of torch.cuda, and `CudaToCpu`, a TorchFunctionMode, rewrites
device arguments. The arithmetic is real; nothing here is for speed. Call `install` before the first import of Megatron,
in a process that does nothing else.

It must hold under a CUDA build of torch and beside Transformer Engine as well, with a GPU or without: those answer the
questions that are not replaced from their C++, which ends in an error about a missing driver or a tensor of the CPU.
"""

import collections
import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cptain.megatron.importing import leave_out_gpu_kernels

_TRITON_KERNELS = "megatron.core.transformer.moe.ops.paged_stash"


def _is_cuda(device: object) -> bool:
    if isinstance(device, (str, torch.device)):
        return str(device).startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


class CudaToCpu(TorchFunctionMode):  # type: ignore[misc]
    """Turns every request for a CUDA device, or for pinned memory, into one for the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to:
            args = tuple("cpu" if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)  # Megatron compares type names
        if func is torch.Tensor.is_cuda.__get__:
            return True
        return func(*args, **kwargs)


class _Stream:
    """A stream, or an event, that has always finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *args: Any) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or _Stream()


def _giving(value: Any) -> Callable[..., Any]:
    """A function of its own: torch._dynamo makes a table of torch.cuda's, and takes the same one only once."""
    return lambda *args, **kwargs: value


def _as_numbers(tensor: Any, as_numpy: bool = False, **kwargs: Any) -> Any:
    """Numbers of tokens as collectives take them."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda_answers() -> dict[str, Any]:
    """What stands in for torch.cuda, by name."""
    properties = types.SimpleNamespace(
        major=0, minor=0, multi_processor_count=1, total_memory=_memory(), name="CPU", uuid="cpu"
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "current_device": lambda: "cpu",
        "get_device_properties": lambda *args: properties,
        "get_device_capability": lambda *args: (0, 0),
        "get_device_name": lambda *args: "CPU",
        "get_rng_state": _random_state,
        "memory_stats": lambda *args, **kwargs: collections.defaultdict(int),
        "mem_get_info": lambda *args: (_memory(), _memory()),
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "nvtx": types.SimpleNamespace(
            range_push=_giving(None), range_pop=_giving(None), range=lambda *args, **kwargs: contextlib.nullcontext()
        ),
    }
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        answers[name] = _giving(0)
    for name in (
        "_lazy_init",
        "empty_cache",
        "manual_seed",
        "manual_seed_all",
        "reset_peak_memory_stats",
        "seed",
        "set_device",
        "set_rng_state",
        "set_stream",
        "synchronize",
    ):
        answers[name] = _giving(None)
    for kind in (
        "FloatTensor",
        "DoubleTensor",
        "IntTensor",
        "LongTensor",
        "ByteTensor",
        "BFloat16Tensor",
        "HalfTensor",
    ):
        answers[kind] = getattr(torch, kind)
    return answers


def _without_dynamo() -> None:
    """Let optimizers do without torch._dynamo, which they import (1.4 s) to tell it what not to compile: here nothing
    is compiled. What is wrapped for it is unwrapped; the wrapper of a step has turned gradients off as well."""
    for kind in (torch.optim.Optimizer, *torch.optim.Optimizer.__subclasses__()):
        for name, method in list(vars(kind).items()):
            if "torch._dynamo" in getattr(getattr(method, "__code__", None), "co_names", ()):
                plain = method.__wrapped__
                setattr(kind, name, torch.no_grad()(plain) if name == "step" else plain)


def install() -> None:
    """Replace what Megatron calls of torch.cuda, and keep from it what has kernels for GPUs alone."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    leave_out_gpu_kernels()
    # Optimizers of torch 2.13 and 2.14 (not of 2.11) ask the accelerator that torch was built for whether it records
    # a graph, once torch.cuda says that it is there: without a driver that is an error.
    torch.accelerator.current_accelerator = lambda check_available=False: None
    for name, answer in _cuda_answers().items():
        setattr(torch.cuda, name, answer)
    _without_dynamo()
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self

    torch.compile = lambda function=None, **kwargs: function if callable(function) else lambda inner: inner
    if not hasattr(torch._C, "_cuda_attach_out_of_memory_observer"):
        torch._C._cuda_attach_out_of_memory_observer = _giving(None)
    if importlib.util.find_spec("triton") is None:
        # From 0.19 on, Megatron's GPT imports these mixture-of-experts kernels, which a dense model never calls, with
        # no guard.
        kernels = types.ModuleType(_TRITON_KERNELS)
        setattr(kernels, "__getattr__", lambda name: None)  # noqa: B010 a module's own, which a type checker denies
        sys.modules[_TRITON_KERNELS] = kernels
    init_process_group = torch.distributed.init_process_group

    def without_device(*args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        init_process_group(*args, **kwargs)

    torch.distributed.init_process_group = without_device


def _packed_attention(forward: Any) -> Any:
    """The attention of Megatron's own layers, which refuse packed sequences: these one after another, each causal."""

    def attend(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **named: Any
    ) -> Any:
        if packed_seq_params is None:
            return forward(self, query, key, value, *args, **named)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        documents = zip(*(one.transpose(0, 1).split(lengths, dim=1) for one in (query, key, value)), strict=True)
        attended = [
            torch.nn.functional.scaled_dot_product_attention(
                *one, is_causal=True, scale=self.softmax_scale, enable_gqa=True
            )
            for one in documents
        ]
        return torch.cat(attended, dim=1).transpose(0, 1).flatten(1)

    return attend


def install_in_megatron() -> None:
    """Replace Megatron's CUDA random state tracker, which has no meaning here: nothing on this path drops out; and how
    the numbers of tokens that go to each expert come from the GPU."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import dot_product_attention
    from megatron.core.transformer.moe import token_dispatcher

    random.CudaRNGStatesTracker.fork = lambda self, *args, **kwargs: contextlib.nullcontext()
    random.CudaRNGStatesTracker.add = lambda self, name, seed: self.states_.__setitem__(name, torch.get_rng_state())
    random._set_cuda_rng_state = _giving(None)
    random._get_cuda_rng_state = _random_state
    attention = dot_product_attention.DotProductAttention
    attention.forward = _packed_attention(attention.forward)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numbers
    with contextlib.suppress(ImportError):  # up to 0.16: fused kernels that are compiled with nvcc
        from megatron.legacy import fused_kernels

        fused_kernels.load = _giving(None)
