"""Of two implementations of the orthogonalisation, for each shape of matrices the faster one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.ops.orthogonalise import Coefficients

Orthogonalise = Callable[[Tensor, Coefficients, int], Tensor]
REPEATS = 3


class FastestByShape:
    """Calls the first function where it is the faster one, else the second.

    The first batch of each shape is timed, which waits for the device: in the first step. Kernels that use symmetry
    lose on small matrices, and where is a matter of the device.
    """

    def __init__(self, function: Orthogonalise, plain: Orthogonalise) -> None:
        self._functions = function, plain
        self.taken: dict[tuple[torch.Size, tuple[int, ...]], Orthogonalise] = {}

    def __call__(self, x_Nmn: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
        key = x_Nmn.shape, x_Nmn.stride()
        if key not in self.taken:
            times = [milliseconds(each, x_Nmn, coefficients, steps) for each in self._functions]
            self.taken[key] = self._functions[times[0] >= times[1]]
        return self.taken[key](x_Nmn, coefficients, steps)


def milliseconds(function: Orthogonalise, x_Nmn: Tensor, coefficients: Coefficients, steps: int) -> float:
    """The least of REPEATS calls after one that may compile; on a GPU. `x_Nmn` is not changed."""
    times = []
    for _ in range(1 + REPEATS):
        copy_Nmn = x_Nmn.clone()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(copy_Nmn, coefficients, steps)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times[1:])
