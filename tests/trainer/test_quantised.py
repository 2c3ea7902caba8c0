"""Weights in INT8 and FP8: rounding, products and whole models against FP64 and against their dequantised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_inference_cache import BASE, MODELS, ids, made, whole
from test_inference_engine import GREEDY, PROMPTS, greedy_by_whole_passes
from torch import Tensor

from trainer.export import assemble
from trainer.inference.cache import Cache
from trainer.inference.engine import Engine
from trainer.loading import cast
from trainer.model.hybrid import HybridModel, build_model
from trainer.model.quantised import SCALE, quantised_state
from trainer.model.ready import normed
from trainer.modelspec import ModelSpec
from trainer.ops import quantised
from trainer.ops.quantised import Kind, Quantised, aligned, dequantised, experts, packed, product, quantise

KINDS: tuple[Kind, Kind] = ("int8", "fp8")


@pytest.fixture
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_kernel_works", lambda: False)


def weights(*shape: int) -> Tensor:
    """Rows of very different size, one of zeros."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w *= torch.logspace(-6, 3, shape[-2])[:, None]
    w[..., 2, :] = 0
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 64), (3, 12, 64)])
def test_rounding_is_within_the_bound_of_its_formula(kind: Kind, shape: tuple[int, ...]) -> None:
    w = weights(*shape)
    numbers, scale = quantise(w, kind)
    assert numbers.shape == shape and scale.shape == shape[:-1] and numbers.dtype == quantised.DTYPES[kind]
    largest = w.double().abs().amax(-1)
    nonzero = largest > 0
    torch.testing.assert_close(
        scale.double()[nonzero], (largest / {"int8": 127, "fp8": 448}[kind])[nonzero], rtol=1e-6, atol=0
    )
    error = (numbers.double() * scale.double()[..., None] - w.double()).abs()
    step = scale.double()[..., None]
    bound = step / 2 if kind == "int8" else torch.maximum(w.double().abs() / 16, step / 1024)
    assert (error <= bound * (1 + 1e-5)).all() and error[nonzero].max() > 0
    assert numbers.float().abs().amax(-1)[nonzero].eq({"int8": 127, "fp8": 448}[kind]).all()
    assert not dequantised(Quantised(numbers, scale))[~nonzero].any()
    torch.testing.assert_close(dequantised(Quantised(numbers, scale)).double(), numbers.double() * step)


def test_each_fp8_number_is_converted_as_torch_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()].view(2, -1)
    for dtype in (torch.float32, torch.bfloat16):
        matrix, factor = quantised._converted(codes, dtype)
        assert codes.numel() == 254 and torch.equal(matrix.float() * factor, codes.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [64, 40])  # torch's kernel reads beyond rows of 40
def test_products_are_those_of_the_numbers(kind: Kind, inputs: int) -> None:
    weight = quantise(torch.randn(30, inputs), kind)
    x, bias = torch.randn(2, 7, inputs), torch.randn(30)
    exact = x.double() @ dequantised(weight).double().T
    size = x.double().abs() @ dequantised(weight).double().abs().T
    y = product(x, weight)
    assert y.dtype == torch.float32 and packed(weight.numbers) == (kind == "int8" and inputs == 64)
    # The kernel rounds x and the result to BF16; half a unit in the last place is 2^-9.
    rounding = 2**-9 * (size + exact.abs()) if packed(weight.numbers) else 0
    assert ((y - exact).abs() <= rounding + 1e-6 * size).all()
    torch.testing.assert_close(product(x, weight, bias), y + bias)
    for row in range(7):  # alone as with others
        torch.testing.assert_close(
            product(x[:1, row], weight), y[:1, row], rtol=0, atol=0 if packed(weight.numbers) else 1e-4
        )
    wide = product(x.bfloat16(), weight)
    assert wide.dtype == torch.bfloat16 and ((wide - exact).abs() <= 2**-7 * size).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(x, weight), wide)


def shifted(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The same numbers `size` bytes after a multiple of 64, as a tensor may lie in a file."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + size
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("size", [8, 16])
def test_numbers_may_lie_anywhere(size: int) -> None:
    """The kernel would end the process where they are not at a multiple of 16 bytes."""
    numbers, scale = quantise(torch.randn(30, 64), "int8")
    x = torch.randn(7, 64).bfloat16()
    lies = Quantised(shifted(numbers, size), scale)
    assert lies.numbers.data_ptr() % 64 == size and packed(lies.numbers) == (size == 16)
    expected = product(x, Quantised(numbers, scale))
    torch.testing.assert_close(product(x, lies), expected, rtol=2**-6, atol=1e-2)
    again = Quantised(aligned(lies.numbers), scale)
    assert torch.equal(product(shifted(x, size), again), expected) and packed(again.numbers)


def test_a_kernel_that_is_not_as_expected_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantised._kernel_works() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512")
    for wrong in (lambda x, q, s: torch.zeros(len(x), len(q), dtype=x.dtype), lambda x, q: None):
        monkeypatch.setattr(torch, "_weight_int8pack_mm", wrong)
        assert not quantised._kernel_works.__wrapped__()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.usefixtures("without_kernel")
def test_experts_are_those_of_the_numbers(kind: Kind, activation: str, tokens: int) -> None:
    first = quantise(torch.randn(5, 48 if activation == "swiglu" else 24, 32) / 5, kind)
    down = quantise(torch.randn(5, 32, 24) / 5, kind)
    x_SD, weight_SK = torch.randn(tokens, 32), torch.rand(tokens, 2)
    expert_SK = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)])  # nobody chooses the last one
    y_SD = experts(first, down, activation)(x_SD, expert_SK, weight_SK)
    up_EGD, down_EDF = dequantised(first).double(), dequantised(down).double()
    for s in range(tokens):
        total = torch.zeros(32, dtype=torch.float64)
        for e, weight in zip(expert_SK[s].tolist(), weight_SK[s].tolist(), strict=True):
            before = up_EGD[e] @ x_SD[s].double()
            if activation == "swiglu":
                hidden = torch.nn.functional.silu(before[:24]) * before[24:]
            else:
                hidden = before.clamp(min=0) ** 2
            total += weight * (down_EDF[e] @ hidden)
        torch.testing.assert_close(y_SD[s].double(), total, rtol=1e-4, atol=1e-5)


def both(model: HybridModel, kind: Kind, stream: torch.dtype = torch.float32) -> tuple[HybridModel, HybridModel]:
    """The quantised model, and one with its dequantised weights in FP32."""
    state = quantised_state(model.spec, model.state_dict(), kind)
    numbers = {
        name: dequantised(Quantised(tensor, state[name + SCALE])) if name + SCALE in state else tensor
        for name, tensor in state.items()
        if not name.endswith(SCALE)
    }
    path = Path("export")
    return (
        assemble(path, model.spec, cast(state, stream), "cpu", kind=kind, stream=stream),
        assemble(path, model.spec, numbers, "cpu"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in MODELS if "LoRA" not in name])  # exports have none
@pytest.mark.usefixtures("without_kernel")
def test_logits_are_those_of_the_dequantised_weights(name: str, kind: Kind) -> None:
    """In a whole pass, in pieces from a cache, and as a loss."""
    model, expected = both(made(name), kind)
    ids_BT = ids(2)[:, :40]
    logits_BTV = whole(expected, ids_BT)
    torch.testing.assert_close(whole(model, ids_BT), logits_BTV, rtol=0, atol=1e-4)
    assert (whole(made(name), ids_BT) - logits_BTV).abs().max() > 1e-3
    with torch.inference_mode():
        cache, parts = Cache(model, 2, 40), []
        for at, end in ((0, 30), (30, 31), (31, 32), (32, 40)):
            parts.append(cache.logits(cache.extend(ids_BT[:, at:end], 0, [at, at])))
        torch.testing.assert_close(torch.cat(parts, dim=1), logits_BTV, rtol=0, atol=1e-4)
        documents_BT = torch.zeros_like(ids_BT, dtype=torch.int32)
        loss = model(ids_BT, documents_BT, ids_BT).ce_sum
        torch.testing.assert_close(loss, expected(ids_BT, documents_BT, ids_BT).ce_sum, rtol=1e-5, atol=0)


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_torchs_kernel_and_a_bf16_stream_change_logits_little(stream: torch.dtype) -> None:
    model, expected = both(made("-"), "int8", stream)
    ids_BT = ids(2)[:, :40]
    actual, exact = whole(model, ids_BT), whole(expected, ids_BT)
    assert actual.dtype == stream and (actual - exact).std() < 0.02 * exact.std()


@pytest.mark.parametrize("name", ["all, tied, μP", "* turned, QK-norm, bias"])
def test_a_bf16_stream_beside_fp32_norms_is_continued_from_a_cache(name: str) -> None:
    plain = made(name)
    model = assemble(Path("export"), plain.spec, cast(plain.state_dict(), torch.bfloat16), "cpu", stream=torch.bfloat16)
    ids_BT = ids(1)[:, :50]
    with torch.inference_mode():
        cache = Cache(model, 1, 50)
        pieces = [cache.logits(cache.extend(ids_BT[:, t : t + 1], 0, [t])) for t in range(50)]
    assert torch.equal(
        normed(model.final_norm)(x := torch.randn(3, 32).bfloat16()), model.final_norm.without_gradient(x)
    )
    expected_BTV = whole(plain, ids_BT)
    for actual_BTV in (torch.cat(pieces, dim=1), whole(model, ids_BT).float()):
        assert 0 < (actual_BTV - expected_BTV).std() < 0.1 * expected_BTV.std()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("without_kernel")
def test_texts_of_an_engine_are_those_of_whole_passes(kind: Kind) -> None:
    torch.manual_seed(0)
    layers = {"layers": ["ME", "*-"], "mtp": {"depth": 1, "layer": "*M"}}
    plain = build_model(ModelSpec.model_validate(BASE).updated(layers), seed=1)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model, exact = both(plain.eval(), kind)
    expected = [greedy_by_whole_passes(exact, prompt, 12) for prompt in PROMPTS[:4]]
    for drafts in (False, True):
        engine = Engine(model, rows=3, length=60, drafts=drafts)
        texts = [engine.submit(prompt, GREEDY) for prompt in PROMPTS[:4]]
        engine.run()
        assert [text.made for text in texts] == expected


@pytest.mark.parametrize(
    ("kind", "stream", "share"), [("int8", "float32", 0.25), ("fp8", "bfloat16", 0.25), (None, "bfloat16", 0.5)]
)
def test_a_model_in_memory_has_a_quarter_of_the_bytes_or_half(kind: Kind | None, stream: str, share: float) -> None:
    layers = {"hidden": 256, "layers": ["ME", "*-"], "moe": {"expert_width": 256}, "mlp": {"width": 512}}
    model = build_model(ModelSpec.model_validate(BASE).updated(layers), seed=1)
    state = model.state_dict() if kind is None else quantised_state(model.spec, model.state_dict(), kind)
    dtype = getattr(torch, stream)
    small = assemble(Path("export"), model.spec, cast(state, dtype), "cpu", kind=kind, stream=dtype)

    def size(model: HybridModel) -> int:
        return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])

    assert share < size(small) / size(model) < 1.06 * share
    assert small.layers[0][1].mixer.router.weight.dtype == small.final_norm.weight.dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for name, tensor in small.state_dict().items() if name.endswith(SCALE))
    assert small.no_tokens.dtype == dtype


def test_what_routes_normalises_or_is_small_is_kept() -> None:
    model = made("all, tied, μP")
    state = quantised_state(model.spec, model.state_dict(), "int8")
    kept = {name.rpartition("mixer.")[2] for name, tensor in state.items() if tensor.dtype == torch.float32}
    kept = {name for name in kept if not name.endswith(SCALE) and "norm." not in name}
    assert kept == {"A_log", "D", "dt_bias", "dt_proj.weight", "conv.weight", "conv.bias", "router.weight", "bias_E"}
    stacks = [name for name in state if name.endswith("up_EFD")]
    assert len(stacks) == 2 and all(state[name].dtype == torch.int8 for name in (*stacks, "embedding.weight"))
