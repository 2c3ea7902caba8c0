"""The choice of precision on GPUs that this machine does not have, and loss scaling on its own device."""

from __future__ import annotations

import pytest
import torch

from trainer import parity, precision
from trainer.fp8.gemm import torch_problem
from trainer.fp8.scaling import E4M3, E5M2
from trainer.ops import packages
from trainer.precision import Precision, resolve, resolve_for_evaluation
from trainer.spec import Fp8Spec, PrecisionSpec

T4, A100, L4, H100, B200, CPU = (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), None


def by_name(name: str, capability: tuple[int, int] | None, **fp8: str) -> Precision:
    return resolve(PrecisionSpec(dtype=name, fp8=Fp8Spec(**fp8)), capability)


def prove(monkeypatch: pytest.MonkeyPatch, *proofs: tuple[str, str, str]) -> None:
    """Records for (implementation, recipe, device class), and both packages installed and importable."""
    monkeypatch.setattr(parity, "proven", lambda op, name, variant, where, version: (name, variant, where) in proofs)
    monkeypatch.setattr(parity, "package_version", lambda package: "1.2")
    monkeypatch.setattr(packages, "load", lambda module: torch)


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "scaling", "reason"),
    [
        (T4, "fp16", torch.float16, True, "7.5 is below BF16's 8.0"),
        (A100, "bf16", torch.bfloat16, False, "8.0; below the 8.9 of FP8"),
        (L4, "bf16", torch.bfloat16, False, "current scaling unproven on sm_89 with torch"),
        (H100, "bf16", torch.bfloat16, False, "torch: current scaling unproven on sm_90 with torch"),
        (CPU, "fp32", None, False, "CPU"),
    ],
)
def test_auto_without_records(monkeypatch, capability, name, dtype, scaling, reason):
    monkeypatch.setattr(parity, "committed", lambda: ())
    rung = by_name("auto", capability)
    assert (rung.name, rung.autocast_dtype, rung.loss_scaling, rung.fp8) == (name, dtype, scaling, None)
    assert reason in rung.reason


def test_auto_steps_on_fp8_where_a_record_proves_it(monkeypatch):
    prove(monkeypatch, ("torch", "current", "sm_90"))
    rung = by_name("auto", H100)
    assert (rung.name, rung.autocast_dtype, rung.fp8.implementation) == ("fp8", torch.bfloat16, "torch")
    assert by_name("auto", L4).name == "bf16", "another class of GPU"
    assert by_name("auto", H100, recipe="delayed").name == "bf16", "another recipe"
    assert by_name("auto", H100, implementation="te").name == "bf16", "another implementation"
    assert by_name("fp8", H100).fp8.implementation == "torch"
    prove(monkeypatch, ("torch", "current", "sm_90"), ("te", "current", "sm_90"))
    assert by_name("auto", H100).fp8.implementation == "te", "Transformer Engine comes first"


def test_a_proven_package_that_breaks_on_import_is_passed_over(monkeypatch):
    prove(monkeypatch, ("torch", "current", "sm_90"), ("te", "current", "sm_90"))
    monkeypatch.setattr(packages, "load", lambda module: "transformer_engine is installed but broken (ValueError: no)")
    assert by_name("auto", H100).fp8.implementation == "torch"
    with pytest.raises(ValueError, match=r"fp8 by te: .*broken \(ValueError: no\); write bf16"):
        by_name("fp8", H100, implementation="te")


@pytest.mark.parametrize(
    ("capability", "implementation", "recipe", "problem"),
    [
        (CPU, "torch", "current", "there is no GPU"),
        (CPU, "te", "current", "there is no GPU"),
        (A100, "torch", "delayed", "compute capability 8.0, FP8 needs 8.9"),
        (A100, "te", "delayed", "compute capability 8.0, FP8 by delayed scaling needs 8.9"),
        (L4, "te", "block128", "compute capability 8.9, FP8 by block128 scaling needs 9.0"),
        (L4, "torch", "block128", "128-block products need 9.x"),
        (B200, "torch", "block128", "128-block products need 9.x"),
        (CPU, "auto", "current", "no implementation is known to work here"),
        (
            H100,
            "auto",
            "current",
            r"current scaling unproven on sm_90 .*name one as train\.precision\.fp8\.implementation",
        ),
    ],
)
def test_fp8_by_name_that_cannot_run_is_one_line(monkeypatch, capability, implementation, recipe, problem):
    monkeypatch.setattr(parity, "committed", lambda: ())
    with pytest.raises(ValueError, match=problem) as caught:
        by_name("fp8", capability, implementation=implementation, recipe=recipe)
    assert "\n" not in str(caught.value) and "bf16" in str(caught.value)


def test_a_margin_that_nothing_would_read_is_refused():
    with pytest.raises(ValueError, match="margin 1 is for the recipes delayed and current, not block128; remove it"):
        PrecisionSpec(fp8={"recipe": "block128", "margin": 1})
    with pytest.raises(
        ValueError, match=r"by te: it takes no margin for current scaling \(train\.precision\.fp8\.margin 1\)"
    ):
        by_name("fp8", H100, implementation="te", recipe="current", margin=1)
    assert by_name("fp8", H100, implementation="torch", recipe="current", margin=1).fp8.margin == 1
    assert by_name("fp8", H100, implementation="emulated", recipe="delayed", margin=1).fp8.margin == 1


def test_blocks_of_torch_take_no_e5m2(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert torch_problem("block128", E4M3, H100) is None
    assert "write train.precision.fp8.format e4m3" in torch_problem("block128", E5M2, H100)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "CUDA 12.8" in torch_problem("block128", E4M3, H100)
    assert torch_problem("current", E5M2, L4) is None


@pytest.mark.parametrize("capability", [CPU, T4, H100])
def test_emulation_runs_anywhere(capability):
    rung = by_name("fp8", capability, implementation="emulated")
    assert (rung.name, rung.autocast_dtype, rung.fp8.implementation) == ("fp8", torch.bfloat16, "emulated")


@pytest.mark.parametrize(("capability", "name"), [(CPU, "fp32"), (T4, "fp16"), (A100, "bf16"), (H100, "bf16")])
def test_fp8_runs_are_evaluated_on_the_rung_below(capability, name, monkeypatch):
    prove(monkeypatch, *(("torch", "current", f"sm_{major}{minor}") for major, minor in [T4, A100, H100]))
    for dtype in ("fp8", "auto"):
        rung = resolve_for_evaluation(PrecisionSpec(dtype=dtype), capability)
        assert (rung.name, rung.fp8) == (name, None)
    assert resolve_for_evaluation(PrecisionSpec(dtype="fp32"), capability).name == "fp32"


@pytest.mark.parametrize("capability", [A100, L4, H100, CPU])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_by_name(name, capability):
    assert by_name(name, capability).name == name


def test_bf16_on_a_t4_says_what_to_write():
    with pytest.raises(ValueError, match=r"7\.5.*write fp16"):
        by_name("bf16", T4)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_autocast_gives_the_dtype_of_products(name):
    rung = by_name(name, CPU)
    with rung.autocast("cpu"):
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype == (rung.autocast_dtype or torch.float32)


def test_transformer_engines_context_surrounds_the_forward_pass(monkeypatch):
    """Its recipe must be active when modules run, inside torch's own autocast."""
    events = []

    class Context:
        def __enter__(self):
            events.append(("on", torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")))

        def __exit__(self, *_):
            events.append("off")

    monkeypatch.setattr(precision.te, "autocast", lambda fp8: Context())
    prove(monkeypatch, ("te", "current", "sm_90"))
    rung = by_name("auto", H100)
    for _ in range(2):
        with rung.autocast("cpu"):
            assert events[-1] == ("on", torch.bfloat16, True)
        assert events[-1] == "off"


def test_scaler_only_for_fp16():
    assert by_name("bf16", CPU).scaler("cpu") is None
    assert by_name("fp8", CPU, implementation="emulated").scaler("cpu") is None
    assert by_name("fp16", CPU).scaler("cpu").get_scale() == 2.0**16
