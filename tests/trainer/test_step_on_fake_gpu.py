"""A whole training step on fake GPU tensors, which have no data.

torch then checks what no CPU can show: that nothing on the host is mixed with what is on the device, and that products
get dtypes and shapes as kernels of a GPU take them. Its autograd engine wants a real GPU; so each hand-written backward
pass is called right after its forward pass, and the optimizers get gradients made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from autograd_context import Context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from manifests.spec import load_job
from trainer import ops
from trainer.model.engram import Engram
from trainer.model.hybrid import HybridModel, ModelOutput
from trainer.optim import build_optimizers, clip_gradients
from trainer.outcome import why_skipped
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import keep_copies
from trainer.spec import BackendsSpec, TrainSpec
from trainer.spikes import Limits

ROWS, POSITIONS = 2, 512


@contextmanager
def gpu_without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yields the names of the hand-written functions that were differentiated."""
    differentiated: list[str] = []

    def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
        context = Context(*arguments)
        with torch.no_grad():
            output = function.forward(context, *arguments)
            first = output[0] if isinstance(output, tuple) else output
            assert first.device.type == "cuda"
            others = [None] * (len(output) - 1) if isinstance(output, tuple) else []
            gradients = function.backward(context, torch.empty_like(first), *others)
        for argument, gradient in zip(arguments, gradients, strict=True):
            if gradient is not None:
                of_gradient = (gradient.shape, gradient.device.type)  # autograd casts it to the argument's dtype
                assert of_gradient == (argument.shape, "cuda"), function.__name__
        differentiated.append(function.__name__)
        return output

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.autograd.Function, "apply", classmethod(apply))
    # torch.autocast looks for a GPU before it sets these.
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            yield differentiated
    finally:
        torch.set_autocast_enabled("cuda", False)


class Copies(TorchDispatchMode):
    """Copies between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name in ("aten::_to_copy", "aten::copy_", "aten::_copy_from"):
            places = {tensor.device.type for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}
            self.found += [str(function)] * (len(places) > 1)
        return result


def made(spec: TrainSpec, backends: BackendsSpec) -> HybridModel:
    choices = ops.resolve(backends, "cuda", torch.bfloat16, spec.model)
    with torch.device("cuda"):
        model = HybridModel(spec.model, ops.functions(choices))
    model.choices = choices
    for module in model.modules():
        if isinstance(module, Engram):
            classes = list(range(spec.model.vocab_size)) if module.spec.compress_tokens else None
            module.hash.set_constants(classes)
    return model.train()


def forward(model: HybridModel, spec: TrainSpec) -> ModelOutput:
    ids_BT, seq_idx_BT, labels_BT = (
        torch.zeros(ROWS, POSITIONS, dtype=dtype, device="cuda") for dtype in (torch.int64, torch.int32, torch.int64)
    )
    return model(ids_BT, seq_idx_BT, labels_BT)


@pytest.mark.parametrize("preset", ["tiny", pytest.param("h100-4b", marks=pytest.mark.slow)])
def test_every_tensor_of_a_step_is_on_the_gpu(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_job(preset).train_spec()
    with gpu_without_data(monkeypatch) as differentiated:
        model = made(spec, BackendsSpec())
        keep_copies(model, Layout(), torch.device("cuda"), torch.bfloat16)
        output = forward(model, spec)
        copies = [copy for moe in model.moe_sublayers() for copy in moe.copies.values()]
        assert {(copy.device.type, copy.dtype) for copy in copies} == {("cuda", torch.bfloat16)}
        assert {part.device.type for part in (output.ce_sum, output.aux_sum, output.expert_load_LE)} == {"cuda"}
        assert set(differentiated) >= {"_RMSNorm", "_GatedRMSNorm", "_ShiftedConv", "_WithinChunk", "_Experts"}
        assert differentiated[-1] == "_ChunkedCrossEntropy"
        optimizers = build_optimizers(model, spec.optimizer, spec.model)
        for parameter in optimizers.parameters:
            parameter.grad = torch.empty_like(parameter)
        with Copies() as copies:  # a value that the host needs would be an error: there is none
            norm, _ = clip_gradients(optimizers.parameters, spec.optimizer.clip_norm)
            skip = why_skipped(output.ce_sum.double(), norm, Limits(9.0, 9.0)) >= 0
            optimizers.step(skip)
            model.update_router_bias(output.expert_load_LE.masked_fill(skip, 0))
        assert not copies.found, "the host waits for a copy from memory that is not pinned"
        assert {tensor.device.type for tensor in optimizers.state_dict().values()} == {"cuda"}
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"cuda"}


def test_a_tensor_left_on_the_host_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above could not fail; and a copy of such a tensor."""
    spec = load_job("tiny").train_spec()
    with gpu_without_data(monkeypatch):
        model = made(spec, BackendsSpec())
        model.final_norm.weight = torch.nn.Parameter(torch.ones(spec.model.hidden))
        with pytest.raises(RuntimeError, match="device"):
            forward(model, spec)
        with Copies() as copies:
            torch.tensor([1.0], device="cuda")
        assert copies.found
