"""The precision ladder for GPUs that this machine does not have, and loss scaling on the one it has."""

import pytest
import torch

from trainer.precision import resolve

T4, A100, L4, H100, CPU = (7, 5), (8, 0), (8, 9), (9, 0), None


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "scaling", "reason"),
    [
        (T4, "fp16", torch.float16, True, "7.5 is below BF16's 8.0"),
        (A100, "bf16", torch.bfloat16, False, "8.0 is below FP8's 8.9"),
        (L4, "bf16", torch.bfloat16, False, "no FP8 layer has been proven on this GPU"),
        (H100, "bf16", torch.bfloat16, False, "no FP8 layer has been proven on this GPU"),
        (CPU, "fp32", None, False, "CPU"),
    ],
)
def test_auto(capability, name, dtype, scaling, reason):
    rung = resolve("auto", capability)
    assert (rung.name, rung.autocast_dtype, rung.loss_scaling) == (name, dtype, scaling)
    assert reason in rung.reason


@pytest.mark.parametrize("capability", [T4, A100, L4, H100, CPU])
def test_fp8_by_name_is_an_error_everywhere(capability):
    with pytest.raises(ValueError, match="write auto or bf16"):
        resolve("fp8", capability)


@pytest.mark.parametrize("capability", [A100, L4, H100, CPU])
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_by_name(name, capability):
    assert resolve(name, capability).name == name


def test_bf16_on_a_t4_says_what_to_write():
    with pytest.raises(ValueError, match=r"7\.5.*write fp16"):
        resolve("bf16", T4)


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_autocast_gives_the_dtype_of_products(name):
    rung = resolve(name, CPU)
    with rung.autocast("cpu"):
        product = torch.ones(4, 4) @ torch.ones(4, 4)
    assert product.dtype == (rung.autocast_dtype or torch.float32)


def test_scaler_only_for_fp16():
    assert resolve("bf16", CPU).scaler("cpu") is None
    assert resolve("fp16", CPU).scaler("cpu").get_scale() == 2.0**16
