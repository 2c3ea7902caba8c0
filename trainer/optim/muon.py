"""Muon: momentum, orthogonalised, for matrices (Jordan 2024; scale of Moonlight, arXiv 2502.16982), and TEON.

Matrices of one shape are orthogonalised together, in one batched product: a mixture of experts has thousands of small
ones, which one by one would cost more in launches than in arithmetic. Where several ranks share a parameter each matrix
is orthogonalised by exactly one of them.

TEON (arXiv 2601.23261) orthogonalises the same matrix of K successive layers as one: momenta M⁽¹⁾ … M⁽ᴷ⁾ [m, n] stand
side by side as [m, K·n] (the mode-1 unfolding of the stacked tensor), and each layer gets its own n columns of the
result. The paper stacks whole query, key and value matrices; here a head is a matrix of its own, so head h of one layer
stands beside head h of the next.

A block whose gradient is exactly zero (an expert without tokens) is not updated: its momentum decays, but
orthogonalised it would move the block at full speed forever, in the end in the direction of rounding errors. Weight
decay still applies.

Shape suffixes: N matrices, m rows, n columns of one block (after the cuts of rules.py), k = K·n columns of a stack.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.mup import MUON_RMS
from trainer.ops.orthogonalise import Coefficients, iteration_dtype, largest, orthogonalise_, power_of_two
from trainer.optim import division
from trainer.optim.conditional import erase_, scale_, unless
from trainer.optim.division import Block, Run
from trainer.optim.exchange import Exchange, Piece, Trip
from trainer.optim.fastest import Orthogonalise
from trainer.optim.shares import Share, local

# Elements orthogonalised in one batch; bounds the temporary memory to a few GiB whatever the number of experts.
MAX_BATCH_ELEMENTS = 2**28
# The same for each thread of a CPU: what the passes over a batch read and write then stays in its cache.
CACHED_ELEMENTS = 2**19


class Muon(torch.optim.Optimizer):
    """W ← W − lr·λ·W − lr·0.2·√max(m, k)·ortho(update), for each block [m, n] of each weight, K of them stacked.

    The scale gives every block the root-mean-square update 0.2 that AdamW typically has, so that both share one
    learning rate. An orthogonal [m, k] matrix with m ≤ k has root-mean-square 1/√k, so K stacked blocks need √K times
    the factor of one, √(K·n) instead of √n: without it TEON would train at 1/√K of the rate. The decay is decoupled and
    not scaled, as in AdamW. A group with a "spectral_base" b has the scale 0.2·√(b·m/k) instead, for μP
    (trainer/mup.py; the b of a stack holds K² for the same reason).

    Args:
        params: groups; a group may carry "block_rows", for each of its parameters the row counts of the blocks of a
            matrix (empty: it is one block); a 3-D tensor has a matrix for each index of its first dimension; "stacks",
            tuples of the indices of parameters whose blocks are orthogonalised together, each parameter in one of
            them; "shares".
        iteration_dtype: bfloat16 or float32; None follows the device.
        state_dtype: of the momentum.
        orthogonalise: another implementation of `orthogonalise_`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.1,
        coefficients: Coefficients = "polar_express",
        steps: int = 5,
        iteration_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        orthogonalise: Orthogonalise | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "coefficients": coefficients,
            "steps": steps,
            "iteration_dtype": iteration_dtype,
            "orthogonalise": orthogonalise,
            "block_rows": None,
            "stacks": None,
            "spectral_base": None,
            "shares": None,
        }
        super().__init__(params, defaults)
        self._work: list[_Work] = []
        for group in self.param_groups:
            parameters = group["params"]
            group["block_rows"] = group["block_rows"] or [()] * len(parameters)
            group["stacks"] = group["stacks"] or [(index,) for index in range(len(parameters))]
            group["shares"] = group["shares"] or [Share(parameter) for parameter in parameters]
            for parameter, share in zip(parameters, group["shares"], strict=True):
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes [m, n] or [N, m, n], not {tuple(parameter.shape)}; give it to AdamW")
                # At once, not at the first step: a checkpoint is loaded into state that is already there.
                self.state[parameter]["momentum"] = share.zeros(state_dtype)
            self._work.append(_Work(group["shares"], group["block_rows"], group["stacks"]))

    def batches_alike(self) -> tuple[dict[tuple[int, int], int], Tensor]:
        """By shape, how many matrices a batch has at most, the same on all ranks; and an empty tensor of their dtype
        and device."""
        counts: Counter[tuple[int, int]] = Counter()
        for group in self.param_groups:
            for members in group["stacks"]:
                *matrices, rows, columns = group["params"][members[0]].shape
                for height in group["block_rows"][members[0]] or (rows,):
                    counts[height, columns * len(members)] += math.prod(matrices)
        first = self.param_groups[0]
        like = local(first["params"][0])
        most = {(m, k): max(1, min(count, MAX_BATCH_ELEMENTS // (m * k))) for (m, k), count in counts.items()}
        return most, like.new_empty(0, dtype=first["iteration_dtype"] or iteration_dtype(like.device))

    @torch.no_grad()
    def step(self, closure: None = None, skip: Tensor | None = None) -> None:
        """One update of every parameter that has a gradient; with cut parameters a collective of their ranks.

        Args:
            skip: see trainer/optim/conditional.py; the gradients of a skipped step become zero.
        """
        assert closure is None, "Muon evaluates no closure"
        for group, work in zip(self.param_groups, self._work, strict=True):
            self._step_group(group, work, skip)

    def _step_group(self, group: dict[str, Any], work: _Work, skip: Tensor | None) -> None:
        momenta = [local(self.state[parameter]["momentum"]) for parameter in group["params"]]
        rows = [_Rows.of(share, momentum) for share, momentum in zip(group["shares"], momenta, strict=True)]
        active = [row for row in rows if row.gradient is not None]
        if not active:
            return
        if skip is not None:
            erase_([row.gradient for row in active], skip)  # and a block without gradient is not updated, see above
        _accumulate([row.momentum for row in active], [row.gradient for row in active], group["momentum"], skip)
        _multiply_([row.weight for row in active], 1 - group["lr"] * group["weight_decay"], skip)
        travelling = _Travelling(group, rows, work.exchanges)
        for runs in work.batches:
            if runs := [run for run in runs if all(rows[member].gradient is not None for member in run.members)]:
                _update_runs(group, rows, runs)
        travelling.finish()


@dataclass(frozen=True)
class _Rows:
    """What this rank has of one parameter, as matrices; the matrices of a 3-D tensor lie one below the other."""

    weight: Tensor
    momentum: Tensor
    gradient: Tensor | None

    @classmethod
    def of(cls, share: Share, momentum: Tensor) -> _Rows:
        gradient = share.gradient
        columns = momentum.shape[-1]
        return cls(
            share.weight.view(-1, columns),
            momentum.view(-1, columns),
            None if gradient is None else gradient.reshape(-1, columns),
        )

    def directions(self, first: int, last: int, count: int, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Rows [first, last) as `count` matrices: what is orthogonalised of them [N, m, n], and `sizes` [2, N] of
        gradients and of directions: the largest absolute value in each."""
        assert self.gradient is not None, "every rank has the gradients of the parameters that it shares"
        shape = (count, (last - first) // count, self.weight.shape[1])
        gradient_Nmn, momentum_Nmn = self.gradient[first:last].view(shape), self.momentum[first:last].view(shape)
        x_Nmn = torch.add(gradient_Nmn, momentum_Nmn, alpha=group["momentum"]) if group["nesterov"] else momentum_Nmn
        return x_Nmn, torch.stack([largest(gradient_Nmn), largest(x_Nmn).to(gradient_Nmn.dtype)])


class _Work:
    """What this rank does for one group: batches of its own blocks, exchanges for those that are cut between ranks."""

    def __init__(self, shares: list[Share], block_rows: list[tuple[int, ...]], stacks: list[tuple[int, ...]]) -> None:
        runs: list[Run] = []
        blocks: dict[Any, list[Block]] = defaultdict(list)  # by process group; None where a rank is alone
        load: dict[Any, list[int]] = {}
        ranks: dict[Any, int] = {}
        for members in stacks:
            share = shares[members[0]]
            shape = share.parameter.shape
            ranks[share.group] = share.rank
            group_load = load.setdefault(share.group, [0] * share.ranks)
            if len(shape) == 3:  # whole matrices lie on one rank, however the first dimension is cut
                heights = block_rows[members[0]] or (shape[1],)
                assert len(set(heights)) == 1 and sum(heights) == shape[1], f"blocks {heights} of {shape[1]} rows"
                runs.append(Run(members, 0, share.weight.shape[0] * len(heights), heights[0], shape[2]))
                matrix = division.work(heights[0], shape[2] * len(members)) * len(heights)
                for rank, part in enumerate(share.part_sizes()):
                    group_load[rank] += part * matrix
                continue
            if share.bounds is None:
                raise ValueError(f"a matrix of shape {tuple(shape)} is cut over several mesh dimensions; use one")
            start = 0
            for height in block_rows[members[0]] or (shape[0],):
                blocks[share.group].append(Block(members, start, height, shape[1], share.bounds))
                start += height
            assert start == shape[0], f"blocks cover {start} of {shape[0]} rows"
        self.exchanges: list[Exchange] = []
        for group, found in blocks.items():
            owned = list(zip(found, division.owners(found, load[group]), strict=True))
            runs += division.join([b for b, owner in owned if not b.is_cut and owner == ranks[group]], ranks[group])
            cut = [(block, owner) for block, owner in owned if block.is_cut]
            for numbers in division.portions([block for block, _ in cut], MAX_BATCH_ELEMENTS):
                self.exchanges.append(Exchange([cut[number] for number in numbers], ranks[group], group))
        on_gpu = any(share.weight.device.type == "cuda" for share in shares)
        most = MAX_BATCH_ELEMENTS if on_gpu else min(MAX_BATCH_ELEMENTS, CACHED_ELEMENTS * torch.get_num_threads())
        self.batches = list(division.batches(runs, most))


def _accumulate(momenta: list[Tensor], gradients: list[Tensor], decay: float, skip: Tensor | None) -> None:
    """momentum ← decay · momentum + gradient, computed in the gradient's dtype and rounded once."""
    if momenta[0].dtype == gradients[0].dtype:
        _multiply_(momenta, decay, skip)
        torch._foreach_add_(momenta, gradients)
        return
    for momentum, gradient in zip(momenta, gradients, strict=True):
        wide = torch.add(gradient, momentum, alpha=decay)
        momentum.copy_(wide if skip is None else torch.where(skip, momentum, wide))


def _multiply_(tensors: list[Tensor], factor: float, skip: Tensor | None) -> None:
    if skip is None:
        torch._foreach_mul_(tensors, factor)
    else:
        scale_(tensors, unless(skip, factor))


def _dtype(group: dict[str, Any], rows: list[_Rows]) -> torch.dtype:
    return group["iteration_dtype"] or iteration_dtype(rows[0].weight.device)


def _rate(group: dict[str, Any], stack: Run | Block) -> float:
    """Factor on the orthogonal matrix of a stack."""
    m, k = stack.shape
    base = group["spectral_base"]
    return group["lr"] * MUON_RMS * math.sqrt(max(m, k) if base is None else base * m / k)


def _orthogonalise_(x_Nmk: Tensor, group: dict[str, Any]) -> Tensor:
    return (group["orthogonalise"] or orthogonalise_)(x_Nmk, group["coefficients"], group["steps"])


def _divisors(sizes_2KN: Tensor) -> Tensor:
    """[K, N], by which the directions of the K members of N stacks are divided before they are orthogonalised.

    One power of two for a whole stack, so that small numbers stay apart in the iteration's dtype too; infinite for a
    member without any gradient, which then has no part in the stack's update.
    """
    gradient_KN, direction_KN = sizes_2KN
    direction_KN = direction_KN.masked_fill(gradient_KN == 0, 0)
    power_N = power_of_two(direction_KN.amax(dim=0))
    return torch.where(direction_KN == 0, math.inf, power_N)


def _update_runs(group: dict[str, Any], rows: list[_Rows], runs: list[Run]) -> None:
    """Update the blocks of `runs`, all of one shape, which lie here."""
    counts = [run.count for run in runs]
    x_Nmk = rows[0].weight.new_empty((sum(counts), *runs[0].shape), dtype=_dtype(group, rows))
    for run, part_Nmk in zip(runs, x_Nmk.split(counts), strict=True):
        members = [rows[member].directions(run.start, run.end, run.count, group) for member in run.members]
        divisors_KN = _divisors(torch.stack([sizes for _, sizes in members], dim=1))
        parts = part_Nmk.split(run.columns, dim=2)
        for (direction_Nmn, _), divisor_N, part_Nmn in zip(members, divisors_KN, parts, strict=True):
            torch.div(direction_Nmn, divisor_N[:, None, None], out=part_Nmn)
    x_Nmk = _orthogonalise_(x_Nmk, group)
    for run, part_Nmk in zip(runs, x_Nmk.split(counts), strict=True):
        for member, part_Nmn in zip(run.members, part_Nmk.split(run.columns, dim=2), strict=True):
            weight = rows[member].weight[run.start : run.end]
            weight.view(part_Nmn.shape).add_(part_Nmn, alpha=-_rate(group, run))


class _Travelling:
    """Updates of blocks that are cut between ranks: their directions go to the owners, the updates come back.

    Made, it sends the directions of the first exchange, which travel while the caller updates blocks of its own. While
    one exchange is orthogonalised, the directions of the next and the updates of the one before travel; no more, since
    each may have MAX_BATCH_ELEMENTS.
    """

    def __init__(self, group: dict[str, Any], rows: list[_Rows], exchanges: list[Exchange]) -> None:
        self._group, self._rows, self._exchanges = group, rows, exchanges
        self._like = rows[0].weight.new_empty(0, dtype=_dtype(group, rows))
        # All before the first trip: a collective waits for those started before it, and the sizes would for the rows.
        self._divisors = [self._divisors_of(exchange) for exchange in exchanges]
        self._outward = self._send(0) if exchanges else None

    def finish(self) -> None:
        homeward: tuple[Exchange, Trip] | None = None
        for number, exchange in enumerate(self._exchanges):
            assert self._outward is not None, "each exchange is sent before its turn"
            received = self._outward.arrived()
            self._outward = self._send(number + 1) if number + 1 < len(self._exchanges) else None
            updates = exchange.matrices(received, self._like, self._orthogonalise_)
            if homeward:
                self._apply(*homeward)
            homeward = exchange, exchange.to_holders(updates, self._like)
        if homeward:
            self._apply(*homeward)

    def _held(self, exchange: Exchange) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        for piece in exchange.held:
            direction_1mn, sizes_21 = self._rows[piece.parameter].directions(piece.first, piece.last, 1, self._group)
            yield piece, direction_1mn[0], sizes_21

    def _divisors_of(self, exchange: Exchange) -> Tensor:
        sizes = [sizes_21 for _, _, sizes_21 in self._held(exchange)]
        return _divisors(exchange.largest(sizes, self._rows[0].weight))

    def _send(self, number: int) -> Trip:
        exchange, divisors_KN = self._exchanges[number], self._divisors[number]
        directions = []
        for piece, direction_mn, _ in self._held(exchange):
            divided_mn = self._like.new_empty(direction_mn.shape)
            directions.append(torch.div(direction_mn, divisors_KN[piece.place, piece.block], out=divided_mn))
        return exchange.to_owners(directions, self._like)

    def _orthogonalise_(self, x_Nmk: Tensor) -> Tensor:
        return _orthogonalise_(x_Nmk, self._group)

    def _apply(self, exchange: Exchange, homeward: Trip) -> None:
        for piece, update in zip(exchange.held, homeward.arrived(), strict=True):
            weight = self._rows[piece.parameter].weight[piece.first : piece.last]
            weight.add_(update, alpha=-_rate(self._group, exchange.blocks[piece.block]))
