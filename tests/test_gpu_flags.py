"""The flags of a training on GPUs that depend on the Megatron, the libraries and the checkpoint at hand."""

import json
import sys
from pathlib import Path

import pytest
from conftest import RunFileMaker, cptain
from cptain.megatron import weight_gradient
from cptain.run_file import load_run

RESHARDABLE = "--dist-ckpt-optim-fully-reshardable"
FUSION = "--cross-entropy-loss-fusion"
NO_GRADIENT_FUSION = "--no-gradient-accumulation-fusion"


def flags(file: Path, *options: str) -> list[str]:
    result = cptain("train", file, "--dry-run", *options)
    assert result.exit_code == 0, result.output
    return [line.strip().removesuffix(" \\") for line in result.stdout.splitlines()[1:]]


@pytest.fixture
def transformer_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and version, which is all that is asked for before training."""
    record = tmp_path / "site" / "transformer_engine-2.12.0.dist-info" / "METADATA"
    record.parent.mkdir(parents=True)
    record.write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.12.0+abc\n")
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_the_optimizer_is_saved_for_any_layout_by_the_megatron_that_the_script_imports(
    make_ready_run: RunFileMaker, tmp_path: Path
) -> None:
    assert RESHARDABLE in flags(make_ready_run())  # PyPI's 0.19
    core = tmp_path / "Megatron-LM" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 13\nPATCH = 1\nPRE_RELEASE = ''\n")
    (tmp_path / "Megatron-LM" / "pretrain_gpt.py").touch()
    assert RESHARDABLE not in flags(make_ready_run(train__script="Megatron-LM/pretrain_gpt.py"))


def test_layers_are_recomputed_by_number_and_a_micro_batch_is_chosen(make_ready_run: RunFileMaker) -> None:
    file = make_ready_run(train__recompute=1, train__micro_batch_size="auto")
    given = flags(file)
    assert "--recompute-granularity full" in given
    assert "--recompute-method block" in given
    assert "--recompute-num-layers 1" in given
    assert "--micro-batch-size 8" in given
    shown = cptain("train", file, "--dry-run").stderr
    assert 'train.micro_batch_size = "auto": 8, which is all that a copy of the model has of a global batch' in shown
    assert "--recompute-method uniform" in flags(make_ready_run(train__recompute="full"))


def test_an_fp8_recipe_is_a_key_of_its_own(make_ready_run: RunFileMaker) -> None:
    assert "--fp8-recipe tensorwise" in flags(make_ready_run(train__precision="fp8"))
    delayed = flags(make_ready_run(train__precision="fp8", train__fp8_recipe="delayed"))
    assert {"--fp8-recipe delayed", "--fp8-amax-history-len 1024", "--fp8-amax-compute-algo max"} <= set(delayed)
    refused = cptain("train", make_ready_run(train__precision="bf16", train__fp8_recipe="delayed"), "--dry-run")
    assert refused.exit_code == 2
    assert 'fp8_recipe = "delayed": precision = "bf16" does not read it' in refused.output


def test_stages_that_layers_divide_are_left_to_megatron(make_ready_run: RunFileMaker) -> None:
    assert not [flag for flag in flags(make_ready_run(parallel__pipeline=2)) if "pipeline-num-layers" in flag]


def test_random_states_are_left_only_where_the_layout_changed(make_ready_run: RunFileMaker, trained_run: Path) -> None:
    file = make_ready_run(train__steps=12)
    load_run(file).folder.mkdir(parents=True)
    load_run(file).checkpoints_folder.symlink_to(load_run(trained_run).checkpoints_folder)
    assert "--no-load-rng" not in flags(file)
    for layout in ("parallel.tensor=2", "parallel.pipeline=2"):
        assert "--no-load-rng" in flags(file, "--set", layout)


def test_megatrons_loss_is_fused_for_a_script_of_the_users_own_but_in_fp32_as_it_computes_in_bf16(
    make_ready_run: RunFileMaker, tmp_path: Path
) -> None:
    core = tmp_path / "Megatron-LM" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 13\nPATCH = 1\nPRE_RELEASE = ''\n")
    (tmp_path / "Megatron-LM" / "pretrain_gpt.py").touch()
    script = "Megatron-LM/pretrain_gpt.py"
    assert FUSION in flags(make_ready_run(train__precision="bf16", train__script=script))
    assert FUSION not in flags(make_ready_run(train__precision="fp32", train__script=script))
    assert FUSION not in flags(make_ready_run(train__precision="bf16"))


@pytest.mark.usefixtures("transformer_engine")
def test_weight_gradients_are_fused_by_transformer_engine_where_apex_is_missing(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert NO_GRADIENT_FUSION not in flags(make_ready_run())
    (tmp_path / "pretrain_gpt.py").touch()
    assert NO_GRADIENT_FUSION in flags(make_ready_run(train__script="pretrain_gpt.py"))
    monkeypatch.setitem(sys.modules, "fused_weight_gradient_mlp_cuda", None)  # and gone afterwards
    weight_gradient.install()
    import fused_weight_gradient_mlp_cuda

    assert fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32 is weight_gradient.wgrad_gemm_accum_fp32


def test_without_both_weight_gradients_are_not_fused(make_ready_run: RunFileMaker) -> None:
    assert NO_GRADIENT_FUSION in flags(make_ready_run())


def test_a_deterministic_run_has_the_flag_and_the_variables_that_it_wants(
    make_ready_run: RunFileMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")  # Megatron ends where it finds this one
    script = tmp_path / "say.py"
    script.write_text("import json, os, sys\njson.dump([sys.argv, dict(os.environ)], open(sys.path[0] + '/said', 'w'))")
    for deterministic in (False, True):
        file = make_ready_run(train__script=str(script), train__deterministic=deterministic)
        cptain("train", file, "--cpu")
        arguments, environment = json.loads((tmp_path / "said").read_text())
        assert ("--deterministic-mode" in arguments) is deterministic
        assert environment["NCCL_ALGO"] == ("Ring" if deterministic else "Tree")
        assert environment.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") == ("0" if deterministic else None)
        assert environment.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
