"""Scaling laws: the loss to expect of N parameters trained on D tokens, and the best N and D of a budget.

    L(N, D) = E + A/N^alpha + B/D^beta,  C = 6ND        (Hoffmann et al. 2022, arXiv 2203.15556)

in nats per token of each law's own tokenizer. Constants are published fits, not ours: none was made on this model, mix
or tokenizer. Their spread is the only honest uncertainty: within one fit A and alpha, and B and beta, depend so
strongly on each other that errors of single constants say nothing. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from trainer.errors import SpecError

FLOPS_PER_PARAMETER = 6  # and token: 2 forward, 4 backward
INFERENCE_FLOPS = 2  # per parameter and token
FITTED_PARAMETERS = (70e6, 16e9)  # of the runs that the corrected law is fitted on, and their tokens: Hoffmann et al.
FITTED_TOKENS = (5e9, 500e9)
FLOOR_ERROR = 0.03  # standard error of E, Besiroglu et al.
CHANCE = math.log(32_000)  # nats of a guess among the tokens of Hoffmann et al.'s vocabulary
REPETITION_DECAY = 15.387756  # R*_D of Muennighoff et al. 2023 (arXiv 2305.16264), appendix A


class Law(NamedTuple):
    """One published fit; `source` names the paper."""

    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """The parameters and tokens with the least loss for 6ND = `flops`."""
        alpha, beta, product = self.alpha, self.beta, flops / FLOPS_PER_PARAMETER
        g = (alpha * self.A / (beta * self.B)) ** (1 / (alpha + beta))
        params = g * product ** (beta / (alpha + beta))
        return params, product / params

    def balanced_tokens(self, params: float) -> float:
        """The tokens for which `params` are the best size: those of the optimum that has as many parameters."""
        return (self.beta * self.B * params**self.alpha / (self.alpha * self.A)) ** (1 / self.beta)

    def balanced_params(self, tokens: float) -> float:
        """The parameters for which `tokens` are best."""
        return (self.alpha * self.A * tokens**self.beta / (self.beta * self.B)) ** (1 / self.alpha)

    def tokens_for(self, params: float, loss: float) -> float:
        """The tokens with which `params` parameters reach `loss`; infinite if they never do."""
        left = loss - self.E - self.A / params**self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else math.inf


# Hoffmann et al.'s third approach as Besiroglu et al. (2024) have corrected it: with it about 20 tokens for each
# parameter are best at Chinchilla's budget, as in the paper's two other approaches.
CORRECTED = Law(
    "Hoffmann et al. as corrected by Besiroglu et al., arXiv 2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658
)
LAWS = (
    CORRECTED,
    # As first published, with the exponents of the TeX source, which the text rounds.
    Law("Hoffmann et al., arXiv 2203.15556", 1.6934, 406.4, 410.7, 0.3392, 0.2849),
    # Appendix A; fitted on C4.
    Law(
        "Muennighoff et al., arXiv 2305.16264",
        E=math.exp(0.6254804),
        A=math.exp(6.255414),
        B=math.exp(7.3049974),
        alpha=0.3526596,
        beta=0.3526596,
    ),
)


class Range(NamedTuple):
    """A value and what else is as likely."""

    low: float
    value: float
    high: float


def expected_loss(params: Iterable[float], tokens: float) -> Range:
    """The corrected law's loss; the range is that of all laws, and at least two standard errors of E around the
    corrected one, since three fits may agree by chance.

    Args:
        params: of a dense model its parameters. A mixture of experts lies between dense models of its active and of all
            its parameters: give both, and the value is that of their geometric mean, a rule of thumb.
    """
    sizes = list(params)
    middle = math.prod(sizes) ** (1 / len(sizes))
    found = [law.loss(size, tokens) for law in LAWS for size in sizes]
    found += [CORRECTED.loss(size, tokens) + sign * 2 * FLOOR_ERROR for size in sizes for sign in (-1, 1)]
    return Range(min(found), CORRECTED.loss(middle, tokens), max(found))


def is_extrapolated(params: Iterable[float], tokens: float) -> bool:
    """Whether a size or the tokens lie outside of what the corrected law is fitted on."""
    low, high = FITTED_PARAMETERS
    return not all(low <= size <= high for size in params) or not FITTED_TOKENS[0] <= tokens <= FITTED_TOKENS[1]


def effective_tokens(unique: float, tokens: float) -> float:
    """What `tokens` tokens of `unique` different ones are worth in fresh tokens: U + U·R*·(1 − exp(−R/R*)), where
    R = D/U − 1 is the number of repetitions (Muennighoff et al., equation 5). Up to four epochs lose little."""
    if tokens <= unique:
        return tokens
    repetitions = tokens / unique - 1
    return unique * (1 + REPETITION_DECAY * (1 - math.exp(-repetitions / REPETITION_DECAY)))


def inference_optimum(params: float, tokens: float, served: float, law: Law = CORRECTED) -> tuple[float, float]:
    """The parameters and tokens that reach the loss of (`params`, `tokens`) with the fewest operations of training and
    of serving `served` tokens, 6ND + 2N·D_served (Sardana et al. 2024, arXiv 2401.00448)."""
    target = law.loss(params, tokens)
    smallest = (law.A / (target - law.E)) ** (1 / law.alpha)  # with endless data

    def cost(log_params: float) -> float:
        size = math.exp(log_params)
        return size * (FLOPS_PER_PARAMETER * law.tokens_for(size, target) + INFERENCE_FLOPS * served)

    low, high = math.log(smallest) + 1e-9, math.log(1e4 * params)
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(200):  # one minimum: both terms are convex in log N
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    best = math.exp((low + high) / 2)
    return best, law.tokens_for(best, target)


def number(text: str, what: str) -> float:
    """15B, 4.2e9, 1T or 300 as a number.

    Raises:
        SpecError: it is none, or not positive.
    """
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    plain = text.strip().upper().replace(",", "").replace("_", "")
    try:
        value = float(plain[:-1]) * units[plain[-1]] if plain[-1:] in units else float(plain)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise SpecError(f"{what} {text}: not a positive number; write it like 15B, 1.5T or 3e9")
    return value
