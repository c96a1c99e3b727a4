"""mbridge and mcore-bridge on the CPU, for `bench/checkpoint.py`: a Hugging Face model to Megatron's format and back.

Both load a Hugging Face model into a Megatron model in memory and write Hugging Face weights from one; the checkpoint
between is written and read by megatron.core's dist_checkpointing, as their users do. A peer's own Python runs this with
PEER CALL MODEL CHECKPOINT EXPORTED, CALL being `there` or `back`.

Both insist on Transformer Engine. Here Megatron's own layers have the names and the parameters of Transformer Engine's,
so that a checkpoint has the same keys; nothing is ever computed with them. Weights are not initialized at random, which
would take longer than the rest on a CPU and no time on a GPU.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import torch
from cptain.megatron.cpu import CudaToCpu
from cptain.megatron.importing import before_import, import_megatron

ENGINE = "transformer_engine"
# Where megatron.core derives its layers from it: the second, an older place, takes all names of the first.
DERIVED = (f"megatron.core.extensions.{ENGINE}", f"megatron.core.transformer.custom_layers.{ENGINE}")


class Empty(types.ModuleType):
    """A module in which every name is an empty torch module's class."""

    __version__ = "2.9.0"
    HAVE_TE = True

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (torch.nn.Module,), {})
        setattr(self, name, made)
        return made


class EngineFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds Transformer Engine and all its modules, and megatron.core's modules that derive layers from it."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] == ENGINE or name in DERIVED:
            return importlib.machinery.ModuleSpec(name, self, is_package=name not in DERIVED)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ in DERIVED:
            add_layers(module)


def add_layers(module: Any) -> None:
    """Megatron's own layers, under the names of those of Transformer Engine that a dense model has."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class NormAndColumn(ColumnParallelLinear):  # type: ignore[misc]
        def __init__(self, input_size: int, *args: Any, config: Any, **named: Any) -> None:
            super().__init__(input_size, *args, config=config, **named)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    class Attention(DotProductAttention):  # type: ignore[misc]
        def __init__(self, *args: Any, k_channels: object = None, v_channels: object = None, **named: Any) -> None:
            super().__init__(*args, **named)

    class Norm:
        def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **named: Any) -> Any:
            return torch.nn.RMSNorm(hidden_size, eps=eps, dtype=config.params_dtype)

    module.TEColumnParallelLinear, module.TERowParallelLinear = ColumnParallelLinear, RowParallelLinear
    module.TELayerNormColumnParallelLinear, module.TEDotProductAttention = NormAndColumn, Attention
    module.TENorm, module.get_cpu_offload_context = Norm, lambda *args, **named: (contextlib.nullcontext(), None)


def start() -> None:
    """Import Megatron with what stands in for CUDA and Transformer Engine, as one process of one."""
    before_import(cpu=True)
    for name in [name for name in sys.modules if name.split(".")[0] == ENGINE]:
        del sys.modules[name]  # `before_import` keeps it out
    sys.meta_path.insert(0, EngineFinder())
    import_megatron(cpu=True)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)


def mbridge(model: str) -> tuple[Any, Any]:
    """mbridge's bridge and its models."""
    from mbridge import AutoBridge

    bridge = AutoBridge.from_pretrained(model)
    bridge.set_extra_args(perform_initialization=False)
    bridge.safetensor_io = bridge._get_safetensor_io(model)  # `save_weights` takes the names of files from the model
    return bridge, bridge.get_model()


def mcore_bridge(model: str) -> tuple[Any, Any]:
    """mcore-bridge's bridge and its models."""
    from mcore_bridge import ModelConfig, get_mcore_model, hf_to_mcore_config
    from transformers import AutoConfig

    config = ModelConfig(params_dtype=torch.bfloat16, **hf_to_mcore_config(AutoConfig.from_pretrained(model)))
    return config.bridge, get_mcore_model(config)


def main() -> None:
    """Convert."""
    peer, call, model, checkpoint, exported = sys.argv[1:]
    start()
    with CudaToCpu(), torch.no_grad():
        bridge, models = {"mbridge": mbridge, "mcore-bridge": mcore_bridge}[peer](model)
        from megatron.core import dist_checkpointing
        from transformers import AutoConfig

        if call == "there":
            bridge.load_weights(models, model)
            Path(checkpoint).mkdir(parents=True)
            dist_checkpointing.save(models[0].sharded_state_dict(), checkpoint)
        else:
            models[0].load_state_dict(dist_checkpointing.load(models[0].sharded_state_dict(), checkpoint))
            bridge.save_weights(models, exported)
            if not Path(exported, "config.json").exists():  # mcore-bridge's users write it
                AutoConfig.from_pretrained(model).save_pretrained(exported)


if __name__ == "__main__":
    main()
