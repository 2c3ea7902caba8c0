"""Mixture of experts (`E`): what is known of it without torch. `trainer.model.moe` computes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainer.kinds.base import (
    FP32_BYTES,
    INDEX_BYTES,
    NORMAL,
    RESIDUAL,
    Activation,
    Count,
    Init,
    Kind,
    ModelShape,
    Parameter,
    Part,
    Rows,
    Stage,
    Widths,
    first_rows,
    halves,
    matrix,
    product,
    two_products,
)


class MoeSpec(Kind):
    """Routed experts.

    `scores` of all experts are sigmoids of the router's logits, or their softmax. The `top_k` of the highest score are
    chosen; with `renormalise` their weights sum to `score_scale` (for softmax scores that is the softmax of the chosen
    ones' logits alone), without it they are the scores times `score_scale`. Three ways to balance: a bias on the choice
    (DeepSeek-V3), a loss on each sequence (the same), and a loss on the whole micro-batch (Switch Transformer,
    arXiv 2101.03961, divided by `top_k` as in Megatron-LM), `balance_loss_weight` · E / top_k · Σ f_e P_e.
    """

    symbol: ClassVar[str] = "E"
    label: ClassVar[str] = "experts"
    mixer: ClassVar[str] = "trainer.model.moe:Moe"
    recomputed: ClassVar[str] = "norm"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"bias_update_rate", "sequence_loss_weight", "balance_loss_weight"}
    )

    num_experts: Count
    top_k: Count
    expert_width: Count
    shared_width: Annotated[int, Field(ge=0)] = 0
    score_scale: Annotated[float, Field(gt=0)] = 2.5
    bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    sequence_loss_weight: Annotated[float, Field(ge=0)] = 1e-4
    balance_loss_weight: Annotated[float, Field(ge=0)] = 0.0
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalise: bool = True
    activation: Activation = "relu2"

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        if self.top_k == 1 and self.num_experts > 1 and self.renormalise:
            raise ValueError(
                "top_k 1 gives the router no gradient (one renormalised weight is always 1); raise it, or write "
                "renormalise: false"
            )
        return self

    def widths(self) -> str:
        shared = f", shared {self.shared_width}" if self.shared_width else ""
        gated = ", SwiGLU" if self.activation == "swiglu" else ""
        return f"{self.num_experts} × {self.expert_width}{gated}, top {self.top_k}{shared}"

    @property
    def first(self) -> str:
        """Name of the experts' first matrices; with a gate, those and the others below them."""
        return "gate_up_EGD" if self.activation == "swiglu" else "up_EFD"

    @property
    def shared_first(self) -> str:
        return "shared_gate_up" if self.activation == "swiglu" else "shared_up"

    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        hidden, rows = model.hidden, first_rows(self.activation, self.expert_width)
        yield self._experts(self.first, sum(rows), hidden, NORMAL, rows)
        yield self._experts("down_EDF", hidden, self.expert_width, RESIDUAL)
        exact = "routing is FP32: a small error changes the choice"
        yield matrix("router.weight", self.num_experts, hidden, high_precision=exact, whole=True)
        if self.shared_width:
            rows = first_rows(self.activation, self.shared_width)
            yield matrix(f"{self.shared_first}.weight", sum(rows), hidden, blocks=rows)
            yield matrix("shared_down.weight", hidden, self.shared_width, RESIDUAL)

    def _experts(self, name: str, rows: int, columns: int, init: Init, blocks: Rows = ()) -> Parameter:
        shape, active = (self.num_experts, rows, columns), self.top_k * rows * columns
        return Parameter(name, shape, active, init, blocks=blocks if len(blocks) > 1 else (), per_expert=True)

    def parts(self) -> Iterator[Part]:
        for e in range(self.num_experts):
            at = f"experts.{e}."
            if self.activation == "swiglu":
                names = (f"{at}gate_proj.weight", f"{at}up_proj.weight")
                yield from halves(*names, self.first, self.expert_width, expert=e)
            else:
                yield Part(f"{at}up_proj.weight", self.first, expert=e)
            yield Part(f"{at}down_proj.weight", "down_EDF", expert=e)
        yield Part("gate.weight", "router.weight")
        yield Part("gate.e_score_correction_bias", "bias_E")
        if self.shared_width:
            at, first = "shared_experts.", f"{self.shared_first}.weight"
            if self.activation == "swiglu":
                yield from halves(f"{at}gate_proj.weight", f"{at}up_proj.weight", first, self.shared_width)
            else:
                yield Part(f"{at}up_proj.weight", first)
            yield Part(f"{at}down_proj.weight", "shared_down.weight")

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        hidden, copies = model.hidden, self.top_k
        # Scores are written and read again in the backward pass; so are the chosen ones and their weights.
        router = product("router", ("router.weight",), hidden, 0)
        yield router._replace(wide=2 * self.num_experts + 4 * copies)
        before = sum(first_rows(self.activation, self.expert_width))
        weights = (self.first, "down_EDF")
        yield two_products("experts", weights, hidden, copies * before, copies * self.expert_width)
        if self.shared_width:
            before = sum(first_rows(self.activation, self.shared_width))
            weights = (f"{self.shared_first}.weight", "shared_down.weight")
            yield two_products("shared expert", weights, hidden, before, self.shared_width)

    def copied(self, hidden: int) -> int:
        """Numbers that the experts move for each token if their tokens are copied, activated, weighted and summed by
        kernels of their own (trainer/ops/experts_grouped.py), instead of within the products.

        Forward a copy of the token is written, read, its result written and read; backward gradient and token are
        copied again, the gradient read by two products, the token by one, its gradient written and read.
        """
        before = sum(first_rows(self.activation, self.expert_width))
        return 5 * hidden + self.top_k * (11 * hidden + 7 * before + 6 * self.expert_width)

    def kept(self, hidden: int, widths: Widths) -> int:
        """Scores, choices and weights, two orders of the copies, and their hidden layer before its activation."""
        before, shared_before = (sum(first_rows(self.activation, w)) for w in (self.expert_width, self.shared_width))
        by_copy = 3 * INDEX_BYTES + 2 * FP32_BYTES + before * widths.product
        if widths.keeps_copies:
            by_copy += (hidden + 2 * self.expert_width) * widths.product
        shared = (shared_before + self.shared_width) * widths.product
        return self.num_experts * FP32_BYTES + self.top_k * by_copy + 2 * FP32_BYTES + shared

    def kept_selective(self, hidden: int, widths: Widths) -> int:
        return hidden * widths.product + self.kept(hidden, widths)
