"""How the next token is chosen: greedy, or drawn after the usual filters.

In the order of transformers: repetition penalty (Keskar et al., arXiv 1909.05858), temperature, top-k, top-p (Holtzman
et al., arXiv 1904.09751), min-p (Nguyen et al., arXiv 2407.01082). Each text has its own generator, so what is drawn
does not depend on the texts beside it.

Legend: B texts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import CheckpointError, SpecError

COLD = 1e-5  # temperatures below would make numbers that FP32 does not have
SEEDS = range(-(2**63), 2**64)  # those of torch


@dataclass(frozen=True)
class Sampling:
    """
    Attributes:
        max_tokens: new tokens at most.
        temperature: divides the logits; 0, or less than COLD, always takes the likeliest token.
        top_k: draw from the k likeliest; 0 from all.
        top_p: draw from the likeliest that together have at least this probability.
        min_p: draw from those with at least this share of the likeliest one's probability.
        repetition_penalty: divides positive logits of tokens that have occurred and multiplies negative ones; 1: none.
        seed: of this text's draws.
        stop: strings at which a text ends; they are not part of it.
        stop_ids: tokens at which it ends.
        logprobs: alternatives whose log-probabilities are reported beside each token's own; None: not even that.

    Raises:
        SpecError: a value out of range.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1: none)"),
            ("seed", self.seed in SEEDS, "a whole number of at most 64 bits"),
            ("stop", all(self.stop), "without empty strings"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0"),
        ):
            if not fine:
                raise SpecError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLD


def penalised(logits_V: Tensor, ids: Sequence[int], penalty: float) -> Tensor:
    """The logits with the repetition penalty for the tokens in `ids`."""
    index = torch.tensor(ids, device=logits_V.device)
    found = logits_V[index]
    return logits_V.index_put((index,), torch.where(found < 0, found * penalty, found / penalty))


def probabilities(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """FP32 [B, V], from which the next token is drawn. All samplings have a temperature above 0."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=logits_BV.device)[:, None]

    logits_BV = logits_BV / column([s.temperature for s in samplings])
    vocabulary = logits_BV.shape[1]
    if any(0 < s.top_k < vocabulary for s in samplings):
        wanted = [min(s.top_k or vocabulary, vocabulary) for s in samplings]
        most = max(k for k in wanted if k < vocabulary)
        top_BK = logits_BV.topk(most).values
        place_B1 = torch.tensor([min(k, most) - 1 for k in wanted], device=logits_BV.device)[:, None]
        limited_B1 = column([float(k < vocabulary) for k in wanted]).bool()
        logits_BV = logits_BV.masked_fill((logits_BV < top_BK.gather(1, place_B1)) & limited_B1, -math.inf)
    p_BV = logits_BV.softmax(-1)
    if any(s.top_p < 1 for s in samplings):
        sorted_BV, index_BV = p_BV.sort(dim=-1, descending=True)
        beyond_BV = sorted_BV.cumsum(-1) - sorted_BV >= column([s.top_p if s.top_p < 1 else 2.0 for s in samplings])
        p_BV = p_BV.masked_fill(torch.zeros_like(beyond_BV).scatter(1, index_BV, beyond_BV), 0)
    if any(s.min_p for s in samplings):
        floor_B1 = p_BV.amax(-1, keepdim=True) * column([s.min_p for s in samplings])
        p_BV = p_BV.masked_fill(p_BV < floor_B1, 0)
    return p_BV / p_BV.sum(-1, keepdim=True)


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    ids: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator],
) -> list[int]:
    """The next token of each text.

    Args:
        logits_BV: FP32.
        ids: of each text so far, with its prompt.
        generators: on the CPU.

    Raises:
        CheckpointError: the model computes NaN.
    """
    for b, sampling in enumerate(samplings):
        if sampling.repetition_penalty != 1:
            logits_BV[b] = penalised(logits_BV[b], ids[b], sampling.repetition_penalty)
    best_B = logits_BV.max(-1)
    if best_B.values.isnan().any():
        raise CheckpointError("the model's logits are NaN: its weights are damaged; export an earlier checkpoint")
    tokens: list[int] = best_B.indices.tolist()
    if drawn := [b for b, sampling in enumerate(samplings) if not sampling.greedy]:
        p_BV = probabilities(logits_BV[drawn], [samplings[b] for b in drawn]).cpu()
        for b, p_V in zip(drawn, p_BV, strict=True):
            tokens[b] = int(torch.multinomial(p_V, 1, generator=generators[b]))
    return tokens
