"""Our calls of GPU packages, with fakes that check the requirements of the packages' sources and use plain torch."""

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.modelspec import ModelSpec
from trainer.ops import (
    OPS,
    Documents,
    Setting,
    attention_flash_attn_3,
    attention_varlen,
    conv_causal_conv1d,
    experts_te,
    packages,
)
from trainer.ops.check import cases
from trainer.ops.conv import conv_reference

SETTING = Setting(torch.device("cpu"))
CUDA = torch.device("cuda")


@pytest.fixture
def stand_in(monkeypatch):
    """Let `packages.load(module)` return an object with these attributes."""

    def put(**modules: object) -> None:
        known = {name.replace("__", "."): module for name, module in modules.items()}
        monkeypatch.setattr(packages, "load", lambda name: known[name])
        monkeypatch.setattr(packages, "_KERNELS", {})

    return put


def assert_same(op: str, function) -> None:
    reference = OPS[op].backends["reference"].function
    for case in cases(op, SETTING):
        outcomes = []
        for candidate in (function, reference):
            leaves = [tensor.clone().requires_grad_() for tensor in case.inputs]
            output = case.call(candidate, leaves)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            outcomes.append([output, *(leaf.grad for leaf in leaves)])
        for mine, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, expected, atol=2e-4, rtol=1e-4, msg=lambda m, c=case: f"{c.name}: {m}")


def varlen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """What both FlashAttention entry points check, and causal attention within each document."""
    assert cu_q.dtype == torch.int32 and cu_q.is_contiguous() and cu_q is cu_k
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dim() == 3
    bounds = cu_q.tolist()
    assert bounds[0] == 0 and bounds[-1] == q.shape[0] and bounds == sorted(bounds)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert 1 < max_q == max_k >= max(lengths)
    parts = []
    for length, *part in zip(lengths, *(t.split(lengths) for t in (q, k, v)), strict=True):
        if length:
            heads_first = [tensor.transpose(0, 1)[None] for tensor in part]
            parts.append(
                F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            )
    return torch.cat(parts)


def test_flash_attn_gets_documents_end_to_end(stand_in):
    def flash_attn_varlen_func(*arguments, causal):
        assert causal is True
        return varlen(*arguments)

    stand_in(flash_attn=SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    assert_same("attention", attention_varlen.attention_flash_attn)


@pytest.mark.parametrize("with_sums", [False, True])
def test_flash_attn_3_gets_documents_end_to_end(stand_in, with_sums):
    """As its interface of 2025 reads; its first releases also returned the sums of the softmax."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0, num_splits=1, pack_gqa=None,
    ):  # fmt: skip
        assert causal is True
        out = varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (out, out.detach().sum(-1)) if with_sums else out

    stand_in(flash_attn_interface=SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    assert_same("attention", attention_flash_attn_3.attention_flash_attn_3)


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((8, 0), "needs compute capability 9.0, this GPU has 8.0"),
        ((9, 0), "flash_attn_interface is not installed"),
        ((10, 0), "has kernels for compute capability 9.0 only; for this GPU there is flash-attn-4"),
    ],
)
def test_flash_attn_3_is_for_hopper(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packages.load.cache_clear()
    assert attention_flash_attn_3.unsupported(Setting(torch.device("cuda"), torch.bfloat16)) == reason


@pytest.mark.parametrize("told_of_groups", [False, True])
def test_torch_varlen_gets_documents_end_to_end(stand_in, told_of_groups):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size == (-1, 0)
        return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)

    def newer(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    stand_in(torch__nn__attention__varlen=SimpleNamespace(varlen_attn=newer if told_of_groups else older))
    assert_same("attention", attention_varlen.attention_varlen)


def test_the_real_varlen_takes_what_we_pass():
    signature = inspect.signature(packages.kernel(attention_varlen.TORCH).function)
    signature.bind(*range(7), window_size=(-1, 0))
    assert list(signature.parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.parametrize("name", ["varlen", "flash_attn", "flash_attn_3", "causal_conv1d"])
def test_calls_compile_as_one_graph(stand_in, name):
    """Imports, signatures and memory layouts are resolved while compiling."""

    def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, 0), causal=True):
        return query * key.shape[1] + cu_seq_q[-1] + max_q

    def convolve(x, weight, bias, seq_idx):
        return x * weight[:, :1] + seq_idx[:, None]

    stand_in(
        torch__nn__attention__varlen=SimpleNamespace(varlen_attn=attend),
        flash_attn=SimpleNamespace(flash_attn_varlen_func=attend),
        flash_attn_interface=SimpleNamespace(flash_attn_varlen_func=attend),
        causal_conv1d=SimpleNamespace(causal_conv1d_fn=convolve),
    )
    kernels = (
        attention_varlen.TORCH,
        attention_varlen.PACKAGE,
        attention_flash_attn_3.KERNEL,
        conv_causal_conv1d.KERNEL,
    )
    for path in kernels:
        assert packages.kernel_problem(path) is None  # as when backends are chosen
    op = "conv" if name == "causal_conv1d" else "attention"
    function = OPS[op].backends[name].function
    for case in list(cases(op, SETTING))[-2:]:
        run = torch.compile(lambda *t, case=case: case.call(function, list(t)), fullgraph=True, backend="eager")
        documents = case.call.__defaults__[0]
        _ = documents.cu_seqlens  # made before the first layer
        torch.testing.assert_close(run(*case.inputs), case.call(function, case.inputs))


def test_cu_seqlens_lists_the_starts_of_all_rows_and_fills_up_with_empty_documents():
    seq_idx_BT = torch.tensor([[3, 3, 4, 4, 4], [0, 1, 2, 2, 2]], dtype=torch.int32)
    assert Documents(seq_idx_BT).cu_seqlens.tolist() == [0, 2, 5, 6, 7, 10, 10, 10, 10]
    assert Documents(torch.zeros(1, 7, dtype=torch.int32)).cu_seqlens.tolist() == [0, 7]
    assert Documents(torch.zeros(2, 1, dtype=torch.int32)).cu_seqlens.tolist() == [0, 1, 2]


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """The checks of causal_conv1d_fwd with seq_idx; x is [B, C, T]."""
    assert x.stride(1) == 1 and x.stride(2) > 1 and x.shape[1] % 8 == 0
    assert x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    assert 2 <= weight.shape[1] <= 4 and (bias is None or bias.dtype == weight.dtype)
    assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and seq_idx.shape == (x.shape[0], x.shape[2])
    return conv_reference(x.transpose(1, 2), weight, bias, Documents(seq_idx)).transpose(1, 2)


def test_causal_conv1d_gets_channels_last_rows_and_plain_convolutions(stand_in):
    stand_in(causal_conv1d=SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    assert_same("conv", conv_causal_conv1d.conv_causal_conv1d)


@pytest.mark.parametrize("width", [40, 44])  # strides that fit the kernel, and strides that need a copy
def test_causal_conv1d_takes_a_slice_of_a_projection(stand_in, width):
    stand_in(causal_conv1d=SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    wide_BTX, w_CK = torch.randn(2, 30, width), torch.randn(16, 4)
    documents = Documents(torch.arange(30, dtype=torch.int32).div(11, rounding_mode="floor").int().repeat(2, 1))
    x_BTC = wide_BTX[..., 8:24]
    found = conv_causal_conv1d.conv_causal_conv1d(x_BTC, w_CK, None, documents)
    torch.testing.assert_close(found, conv_reference(x_BTC, w_CK, None, documents))


class GroupedLinear(nn.Module):
    """As Transformer Engine's: parameters weight0…, called with rows and their counts."""

    def __init__(self, num_gemms, in_features, out_features, *, bias, params_dtype, device):
        super().__init__()
        assert bias is False
        self.num_gemms = num_gemms
        for e in range(num_gemms):
            weight = torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            self.register_parameter(f"weight{e}", nn.Parameter(weight))
            setattr(self, f"bias{e}", torch.empty(0, device=device))

    def forward(self, inp, m_splits):
        assert len(m_splits) == self.num_gemms and sum(m_splits) == inp.shape[0]
        weights = [getattr(self, f"weight{e}") for e in range(self.num_gemms)]
        return torch.cat([F.linear(part, w) for part, w in zip(inp.split(m_splits), weights, strict=True)])


class Padding(nn.Module):
    def __init__(self, num_gemms):
        super().__init__()

    def forward(self, inp, m_splits):
        parts = [F.pad(part, (0, 0, 0, -len(part) % 16)) for part in inp.split(m_splits)]
        return torch.cat(parts), [len(part) for part in parts]


class Unpadding(Padding):
    def forward(self, inp, m_splits):
        return torch.cat(
            [part[:m] for part, m in zip(inp.split([m + -m % 16 for m in m_splits]), m_splits, strict=True)]
        )


@pytest.mark.parametrize("recipe", [None, "current", "delayed"])
def test_transformer_engine_gets_rows_by_expert(stand_in, recipe):
    """FP8 is on only for recipes without a history; then every expert's rows are padded."""
    entered = []

    class Autocast:
        def __init__(self, enabled, recipe):
            entered.append(enabled)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    te = SimpleNamespace(GroupedLinear=GroupedLinear, Fp8Padding=Padding, Fp8Unpadding=Unpadding, autocast=Autocast)
    state = SimpleNamespace(
        is_fp8_enabled=lambda: recipe is not None,
        get_fp8_recipe=lambda: SimpleNamespace(delayed=lambda: recipe == "delayed"),
    )
    stand_in(
        transformer_engine__pytorch=te,
        transformer_engine__pytorch__quantization=SimpleNamespace(FP8GlobalStateManager=state),
    )
    experts_te._carrier.cache_clear()
    assert_same("experts", experts_te.experts_te)
    assert set(entered) == {recipe == "current"}


def spec(**changes) -> ModelSpec:
    base = {
        "vocab_size": 64,
        "hidden": 64,
        "layers": ["ME", "*"],
        "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16},
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
        "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32},
    }
    return ModelSpec.model_validate({**base, **changes})


@pytest.mark.parametrize(
    ("op", "backend", "capability", "dtype", "model", "reason"),
    [
        ("attention", "varlen", (7, 5), torch.float16, spec(), "needs compute capability 8.0, this GPU has 7.5"),
        ("attention", "varlen", (9, 0), torch.float32, spec(), "computes bf16 and fp16, not fp32"),
        (
            "attention",
            "flash_attn",
            (9, 0),
            torch.bfloat16,
            spec(attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 12}),
            "head widths in multiples of 8 up to 256, the model has 12",
        ),
        (
            "conv",
            "causal_conv1d",
            (9, 0),
            torch.bfloat16,
            spec(mamba={"num_heads": 2, "head_dim": 16, "d_state": 16, "conv_kernel": 5}),
            "takes 2 to 4 taps, the model has 5",
        ),
        (
            "experts",
            "grouped",
            (9, 0),
            torch.bfloat16,
            spec(moe={"num_experts": 4, "top_k": 2, "expert_width": 30}),
            "rows must be multiples of 16 bytes, the model is 64 and 30 wide",
        ),
        ("ssd", "mamba_ssm", (9, 0), torch.bfloat16, spec(), "mamba_ssm is not installed"),
        ("experts", "te", (9, 0), torch.bfloat16, spec(), "transformer_engine is not installed"),
    ],
)
def test_what_rules_a_kernel_out_on_a_gpu(monkeypatch, op, backend, capability, dtype, model, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for function in (packages.load, packages.load_without_init):
        function.cache_clear()
    found = OPS[op].backends[backend].unsupported(Setting(CUDA, dtype, model))
    assert found is not None and reason in found
    for function in (packages.load, packages.load_without_init):
        function.cache_clear()
