"""CUDA graphs: the layers of a training pass are launched from recordings, instead of kernel by kernel.

The first pass of a shape records each layer's forward pass and then, from the last layer to the first, its backward
passes. Recordings read and write fixed addresses, so their inputs are copied to where they were recorded: tokens and
documents once for all layers. A layer reads the residual stream where the layer before has left it, and all share one
tensor for its gradient. Memory within recordings comes from one pool: as they are launched in the order in which they
were recorded, they may use it one after the other, as without graphs.

A recording adds to gradients by itself, and autograd never sees those of parameters. So nobody can wait for them: runs
of several ranks have no graphs. Weights may change in place, their memory may not (`_addresses`).

Embedding, final norm, cross-entropy, multi-token prediction and everything without gradients stay as they are. Nothing
in a layer may depend on the data in size. The one thing that would, the number of documents, has a bound: before a pass
with more of them all is recorded anew. Such a pass cannot call the layers instead, as there is no memory for them
beside that of the recordings.

Legend: B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.errors import first_line
from trainer.model.hybrid import HybridModel, Layer, Run
from trainer.model.moe import Moe
from trainer.ops import Documents, narrow
from trainer.ops.experts import compute_dtype

WARM_UPS = 2  # compilers, tuners and libraries do at first calls what cannot be recorded
TOKENS_PER_DOCUMENT = 64  # at first there is room for documents of this mean length


class Recorder(Protocol):
    """Makes recordings that share memory."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What repeats all that the function launches; it is not said whether recording runs it, too."""

    def aside(self) -> AbstractContextManager[object]:
        """Around what is run before recordings and leaves nothing."""


class CudaRecorder:
    """CUDA graphs with one pool of memory, recorded on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            # Other threads, such as the loader's, may do meanwhile what a recording forbids.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                function()
        finally:
            torch.cuda.set_stream(before)  # torch does not, if the recording cannot be ended
        return graph.replay

    @contextmanager
    def aside(self) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # else the pool could not have that memory


class Shape(NamedTuple):
    """What a set of recordings is made for."""

    rows: int
    length: int
    dtype: torch.dtype
    differentiated: bool  # the input of the first layer has a gradient
    documents: int  # at most
    addresses: tuple[int, ...]


class LayerGraphs:
    """The graphs of a model's layers; HybridModel.graphs.

    Args:
        recorder: of a device, for all layers; None for CUDA graphs.
        problem: is called with the reason if they cannot be made, after which the layers are called as ever.
    """

    def __init__(
        self,
        model: HybridModel,
        problem: Callable[[str], None],
        recorder: Callable[[torch.device], Recorder] | None = None,
    ) -> None:
        self._model, self._problem, self._recorder = model, problem, recorder or CudaRecorder
        self._sums = _Sums(model.layers)
        self._set: _Set | None = None
        self._works = True

    def of(
        self, x_BTD: Tensor, ids_BT: Tensor, seq_idx_BT: Tensor, num_documents: int | None
    ) -> tuple[Documents, Sequence[Run]] | None:
        """See `trainer.model.hybrid.Graphs`."""
        if not (self._works and self._model.training and torch.is_grad_enabled()) or num_documents is None:
            return None
        rows, length, _ = x_BTD.shape
        kept = self._set.shape.documents if self._set else 0
        documents = max(kept, rows * length // TOKENS_PER_DOCUMENT, 1 << (num_documents - 1).bit_length())
        addresses = tuple(_addresses(self._model))
        shape = Shape(rows, length, x_BTD.dtype, x_BTD.requires_grad, documents, addresses)
        if self._set is None or self._set.shape != shape:
            self._set = None  # its memory is needed
            try:
                self._set = self._recorded(shape, x_BTD, ids_BT, seq_idx_BT)
            except Exception as error:  # of torch, Triton, a package, …
                self._works = False
                self._problem(first_line(error))
                return None
        self._sums.take()
        return self._set.begun(ids_BT, seq_idx_BT)

    def _recorded(self, shape: Shape, x_BTD: Tensor, ids_BT: Tensor, seq_idx_BT: Tensor) -> _Set:
        with self._sums.aside(), _autocast(x_BTD):
            return _Set(self._model, self._recorder(x_BTD.device), shape, x_BTD, ids_BT, seq_idx_BT)


def _addresses(model: HybridModel) -> Iterator[int]:
    """Of all that layers read and that is not theirs alone: optimizers and loading must keep it in place."""
    for layer in model.layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            yield tensor.data_ptr()
    for moe in model.moe_sublayers():
        for copy in moe.copies.values():
            yield copy.data_ptr()


def _autocast(x: Tensor) -> AbstractContextManager[object]:
    """As it is, but casts of weights are not kept: they have to be part of the recordings."""
    kind = x.device.type
    torch.clear_autocast_cache()
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


class _Sums:
    """Where recordings add gradients: one tensor for each parameter of the layers, for ever at its address."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._parameters = [parameter for parameter in layers.parameters() if parameter.requires_grad]
        self._sums: list[Tensor] = []

    def take(self) -> None:
        """Make them the gradients, with what is there already: nothing at first, or after a pass without graphs."""
        fresh = [total for p, total in zip(self._parameters, self._sums, strict=True) if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter, total in zip(self._parameters, self._sums, strict=True):
            if parameter.grad is not None and parameter.grad is not total:
                total.copy_(parameter.grad)
            parameter.grad = total

    @contextmanager
    def aside(self) -> Iterator[None]:
        """They are the gradients in the block, which adds only zeros."""
        before = [parameter.grad for parameter in self._parameters]
        self._sums = self._sums or [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        try:
            for parameter, total in zip(self._parameters, self._sums, strict=True):
                parameter.grad = total
            yield
        finally:
            for parameter, gradient in zip(self._parameters, before, strict=True):
                parameter.grad = gradient


class _Set:
    """Recordings of all layers for one shape."""

    def __init__(
        self,
        model: HybridModel,
        recorder: Recorder,
        shape: Shape,
        x_BTD: Tensor,
        ids_BT: Tensor,
        seq_idx_BT: Tensor,
    ) -> None:
        self.shape = shape
        self._ids_BT, self._seq_idx_BT = ids_BT.clone(), seq_idx_BT.clone()
        self._documents = Documents(self._seq_idx_BT, shape.documents, any=True)
        with recorder.aside():
            for _ in range(WARM_UPS):
                self._warm_up(model, x_BTD)

        def prepare() -> None:
            model.prepared(self._documents, compute_dtype(x_BTD))

        self._prepare = recorder.record(prepare)
        gradient_BTD = torch.zeros_like(x_BTD, requires_grad=False)
        inner_BTD = x_BTD.detach().clone().requires_grad_(shape.differentiated)
        self._layers: list[_LayerGraph] = []
        for layer in model.layers:
            graph = _LayerGraph(layer, inner_BTD, gradient_BTD)
            graph.record_forward(recorder, self._ids_BT, self._documents)
            inner_BTD = graph.outputs[0].detach().requires_grad_(graph.outputs[0].requires_grad)
            self._layers.append(graph)
        for graph in reversed(self._layers):
            graph.record_backward(recorder)

    def _warm_up(self, model: HybridModel, x_BTD: Tensor) -> None:
        """Both passes of each layer alone. Its gradients are zeros, which change no sums and no statistics of FP8."""
        documents = Documents(self._seq_idx_BT, self.shape.documents, any=True)
        model.prepared(documents, compute_dtype(x_BTD))
        for layer in model.layers:
            x_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)
            x_BTD, aux, _ = layer(x_BTD, self._ids_BT, documents)
            outputs = [output for output in (x_BTD, aux) if output.requires_grad]
            with torch.autocast(x_BTD.device.type, enabled=False):
                if outputs:
                    torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])

    def begun(self, ids_BT: Tensor, seq_idx_BT: Tensor) -> tuple[Documents, Sequence[Run]]:
        """For a pass over these tokens."""
        self._ids_BT.copy_(ids_BT, non_blocking=True)
        self._seq_idx_BT.copy_(seq_idx_BT, non_blocking=True)
        self._prepare()
        return self._documents, self._layers


class _LayerGraph:
    """Recordings of one layer; is called instead of it.

    Args:
        inner_BTD: where it reads the residual stream.
        gradient_BTD: where it reads and leaves the gradient of the stream; all layers have the same one.
    """

    def __init__(self, layer: Layer, inner_BTD: Tensor, gradient_BTD: Tensor) -> None:
        self._layer, self._inner_BTD, self._gradient_BTD = layer, inner_BTD, gradient_BTD
        # Lets autograd call the backward pass also if the stream has no gradient and only parameters have one.
        self._anchor = torch.empty(0, device=inner_BTD.device, requires_grad=True)
        self.outputs: list[Tensor] = []  # the stream, the layer's loss, and loads; where the recording writes them

    def record_forward(self, recorder: Recorder, ids_BT: Tensor, documents: Documents) -> None:
        def forward() -> None:
            x_BTD, aux, loads = self._layer(self._inner_BTD, ids_BT, documents)
            self.outputs = [x_BTD, aux, *loads]

        self._forward = recorder.record(forward)

    def record_backward(self, recorder: Recorder) -> None:
        differentiated = [output.requires_grad for output in self.outputs[:2]]
        given = [self._gradient_BTD, torch.zeros_like(self.outputs[1], requires_grad=False)]
        self._aux_gradient = given[1]
        self._differentiated = differentiated
        leaves = list(self._leaves())

        def backward() -> None:
            outputs = [output for output, wanted in zip(self.outputs, differentiated, strict=False) if wanted]
            gradients = [gradient for gradient, wanted in zip(given, differentiated, strict=True) if wanted]
            with torch.autocast(self._inner_BTD.device.type, enabled=False):
                tensors = [tensor for tensor, _ in leaves]
                found = torch.autograd.grad(outputs, tensors, gradients, allow_unused=True)
            for (_, add), gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    add(gradient)

        self._backward = recorder.record(backward) if any(differentiated) and leaves else None
        self.outputs = [output.detach() for output in self.outputs]  # frees what the backward pass has read

    def _leaves(self) -> Iterator[tuple[Tensor, Callable[[Tensor], object]]]:
        """All that has a gradient, and what takes it."""
        if self._inner_BTD.requires_grad:
            yield self._inner_BTD, self._gradient_BTD.copy_
        for parameter in self._layer.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                yield parameter, parameter.grad.add_
        for moe in self._layer.modules():
            for copy in moe.copies.values() if isinstance(moe, Moe) else ():
                if copy.requires_grad:
                    yield copy, partial(narrow.add, copy)

    def __call__(self, x_BTD: Tensor, ids_BT: Tensor, documents: Documents) -> tuple[Tensor, Tensor, list[Tensor]]:
        x_BTD, aux, *loads = _Replayed.apply(self, x_BTD, self._anchor)
        return x_BTD, aux, loads

    def forward(self, x_BTD: Tensor) -> list[Tensor]:
        _put(self._inner_BTD, x_BTD)
        self._forward()
        return [output.detach() for output in self.outputs]

    def backward(self, *gradients: Tensor | None) -> Tensor | None:
        """The gradient of the stream before the layer, from those of its first two outputs."""
        for inner, gradient in zip((self._gradient_BTD, self._aux_gradient), gradients, strict=True):
            _put(inner, gradient)
        if self._backward is not None:
            self._backward()
        return self._gradient_BTD.detach() if self._inner_BTD.requires_grad else None

    def constant(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Those without a gradient."""
        flags = [*self._differentiated, *(False for _ in outputs[2:])]
        return [output for output, flag in zip(outputs, flags, strict=True) if not flag]


@torch.no_grad()
def _put(inner: Tensor, value: Tensor | None) -> None:
    if value is None:
        inner.zero_()
    elif value.data_ptr() != inner.data_ptr():
        inner.copy_(value)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, graph: _LayerGraph, x_BTD: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        ctx.graph = graph
        ctx.set_materialize_grads(False)
        outputs = graph.forward(x_BTD)
        ctx.mark_non_differentiable(*graph.constant(outputs))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        graph, ctx.graph = ctx.graph, None  # a loss that is kept would keep the memory of the recordings
        return None, graph.backward(*gradients[:2]), None
