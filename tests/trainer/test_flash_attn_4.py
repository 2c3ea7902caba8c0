"""flash-attn-4 is called as its version 4.0.0b36 reads; functions in its place compute what its documentation says."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.modelspec import ModelSpec
from trainer.ops import OPS, Documents, Setting, attention_flash_attn_4, packages
from trainer.ops.check import cases

CPU = Setting(torch.device("cpu"))
GPU = Setting(torch.device("cuda"), torch.bfloat16)
FUNCTION = OPS["attention"].backends["flash_attn_4"].function


def attended(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    lengths = starts.diff().tolist()
    parts = zip(*(each.transpose(0, 1).split(lengths, dim=1) for each in (q, k, v)), strict=True)
    done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(done, dim=1).transpose(0, 1)


# The parameters in their order, with those left out that are never given and follow all that are.
def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    return_lse=False,
):  # fmt: skip
    assert causal and return_lse and cu_seqlens_q is cu_seqlens_k and cu_seqlens_q.dtype == torch.int32
    assert qv is None and max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
    return attended(q, k, v, cu_seqlens_q), torch.full((q.shape[1], q.shape[0]), 7.0)


def flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
):  # fmt: skip
    assert causal and lse.eq(7).all() and dout.is_contiguous() and out.shape == q.shape
    return differentiated(q, k, v, dout, cu_seqlens_q)


def differentiated(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the formula: within an operator there is no autograd."""
    same = torch.bucketize(torch.arange(q.shape[0], dtype=torch.int32), starts, right=True)
    seen = (same[:, None] == same[None, :]).tril()
    group, factor = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    keys, values = (each.repeat_interleave(group, dim=1) for each in (k, v))
    p = (torch.einsum("qhd,khd->hqk", q, keys) * factor).masked_fill(~seen, -torch.inf).softmax(-1)
    dp = torch.einsum("qhd,khd->hqk", dout, values)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * factor
    dq, dk = torch.einsum("hqk,khd->qhd", ds, keys), torch.einsum("hqk,qhd->khd", ds, q)
    dv = torch.einsum("hqk,qhd->khd", p, dout)
    return dq, *(each.unflatten(1, (-1, group)).sum(2) for each in (dk, dv))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    known = {
        "flash_attn.cute": SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
        "flash_attn.cute.interface": SimpleNamespace(_flash_attn_bwd=flash_attn_bwd),
    }
    monkeypatch.setattr(packages, "load", lambda name: known[name])
    monkeypatch.setattr(packages, "_KERNELS", {})
    for path in (attention_flash_attn_4.FORWARD, attention_flash_attn_4.BACKWARD):
        assert packages.kernel_problem(path) is None


def test_documents_arrive_and_gradients_return(installed: None):
    reference = OPS["attention"].backends["reference"].function
    for case in cases("attention", CPU):
        outcomes = []
        for function in (FUNCTION, reference):
            leaves = [each.clone().requires_grad_() for each in case.inputs]
            output = case.call(function, leaves)
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            outcomes.append([output, *(leaf.grad for leaf in leaves)])
        for mine, expected in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, expected, atol=2e-4, rtol=1e-4, msg=lambda m, c=case: f"{c.name}: {m}")


def test_it_compiles_as_one_graph(installed: None):
    documents = Documents(torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2]], dtype=torch.int32))
    _ = documents.cu_seqlens  # made before the first layer
    q, k, v = (torch.randn(2, 6, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    run = torch.compile(lambda q, k, v: FUNCTION(q * 2, k, v, documents), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(FUNCTION(q * 2, k, v, documents).square().sum(), (q, k, v))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize(
    ("capability", "head_dim", "reason"),
    [
        ((8, 0), 16, "needs compute capability 9.0, this GPU has 8.0"),
        ((9, 0), 264, "takes head widths in multiples of 8 up to 256, the model has 264"),
        ((10, 0), 192, "takes head widths up to 128 on this GPU, the model has 192"),
        ((9, 0), 192, "flash-attn-4 is not installed"),
    ],
)
def test_what_rules_it_out(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int, reason: str):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": head_dim}
    model = ModelSpec.model_validate({"vocab_size": 64, "hidden": 64, "layers": ["*"], "attention": attention})
    assert attention_flash_attn_4.unsupported(Setting(GPU.device, GPU.dtype, model)) == reason


def test_it_is_found_beside_flash_attn_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where flash-attn belongs to the base image: its folder is the package, and has no `cute`."""
    base, own = tmp_path / "base", tmp_path / "own"
    (base / "flash_attn").mkdir(parents=True)
    (base / "flash_attn" / "__init__.py").write_text("VERSION = 2")
    (own / "flash_attn" / "cute").mkdir(parents=True)
    (own / "flash_attn" / "cute" / "__init__.py").write_text("def flash_attn_varlen_func(q, k, v): ...")
    (own / "flash_attn" / "cute" / "interface.py").write_text("def _flash_attn_bwd(q, k, v): ...")
    (own / "flash_attn_4-4.0.0b36.dist-info").mkdir()
    (own / "flash_attn_4-4.0.0b36.dist-info" / "METADATA").write_text("Name: flash-attn-4\nVersion: 4.0.0b36\n")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(packages, "_KERNELS", {})
    for folder in (base, own):  # the second is looked at first
        monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    packages.load.cache_clear()
    try:
        assert attention_flash_attn_4.unsupported(GPU) is None
        assert sys.modules["flash_attn"].VERSION == 2, "flash-attn is still itself"
        assert packages.kernel(attention_flash_attn_4.FORWARD).parameters == {"q", "k", "v"}
    finally:
        packages.load.cache_clear()
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "flash_attn":
                del sys.modules[name]
