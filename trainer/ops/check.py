"""Compare every backend with its reference on this device; the results are parity records.

Inputs are drawn in fp32, rounded to the number format and handed to both; the reference computes on them in fp32.
Errors are the largest difference as a part of the reference's largest value, over outputs and over gradients of a
fixed random projection of them. Leaks: the same call once more with another first document of each row; what moved in
the rest of the row, outputs and gradients, measured in the same way.

Legend: B rows, T positions, S tokens, E experts.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kinds.ngrams import multipliers
from trainer.ops import OPS, Documents, Setting
from trainer.ops.engram import Hash
from trainer.ops.setting import VARIANT, interpreted
from trainer.parity import Record, package_version

# fp32 on a GPU: Triton's products round their operands to TF32, 10 bits of mantissa.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
TF32_TOLERANCE = 5e-3

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """Inputs of one comparison and how a backend is called with them.

    Attributes:
        by_position: how many of the inputs, from the first, are [B, T, …].
        start: where the second document of each row begins; None: no leak can be looked for.
    """

    name: str
    inputs: list[Tensor]
    call: Callable[[Function, list[Tensor]], Tensor]
    by_position: int = 0
    start: int | None = None


def compare(op: str, backend: str, setting: Setting) -> Record:
    """Run all cases of one backend.

    Raises:
        ValueError: the backend cannot run in this setting.
    """
    chosen = OPS[op].backends[backend]
    if (problem := chosen.unsupported(setting)) is not None:
        raise ValueError(f"{op}: '{backend}' cannot run on {setting.device.type}: {problem}")
    reference = OPS[op].backends["reference"].function
    forward = backward = leak = 0.0
    with launchable(setting):
        for case in cases(op, setting):
            found, expected = _values(chosen.function, case), _values(reference, case, wide=True)
            errors = [difference(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
            forward, backward = worst(forward, errors[0]), worst(backward, *errors[1:])
            if case.start is not None:
                leak = worst(leak, _leak(chosen.function, case, case.start))
    tf32 = setting.variant == "fp32" and setting.device.type == "cuda" and not chosen.portable
    tolerance = TF32_TOLERANCE if tf32 else TOLERANCE[setting.variant]
    return Record(
        op=op,
        backend=backend,
        variant=setting.variant,
        package=chosen.package,
        version=package_version(chosen.package) or "unknown",
        torch=package_version("torch") or "unknown",
        device_class=setting.device_class,
        device=device_name(setting.device),
        forward_error=float(f"{forward:.2e}"),
        backward_error=float(f"{backward:.2e}"),
        leak=float(f"{leak:.2e}"),
        tolerance=tolerance,
        passed=forward <= tolerance and backward <= tolerance and leak <= tolerance,
    )


@contextmanager
def launchable(setting: Setting) -> Iterator[None]:
    """For Triton's interpreter, which has no device: launchers select none, autotuning takes the smallest blocks."""
    if not interpreted(setting.device):
        yield
        return
    with (
        patch("torch.cuda.device", lambda device: nullcontext()),
        patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=1)),
        patch("triton.runtime.autotuner.Autotuner._bench", lambda *args, config, **kwargs: [_block_size(config)]),
    ):
        yield


def _block_size(config: Any) -> float:
    """Elements of a tile of this autotuning choice; the interpreter computes masked ones too."""
    return float(math.prod(value for name, value in config.kwargs.items() if name.startswith("BLOCK")))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def variants(op: str, backend: str, device: torch.device) -> Iterator[Setting]:
    """The settings in which a backend can run on this device."""
    for dtype in VARIANT:
        setting = Setting(device, dtype)
        if OPS[op].backends[backend].unsupported(setting) is None:
            yield setting


def _values(function: Function, case: Case, *, wide: bool = False, start: int = 0) -> list[Tensor]:
    """Output, then gradients of its projection on a fixed direction from position `start` on; `wide`: all in fp32."""
    leaves = [(tensor.float() if wide else tensor).detach().clone().requires_grad_() for tensor in case.inputs]
    output = case.call(function, leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output.device)
    if start:
        direction[:, :start] = 0
    (output.float() * direction).sum().backward()
    return [output.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def worst(*errors: float) -> float:
    """The largest; a NaN is the worst of all."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def _leak(function: Function, case: Case, start: int) -> float:
    generator = torch.Generator().manual_seed(11)
    other = [tensor.clone() for tensor in case.inputs]
    for tensor in other[: case.by_position]:
        noise = torch.rand(tensor[:, :start].shape, generator=generator) * 3 + 0.5
        tensor[:, :start] *= noise.to(tensor)
    before = _values(function, case, start=start)
    after = _values(function, Case(case.name, other, case.call), start=start)
    moved = difference(after[0][:, start:], before[0][:, start:])
    for index, (mine, theirs) in enumerate(zip(after[1:], before[1:], strict=True)):
        since = start if index < case.by_position else 0
        moved = worst(moved, difference(mine[:, since:] if since else mine, theirs[:, since:] if since else theirs))
    return moved


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest |difference| over the largest |expected|, at least 0.1, because inputs are around 1."""
    return (found - expected).abs().max().item() / max(expected.abs().max().item(), 0.1)


def cases(op: str, setting: Setting) -> Iterator[Case]:
    made = {
        "ssd": _ssd,
        "conv": _conv,
        "attention": _attention,
        "experts": _experts,
        "add_norm": _add_norm,
        "orthogonalise": _orthogonalise,
        "router": _router,
        "engram": _engram,
    }
    return made[op](setting)


def _documents(device: torch.device, length: int) -> Iterator[tuple[str, Documents, int | None]]:
    """Ways to cut two rows into documents, and where the second one begins in both."""
    position_T = torch.arange(length)

    def rows(*cuts: list[int]) -> Documents:
        seq_idx_BT = torch.stack([sum(((position_T >= cut).int() for cut in row), position_T * 0) for row in cuts])
        return Documents(seq_idx_BT.to(device, torch.int32))

    yield "one document", rows([], []), None
    yield "ragged documents", rows([5, 6, 7, 64, 71, 100], [5, 128]), 5
    yield "one-token documents", Documents(position_T.int().to(device).repeat(2, 1)), 1
    # A row may begin in the middle of a document, whose number then is not 0.
    yield "middle of a document", Documents((rows([33], [33]).seq_idx_BT + 7).contiguous()), 33


def _draw(setting: Setting, *shape: int, seed: int) -> Tensor:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return tensor.to(setting.device, setting.dtype)


def _ssd(setting: Setting) -> Iterator[Case]:
    length, heads, groups, width, state, chunk = 150, 4, 2, 32, 32, 64
    if interpreted(setting.device):
        length, heads, width, state, chunk = 40, 2, 16, 16, 32
    for name, documents, start in _documents(setting.device, length):
        inputs = [
            _draw(setting, 2, length, heads, width, seed=1),
            F.softplus(_draw(setting, 2, length, heads, seed=2).float() - 2),
            _draw(setting, 2, length, groups, state, seed=3),
            _draw(setting, 2, length, groups, state, seed=4),
            -torch.rand(heads, generator=torch.Generator().manual_seed(5)).to(setting.device) * 8 - 0.5,
            _draw(setting, heads, seed=6).float(),
        ]

        def call(function: Function, t: list[Tensor], documents: Documents = documents) -> Tensor:
            x, dt, B, C, A, D = t
            return function(x, dt, A, B, C, D, documents, chunk)

        yield Case(name, inputs, call, 4, start)


def _conv(setting: Setting) -> Iterator[Case]:
    length, channels = 150, 32
    for dilation, with_bias in ((1, True), (3, False)):
        for name, documents, start in _documents(setting.device, length):
            inputs = [_draw(setting, 2, length, channels, seed=1), _draw(setting, channels, 4, seed=2).float()]
            inputs += [_draw(setting, channels, seed=3).float()] if with_bias else []

            def call(
                function: Function, t: list[Tensor], documents: Documents = documents, dilation: int = dilation
            ) -> Tensor:
                return function(t[0], t[1], t[2] if len(t) > 2 else None, documents, dilation)

            yield Case(f"{name}, dilation {dilation}", inputs, call, 1, start)


def _attention(setting: Setting) -> Iterator[Case]:
    length, heads, kv_heads, width = 150, 4, 2, 32
    for name, documents, start in _documents(setting.device, length):
        inputs = [_draw(setting, 2, length, number, width, seed=number) for number in (heads, kv_heads, kv_heads)]
        inputs[2] = inputs[2].flip(1)

        def call(function: Function, t: list[Tensor], documents: Documents = documents) -> Tensor:
            return function(*t, documents)

        yield Case(name, inputs, call, 3, start)


def _experts(setting: Setting) -> Iterator[Case]:
    hidden, width, experts, top_k = 64, 128, 8, 2
    generator = torch.Generator().manual_seed(7)
    some = torch.stack([torch.randperm(experts - 1, generator=generator)[:top_k] for _ in range(200)])
    for name, choices in (
        ("an empty expert", some + (some >= 2)),
        ("two experts for all tokens", torch.tensor([5, 1]).repeat(70, 1)),
        ("one token", torch.tensor([[3, 6]])),
    ):
        weight_SK = torch.rand(choices.shape, generator=torch.Generator().manual_seed(4)).to(setting.device) + 0.1
        for activation, maps in (("relu2", 1), ("swiglu", 2)):
            inputs = [
                _draw(setting, len(choices), hidden, seed=1),
                _draw(setting, experts, maps * width, hidden, seed=2) / 8,
                _draw(setting, experts, hidden, width, seed=3) / 8,
                weight_SK,
            ]

            def call(
                function: Function,
                t: list[Tensor],
                choices: Tensor = choices.to(setting.device),
                activation: str = activation,
            ) -> Tensor:
                x, up, down, weight = t
                return function(x, up, down, choices, weight, activation)

            yield Case(f"{name}, {activation}", inputs, call)


def _add_norm(setting: Setting) -> Iterator[Case]:
    for width in (48, 100):
        inputs = [_draw(setting, 2, 70, width, seed=seed) for seed in (1, 2)]
        inputs.append(_draw(setting, width, seed=3).float())

        def call(function: Function, t: list[Tensor]) -> Tensor:
            return torch.stack(function(t[0], t[1], t[2], 1e-5))

        def norm_alone(function: Function, t: list[Tensor]) -> Tensor:
            return torch.stack(function(t[0], None, t[1], 1e-5))

        yield Case(f"sum and norm, width {width}", inputs, call)
        yield Case(f"norm alone, width {width}", [inputs[0], inputs[2]], norm_alone)


def _orthogonalise(setting: Setting) -> Iterator[Case]:
    """Two steps: from the third on the polynomials steepen the rounding of bfloat16 to a tenth of the largest value,
    by whatever kernel. Nobody differentiates this operation."""
    for count, rows, columns in ((3, 128, 256), (2, 256, 128), (1, 520, 520), (2, 72, 200)):
        size = max(rows, columns)
        frame_NSS = torch.linalg.qr(torch.randn(count, size, size, generator=torch.Generator().manual_seed(1))).Q
        scale_n = torch.linspace(0.5, 1.5, columns)
        x_Nmn = (frame_NSS[:, :rows, :columns] * scale_n).to(setting.device, setting.dtype)

        def call(function: Function, t: list[Tensor]) -> Tensor:
            largest = t[0].detach().abs().max()
            return function(t[0].detach() / largest, "polar_express", 2) + 0 * t[0]

        yield Case(f"{count} of {rows} x {columns}", [x_Nmn], call)


def _router(setting: Setting) -> Iterator[Case]:
    """Outputs are scores and weights; the choice is that of the weights' places in a row of all experts."""
    for experts, top_k, softmax, renormalise in ((64, 6, False, True), (9, 2, True, False), (40, 4, True, True)):
        # Far from each other, so that rounding changes no choice.
        order = torch.rand(70, experts, generator=torch.Generator().manual_seed(experts)).argsort(-1)
        logits = (order / experts * 4 - 2).to(setting.device)
        bias = torch.linspace(-0.01, 0.01, experts, device=setting.device)

        def call(
            function: Function,
            t: list[Tensor],
            bias: Tensor = bias,
            top_k: int = top_k,
            softmax: bool = softmax,
            renormalise: bool = renormalise,
        ) -> Tensor:
            routed = function(t[0], bias, top_k, 2.5, softmax=softmax, renormalise=renormalise)
            placed = torch.zeros_like(routed.score_SE).scatter(-1, routed.expert_SK, routed.weight_SK)
            return torch.cat([routed.score_SE, placed, routed.load_E[None] / len(t[0])])

        yield Case(f"{top_k} of {experts} experts", [logits], call)


def _engram(setting: Setting) -> Iterator[Case]:
    """Small tables, so that tokens share rows; in FP32 under autocast, as they are trained."""
    device, length, tokens = setting.device, 40 if interpreted(setting.device) else 150, 24
    for primes, orders, width in (([11, 13], 2, 20), ([11, 13, 17, 19, 23, 29], 4, 8)):
        numbers = (torch.arange(tokens) // 2, multipliers(3, orders, tokens), primes, [0, *primes[:-1]])
        hash = Hash(*(torch.as_tensor(number, dtype=torch.int64).to(device) for number in numbers))
        hash = hash._replace(offset_J=hash.offset_J.cumsum(0))
        ids_BT = torch.randint(tokens, (2, length), generator=torch.Generator().manual_seed(2)).to(device)
        table_RW = torch.randn(sum(primes), width, generator=torch.Generator().manual_seed(1)).to(device)
        for name, documents, _ in _documents(device, length):

            def call(
                function: Function,
                t: list[Tensor],
                ids_BT: Tensor = ids_BT,
                documents: Documents = documents,
                hash: Hash = hash,
            ) -> Tensor:
                with torch.autocast(device.type, setting.dtype, enabled=setting.dtype is not torch.float32):
                    return function(ids_BT, documents, hash, t[0])

            yield Case(f"{name}, {len(primes)} tables", [table_RW], call)
