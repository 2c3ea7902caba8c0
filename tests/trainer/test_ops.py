"""Every backend of every operation against its reference: forward, backward, ragged documents, an empty expert."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.ops import OPS, Documents, Setting, functions, resolve
from trainer.ops.check import cases
from trainer.ops.cross_entropy import cross_entropy_sum
from trainer.ops.experts import by_expert, count_choices, experts_reference
from trainer.ops.experts_grouped import _Experts
from trainer.ops.ssd import ssd_chunked, ssd_reference
from trainer.spec import BackendsSpec

CPU = torch.device("cpu")


def backends_of(op: str) -> list[str]:
    """The portable backends; test_parity.py compares kernels of packages on machines where they run."""
    return [name for name, backend in OPS[op].backends.items() if name != "reference" and backend.portable]


def ragged_documents(batch: int, length: int) -> Documents:
    """Rows split differently: many short documents, a boundary at a chunk's edge, a single document."""
    seq_idx_BT = torch.zeros(batch, length, dtype=torch.int32)
    for cut in (1, 2, 7, 16, 17, 23, 32, 40):
        seq_idx_BT[0, min(cut, length) :] += 1
    if batch > 1:
        seq_idx_BT[1, min(16, length) :] += 5
    return Documents(seq_idx_BT)


def values_and_gradients(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output of `run` and the gradients of a fixed random projection of it."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = run(*leaves)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float32)
    (output.float() * direction).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (mine, reference) in enumerate(zip(found, expected, strict=True)):
        scale = reference.abs().max().item()
        assert scale > 0, f"tensor {index} of the reference is zero and proves nothing"
        torch.testing.assert_close(mine, reference, atol=tolerance * scale, rtol=0, msg=lambda m, i=index: f"{i}: {m}")


def ssd_inputs(length: int, groups: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    batch, heads, width, state = 3, 4, 6, 5
    return [
        torch.randn(batch, length, heads, width),
        F.softplus(torch.randn(batch, length, heads)),
        -torch.rand(heads) * 3 - 0.05,
        torch.randn(batch, length, groups, state),
        torch.randn(batch, length, groups, state),
        torch.randn(heads),
    ]


@pytest.mark.parametrize("backend", backends_of("ssd"))
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 16, 41, 64])
def test_ssd_equals_reference(backend, length, groups):
    documents, inputs = ragged_documents(3, length), ssd_inputs(length, groups)
    function = OPS["ssd"].backends[backend].function

    def with_function(f, inputs):
        found = values_and_gradients(lambda *tensors: f(*tensors, documents, 16), inputs)
        return found if length > 1 else [*found[:3], *found[4:]]  # one position: nothing decays, A has no slope

    exact = [tensor.float() for tensor in with_function(ssd_reference, [tensor.double() for tensor in inputs])]
    assert_all_close(with_function(function, inputs), exact, 5e-5)  # the slope of A is a sum that all but cancels


def test_ssd_reference_equals_the_matrix_form_in_fp64():
    """y = (L ∘ C Bᵀ)(dt x) + D x with L[i, j] = exp(Σ_{j<k≤i} dt_k A), written out entry by entry for one document."""
    x, dt, A, B, C, D = (tensor.double() for tensor in ssd_inputs(9, groups=1))
    y = ssd_reference(x, dt, A, B, C, D, Documents.one_per_row(3, 9), 16)
    for b in range(3):
        for h in range(4):
            for i in range(9):
                expected = D[h] * x[b, i, h]
                for j in range(i + 1):
                    decay = math.exp(float((dt[b, j + 1 : i + 1, h] * A[h]).sum()))
                    expected = expected + decay * (C[b, i, 0] @ B[b, j, 0]) * dt[b, j, h] * x[b, j, h]
                torch.testing.assert_close(y[b, i, h], expected)


def test_ssd_survives_decays_that_underflow():
    x, dt, A, B, C, D = ssd_inputs(64)
    found = values_and_gradients(lambda *t: ssd_chunked(*t, ragged_documents(3, 64), 16), [x, dt * 50, A * 16, B, C, D])
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("backend", backends_of("conv"))
@pytest.mark.parametrize(("dilation", "bias"), [(1, True), (3, False), (4, True)])
@pytest.mark.parametrize("length", [1, 5, 41])
def test_conv_equals_reference(backend, length, dilation, bias):
    torch.manual_seed(0)
    documents = ragged_documents(3, length)
    inputs = [torch.randn(3, length, 10), torch.randn(10, 4)] + ([torch.randn(10)] if bias else [])

    def run(f):
        return lambda x, w, b=None: f(x, w, b, documents, dilation)

    function = OPS["conv"].backends[backend].function
    expected = values_and_gradients(run(OPS["conv"].backends["reference"].function), inputs)
    assert_all_close(values_and_gradients(run(function), inputs), expected, 1e-5)


def test_conv_reference_equals_torch_conv1d_within_one_document():
    torch.manual_seed(0)
    x_BTC, w_CK, bias_C = torch.randn(2, 20, 6), torch.randn(6, 4), torch.randn(6)
    padded = F.pad(x_BTC.transpose(1, 2), (9, 0))
    expected = F.conv1d(padded, w_CK[:, None], bias_C, groups=6, dilation=3).transpose(1, 2)
    reference = OPS["conv"].backends["reference"].function
    torch.testing.assert_close(reference(x_BTC, w_CK, bias_C, Documents.one_per_row(2, 20), 3), expected)


@pytest.mark.parametrize("backend", backends_of("attention"))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 41])
def test_attention_equals_reference(backend, length, kv_heads):
    torch.manual_seed(0)
    documents = ragged_documents(3, length)
    inputs = [torch.randn(3, length, heads, 8) for heads in (4, kv_heads, kv_heads)]
    function, reference = (OPS["attention"].backends[name].function for name in (backend, "reference"))
    found = values_and_gradients(lambda *t: function(*t, documents), inputs)
    expected = values_and_gradients(lambda *t: reference(*t, documents), inputs)
    if length == 1:  # a softmax over one position has no slope
        found, expected = [found[0], found[3]], [expected[0], expected[3]]
    assert_all_close(found, expected, 1e-5)


def expert_inputs(dtype: torch.dtype = torch.float32, maps: int = 1) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    tokens, hidden, experts, width, top_k = 50, 16, 6, 24, 2
    choices = torch.stack([torch.randperm(experts - 1)[:top_k] for _ in range(tokens)])
    choices[choices >= 2] += 1  # no token chooses expert 2
    tensors = [
        torch.randn(tokens, hidden, dtype=dtype),
        torch.randn(experts, maps * width, hidden, dtype=dtype) / 4,
        torch.randn(experts, hidden, width, dtype=dtype) / 4,
        torch.rand(tokens, top_k) + 0.1,
    ]
    return tensors, choices


def as_on_a_gpu(x: Tensor, up: Tensor, down: Tensor, choices: Tensor, weight: Tensor, activation: str) -> Tensor:
    """What `experts_grouped` does on a GPU; torch's grouped product runs on a CPU too."""
    routing = by_expert(choices, up.shape[0])
    ends = routing.count_E.cumsum(0).to(torch.int32)
    return _Experts.apply(x, up, down, weight, routing.order_R, routing.place_R, ends, activation)


@pytest.mark.parametrize("backend", [*backends_of("experts"), as_on_a_gpu])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("activation", "maps"), [("relu2", 1), ("swiglu", 2)])
def test_experts_equal_reference_with_an_empty_expert(backend, dtype, tolerance, activation, maps):
    tensors, choices = expert_inputs(dtype, maps)
    function = backend if callable(backend) else OPS["experts"].backends[backend].function

    def run(f):
        return values_and_gradients(lambda x, up, down, weight: f(x, up, down, choices, weight, activation), tensors)

    found, expected = run(function), run(experts_reference)
    assert_all_close(found, expected, tolerance)
    assert found[2][2].eq(0).all() and found[3][2].eq(0).all()  # no tokens, no gradient, and no uninitialised values


def test_choices_are_counted_as_bincount_does():
    _, choices = expert_inputs()
    found = count_choices(choices.flatten(), 6)
    assert torch.equal(found, torch.bincount(choices.flatten(), minlength=6)) and found[2] == 0


def test_experts_reference_equals_a_loop_over_tokens():
    (x_SD, up_EFD, down_EDF, weight_SK), choices = expert_inputs()
    (_, gate_up_EGD, *_), _ = expert_inputs(maps=2)
    y_SD = experts_reference(x_SD, up_EFD, down_EDF, choices, weight_SK)
    gated_SD = experts_reference(x_SD, gate_up_EGD, down_EDF, choices, weight_SK, "swiglu")
    gate_EFD, gated_up_EFD = gate_up_EGD.chunk(2, dim=1)
    for s, x in enumerate(x_SD):
        of_token = [(weight_SK[s, k], e) for k, e in enumerate(choices[s])]
        expected = sum(w * (down_EDF[e] @ torch.relu(up_EFD[e] @ x) ** 2) for w, e in of_token)
        torch.testing.assert_close(y_SD[s], expected, atol=1e-5, rtol=1e-5)
        gated = sum(w * (down_EDF[e] @ (F.silu(gate_EFD[e] @ x) * (gated_up_EFD[e] @ x))) for w, e in of_token)
        torch.testing.assert_close(gated_SD[s], gated, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [7, 64, 1000])
def test_cross_entropy_equals_torch(chunk_tokens):
    torch.manual_seed(0)
    labels_N = torch.randint(0, 50, (100,))
    labels_N[::9] = -100
    inputs = [torch.randn(100, 16), torch.randn(50, 16)]

    def ours(h_ND, w_VD):
        return 0.25 * cross_entropy_sum(h_ND, w_VD, labels_N, chunk_tokens)

    def theirs(h_ND, w_VD):
        return 0.25 * F.cross_entropy(h_ND @ w_VD.T, labels_N, ignore_index=-100, reduction="sum")

    assert_all_close(values_and_gradients(ours, inputs), values_and_gradients(theirs, inputs), 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_cross_entropy_makes_no_gradient_buffer_when_none_is_wanted(off):
    h_ND, weight_VD = torch.randn(100, 16), torch.randn(50, 16, requires_grad=True)
    labels_N = torch.randint(0, 50, (100,))

    class NewOfWeightSize(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.numel() == weight_VD.numel():
                self.count += result.data_ptr() != weight_VD.data_ptr()
            return result

    with NewOfWeightSize() as trained:
        wanted = cross_entropy_sum(h_ND, weight_VD, labels_N, chunk_tokens=4)
    with off(), NewOfWeightSize() as evaluated:
        total = cross_entropy_sum(h_ND, weight_VD, labels_N, chunk_tokens=4)
    assert trained.count > 0 and evaluated.count == 0
    assert total == wanted.detach()


def test_cross_entropy_of_no_labels_is_zero():
    h_ND = torch.randn(5, 4, requires_grad=True)
    total = cross_entropy_sum(h_ND, torch.randn(9, 4), torch.full((5,), -100))
    total.backward()
    assert total.item() == 0 and h_ND.grad.eq(0).all()


def test_cross_entropy_never_holds_all_logits():
    h_ND, w_VD = torch.randn(4096, 8), torch.randn(512, 8, requires_grad=True)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    with Watch():
        cross_entropy_sum(h_ND, w_VD, torch.zeros(4096, dtype=torch.int64), 256).backward()
    assert max(sizes) <= 256 * 512


@pytest.mark.parametrize(
    ("op", "backend"), [("ssd", "reference"), ("conv", "reference"), ("conv", "torch"), ("attention", "reference")]
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_document(op, backend, poison):
    """Backends made of matrix products over several documents cannot promise this: 0 · NaN is NaN there."""
    function = OPS[op].backends[backend].function
    for case in cases(op, Setting(CPU)):
        if case.start is None:
            continue
        poisoned = [tensor.clone() for tensor in case.inputs]
        for tensor in poisoned[: case.by_position]:
            tensor[:, : case.start] = poison
        before, after = (case.call(function, inputs)[:, case.start :] for inputs in (case.inputs, poisoned))
        assert torch.equal(before, after), case.name


def test_auto_takes_the_fastest_and_says_why():
    choices = resolve(BackendsSpec(), CPU)
    assert {op: choice.name for op, choice in choices.items()} == {
        "ssd": "chunked",
        "conv": "torch",
        "attention": "sdpa",
        "experts": "grouped",
        "add_norm": "torch",
        "orthogonalise": "reference",
        "router": "torch",
        "engram": "torch",
    }
    assert all(choice.reason for choice in choices.values())
    assert functions(choices)["ssd"] is ssd_chunked


def test_a_named_backend_is_taken_or_refused(monkeypatch):
    named = BackendsSpec(experts="grouped", ssd="reference")
    assert resolve(named, CPU)["ssd"] == ("reference", "named in the spec", True)
    monkeypatch.delattr(F, "grouped_mm")
    with pytest.raises(ValueError, match=r"train\.backends\.experts: 'grouped' cannot run on cpu: .*use 'auto'"):
        resolve(named, CPU)
    fallen_back = resolve(BackendsSpec(), CPU)["experts"]
    assert fallen_back.name == "reference" and "not grouped" in fallen_back.reason


def test_every_backend_of_the_spec_is_registered():
    for op, field in BackendsSpec.model_fields.items():
        assert set(field.annotation.__args__) == {"auto", *OPS[op].backends}
