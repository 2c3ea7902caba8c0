"""Of two implementations of the orthogonalisation, for each shape of matrices the faster one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.ops.orthogonalise import Coefficients

Orthogonalise = Callable[[Tensor, Coefficients, int], Tensor]
Agree = Callable[[Any], Any]  # rank 0's value on every rank
REPEATS = 3


class FastestByShape:
    """Calls the first function for matrices of a shape for which it was chosen, else the second.

    Kernels that use symmetry lose on small matrices, and where is a matter of the device. Ranks that update copies of
    one weight have to call the same function, or their copies drift apart by its rounding; so rank 0 chooses for all.
    """

    def __init__(self, function: Orthogonalise, plain: Orthogonalise) -> None:
        self._functions = function, plain
        self.taken: dict[tuple[int, int], bool] = {}

    def choose(
        self,
        counts: Mapping[tuple[int, int], int],
        like: Tensor,
        coefficients: Coefficients,
        steps: int,
        agree: Agree = lambda value: value,
    ) -> None:
        """Time both on random matrices; a collective of all ranks, which waits for the device.

        Args:
            counts: matrices by shape, in batches as they come; the same on all ranks.
            like: has the dtype and the device of a batch.
        """
        taken, generator = {}, torch.Generator(like.device).manual_seed(0)
        for shape, count in counts.items():
            x_Nmn = torch.randn(count, *shape, device=like.device, generator=generator).to(like.dtype)
            first, second = (milliseconds(each, x_Nmn, coefficients, steps) for each in self._functions)
            taken[shape] = first < second
        self.taken = agree(taken)

    def __call__(self, x_Nmn: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
        rows, columns = x_Nmn.shape[1:]
        function, plain = self._functions
        return (function if self.taken.get((rows, columns)) else plain)(x_Nmn, coefficients, steps)


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
