"""Mamba-2 mixer (Dao & Gu 2024): projection → causal convolution over x, B, C → SSD scan → gated norm → projection.

The time-step projection is a separate matrix: it has few rows and is too narrow and too sensitive for FP8. Without it,
z, x, B and C form one matrix whose row count is a multiple of 128 at the widths of the large presets.

Legend: B rows, T positions, S positions with those that the convolution remembers, D hidden, I d_inner = H·P, H heads,
P head width, G groups, N d_state, C conv channels = I + 2·G·N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.kinds.mamba2 import MambaSpec
from trainer.model.linear import Linear
from trainer.model.mixer import Functions, Mixed, Mixer
from trainer.model.norm import GatedRMSNorm
from trainer.model.ready import Ready, linear, normed, plain, rms
from trainer.model.step import State, Step, convolved
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.ssd_state import ssd_extend


class CausalConv(nn.Module):
    """Weights of a depthwise causal convolution; the operation itself is chosen by `trainer.ops`."""

    def __init__(self, channels: int, kernel: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None


class Mamba2(Mixer):
    def __init__(self, model: ModelSpec, spec: MambaSpec, functions: Functions) -> None:
        super().__init__()
        self.spec, hidden = spec, model.hidden
        self.scan, self.convolve = functions["ssd"], functions["conv"]
        self.zxbc_proj = Linear(hidden, spec.d_inner + spec.conv_dim)
        self.dt_proj = Linear(hidden, spec.num_heads)
        self.conv = CausalConv(spec.conv_dim, spec.conv_kernel, bias=True)
        self.A_log = nn.Parameter(torch.empty(spec.num_heads))
        self.D = nn.Parameter(torch.empty(spec.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.num_heads))
        self.norm = GatedRMSNorm(spec.d_inner, spec.num_groups, model.norm_eps)
        self.out_proj = Linear(spec.d_inner, hidden)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.zxbc_proj(x_BTD), self.dt_proj(x_BTD)

    def mix(self, zxBC: Tensor, dt_BTH: Tensor, documents: Documents) -> Mixed:
        return Mixed(self.region("selective", lambda zxBC, dt_BTH: self._scan(zxBC, dt_BTH, documents), zxBC, dt_BTH))

    def _scan(self, zxBC: Tensor, dt_BTH: Tensor, documents: Documents) -> Tensor:
        spec = self.spec
        z_BTI, xBC_BTC = zxBC.split([spec.d_inner, spec.conv_dim], dim=-1)
        with torch.autocast(zxBC.device.type, enabled=False):
            # Time steps, decays and states are fp32 whatever the precision of the matrix products.
            dt_BTH = F.softplus(dt_BTH.float() + self.dt_bias.float())
            xBC_BTC = F.silu(self.convolve(xBC_BTC, self.conv.weight, self.conv.bias, documents))
            inner_BTI, B_BTS, C_BTS = xBC_BTC.split([spec.d_inner, spec.state_width, spec.state_width], dim=-1)
            y_BTHP = self.scan(
                inner_BTI.unflatten(-1, (spec.num_heads, spec.head_dim)),
                dt_BTH,
                -torch.exp(self.A_log.float()),
                B_BTS.unflatten(-1, (spec.num_groups, spec.d_state)),
                C_BTS.unflatten(-1, (spec.num_groups, spec.d_state)),
                self.D.float(),
                documents,
                spec.chunk_size,
            )
            y_BTI = self.norm(y_BTHP.flatten(2), z_BTI)
        return self.out_proj(y_BTI)

    def ready(self, norm: nn.Module) -> Ready:
        spec, norm_D = self.spec, normed(norm)
        project, project_dt, out = (linear(m) for m in (self.zxbc_proj, self.dt_proj, self.out_proj))
        first, second = [spec.d_inner, spec.conv_dim], [spec.d_inner, spec.state_width, spec.state_width]
        inner, group = (spec.num_heads, spec.head_dim), (spec.num_groups, spec.d_state)
        w_KC, bias_C, dt_bias_H = self.conv.weight.T.contiguous(), self.conv.bias, self.dt_bias.float()
        A_H, D_H1 = -torch.exp(self.A_log.float()), self.D.float()[:, None]
        fast = plain(self.norm.weight) and spec.num_groups == 1
        rms_I = rms(self.norm.weight, self.norm.eps) if fast else None

        def scanned(zxBC: Tensor, dt_BTH: Tensor, step: Step, state: State) -> Tensor:
            z_BTI, xBC_BTC = zxBC.split(first, dim=-1)
            dt_BTH = F.softplus(dt_BTH.float() + dt_bias_H)
            xBC_BTC = F.silu(convolved(step.joined(state["conv"], xBC_BTC), w_KC, bias_C, step.new))
            x_BTI, B_BTS, C_BTS = xBC_BTC.split(second, dim=-1)
            B_BTGN, C_BTGN = B_BTS.unflatten(-1, group), C_BTS.unflatten(-1, group)
            x_BTHP = x_BTI.unflatten(-1, inner)
            y_BTHP = ssd_extend(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H1, state["state"], step.kept_BT)
            y_BTI = y_BTHP.flatten(2)
            return self.norm.without_gradient(y_BTI, z_BTI) if rms_I is None else rms_I(F.silu(z_BTI).mul_(y_BTI))

        def extend(x_BTD: Tensor, step: Step, state: State) -> Tensor:
            x_BTD = norm_D(x_BTD)
            zxBC, dt_BTH = project(x_BTD), project_dt(x_BTD)
            if not torch.is_autocast_enabled(x_BTD.device.type):
                return out(scanned(zxBC, dt_BTH, step, state))
            with torch.autocast(x_BTD.device.type, enabled=False):
                y_BTI = scanned(zxBC, dt_BTH, step, state)
            return out(y_BTI)

        return extend
