"""What a CUDA graph does, on a CPU: a recording repeats the same operations on the same memory, and no Python runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Tape:
    """A recorder as `trainer.model.graphs` wants one. Operators of our own are repeated whole, so they may read."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        noted = Noted()
        with noted:
            function()

        @torch.no_grad()
        @torch.autocast("cpu", enabled=False)  # the operations are those that autocast has come to
        def replay() -> None:
            self.replays += 1
            for operation, args, kwargs, outputs in noted.calls:
                found = operation(*args, **kwargs)
                for kept, new in zip(outputs, tensors(found), strict=True):
                    assert (kept.shape, kept.dtype) == (new.shape, new.dtype), operation
                    if kept.data_ptr() != new.data_ptr():  # neither a view nor in place
                        kept.copy_(new)

        return replay

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield


class Noted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name.partition("::")[2] in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        # Tensors whose history is not needed: otherwise the tape would keep all of autograd's.
        plain = [torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, each) for each in (args, kwargs)]
        self.calls.append((function, *plain, [tensor.detach() for tensor in tensors(found)]))
        return found


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
