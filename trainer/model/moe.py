"""Mixture of experts, balanced by a bias on the choice (DeepSeek-V3, arXiv 2412.19437, §2.1.2) or by a loss.

The bias affects only the choice of experts: the weights are the unbiased scores of the chosen ones. Between steps
`update_bias` raises the bias of experts that got less than the mean load and lowers the others; a small loss on each
sequence keeps single rows from collapsing on few experts. No token is dropped. Router arithmetic is fp32.

Legend: B rows, T positions, S = B·T tokens, D hidden, E experts, F expert width,
G rows of an expert's first matrix (F, or 2·F with a gate), K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from trainer.kinds.base import first_rows
from trainer.kinds.moe import MoeSpec
from trainer.model.linear import Linear
from trainer.model.lora import summed, with_stacks
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.quantised import stack
from trainer.model.ready import Ready, normed
from trainer.model.step import State, Step
from trainer.modelspec import ModelSpec
from trainer.ops import Documents, narrow, quantised
from trainer.ops.activation import ACTIVATIONS
from trainer.ops.experts import compute_dtype, count_choices
from trainer.ops.experts_few import Run, experts_without_gradient
from trainer.ops.router import Routed, choose


class Moe(Mixer):
    bias_E: Tensor

    def __init__(self, model: ModelSpec, spec: MoeSpec, functions: Functions) -> None:
        super().__init__()
        self.spec, hidden = spec, model.hidden
        self.balances = model.lora is None  # with adapters the router is frozen
        self.run_experts: Callable[..., Tensor] = functions["experts"]
        self.route: Callable[..., Routed] = functions["router"]
        self.quantised = False  # experts in INT8 or FP8, with scales (trainer/model/quantised.py)
        self.exchange: Callable[..., Tensor] | None = None  # trainer.parallel.experts, where ranks share the experts
        self.copies: dict[str, Tensor] = {}  # of weights, in the dtype of products (trainer/ops/narrow.py)
        self.product_adds = False  # the backend adds gradients to the sums of copies
        self.router = Linear(hidden, spec.num_experts)
        self.register_buffer("bias_E", torch.empty(spec.num_experts, dtype=torch.float32))
        rows = first_rows(spec.activation, spec.expert_width)
        first_EGD = nn.Parameter(torch.empty(spec.num_experts, sum(rows), hidden))
        self.register_parameter(spec.first, first_EGD)
        self.down_EDF = nn.Parameter(torch.empty(spec.num_experts, hidden, spec.expert_width))
        if spec.shared_width:
            rows = first_rows(spec.activation, spec.shared_width)
            setattr(self, spec.shared_first, Linear(hidden, sum(rows)))
            self.shared_down = Linear(spec.shared_width, hidden)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The input itself and the router's logits, [B, T, E] fp32."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            return x_BTD, _WideLinear.apply(x_BTD, self.router.weight)

    def mix(self, x_BTD: Tensor, logits_BTE: Tensor, documents: Documents) -> Mixed:
        x_SD = x_BTD.flatten(0, 1)
        score_SE, expert_SK, weight_SK, load_E = self.routed(logits_BTE.flatten(0, 1))
        spec, run_own = self.spec, self.run_experts
        if self.product_adds and self._copy("down_EDF", x_SD) is not None:
            run_own = partial(run_own, adds=True)
        run = run_own if self.exchange is None else partial(self.exchange, run_own=run_own)

        def experts(first_EGD: Tensor, down_EDF: Tensor) -> Tensor:
            first_EGD, down_EDF = self._narrow(spec.first, first_EGD, x_SD), self._narrow("down_EDF", down_EDF, x_SD)
            return run(x_SD, first_EGD, down_EDF, expert_SK, weight_SK, spec.activation)

        if self.quantised:
            y_SD = self._run_quantised()(x_SD, expert_SK, weight_SK)
        else:
            y_SD = with_stacks(self, (spec.first, "down_EDF"), x_SD, experts, keep=self.policy == "full")
        y_BTD = self._with_shared(y_SD.view_as(x_BTD), x_BTD)
        if not self.balances:
            return Mixed(y_BTD, load_E=load_E)
        scores_BTE = score_SE.view_as(logits_BTE)
        aux_loss = self.sequence_loss(scores_BTE)
        if spec.balance_loss_weight:
            aux_loss = aux_loss + self.balance_loss(scores_BTE, load_E)
        return Mixed(y_BTD, aux_loss, load_E)

    def _copy(self, name: str, x_SD: Tensor) -> Tensor | None:
        """The copy of a weight for products on x, if there is one."""
        copy = self.copies.get(name)
        return copy if copy is not None and copy.dtype == compute_dtype(x_SD) else None

    def _narrow(self, name: str, weight: Tensor, x_SD: Tensor) -> Tensor:
        copy = self._copy(name, x_SD)
        return weight if copy is None else narrow.in_place_of(weight, copy)

    def _run_quantised(self) -> Run:
        return quantised.experts(stack(self, self.spec.first), stack(self, "down_EDF"), self.spec.activation)

    def _with_shared(self, y_BTD: Tensor, x_BTD: Tensor) -> Tensor:
        """Adds the expert that every token goes through, if there is one."""
        spec = self.spec
        if not spec.shared_width:
            return y_BTD
        hidden_BTF = ACTIVATIONS[spec.activation].value(getattr(self, spec.shared_first)(x_BTD))
        return y_BTD + self.shared_down(hidden_BTF)

    def ready(self, norm: nn.Module) -> Ready:
        spec, norm_D, router_ED = self.spec, normed(norm), self.router.weight.float()
        first_EGD, down_EDF = summed(self, spec.first), summed(self, "down_EDF")
        run: Run | None = None
        if self.quantised:
            run = self._run_quantised()
        elif not first_EGD.is_cuda:
            run = experts_without_gradient(first_EGD, down_EDF, spec.activation)

        def extend(x_BTD: Tensor, step: Step, state: State) -> Tensor:
            x_BTD = norm_D(x_BTD)
            x_SD = x_BTD.flatten(0, 1)
            narrowed = torch.is_autocast_enabled(x_BTD.device.type)
            with torch.autocast(x_BTD.device.type, enabled=False) if narrowed else nullcontext():
                logits_SE = F.linear(x_SD.float(), router_ED)
                scores_SE = logits_SE.softmax(-1) if spec.scores == "softmax" else logits_SE.sigmoid_()
            expert_SK, weight_SK = choose(
                scores_SE, self.bias_E, spec.top_k, spec.score_scale, renormalise=spec.renormalise
            )
            if run is not None:
                y_SD = run(x_SD, expert_SK, weight_SK)
            else:
                y_SD = self.run_experts(x_SD, first_EGD, down_EDF, expert_SK, weight_SK, spec.activation)
            return self._with_shared(y_SD.view_as(x_BTD), x_BTD)

        return extend

    def reset_buffers(self, token_classes: list[int] | None) -> None:
        self.bias_E.zero_()

    def routed(self, logits_SE: Tensor) -> Routed:
        """The choice for each token; fp32 under autocast, too."""
        spec = self.spec
        with torch.autocast(logits_SE.device.type, enabled=False):
            return self.route(
                logits_SE,
                self.bias_E,
                spec.top_k,
                spec.score_scale,
                softmax=spec.scores == "softmax",
                renormalise=spec.renormalise,
            )

    def sequence_loss(self, scores_BTE: Tensor) -> Tensor:
        """Σ over rows of weight · Σ_e f_e P_e (DeepSeek-V3 eq. 17-20); f counts what unbiased scores would choose."""
        if not self.spec.sequence_loss_weight:
            return scores_BTE.new_zeros(())
        batch, length, num_experts = scores_BTE.shape
        wanted_BTK = scores_BTE.detach().topk(self.spec.top_k, dim=-1, sorted=False).indices
        offset_B1 = torch.arange(batch, device=scores_BTE.device)[:, None] * num_experts
        count_BE = count_choices((wanted_BTK.flatten(1) + offset_B1).flatten(), batch * num_experts).view(batch, -1)
        f_BE = count_BE * (num_experts / (self.spec.top_k * length))
        P_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
        return self.spec.sequence_loss_weight * (f_BE * P_BE).sum()

    def balance_loss(self, scores_BTE: Tensor, load_E: Tensor) -> Tensor:
        """B times weight · E / K · Σ_e f_e P_e, f_e the share of the micro-batch's tokens that chose expert e.

        Times B, as the losses of rows are summed and divided by the rows of the whole step: a mean over micro-batches.
        """
        num_tokens = scores_BTE[..., 0].numel()
        share_E = load_E * (self.spec.num_experts / (self.spec.top_k * num_tokens))
        P_E = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean((0, 1))
        return scores_BTE.shape[0] * self.spec.balance_loss_weight * (share_E * P_E).sum()

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """b += u·sign(mean load - load), less the mean of that change, so that the biases keep their level."""
        load_E = load_E.to(torch.float32)
        delta_E = self.spec.bias_update_rate * torch.sign(load_E.mean() - load_E)
        self.bias_E += (delta_E - delta_E.mean()).to(self.bias_E.device)


class _WideLinear(torch.autograd.Function):
    """x · wᵀ in fp32, of which x is kept in the dtype that it came in."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BTD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTD, w_ED)
        return x_BTD.float() @ w_ED.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BTE: Tensor) -> tuple[Tensor, Tensor | None]:
        x_BTD, w_ED = ctx.saved_tensors
        grad_x_BTD = (grad_BTE @ w_ED.float()).to(x_BTD.dtype)
        if not ctx.needs_input_grad[1]:
            return grad_x_BTD, None
        grad_w_ED = grad_BTE.flatten(0, 1).T @ x_BTD.float().flatten(0, 1)
        return grad_x_BTD, grad_w_ED.to(w_ED.dtype)
